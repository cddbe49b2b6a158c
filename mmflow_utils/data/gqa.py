"""GQA's own files: questions with their operations and annotations, and scene graphs."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from sys import intern
from typing import Any

import pandas as pd

from mmflow_utils.data.fields import clipped_box, number, picture_file, pictures_folder, read_entries, text
from mmflow_utils.data.sample import Box, Sample, SceneObject
from mmflow_utils.data.tasks import check_task, task_of

_SHORT = re.compile(r"^(?:to the|in) (.+) of$")


def read_gqa(
    questions: Path | str,
    scene_graphs: Path | str | None,
    images: Path | str,
    *,
    tasks: Iterable[str] | None = None,
) -> tuple[list[Sample], pd.DataFrame]:
    """Read questions in GQA's format, with the boxes of their objects.

    The files are read entry by entry: what stays in memory are the samples and the boxes they ask for.

    Args:
        questions: A question file, such as `val_balanced_questions.json`.
        scene_graphs: Those of the same split, such as `val_sceneGraphs.json`; None leaves every box unknown.
        images: Folder of the pictures, `<image id>.jpg` (or .jpeg, .png).
        tasks: Keep only these tasks; by default every question.

    Returns:
        The samples in the file's order, and what was left out: `sample_id`, `reason` and `kept`, which is true where
        the sample stays and lost only a box or its options. Boxes are clipped to the picture.

    Raises:
        ValueError: A file or folder that is missing, damaged or of another layout; an id that is duplicated; no
            question that can be used; an unknown task.
    """
    wanted = None if tasks is None else {check_task(task) for task in tasks}
    folder = pictures_folder(images)
    found: dict[str, Sample] = {}
    skipped: list[dict[str, Any]] = []
    for sample_id, entry in read_entries(questions, "GQA question file"):
        if sample_id in found:
            raise ValueError(f"{questions}: question {sample_id!r} is duplicated; download the file again")
        with _recorded(sample_id, skipped) as notes:
            if sample := _gqa_sample(sample_id, entry, folder, wanted, notes):
                found[sample_id] = sample
    samples = list(found.values())
    if scene_graphs is not None and samples:
        samples = _with_boxes(samples, _graphs_of(samples, scene_graphs), skipped)
    lost = {row["sample_id"] for row in skipped if not row["kept"]}  # some only when the boxes were read
    skipped = [row for row in skipped if not row["kept"] or row["sample_id"] not in lost]
    if lost and not samples:
        first = f"entry {skipped[0]['sample_id']!r}: {skipped[0]['reason']}"
        raise ValueError(
            f"no question of {questions} can be used ({first}); expected GQA's questions and the same split's"
            f" scene graphs, got {scene_graphs}: unpack both unchanged"
        )
    return samples, pd.DataFrame(skipped, columns=["sample_id", "reason", "kept"])


@contextmanager
def _recorded(sample_id: str, skipped: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Record why a question is left out; and, of one that stays, the notes of what it lost."""
    notes: list[str] = []
    try:
        yield notes
    except ValueError as error:
        skipped.append({"sample_id": sample_id, "reason": str(error), "kept": False})
    else:
        skipped += [{"sample_id": sample_id, "reason": note, "kept": True} for note in notes]


def _graphs_of(samples: list[Sample], scene_graphs: Path | str) -> dict[str, Any]:
    """Read the scene graphs of the samples' pictures, and of these only what boxes are made of."""
    asked: dict[str, set[str]] = {}
    for sample in samples:
        asked.setdefault(sample.image_id, set()).update(o.object_id for o in sample.objects if o.object_id)
    graphs: dict[str, Any] = {}
    for image_id, graph in read_entries(scene_graphs, "GQA scene graph file"):
        if image_id in graphs:
            raise ValueError(f"{scene_graphs}: image {image_id!r} is duplicated; download the file again")
        if image_id in asked:
            graphs[image_id] = _boxes_alone(graph, asked[image_id])
    return graphs


def _boxes_alone(graph: Any, ids: set[str]) -> Any:
    """Drop attributes, relations and other objects; what isn't as it should be stays, to be judged."""
    if not isinstance(graph, dict) or not isinstance(graph.get("objects"), dict):
        return graph
    objects = {i: graph["objects"][i] for i in ids if i in graph["objects"]}
    for object_id, value in objects.items():
        if isinstance(value, dict):
            objects[object_id] = {side: value.get(side) for side in "xywh"}
    return {side: graph.get(side) for side in ("width", "height")} | {"objects": objects}


def _with_boxes(samples: list[Sample], graphs: dict[str, Any], skipped: list[dict[str, Any]]) -> list[Sample]:
    placed = []
    for sample in samples:
        with _recorded(sample.sample_id, skipped) as notes:
            graph = _graph(graphs, sample.image_id)
            objects = (replace(o, box=_graph_box(graph, o, notes)) for o in sample.objects)
            placed.append(replace(sample, objects=tuple(objects), image_size=graph["size"]))
    return placed


def _gqa_sample(sample_id: str, entry: Any, folder: Path, wanted: set[str] | None, notes: list[str]) -> Sample | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("types"), dict):
        held = ", ".join(map(str, entry)) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(f"expected the fields question, imageId, answer, types and semantic, got {held[:80]}")
    # interned: thousands of questions share a kind, a picture, an answer
    kinds: dict[str, Any] = {
        kind: intern(text(entry["types"], kind)) for kind in ("structural", "semantic", "detailed")
    }
    task = task_of(kinds["detailed"])
    if wanted is not None and task not in wanted:
        return None
    image_id, answer = intern(text(entry, "imageId")), intern(text(entry, "answer").lower())
    operations = _operations(entry.get("semantic"))
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
        objects=_objects(operations, _annotated(entry)),
        full_answer=text(entry, "fullAnswer") if entry.get("fullAnswer") else None,
        **kinds,
    )


def _operations(semantic: Any) -> list[tuple[str, str]]:
    try:
        return [(step["operation"].strip(), step["argument"].strip()) for step in semantic]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"semantic should list operations with arguments, got {str(semantic)[:80]}") from None


def _options(operations: list[tuple[str, str]], answer: str, notes: list[str]) -> tuple[str | None, str | None]:
    """Read the options of `choose …: a|b`, or of `choose rel: man,to the right of|to the left of,s (42)`.

    "to the right of" is the option "right" and "in front of" is "front", as in the authors' files.
    """
    for operation, argument in operations:
        if not operation.startswith("choose") or "|" not in argument:
            continue
        choices = [c.strip() for c in next(p for p in argument.split(",") if "|" in p).split("|")]
        choices = [choice if choice.lower() == answer else _SHORT.sub(r"\1", choice) for choice in choices]
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


def _objects(operations: list[tuple[str, str]], annotated: dict[str, tuple[int, int]]) -> tuple[SceneObject, ...]:
    """Read the objects of `select: jar (496168)`, `relate: man,wearing,o (123)`, `select: mud (-)`."""
    found = {}
    for operation, argument in operations:
        ids = re.search(r"\(([^()]*)\)$", argument)
        if not ids or operation not in {"select", "relate", "choose rel", "verify rel"}:
            continue
        name = argument[: ids.start()].split(",")[0].strip()
        for object_id in (i.strip() for i in ids[1].split(",")):
            known = None if object_id == "-" else object_id
            found[name, known] = SceneObject(name=name, object_id=known, words=annotated.get(object_id))
    return tuple(found.values())


def _graph(graphs: dict[str, Any], image_id: str) -> dict[str, Any]:
    graph = graphs.get(image_id)
    if graph is None:
        raise ValueError(f"the scene graphs don't have image {image_id!r}")
    try:
        width, height = (number(graph[side]) for side in ("width", "height"))
        if not isinstance(graph["objects"], dict) or min(width, height) < 1:
            raise ValueError(f"{width} x {height} pixels")
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the scene graph of image {image_id!r} needs width, height, objects: {error!r}") from None
    return {"size": (int(width), int(height)), "objects": graph["objects"]}


def _graph_box(graph: dict[str, Any], thing: SceneObject, notes: list[str]) -> Box | None:
    if thing.object_id is None:
        return None
    try:
        return clipped_box(graph["objects"][thing.object_id], *graph["size"])
    except (KeyError, TypeError, ValueError) as error:
        why = "the scene graph doesn't have it" if isinstance(error, KeyError) else error
        notes.append(f"no box for {thing.name} ({thing.object_id}): {why}")
        return None
