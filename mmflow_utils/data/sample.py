"""The records: a sample, its objects and their boxes; its picture; and their way into a frame and back."""

import json
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import TypeAdapter


@dataclass(frozen=True, kw_only=True)
class Box:
    """A rectangle in pixels of the stored picture: its left upper corner, its width and height."""

    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """An object that a question is about.

    Attributes:
        name: Its name in the question's operations; "_" where the question asks for it without naming it.
        object_id: Its id in the scene graph; None where the picture doesn't have it (GQA writes "-").
        box: Where it is; None where that isn't known.
        words: Half-open range of the question's words (split at spaces) that stand for it, where GQA says so.
    """

    name: str
    object_id: str | None = None
    box: Box | None = None
    words: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one picture.

    Attributes:
        answer: The label, in lower case.
        task: One of `TASKS`, "OKVQA" or "A-OKVQA" (App. H), or None for the kinds of question that the paper
            leaves out.
        structural, semantic, detailed: GQA's types of the question.
        option_true, option_false: The options, where it offers two; the true one is the answer.
        image_size: Width and height in pixels that the boxes refer to; `load_image` holds the picture to it.
        answers: What several people answered, where the label is not one word (App. H): see `vqa_accuracy`.
        other_image: A second picture, whose values the intervention `resample` takes (`with_other_pictures`).
    """

    sample_id: str
    image_id: str
    image: Path
    question: str
    answer: str
    task: str | None
    structural: str
    semantic: str
    detailed: str
    option_true: str | None = None
    option_false: str | None = None
    objects: tuple[SceneObject, ...] = ()
    full_answer: str | None = None
    caption: str | None = None
    image_size: tuple[int, int] | None = None
    answers: tuple[str, ...] = ()
    other_image: Path | None = None


_NESTED = ("objects", "image_size", "answers")  # JSON in a frame's columns
_RECORD = TypeAdapter(Sample)
_COLUMNS = [field.name for field in fields(Sample) if field.name != "other_image"]  # which no file of samples tells


def picture_by_picture(samples: Sequence[Sample]) -> list[int]:
    """Return the order, by index, in which questions about one picture follow each other, the first seen first."""
    pictures, _ = pd.Series([sample.image_id for sample in samples], dtype=object).factorize()
    return pictures.argsort(kind="stable").tolist()


def load_image(sample: Sample) -> Image.Image:
    """Return a sample's picture as RGB with 8 bits: the pixels as they are stored.

    An EXIF rotation is not applied, since boxes refer to the stored pixels, and LLaVA's own code doesn't
    either. 16 bits are scaled to 8, a transparent picture is laid on white, an animated one shows its first
    frame.

    Raises:
        ValueError: The picture is missing or broken, too large to be safe (`PIL.Image.MAX_IMAGE_PIXELS`), of
            pixels without a known range, or of another size than its boxes refer to.
    """
    name = f"sample {sample.sample_id}: picture {sample.image}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(sample.image) as stored:
                picture = _as_rgb(stored)
    except FileNotFoundError as error:
        said = f"sample {sample.sample_id}: no picture {sample.image}; unpack the pictures there, or set images"
        raise ValueError(said) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} unpacks to more than {Image.MAX_IMAGE_PIXELS:,} pixels, which is no photograph but may"
            " be an attack on memory; replace it by a smaller one"
        ) from error
    except Exception as error:  # a decoder that meets a broken file raises what it likes
        raise ValueError(f"{name} is broken ({error}); fetch it again") from error
    if picture is None:
        raise ValueError(f"{name} holds numbers without a known range; store it with 8 bits a color")
    if sample.image_size and picture.size != sample.image_size:
        raise ValueError(
            f"{name} is {picture.size} pixels, but its boxes refer"
            f" to {sample.image_size}; use the pictures that belong to the questions, not resized"
        )
    return picture


def picture_size(sample: Sample) -> tuple[int, int]:
    """Return the width and height of a sample's picture, as its annotation or else its file says; reads no pixels."""
    if sample.image_size:
        return sample.image_size
    with Image.open(sample.image) as stored:
        return stored.size


def _as_rgb(stored: Image.Image) -> Image.Image | None:
    """Convert a picture's first frame; None where nothing says which number is white."""
    if stored.mode in ("I", "F"):
        return None
    if stored.mode.startswith("I;16"):  # Pillow's own conversion would clip all above 255 to white
        return Image.fromarray((np.asarray(stored) / 257).round().astype(np.uint8)).convert("RGB")
    if stored.has_transparency_data:
        stored = stored.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", stored.size, "white"), stored).convert("RGB")
    return stored.convert("RGB")


def is_correct(said: str, sample: Sample) -> bool:
    """Return whether an answer is the label, letter case aside (§4)."""
    return said.lower() == sample.answer.strip().lower()


def exchange_pictures(samples: Iterable[Sample], among: Iterable[Sample]) -> list[Sample]:
    """Ask each question about a picture of `among`, another than its own: what it then answers follows from its words.

    That picture is the one half the list away, in the order of image ids, so it hangs on no other question asked. Its
    `image_id` stays the question's own; boxes are dropped, and a picture that is missing is passed over.

    Raises:
        ValueError: There are fewer than two pictures.
    """
    pictures = {sample.image_id: sample for sample in among if sample.image.is_file()}
    if len(pictures) < 2:
        raise ValueError(f"expected questions about several pictures to exchange, got {len(pictures)} picture(s)")
    ids, changed = sorted(pictures), []
    for sample in samples:
        other = pictures[ids[(bisect_left(ids, sample.image_id) + len(ids) // 2) % len(ids)]]
        objects = tuple(replace(thing, box=None) for thing in sample.objects)
        changed.append(replace(sample, image=other.image, image_size=other.image_size, objects=objects))
    return changed


def samples_to_frame(samples: Iterable[Sample]) -> pd.DataFrame:
    """Return samples as a frame of text columns, nested values as JSON, which parquet can hold.

    >>> samples_to_frame([]).columns[:4].tolist()
    ['sample_id', 'image_id', 'image', 'question']
    """
    rows = []
    for sample in samples:
        row = asdict(sample) | {"image": str(sample.image)}
        rows.append(row | {name: json.dumps(row[name]) for name in _NESTED if row[name] is not None})
    return pd.DataFrame(rows, columns=_COLUMNS, dtype="str")


def frame_to_samples(frame: pd.DataFrame) -> list[Sample]:
    """Return the samples of a frame made by `samples_to_frame`; a frame that lacks or garbles one is a ValueError."""
    if missing := [name for name in _COLUMNS if name not in frame]:
        raise ValueError(f"the frame lacks the columns {', '.join(missing)}: expected that of samples_to_frame")
    samples = []
    for row in frame[_COLUMNS].to_dict("records"):
        row = {name: None if pd.isna(value) else value for name, value in row.items()}
        try:
            row |= {name: json.loads(row[name]) for name in _NESTED if row[name]}
            samples.append(_RECORD.validate_python(row))
        except (TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"sample {row['sample_id']}: {', '.join(_NESTED)} or another column can't be read ({said:.200}):"
                " make the frame anew by samples_to_frame"
            ) from error
    return samples
