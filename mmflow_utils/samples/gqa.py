"""GQA's own files: questions with their operations and annotations, and scene graphs.

A file that isn't what it should be stops the reading with one `ValueError`; a single question that can't be
used is left out, and the reason is recorded.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from mmflow_utils.samples.fields import clipped_box, number, picture_file, pictures_folder, read_json, text
from mmflow_utils.samples.records import TASKS, Box, Sample, SceneObject, task_of

__all__ = ["read_gqa"]


def read_gqa(
    questions: Path | str,
    scene_graphs: Path | str | None,
    images: Path | str,
    *,
    tasks: Iterable[str] | None = None,
) -> tuple[list[Sample], pd.DataFrame]:
    """Read questions in GQA's format, with the boxes of their objects.

    Args:
        questions: A question file, such as `val_balanced_questions.json`.
        scene_graphs: The scene graphs of the same split, such as `val_sceneGraphs.json`; None (the test
            splits have none) leaves every box unknown.
        images: Folder of the pictures, `<image id>.jpg` (or .jpeg, .png).
        tasks: Keep only these tasks; by default every question.

    Returns:
        The samples in the file's order, and what was left out: `sample_id`, `reason` and `kept`, which is
        true where the sample stays and lost only a box or its options. Boxes are clipped to the picture.

    Raises:
        ValueError: A file or folder that is missing, cut short or of another layout; no question that can be
            used; an unknown task.
    """
    wanted = _known_tasks(tasks)
    entries = _load_json(Path(questions), "GQA question file")
    graphs = None if scene_graphs is None else _load_json(Path(scene_graphs), "GQA scene graph file")
    folder = pictures_folder(images)
    samples, skipped, first = [], [], ""
    for sample_id in list(entries):
        entry = entries.pop(sample_id)  # the files are large: let go what is read
        notes: list[str] = []
        try:
            if sample := _gqa_sample(sample_id, entry, graphs, folder, wanted, notes):
                samples.append(sample)
        except ValueError as error:
            first = first or f"entry {sample_id!r}: {error}"
            skipped.append({"sample_id": sample_id, "reason": str(error), "kept": False})
            continue
        skipped += [{"sample_id": sample_id, "reason": note, "kept": True} for note in notes]
    if first and not samples:
        raise ValueError(
            f"no question of {questions} can be used ({first}); expected GQA's questions and the same split's"
            f" scene graphs, got {scene_graphs}: unpack both unchanged"
        )
    return samples, pd.DataFrame(skipped, columns=["sample_id", "reason", "kept"])


def _known_tasks(tasks: Iterable[str] | None) -> frozenset[str] | None:
    wanted = None if tasks is None else frozenset(tasks)
    if wanted and (unknown := sorted(wanted - TASKS.keys())):
        raise ValueError(f"unknown task {', '.join(unknown)}: the tasks are {', '.join(TASKS)}")
    return wanted


def _load_json(path: Path, what: str) -> dict[str, Any]:
    data = read_json(path, what)
    if not isinstance(data, dict) or not data:
        kind = "nothing in it" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ValueError(f"{path} has {kind} at the top: expected a {what}, entries keyed by id")
    return data


def _gqa_sample(
    sample_id: str,
    entry: Any,
    graphs: dict[str, Any] | None,
    folder: Path,
    wanted: frozenset[str] | None,
    notes: list[str],
) -> Sample | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("types"), dict):
        held = ", ".join(map(str, entry)) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(
            f"expected the fields question, imageId, answer, types and semantic, got {held[:80]}"
        )
    kinds = {kind: text(entry["types"], kind) for kind in ("structural", "semantic", "detailed")}
    task = task_of(kinds["detailed"])
    if wanted is not None and task not in wanted:
        return None
    image_id, answer = text(entry, "imageId"), text(entry, "answer").lower()
    operations, graph = _operations(entry.get("semantic")), _graph(graphs, image_id)
    true, false = _options(operations, answer, notes)
    return Sample(
        sample_id=sample_id,
        image_id=image_id,
        image=picture_file(folder, image_id),
        question=text(entry, "question"),
        answer=answer,
        task=task,
        option_true=true,
        option_false=false,
        objects=_objects(operations, graph, _annotated(entry), notes),
        full_answer=text(entry, "fullAnswer") if entry.get("fullAnswer") else None,
        image_size=graph["size"] if graph else None,
        **kinds,
    )


def _operations(semantic: Any) -> list[tuple[str, str]]:
    try:
        return [(step["operation"].strip(), step["argument"].strip()) for step in semantic]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            f"semantic should list operations with arguments, got {str(semantic)[:80]}"
        ) from None


def _options(
    operations: list[tuple[str, str]], answer: str, notes: list[str]
) -> tuple[str | None, str | None]:
    """Read the options of `choose …: a|b`, or of `choose rel: man,to the right of|to the left of,s (42)`."""
    for operation, argument in operations:
        if not operation.startswith("choose") or "|" not in argument:
            continue
        choices = next(part for part in argument.split(",") if "|" in part).split("|")
        choices = [re.sub(r"^to the (.+) of$", r"\1", choice.strip()) for choice in choices]
        true = [choice for choice in choices if choice.lower() == answer]
        if len(choices) == 2 and len(true) == 1 and all(choices):
            return true[0], next(choice for choice in choices if choice != true[0])
        notes.append(f"options not used: the answer {answer!r} should be one of two, got {argument!r}")
    return None, None


def _annotated(entry: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Read which words of the question stand for which object: keys are "4" or, half-open, "6:8"."""
    annotations = entry.get("annotations")
    marks = annotations.get("question") if isinstance(annotations, dict) else None
    found: dict[str, tuple[int, int]] = {}
    for key, ids in marks.items() if isinstance(marks, dict) else ():
        if words := re.fullmatch(r"([0-9]{1,4})(?::([0-9]{1,4}))?", str(key)):
            start = int(words[1])
            for object_id in str(ids).split(","):
                found.setdefault(object_id.strip(), (start, int(words[2] or start + 1)))
    return found


def _objects(
    operations: list[tuple[str, str]],
    graph: dict[str, Any] | None,
    annotated: dict[str, tuple[int, int]],
    notes: list[str],
) -> tuple[SceneObject, ...]:
    """Read the objects of `select: jar (496168)`, `relate: man,wearing,o (123)`, `select: mud (-)`."""
    found = {}
    for operation, argument in operations:
        ids = re.search(r"\(([^()]*)\)$", argument)
        if not ids or operation not in {"select", "relate", "choose rel", "verify rel"}:
            continue
        name = argument[: ids.start()].split(",")[0].strip()
        for object_id in (i.strip() for i in ids[1].split(",")):
            known = None if object_id == "-" else object_id
            box = _graph_box(graph, known, name, notes) if graph and known else None
            found[name, known] = SceneObject(
                name=name, object_id=known, box=box, words=annotated.get(object_id)
            )
    return tuple(found.values())


def _graph(graphs: dict[str, Any] | None, image_id: str) -> dict[str, Any] | None:
    if graphs is None:
        return None
    graph = graphs.get(image_id)
    if graph is None:
        raise ValueError(f"the scene graphs don't have image {image_id!r}")
    try:
        width, height = (number(graph[side]) for side in ("width", "height"))
        if not isinstance(graph["objects"], dict) or min(width, height) < 1:
            raise ValueError(f"{width} x {height} pixels")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"the scene graph of image {image_id!r} needs width, height, objects: {error!r}"
        ) from None
    return {"size": (int(width), int(height)), "objects": graph["objects"]}


def _graph_box(graph: dict[str, Any], object_id: str, name: str, notes: list[str]) -> Box | None:
    try:
        return clipped_box(graph["objects"][object_id], *graph["size"])
    except KeyError:
        notes.append(f"no box for {name} ({object_id}): the scene graph doesn't have it")
    except (TypeError, ValueError) as error:
        notes.append(f"no box for {name} ({object_id}): {error}")
    return None
