"""Minimal pairs: two pictures that differ in one fact about one thing, one question, two answers.

The fact is a color, shape or material, what the thing is, or where it stands; all else is painted alike, pixel by
pixel. Two tasks have none: to share another property with a thing, as CompareAttr asks, takes two facts.

    val_balanced_questions.json, val_sceneGraphs.json, images/    as in `dataset`; a pair's image ids differ at the end

Example:
    python -m miniature.pairs assets/miniature/pairs
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from miniature.dataset import write_json
from miniature.drawing import draw_scene
from miniature.questions import ask, gqa_record
from miniature.questions.draft import Draft, Rng, other_value
from miniature.questions.tasks import (
    categoryThisChoose,
    chooseAttr,
    existThatOr,
    materialChoose,
    positionQuery,
    relChooser,
)
from miniature.world import MARGIN, REACH, Scene, Thing, sample_scene, scene_graph

__all__ = ["write_pairs"]

STREAM = 3000  # of the random generators: apart from those of training, of its evaluation and of the split
TRIES = 20_000  # at asking the same question again
Change = tuple[Thing, dict[str, Any]]  # a thing, and what becomes of it


def write_pairs(folder: Path, *, n_pairs: int = 30, seed: int = 0) -> None:
    """Write `n_pairs` pairs of each task that has them; the same seed gives the same files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions, graphs = {}, {}
    for number, task in enumerate(TASKS, 1):
        for n in range(1, n_pairs + 1):
            rng = np.random.default_rng([seed, STREAM, number, n])
            pair = _draw_pair(task, n, rng, f"{number}{n:03d}")
            for end in rng.permutation(2):  # which of the two comes first says nothing
                scene, draft = pair[end]
                scene = replace(scene, scene_id=f"{scene.scene_id}{end}")
                draw_scene(scene).save(folder / "images" / f"{scene.scene_id}.png", optimize=True)
                graphs[scene.scene_id] = scene_graph(scene)
                questions[f"{scene.scene_id}00"] = gqa_record(draft, scene)
    write_json(folder / "val_balanced_questions.json", questions)
    write_json(folder / "val_sceneGraphs.json", graphs)


def _draw_pair(task: str, n: int, rng: Rng, scene_id: str) -> list[tuple[Scene, Draft]]:
    """Draw two scenes with their question, whose words are the same."""
    generators, change = TASKS[task]
    generator = generators[n % len(generators)]
    while True:
        scene = sample_scene(rng, scene_id=scene_id)
        draft = ask(generator, scene, rng)
        if draft is None or (found := change(scene, draft, rng)) is None:
            continue
        thing, facts = found
        things = tuple(replace(one, **facts) if one == thing else one for one in scene.things)
        other = replace(scene, things=things)
        drafts = (generator(other, rng) for _ in range(TRIES))
        again = next((one for one in drafts if one and one.text == draft.text), None)
        if again and again.answer != draft.answer:
            return [(scene, draft), (other, again)]


def _named(scene: Scene, draft: Draft) -> list[Thing]:
    """List the things that a question names, in its order."""
    things = {thing.object_id: thing for thing in scene.things}
    return [things[object_id] for object_id in draft.wording.mentions.values()]


def _change_option(scene: Scene, draft: Draft, rng: Rng) -> Change:
    """Make the other option true: of a thing's color, shape or material, or of what it is."""
    operation, _, options = draft.operations[-1]
    (other,) = set(options.split("|")) - {draft.answer}
    kind = operation.removeprefix("choose ").replace("name", "category")
    return _named(scene, draft)[0], {kind: other}


def _change_truth(scene: Scene, draft: Draft, rng: Rng) -> Change | None:
    """Take the property that is asked for from the one thing that has it."""
    kind, value = draft.operations[1][0].removeprefix("filter "), draft.operations[1][2]
    having = [thing for thing in _named(scene, draft) if thing.attribute(kind) == value]
    return (having[0], {kind: other_value(rng, kind, value)}) if len(having) == 1 else None


def _move(scene: Scene, draft: Draft, rng: Rng) -> Change | None:
    """Move the thing that is asked about to where no relation is another, but the one that is asked for."""
    thing, *anchor = _named(scene, draft)
    before, asked = _relations(scene), {(thing.object_id, one.object_id) for one in anchor}
    reach, width = thing.size * REACH / 2 + MARGIN / 2, thing.frame[0]
    for x in rng.permutation(np.arange(np.ceil(reach), width - reach)):
        moved = replace(thing, x=float(x))
        others = [one for one in scene.things if one != thing]
        after = _relations(replace(scene, things=(moved, *others)))
        apart = all(
            max(abs(moved.x - one.x), abs(moved.y - one.y)) > reach + one.size * REACH / 2 + MARGIN / 2
            for one in others
        )
        differ = {pair for pair in before | after if before.get(pair) != after.get(pair)}
        crosses = None not in (thing.side, moved.side) and thing.side != moved.side
        turned = asked | {(b, a) for a, b in asked}
        if apart and differ == turned and (crosses or anchor) and turned <= before.keys() & after.keys():
            return thing, {"x": float(x)}
    return None


def _relations(scene: Scene) -> dict[tuple[str, str], str]:
    """Read from the scene graph how each thing stands to each other."""
    objects = scene_graph(scene)["objects"].items()
    return {(i, relation["object"]): relation["name"] for i, entry in objects for relation in entry["relations"]}


def _color(scene: Scene, rng: Rng) -> Draft | None:
    draft = chooseAttr(scene, rng)
    return draft if draft.operations[-1][0] == "choose color" else None


def _shape(scene: Scene, rng: Rng) -> Draft | None:
    draft = chooseAttr(scene, rng)
    return draft if draft.operations[-1][0] == "choose shape" else None


TASKS: dict[str, tuple[tuple[Callable[[Scene, Rng], Draft | None], ...], Callable[..., Change | None]]] = {
    "ChooseAttr": ((_color, _shape, materialChoose), _change_option),
    "ChooseCat": ((categoryThisChoose,), _change_option),
    "ChooseRel": ((relChooser,), _move),
    "LogicalObj": ((existThatOr,), _change_truth),
    "QueryAttr": ((positionQuery,), _move),
}

if __name__ == "__main__":
    write_pairs(Path(sys.argv[1]))
