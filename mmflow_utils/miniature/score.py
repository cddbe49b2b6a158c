"""How many held-out questions a miniature answers correctly, shown what they are about or something else."""

import numpy as np
import torch
from torch import nn
from transformers import ProcessorMixin

from mmflow_utils.miniature.drawing import draw_scene
from mmflow_utils.miniature.packing import pack, packed_logits
from mmflow_utils.miniature.world import Scene, sample_scene
from mmflow_utils.samples.records import task_of

__all__ = ["accuracy_in_parts", "held_out", "task_accuracy"]

N_QUESTIONS = 10  # about each scene
PART = 50  # scenes that are scored together: more wouldn't fit in memory


def held_out(n_scenes: int, seed: int) -> list[Scene]:
    """Draw scenes that no training step draws: evaluation has a seed sequence of its own."""
    rng = np.random.default_rng([seed, 1000])
    return [sample_scene(rng) for _ in range(n_scenes)]


@torch.no_grad()
def task_accuracy(
    model: nn.Module,
    processor: ProcessorMixin,
    *,
    n_scenes: int,
    seed: int,
    captions: bool = False,
    shuffled: bool = False,
    half: bool = True,
) -> dict[str, float]:
    """Give the share (%) of held-out questions whose every answer token is the most probable one, by task.

    Args:
        model: A miniature in training (`packed_logits`).
        processor: Its processor.
        n_scenes: Scenes to ask about, ten questions each.
        seed: Of the scenes and the questions.
        captions: Show a caption in place of the picture.
        shuffled: Show each question another scene's picture or caption: what a blind model would reach.
        half: Compute in bfloat16, as in training, or in float32.
    """
    scenes, rng = held_out(n_scenes, seed), np.random.default_rng([seed, 1001])
    n_image_tokens = model.config.image_seq_length
    shown = scenes[1:] + scenes[:1] if shuffled else scenes
    batch = pack(
        processor.tokenizer,
        scenes,
        rng,
        n_questions=N_QUESTIONS,
        captions=captions,
        n_image_tokens=n_image_tokens,
        told=shown,
    )
    pixels = None
    if not captions:
        pictures = [draw_scene(scene) for scene in shown]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    said = packed_logits(model, batch, pixels, half=half)[:, :-1].argmax(-1)
    wrong = (said != batch.ids[:, 1:]) & (batch.answer[:, 1:] == 1)
    hits: dict[str, list[bool]] = {}
    for segment, missed, asked in zip(batch.segment[:, 1:], wrong, batch.drafts, strict=True):
        failed = set(segment[missed].tolist())
        for k, draft in enumerate(asked, start=1):
            hits.setdefault(task_of(draft.detailed) or "other", []).append(k not in failed)
    return {task: 100 * float(np.mean(hit)) for task, hit in sorted(hits.items())}


def accuracy_in_parts(
    model: nn.Module, processor: ProcessorMixin, *, n_scenes: int, seed: int, **shown: bool
) -> dict[str, float]:
    """Average `task_accuracy`, in float32, over parts of 50 scenes; `shown`: captions, shuffled."""
    parts = [
        task_accuracy(model, processor, n_scenes=PART, seed=seed + 10_000 * k, half=False, **shown)
        for k in range(n_scenes // PART)
    ]
    return {task: round(float(np.mean([part[task] for part in parts])), 2) for task in parts[0]}
