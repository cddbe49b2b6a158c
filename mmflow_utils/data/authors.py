"""The CSV files that the paper's authors released: six tasks of GQA questions, with boxes and captions."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mmflow_utils.data.fields import clipped_box, number, picture_file, pictures_folder, text
from mmflow_utils.data.sample import Sample, SceneObject
from mmflow_utils.data.tasks import task_of


def read_authors(
    folder: Path | str, images: Path | str, *, tasks: Iterable[str] | None = None
) -> tuple[list[Sample], pd.DataFrame]:
    """Read the authors' CSV files in a folder, for figures over exactly their questions.

    Args:
        folder: Holds their six files, or some of them; or one of these files.
        images: Folder of GQA's pictures.
        tasks: Keep only these tasks; by default every question.

    Returns:
        The samples, file by file, and what was left out, as from `read_gqa`. Of a duplicated question, the first
        is kept; a box that can't be used is left unknown.

    Raises:
        ValueError: No CSV file there, or one that is damaged or of another layout, naming the row.
    """
    files = [Path(folder)] if Path(folder).suffix == ".csv" else sorted(Path(folder).glob("*.csv"))
    if not files:
        raise ValueError(f"no CSV file in {folder}: put the authors' six files there (docs/data.md says how)")
    wanted = None if tasks is None else set(tasks)
    found: dict[str, Sample] = {}
    left_out = []
    for sample, notes in (read for file in files for read in _read_rows(file, images)):
        if wanted is not None and sample.task not in wanted:
            continue
        kept = sample.sample_id not in found
        found.setdefault(sample.sample_id, sample)
        reasons = notes if kept else ["the question is duplicated"]
        left_out += [{"sample_id": sample.sample_id, "reason": reason, "kept": kept} for reason in reasons]
    return list(found.values()), pd.DataFrame(left_out, columns=["sample_id", "reason", "kept"])


def compare_with_authors(samples: Iterable[Sample], authors: Iterable[Sample]) -> pd.DataFrame:
    """Compare what was read from GQA's own files with the authors' rows for the same questions.

    Args:
        samples: From `read_gqa`.
        authors: From `read_authors`.

    Returns:
        For each of the authors' questions a row for each `field` (question, answer, options, objects, boxes):
        `sample_id`, `task`, `field`, `equal`, and what `ours` and `authors` hold, as text. Objects and boxes are
        compared as sets, boxes in pixels, clipped to the picture on both sides. A question that `samples` lacks
        has the one field `found`.
    """
    ours = {sample.sample_id: _fields(sample) for sample in samples}
    rows = []
    for sample in authors:
        known = ours.get(sample.sample_id, {"found": "no"})
        theirs = _fields(sample) if sample.sample_id in ours else {"found": "yes"}
        for field, value in known.items():
            row = {"sample_id": sample.sample_id, "task": sample.task, "field": field}
            rows.append(row | {"equal": value == theirs[field], "ours": value, "authors": theirs[field]})
    return pd.DataFrame(rows, columns=["sample_id", "task", "field", "equal", "ours", "authors"])


def _fields(sample: Sample) -> dict[str, str]:
    """Return what the experiments use of a sample as texts, one for each field."""
    named = {f"{o.name} ({o.object_id or '-'})": o.box for o in sample.objects}
    boxes = {name: f"{b.x:g} {b.y:g} {b.w:g} {b.h:g}" if b else "none" for name, b in named.items()}
    return {
        "question": sample.question,
        "answer": sample.answer,
        "options": f"{sample.option_true} | {sample.option_false}",
        "objects": ", ".join(sorted(named)),
        "boxes": ", ".join(f"{name}: {boxes[name]}" for name in sorted(boxes)),
    }


def _read_rows(path: Path | str, images: Path | str) -> Iterator[tuple[Sample, list[str]]]:
    """Yield a file's samples, each with notes on the boxes that it lost."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        said = " ".join(str(error).split())
        raise ValueError(f"can't read {path} as CSV ({said}): fetch the authors' file again") from error
    two = "object1 name" in frame
    subjects = ("object1", "object2") if two else ("central object",)
    needed = ["question_id", "img_id", "question", "answer", "image_w", "image_h", "captions"]
    needed += [f"type_{kind}" for kind in ("structural", "semantic", "detailed")]
    needed += [f"{subject} {what}" for subject in subjects for what in ("name", "id", "x", "y", "w", "h")]
    if missing := [column for column in needed if column not in frame]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}: expected one of the authors' CSV files")
    folder = pictures_folder(images)
    for line, row in enumerate(frame.to_dict("records"), start=2):
        notes: list[str] = []
        try:
            sample = _authors_sample(row, subjects, folder, notes)
        except ValueError as error:
            raise ValueError(f"{path}, row {line}: {error}; fetch the authors' file again") from error
        yield sample, notes


def _authors_sample(row: dict[str, Any], subjects: tuple[str, ...], folder: Path, notes: list[str]) -> Sample:
    size = (int(number(row["image_w"])), int(number(row["image_h"])))
    if min(size) < 1:
        raise ValueError(f"image_w and image_h should be 1 pixel or more, got {size[0]} x {size[1]}")
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
                notes.append(f"no box for {name} ({object_id}): {error}")
        objects.append(SceneObject(name=name, object_id=None if object_id == "-" else object_id, box=box))
    kinds: dict[str, Any] = {kind: text(row, f"type_{kind}") for kind in ("structural", "semantic", "detailed")}
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
