"""A trained miniature on disk: the library's own files, and in `training.json` how it learnt and how well.

Example (the text-only counterpart of `mini`, App. G; its `text` stage is that of `mini`):
    >>> trainer = Trainer(model, processor, Recipe(), Path("outputs/mini/training"))
    >>> trainer.text()
    >>> trainer.read()
    >>> save_text_miniature(trainer, Path("assets/mini-text"))
"""

import json
from dataclasses import asdict
from pathlib import Path

from transformers import LlamaForCausalLM

from miniature.score import accuracy_in_parts
from miniature.train import Trainer

__all__ = ["save_miniature", "save_text_miniature"]


def save_miniature(trainer: Trainer, folder: Path | str, *, n_scenes: int = 1000) -> dict:
    """Write model, processor and `training.json`: recipe, learning curves, and held-out accuracy in float32.

    Returns:
        What `training.json` holds.
    """
    record = _measure(trainer, n_scenes, captions=False)
    model = trainer.model
    model.set_attn_implementation({"text_config": "sdpa"})
    model.save_pretrained(folder)
    trainer.processor.save_pretrained(folder)
    return _write(record, folder)


def save_text_miniature(trainer: Trainer, folder: Path | str, *, n_scenes: int = 1000) -> dict:
    """Write the decoder alone as a language model, with its tokenizer and `training.json` (App. G).

    Returns:
        What `training.json` holds; the accuracies are those with captions, a scene's own or another's.
    """
    record = _measure(trainer, n_scenes, captions=True)
    model = LlamaForCausalLM(trainer.model.config.text_config)
    model.model, model.lm_head = trainer.model.model.language_model, trainer.model.lm_head
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    trainer.processor.tokenizer.save_pretrained(folder)
    return _write(record, folder)


def _measure(trainer: Trainer, n_scenes: int, *, captions: bool) -> dict:
    recipe = trainer.recipe
    asked = dict(n_scenes=n_scenes, seed=recipe.seed + 1, frames=recipe.frames, captions=captions)
    model = trainer.model.eval()
    accuracy = {
        name: accuracy_in_parts(model, trainer.processor, shuffled=name == "shuffled", **asked)
        for name in ("intact", "shuffled")
    }
    return dict(recipe=asdict(recipe), n_scenes=n_scenes, accuracy_pct=accuracy, curves=trainer.curves)


def _write(record: dict, folder: Path | str) -> dict:
    (Path(folder) / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record
