"""Factual questions about the split's scenes, in the layouts of OKVQA and of A-OKVQA (App. H).

    okvqa_questions.json      as OpenEnded_mscoco_val2014_questions.json
    okvqa_annotations.json    as mscoco_val2014_annotations.json
    aokvqa.json               as aokvqa_v1p0_val.json

The ten people who answer are drawn too: they know the facts, are sure, and agree. So an answer is either
wholly right or wholly wrong here, and soft accuracy is plain accuracy.

Example:
    write_factual(Path("assets/miniature"), n_scenes=300, seed=0)  # the pictures are those of write_split
    read_aokvqa(folder / "aokvqa.json", folder / "images", image_pattern=IMAGE_PATTERN)
"""

from pathlib import Path

import numpy as np

from miniature.dataset import split_scenes, write_json
from miniature.questions import ask
from miniature.questions.draft import Draft, absent
from miniature.questions.extras import factual
from miniature.world import Scene

__all__ = ["IMAGE_PATTERN", "write_factual"]

IMAGE_PATTERN = "{image_id:05d}.png"  # how the readers find the split's pictures
N_PEOPLE, N_CHOICES, N_RATIONALES = 10, 4, 3  # as officially
TRIES = 12  # at a second question; a scene with both kinds of food and nothing else allows none
ABOUT = "Factual questions about a drawn world. Ten drawn people answered: they know the facts, and agree."
HEAD = dict(  # of both OKVQA files
    info=dict(description=ABOUT, version="1.0", contributor="mmflow", year=2026, url="", date_created=""),
    license=dict(name="MIT", url="https://opensource.org/license/mit"),
    task_type="Open-Ended",
    data_type="miniature",
    data_subtype="val",
)


def write_factual(folder: Path, *, n_scenes: int, seed: int) -> None:
    """Ask by facts about the scenes that `write_split` draws; the same seed gives the same files.

    Of each scene OKVQA's files ask one question, A-OKVQA's another, as far as the scene allows them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    okvqa, answers, aokvqa = [], [], []
    for scene, rng in split_scenes(n_scenes, seed):
        drafts = list({d.text: d for _ in range(TRIES) if (d := ask(factual, scene, rng))}.values())
        okvqa += [_okvqa_ids(scene) | dict(question=draft.text) for draft in drafts[:1]]
        answers += [_okvqa_answers(draft, scene) for draft in drafts[:1]]
        aokvqa += [_aokvqa(draft, scene, rng) for draft in drafts[1:2]]
    kinds = {"other": "Other"}
    write_json(folder / "okvqa_questions.json", HEAD | dict(questions=okvqa))
    write_json(folder / "okvqa_annotations.json", HEAD | dict(question_types=kinds, annotations=answers))
    write_json(folder / "aokvqa.json", aokvqa)


def _okvqa_ids(scene: Scene) -> dict:
    return dict(image_id=int(scene.scene_id), question_id=10 * int(scene.scene_id))


def _okvqa_answers(draft: Draft, scene: Scene) -> dict:
    answer = dict(raw_answer=draft.answer, answer=draft.answer, answer_confidence="yes")
    answers = [dict(answer_id=k + 1) | answer for k in range(N_PEOPLE)]
    return _okvqa_ids(scene) | dict(question_type="other", answer_type="other", answers=answers)


def _aokvqa(draft: Draft, scene: Scene, rng: np.random.Generator) -> dict:
    """Offer the answer among four: with the other things of the scene, then with some that aren't there."""
    others = [t.category for t in scene.things if t.category != draft.answer]
    others += [str(category) for category in rng.permutation(absent(scene))]
    choices = [str(c) for c in rng.permutation([draft.answer, *others[: N_CHOICES - 1]])]
    return dict(
        split="val",
        image_id=int(scene.scene_id),
        question_id=f"{scene.scene_id}-fact",
        question=draft.text,
        choices=choices,
        correct_choice_idx=choices.index(draft.answer),
        direct_answers=[draft.answer] * N_PEOPLE,
        difficult_direct_answer=False,
        rationales=[draft.full_answer] * N_RATIONALES,
    )
