"""JSON files, whole or entry by entry, and values of one entry, checked: a text, a number, a box, a picture's file.

Each raises a `ValueError` that says what was expected and what came; of a value, the reader adds entry and file.
"""

import json
import math
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np
from tqdm.auto import tqdm

from mmflow_utils.data.sample import Box

NO_BAR_BELOW = 2**25  # bytes; a smaller file is read within seconds
DEEPEST = 100  # lists and objects within one another; GQA's files have five
# What `make data DATA=…` fetches, by a name in its path below data/; of several the first.
FETCHED = {"region_descriptions": "captions", "val2014": "okvqa", "val2017": "aokvqa"}
FETCHED |= {name: name for name in ("gqa", "okvqa", "aokvqa")}

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# Escapes that are whole, a backslash or a character of two halves, or else half a character.
_HALVES = re.compile(rb"\\(?:\\|u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..))")
_STEPS, _OTHERS = bytes.maketrans(b"[{]}", b"\1\1\xff\xff"), bytes({*range(256)} - {*b"[{]}"})


@contextmanager
def _json_errors(path: Path | str, what: str) -> Iterator[None]:
    """Explain a file that can't be read, or isn't whole JSON, what to do; `what` names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"can't read the {what} {path} ({error.strerror}): {fetching(path)}put it there, or change the parameters"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} isn't whole JSON ({error}): download the {what} again and unpack it") from error


def read_json(path: Path | str, what: str) -> Any:
    """Read a whole JSON file; `what` names it in the error, as in "GQA question file"."""
    with _json_errors(path, what):
        return json.loads(Path(path).read_bytes())


def read_entries(path: Path | str, what: str) -> Iterator[tuple[str, Any]]:
    """Yield key and value of a JSON object in the file's order, so that memory doesn't grow with the file.

    `what` names the file in errors and in the bar that is shown from 32 MB on, as in "GQA question file". A key that
    is duplicated comes twice. A file that is missing, damaged (the last entry that could be read is named) or no object
    is a ValueError.
    """
    entries = _stream(path, what, ijson.kvitems, "")
    first = next(entries, None)
    if first is None:
        found = read_json(path, what)
        kind = "nothing in it" if found == {} else f"a {type(found).__name__}"
        raise ValueError(f"{path} has {kind} at the top: expected a {what}, entries keyed by id")
    yield first
    yield from entries


def read_list(path: Path | str, what: str) -> Iterator[Any]:
    """Read a JSON list entry by entry, as `read_entries` does an object; anything else has no entries."""
    return _stream(path, what, ijson.items, "item")


def _stream(path: Path | str, what: str, read: Callable, prefix: str) -> Iterator[Any]:
    n, entry = 0, None
    with _json_errors(path, what), open(path, "rb") as file:
        size = _check_readable(file)
        with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=size < NO_BAR_BELOW) as bar:
            try:
                for entry in read(file, prefix, use_float=True):
                    yield entry
                    n += 1
                    bar.update(file.tell() - bar.n)
            except (ijson.JSONError, UnicodeDecodeError) as error:
                said = re.split(r"\n|\\n", str(error))[0].removeprefix("b'")  # more lines show the place
                last = f", {entry[0]!r:.40}" if isinstance(entry, tuple) else ""
                raise ValueError(f"{said} after entry {n}{last}") from error


def _check_readable(file: BinaryIO) -> int:
    """Return the size in bytes; refuse what ijson takes wrongly: half a character, nesting that takes all memory."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if half := next((found for found in _HALVES.finditer(content) if found[1]), None):
            raise ValueError(f"half a character at byte {half.start():,}")
        depth = 0
        for start in range(0, len(content), 2**16):
            steps = content[start : start + 2**16].translate(_STEPS, _OTHERS)
            depths = depth + np.frombuffer(steps, np.int8).cumsum(dtype=int)
            depth = depths[-1] if steps else depth
            if (depths > DEEPEST).any():
                raise ValueError(f"lists and objects nested more than {DEEPEST} deep from byte {start:,} on")
        return len(content)


def text(entry: dict[str, Any], key: str) -> str:
    """Return an entry's text, without white space about it.

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
    """Return a finite number, from a number or from its text.

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
        raise ValueError(f"no images folder {images}: {fetching(images)}unpack them there or set the parameter images")
    return Path(images)


def fetching(path: Path | str) -> str:
    """Begin a remedy with the command that fetches what belongs in data/; with nothing for files elsewhere."""
    parts = Path(path).with_suffix("").parts
    names = [name for part, name in FETCHED.items() if part in parts and "data" in parts]
    return f"make data DATA={names[0]}, or " if names else ""


def picture_file(folder: Path, image_id: str) -> Path:
    """Name an image's file: the one that is there, or else GQA's `<image id>.jpg`."""
    if not _SAFE_ID.fullmatch(image_id):
        raise ValueError(f"image id {image_id!r:.80} is no plain name and might lead out of the images folder")
    files = [folder / f"{image_id}{ending}" for ending in (".jpg", ".jpeg", ".png")]
    return next((file for file in files if file.exists()), files[0])
