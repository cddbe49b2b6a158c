"""The training recipe of the miniatures, in LLaVA's own order.

1. `tower`: the picture encoder learns to say, for each image patch, what thing it shows (layer -2, the one
   that LLaVA reads).
2. `text`: the decoder alone learns to read captions and answer questions about them, predicting *every*
   token, as a language model does before it ever sees a picture.
3. `align`: tower and decoder frozen, the projector learns to speak the decoder's language.
4. `joint`: projector and decoder together on pictures and questions; the tower stays frozen, as LLaVA's does.

A miniature that begins with another's weights (`next`) repeats `tower` and `joint`. For the text-only one
(App. G) the decoder goes on after `text` with `read`: what `joint` asks, about captions.

No attention edge is blocked and no flow rewarded: whatever routes the model uses, it found.

Example:
    trainer = Trainer(model, processor, Recipe(), Path("outputs/mini/training"))
    for stage in (trainer.tower, trainer.text, trainer.align, trainer.joint):
        stage()
    save_miniature(trainer, Path("assets/mini"))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin

from miniature.course import Course
from miniature.optimize import make_optimizers
from miniature.packing import ATTENTION, pack, packed_logits, picture_tokens
from miniature.precision import in_half
from miniature.projector import boost_attribute, warm_projector
from miniature.score import held_out, task_accuracy
from miniature.tower import HEADS, patch_truth, tower_loss
from miniature.views import look_at
from miniature.world import SQUARE, Scene, sample_scene

__all__ = ["Recipe", "Trainer"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast each stage learns; steps, not seconds, so that a run can be repeated. JSON can hold it."""

    seed: int = 0
    begins_with: str | None = None  # folder of the miniature whose weights it takes up, from the project's root
    reads_first: str | None = None  # folder of a text-only miniature, whose decoder it takes instead
    frames: Sequence[Sequence[int]] = (SQUARE,)  # widths and heights of the pictures
    tower_steps: int = 1000
    text_steps: int = 1000
    align_steps: int = 100
    joint_steps: int = 15000
    # From a step on, the rate is that of a stage that began at another step and is so many steps long: color
    # came late, and so the rate was let rise again.
    joint_rates: Sequence[Sequence[int]] = (
        (0, 0, 7500),
        (6500, 0, 8900),
        (7750, 6500, 3000),
        (9500, 9000, 6000),
    )
    # Before these steps of the joint stage the projector says a kind of fact again, with this share, and it
    # and the decoder's first layer are held for so many steps: what that layer drowns is never learned.
    louder: Sequence[Sequence] = (
        (2250, "color", 0.1, 0),
        (3250, "color", 1.0, 0),
        (3750, "color", 3.0, 0),
        (5250, "color", 8.0, 500),
    )
    # From these steps of the joint stage on, a question of this type is asked about each scene once more.
    more: Sequence[Sequence] = ()
    read_steps: int = 3800
    tower_batch: int = 64  # pictures
    tower_held: int = 0  # steps in which only the heads learn: for a tower that was trained before
    tower_lr: float = 3e-3  # as `lr`, in the tower
    batch: int = 16  # scenes
    n_questions: int = 10  # questions that share a scene
    lr: float = 3e-3  # of Muon on the matrices of the layers
    lr_rest: float = 1e-3  # of AdamW on embeddings, projector, heads, norms and biases
    joint_batch: int = 8  # scenes, from `align` on
    joint_questions: int = 9  # that share a scene there, beside descriptions of all things
    joint_question_weight: float = 0.15  # of a question's words in their loss, beside 1 for an answer
    ema: float = 0.998
    eval_every: int = 250  # steps
    eval_scenes: int = 64
    held_scenes: int = 256  # others held out, by which the tower is judged and the projector fitted by hand

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(map(tuple, self.frames)))  # JSON has lists


class Trainer(Course):
    """Train a miniature stage by stage."""

    stages = ("tower", "text", "align", "joint", "read")

    def __init__(self, model: nn.Module, processor: ProcessorMixin, recipe: Recipe, folder: Path | str):
        super().__init__(model, recipe, folder)
        self.processor = processor
        self.model.set_attn_implementation({"text_config": ATTENTION})
        self.more: list[str] = []  # types of questions that are asked once more at this step
        torch.manual_seed(recipe.seed)
        width = model.config.vision_config.hidden_size
        heads = {name: nn.Linear(width, n) for name, n in HEADS.items()}
        self.heads = nn.ModuleDict(heads | {"center": nn.Linear(width, 2)})

    # ---- stages ----------------------------------------------------------------------------------------

    def tower(self) -> None:
        """Stage 1: name what each image patch shows."""
        tower, recipe = self.model.model.vision_tower, self.recipe
        options = dict(lr=recipe.tower_lr, before=lambda step: tower.requires_grad_(step >= recipe.tower_held))
        parts = nn.ModuleList([tower, self.heads])
        self._fit("tower", parts, recipe.tower_steps, self._tower_loss, self._tower_accuracy, **options)

    def text(self) -> None:
        """Stage 2: the decoder alone, captions in place of pictures."""
        parts = nn.ModuleList([self.model.model.language_model, self.model.lm_head])
        self._fit("text", parts, self.recipe.text_steps, self._caption_loss, self._caption_accuracy)

    def align(self) -> None:
        """Stage 3: the projector alone, from what the tower's heads read."""
        seed = self.recipe.seed
        views = look_at(self._held_out(), self.processor.image_processor)
        warm_projector(self.model, self.heads, views.pixels, seed)
        parts = nn.ModuleList([self.model.model.multi_modal_projector])
        self._fit("align", parts, self.recipe.align_steps, self._answer_loss, self._accuracy)

    def joint(self) -> None:
        """Stage 4: projector and decoder on pictures."""
        core, recipe = self.model.model, self.recipe
        parts = nn.ModuleList([core.multi_modal_projector, core.language_model, self.model.lm_head])
        if hasattr(core, "image_newline"):
            parts.append(nn.ParameterList([core.image_newline]))
        schedule = dict(rates=recipe.joint_rates, before=self._speak_up)
        self._fit("joint", parts, recipe.joint_steps, self._answer_loss, self._accuracy, **schedule)

    def read(self) -> None:
        """For the text-only miniature, after `text`: the decoder on captions, asked what `joint` asks."""
        parts = nn.ModuleList([self.model.model.language_model, self.model.lm_head])
        self._fit("read", parts, self.recipe.read_steps, self._reading_loss, self._caption_accuracy)

    def _speak_up(self, step: int) -> None:
        """Do to the model what the recipe has for this step of the joint stage."""
        core, seed = self.model.model, self.recipe.seed
        self.more = [name for first, name in self.recipe.more if first <= step]
        carriers = nn.ModuleList([core.multi_modal_projector, core.language_model.layers[0]])
        held = any(first <= step < first + hold for first, _, _, hold in self.recipe.louder)
        carriers.requires_grad_(not held)
        for _, kind, share, _ in (entry for entry in self.recipe.louder if entry[0] == step):
            views = look_at(self._held_out(), self.processor.image_processor)
            boost_attribute(self.model, views, kind, share=share, seed=seed)

    def _fit(self, stage: str, parts: nn.Module, *run: Any, lr: float | None = None, **schedule: Any) -> None:
        optimizers = make_optimizers(parts, lr=lr or self.recipe.lr, lr_rest=self.recipe.lr_rest)
        self.fit(stage, parts, *run, optimizers=optimizers, **schedule)

    # ---- losses and accuracies -------------------------------------------------------------------------

    def _draw(self, rng: np.random.Generator, n: int) -> list[Scene]:
        return [sample_scene(rng, frames=self.recipe.frames) for _ in range(n)]

    def _held_out(self) -> list[Scene]:
        """Draw scenes on which the model is fitted by hand, apart from those of training and evaluation."""
        return held_out(self.recipe.held_scenes, self.recipe.seed + 2, self.recipe.frames)

    def _tower_pass(self, scenes: list[Scene]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tower, views = self.model.model.vision_tower, look_at(scenes, self.processor.image_processor)
        with in_half():
            states = tower(views.pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            logits = {name: head(states).float() for name, head in self.heads.items()}
        return logits, patch_truth(views.scenes, round(states.shape[1] ** 0.5), views.windows)

    def _tower_loss(self, rng: np.random.Generator) -> Float[Tensor, ""]:
        return tower_loss(*self._tower_pass(self._draw(rng, self.recipe.tower_batch)))

    @torch.no_grad()
    def _tower_accuracy(self) -> dict[str, float]:
        logits, truth = self._tower_pass(held_out(self.recipe.held_scenes, self.recipe.seed, self.recipe.frames))
        shown = truth["category"] > 0
        right = {name: (logits[name].argmax(-1) == truth[name])[shown] for name in HEADS}
        return {name: 100 * float(hits.float().mean()) for name, hits in right.items()}

    def _answer_loss(
        self, rng: np.random.Generator, *, captions: bool = False, described: bool = True
    ) -> Float[Tensor, ""]:
        recipe = self.recipe
        asked = dict(n_questions=recipe.n_questions)
        if described:
            asked = dict(n_questions=recipe.joint_questions, described=True)
            asked |= dict(word_weight=recipe.joint_question_weight, more=self.more)
        scenes = self._draw(rng, recipe.joint_batch if described else recipe.batch)
        pictures = None if captions else picture_tokens(self.model, self.processor, scenes)
        asked["n_image_tokens"] = None if captions else [len(tokens) for tokens in pictures]
        batch = pack(self.processor.tokenizer, scenes, rng, **asked)
        logits = packed_logits(self.model, batch, pictures)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        weight = batch.weight[:, 1:].flatten()
        return (loss * weight).sum() / weight.sum()

    def _caption_loss(self, rng: np.random.Generator) -> Float[Tensor, ""]:
        return self._answer_loss(rng, captions=True, described=False)

    def _reading_loss(self, rng: np.random.Generator) -> Float[Tensor, ""]:
        return self._answer_loss(rng, captions=True)

    def _accuracy(self, *, captions: bool = False) -> dict[str, float]:
        recipe = self.recipe
        asked = dict(n_scenes=recipe.eval_scenes, seed=recipe.seed, frames=recipe.frames, captions=captions)
        return task_accuracy(self.model, self.processor, **asked)

    def _caption_accuracy(self) -> dict[str, float]:
        return self._accuracy(captions=True)
