"""The evaluation split: scenes that training never drew, written in GQA's own layout.

    val_balanced_questions.json   {question id: GQA's question record}
    val_sceneGraphs.json          {image id: GQA's scene graph}
    region_descriptions.json      dense captions, as Visual Genome lists them: one phrase for each region
    images/<image id>.png

Example:
    write_split(Path("assets/miniature"), n_scenes=300, seed=0)
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from miniature.drawing import draw_scene
from miniature.questions import ask
from miniature.questions.bridges import BRIDGES
from miniature.questions.draft import gqa_record
from miniature.questions.tasks import TASK_GENERATORS
from miniature.world import SQUARE, Frame, Scene, caption, sample_scene, scene_graph

__all__ = ["split_scenes", "write_json", "write_split"]

STREAM = 2000  # of the random generators: apart from those of training and of its evaluation
N_BRIDGES = 5  # questions of a scene from outside the six tasks


def write_split(folder: Path, *, n_scenes: int, seed: int, frames: Sequence[Frame] = (SQUARE,)) -> None:
    """Draw `n_scenes` and write them, their questions and captions; the same seed gives the same files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions, graphs, regions = {}, {}, []
    for scene, rng in split_scenes(n_scenes, seed, frames):
        draw_scene(scene).save(folder / "images" / f"{scene.scene_id}.png", optimize=True)
        graphs[scene.scene_id] = scene_graph(scene)
        regions.append(_regions(scene, rng))
        for k, record in enumerate(_ask_all(scene, rng)):
            questions[f"{scene.scene_id}{k:02d}"] = record
    write_json(folder / "val_balanced_questions.json", questions)
    write_json(folder / "val_sceneGraphs.json", graphs)
    write_json(folder / "region_descriptions.json", regions)


def split_scenes(
    n_scenes: int, seed: int, frames: Sequence[Frame] = (SQUARE,)
) -> Iterator[tuple[Scene, np.random.Generator]]:
    """Draw the scenes of a split, each with the generator that goes on to draw what is asked about it."""
    for i in range(n_scenes):
        rng = np.random.default_rng([seed, STREAM, i])
        yield sample_scene(rng, scene_id=f"{i + 1:05d}", frames=frames), rng


def _ask_all(scene: Scene, rng: np.random.Generator) -> list[dict]:
    """Ask one question from each of the tasks' generators and a few of the other groups, none twice."""
    generators = [g for group in TASK_GENERATORS.values() for g in group]
    generators += [BRIDGES[i] for i in rng.choice(len(BRIDGES), N_BRIDGES, replace=False)]
    drafts = {draft.text: draft for g in generators if (draft := ask(g, scene, rng))}
    return [gqa_record(draft, scene) for draft in drafts.values()]


def _regions(scene: Scene, rng: np.random.Generator) -> dict:
    """Divide a caption into phrases: one about each thing, with its box, the others about the whole picture."""
    phrases = [phrase.strip() + "." for phrase in caption(scene, rng).split(".") if phrase.strip()]
    boxes = {thing.category: thing.box for thing in scene.things}
    entry = {"id": scene.scene_id, "regions": []}
    for k, phrase in enumerate(phrases):
        about = next((category for category in boxes if f" {category} made" in phrase), None)
        x, y, w, h = boxes.get(about, (0, 0, *scene.frame))
        region = dict(region_id=f"{scene.scene_id}{k:02d}", image_id=scene.scene_id, phrase=phrase)
        entry["regions"].append(region | dict(x=x, y=y, width=w, height=h))
    return entry


def write_json(path: Path, content: object) -> None:
    """Write a file of the split: JSON without spaces, the same bytes for the same content."""
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
