"""The CSV files that the paper's authors released: six tasks of GQA questions, with boxes and captions."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from mmflow_utils.samples.fields import clipped_box, number, picture_file, pictures_folder, text
from mmflow_utils.samples.records import Sample, SceneObject, task_of

__all__ = ["read_authors_csv"]

_LOG = logging.getLogger(__name__)


def read_authors_csv(path: Path | str, images: Path | str) -> list[Sample]:
    """Read one of the CSV files that the paper's authors released: GQA questions, with boxes and captions.

    Args:
        path: One of their six files, `GQA_val_correct_question_with_…_<task>.csv`.
        images: Folder of GQA's pictures.

    Returns:
        The samples in the file's order. A box that can't be used is left unknown, and logged as a warning.

    Raises:
        ValueError: A file that is missing, cut short or of another layout, naming the row.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"can't read {path} as CSV ({error}): fetch the authors' file again") from error
    two = "object1 name" in frame
    subjects = ("object1", "object2") if two else ("central object",)
    needed = ["question_id", "img_id", "question", "answer", "image_w", "image_h", "captions"]
    needed += [f"type_{kind}" for kind in ("structural", "semantic", "detailed")]
    needed += [f"{subject} {what}" for subject in subjects for what in ("name", "id", "x", "y", "w", "h")]
    if missing := [column for column in needed if column not in frame]:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}: expected one of the authors' CSV files"
        )
    folder = pictures_folder(images)
    samples = []
    for line, row in enumerate(frame.to_dict("records"), start=2):
        try:
            samples.append(_authors_sample(row, subjects, folder))
        except ValueError as error:
            raise ValueError(f"{path}, row {line}: {error}; fetch the authors' file again") from error
    return samples


def _authors_sample(row: dict[str, Any], subjects: tuple[str, ...], folder: Path) -> Sample:
    size = (int(number(row["image_w"])), int(number(row["image_h"])))
    objects = []
    for subject in subjects:
        name, object_id = text(row, f"{subject} name"), text(row, f"{subject} id")
        sides = {side: row[f"{subject} {side}"] for side in "xywh"}
        box = None
        if "-" not in sides.values():
            numbers = {side: number(value) for side, value in sides.items()}
            try:
                box = clipped_box(numbers, *size)
            except ValueError as error:
                _LOG.warning(
                    "question %s: no box for %s (%s): %s", row["question_id"], name, object_id, error
                )
        objects.append(SceneObject(name=name, object_id=None if object_id == "-" else object_id, box=box))
    kinds = {kind: text(row, f"type_{kind}") for kind in ("structural", "semantic", "detailed")}
    return Sample(
        sample_id=text(row, "question_id"),
        image_id=text(row, "img_id"),
        image=picture_file(folder, row["img_id"]),
        question=text(row, "question"),
        answer=text(row, "answer").lower(),
        task=task_of(kinds["detailed"]),
        option_true=row.get("true option") or None,
        option_false=row.get("false option") or None,
        objects=tuple(objects),
        full_answer=row.get("full answer") or None,
        caption=row["captions"] or None,
        image_size=size,
        **kinds,
    )
