"""How many held-out questions a miniature answers correctly, shown what they are about or something else."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import ProcessorMixin

from miniature.packing import pack, packed_logits, picture_tokens
from miniature.questions import Draft
from miniature.world import SQUARE, Frame, Scene, sample_scene
from mmflow_utils.data.tasks import task_of

__all__ = ["accuracy_in_parts", "held_out", "share_right", "task_accuracy"]

N_QUESTIONS = 10  # about each scene
PART = 50  # scenes that are scored together: more wouldn't fit in memory


def held_out(n_scenes: int, seed: int, frames: Sequence[Frame] = (SQUARE,)) -> list[Scene]:
    """Draw scenes that no training step draws: evaluation has a seed sequence of its own."""
    rng = np.random.default_rng([seed, 1000])
    return [sample_scene(rng, frames=frames) for _ in range(n_scenes)]


@torch.no_grad()
def task_accuracy(
    model: nn.Module,
    processor: ProcessorMixin,
    *,
    n_scenes: int,
    seed: int,
    frames: Sequence[Frame] = (SQUARE,),
    captions: bool = False,
    shuffled: bool = False,
    half: bool = True,
) -> dict[str, float]:
    """Return the share (%) of held-out questions whose every answer token is the most probable one, by task.

    Args:
        model: A miniature in training (`packed_logits`).
        processor: Its processor.
        n_scenes: Scenes to ask about, ten questions each.
        seed: Of the scenes and the questions.
        frames: Widths and heights that the pictures may have.
        captions: Show a caption in place of the picture.
        shuffled: Show each question another scene's picture or caption: what a blind model would reach.
        half: Compute in `HALF`, as in training, or in float32.
    """
    scenes, rng = held_out(n_scenes, seed, frames), np.random.default_rng([seed, 1001])
    shown = scenes[1:] + scenes[:1] if shuffled else scenes
    pictures = None if captions else picture_tokens(model, processor, shown, half=half)
    n_image_tokens = None if captions else [len(tokens) for tokens in pictures]
    options = dict(n_questions=N_QUESTIONS, n_image_tokens=n_image_tokens, told=shown)
    batch = pack(processor.tokenizer, scenes, rng, **options)
    said = packed_logits(model, batch, pictures, half=half)[:, :-1].argmax(-1)
    wrong = (said != batch.ids[:, 1:]) & (batch.answer[:, 1:] == 1)
    return share_right(batch.segment[:, 1:], wrong, batch.drafts)


def share_right(
    segment: Iterable[Int[Tensor, " token"]], wrong: Iterable[Bool[Tensor, " token"]], drafts: Iterable[Sequence[Draft]]
) -> dict[str, float]:
    """Return the share (%) of questions without a wrong token, by task; other questions are "other".

    Args:
        segment: Of each scene, for each predicted token, the number of its question, from 1.
        wrong: Whether that token is an answer's and not the likeliest.
        drafts: The questions of each scene.
    """
    hits: dict[str, list[bool]] = {}
    for numbers, missed, asked in zip(segment, wrong, drafts, strict=True):
        failed = set(numbers[missed].tolist())
        for k, draft in enumerate(asked, start=1):
            hits.setdefault(task_of(draft.detailed) or "other", []).append(k not in failed)
    return {task: 100 * float(np.mean(hit)) for task, hit in sorted(hits.items())}


def accuracy_in_parts(
    model: nn.Module, processor: ProcessorMixin, *, n_scenes: int, seed: int, **shown: Any
) -> dict[str, float]:
    """Average `task_accuracy`, in float32, over parts of 50 scenes; `shown`: frames, captions, shuffled."""
    parts = [
        task_accuracy(model, processor, n_scenes=PART, seed=seed + 10_000 * k, half=False, **shown)
        for k in range(n_scenes // PART)
    ]
    return {task: round(float(np.mean([part[task] for part in parts])), 2) for task in parts[0]}
