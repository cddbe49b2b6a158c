"""A file's JSON, and values of one entry, checked: a text, a number, a box cut to its picture, its file.

Each raises a `ValueError` that says what was expected and what came; the reader adds the entry and the file.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmflow_utils.data.sample import Box

__all__ = ["clipped_box", "json_errors", "number", "picture_file", "pictures_folder", "read_json", "text"]

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@contextmanager
def json_errors(path: Path | str, what: str) -> Iterator[None]:
    """Say of a file that can't be read, or isn't whole JSON, what to do; `what` names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"can't read the {what} {path} ({error.strerror}): check the path in the parameters"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} isn't whole JSON ({error}): download the {what} again and unpack it") from error


def read_json(path: Path | str, what: str) -> Any:
    """Read a whole JSON file; `what` names it in the error, as in "GQA question file"."""
    with json_errors(path, what):
        return json.loads(Path(path).read_bytes())


def text(entry: dict[str, Any], key: str) -> str:
    """Give an entry's text, without white space about it.

    >>> text({"answer": " cup "}, "answer")
    'cup'
    """
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} should be a text, got {value!r:.80}")
    if not value.isprintable() and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{key} holds half a character: {value!r:.80}")  # no tokenizer and no file takes it
    return value.strip()


def number(value: Any) -> float:
    """Give a finite number, from a number or from its text.

    >>> number("12")
    12.0
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"expected a number of pixels, got {value!r:.80}")
    return found


def clipped_box(sides: Any, width: int, height: int) -> Box:
    """Read a box from its x, y, w and h, and cut it to the picture.

    >>> clipped_box({"x": -10, "y": 0, "w": 30, "h": 9}, width=100, height=50)
    Box(x=0.0, y=0.0, w=20.0, h=9.0)
    """
    if not isinstance(sides, dict):
        raise ValueError(f"expected a box with x, y, w and h, got {sides!r:.80}")
    x, y, w, h = (number(sides.get(side)) for side in "xywh")
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if left >= right or top >= bottom:
        raise ValueError(f"{w:g} x {h:g} pixels at ({x:g}, {y:g}) leave nothing in {width} x {height}")
    return Box(x=left, y=top, w=right - left, h=bottom - top)


def pictures_folder(images: Path | str) -> Path:
    """Check that the folder of pictures is there."""
    if not Path(images).is_dir():
        raise ValueError(f"no images folder {images}: unpack the pictures there or change the parameter images")
    return Path(images)


def picture_file(folder: Path, image_id: str) -> Path:
    """Name an image's file: the one that is there, or else GQA's `<image id>.jpg`.

    Raises:
        ValueError: An id that is no plain name, and so might lead out of the folder.
    """
    if not _SAFE_ID.fullmatch(image_id):
        raise ValueError(f"image id {image_id!r:.80} is no plain name and might lead out of the images folder")
    files = [folder / f"{image_id}{ending}" for ending in (".jpg", ".jpeg", ".png")]
    return next((file for file in files if file.exists()), files[0])
