"""`mini-after-text`: LLaVA's order in miniature, for what the order alone does to the routes (notebook 18).

The decoder is `mini-text`'s, which learned to answer from captions and never saw a picture; the picture
encoder is `mini`'s. The projector learns alone first, then projector and decoder.

Example:
    model, processor = begin(AFTER_TEXT_RECIPE)
    trainer = Trainer(model, processor, AFTER_TEXT_RECIPE, Path("outputs/mini-after-text/training"))
    for stage in ("tower", "align", "joint"):
        getattr(trainer, stage)()
"""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from miniature.train import Recipe

__all__ = ["AFTER_TEXT_RECIPE", "give_reader"]

AFTER_TEXT_RECIPE = Recipe(
    begins_with="assets/mini",
    reads_first="assets/mini-text",
    tower_steps=150,  # the heads alone, from which the projector begins
    tower_held=150,
    tower_batch=16,
    text_steps=0,
    align_steps=200,
    joint_steps=2000,
    joint_rates=((0, 0, 2000),),
    louder=(),
    read_steps=0,
)


def give_reader(mini: LlavaForConditionalGeneration, folder: Path) -> LlavaForConditionalGeneration:
    """Put a text-only miniature's decoder into a miniature."""
    reader = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mini.model.language_model.load_state_dict(reader.model.state_dict())
    mini.lm_head.load_state_dict(reader.lm_head.state_dict())
    return mini
