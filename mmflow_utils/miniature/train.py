"""The training recipe of the miniatures, in LLaVA's own order.

1. `tower`: the picture encoder learns to say, for each image patch, what thing it shows (layer -2, the one LLaVA reads).
2. `text`: the decoder alone learns to read captions and answer questions about them, predicting *every* token, as a
   language model does before it ever sees a picture.
3. `align`: tower and decoder frozen, the projector learns to speak the decoder's language.
4. `joint`: projector and decoder together on pictures and questions; the tower stays frozen, as LLaVA's does.

Many questions share one picture (or caption) in a packed sequence: each attends to the shared prefix and to itself, and
its rotary positions go on from the prefix, which gives the same numbers as one plain forward per question.
No attention edge is blocked and no flow rewarded: whatever routes the model uses, it found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

from .build import PROMPT
from .questions import BRIDGES, TASK_GENERATORS, ask, factual
from .world import ATTRIBUTES, CATEGORIES, PLACES, SIZE, Scene, caption, draw_scene, sample_scene

__all__ = ["Recipe", "Trainer", "task_accuracy"]

STAGES = ("tower", "text", "align", "joint")
QUESTION_WEIGHT = 0.3  # of the next-token loss on the words of captions and questions, beside 1 on the answer
HEADS = {"category": len(CATEGORIES) + 1, "place": len(PLACES)} | {k: len(v) for k, v in ATTRIBUTES.items()}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and how fast each stage learns; steps, not seconds, so that a run can be repeated."""

    seed: int = 0
    tower_steps: int = 2500
    text_steps: int = 3000
    align_steps: int = 300
    joint_steps: int = 5000
    tower_batch: int = 64  # pictures
    batch: int = 16  # scenes
    n_questions: int = 10  # questions that share a scene
    lr: float = 3e-3  # of Muon on the matrices
    lr_rest: float = 1e-3  # of AdamW on embeddings, norms and biases
    joint_lr_scale: float = 0.7
    ema: float = 0.998
    eval_every: int = 250  # steps
    eval_scenes: int = 64


class Trainer:
    """Trains a model stage by stage, keeps its learning curves, and goes on from where a checkpoint left off."""

    def __init__(self, model: nn.Module, processor, recipe: Recipe, folder: Path):
        self.model, self.processor, self.recipe, self.folder = model, processor, recipe, Path(folder)
        self.tokenizer = processor.tokenizer
        self.model.set_attn_implementation({"text_config": "half_eager"})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.curves: list[dict] = []
        torch.manual_seed(recipe.seed)
        self.heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in HEADS.items()} | {"centre": nn.Linear(128, 2)})

    # ---- stages ----------------------------------------------------------------------------------------------------

    def tower(self) -> None:
        """Stage 1: name what each image patch shows."""
        parts = nn.ModuleList([self.model.model.vision_tower, self.heads])
        self._fit("tower", parts, self.recipe.tower_steps, self._tower_loss, self._tower_accuracy)

    def text(self) -> None:
        """Stage 2: the decoder alone, captions in place of pictures."""
        parts = nn.ModuleList([self.model.model.language_model, self.model.lm_head])
        self._fit("text", parts, self.recipe.text_steps, lambda rng: self._answer_loss(rng, captions=True),
                  lambda: self._accuracy(captions=True))  # fmt: skip

    def align(self) -> None:
        """Stage 3: the projector alone."""
        parts = nn.ModuleList([self.model.model.multi_modal_projector])
        self._fit("align", parts, self.recipe.align_steps, self._answer_loss, self._accuracy)

    def joint(self) -> None:
        """Stage 4: projector and decoder on pictures, at a lower rate."""
        core = self.model.model
        parts = nn.ModuleList([core.multi_modal_projector, core.language_model, self.model.lm_head])
        self._fit("joint", parts, self.recipe.joint_steps, self._answer_loss, self._accuracy,
                  scale=self.recipe.joint_lr_scale)  # fmt: skip

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _fit(self, stage: str, parts: nn.Module, steps: int, loss_of: Callable, evaluate: Callable, scale: float = 1.0):
        """Run one stage from its last checkpoint to its end; afterwards `parts` hold the averaged weights."""
        recipe, path = self.recipe, self.folder / f"{stage}.pt"
        self.model.requires_grad_(False)
        parts.requires_grad_(True)
        optimizers = _optimizers(parts, recipe, scale)
        average = {k: v.detach().clone() for k, v in parts.state_dict().items()}
        first = 0
        if path.exists():
            saved = torch.load(path, weights_only=True)
            first, average = saved["step"], saved["average"]
            self.curves += saved["curves"]
            parts.load_state_dict(saved["parts"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        for step in range(first, steps):
            _set_rate(optimizers, step, steps)
            rng = np.random.default_rng([recipe.seed, STAGES.index(stage), step])  # so that resuming changes nothing
            loss = loss_of(rng)
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(recipe.ema, (step + 1) / (step + 10))
            for key, value in parts.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
            if step % 50 == 0 or step + 1 == steps:
                self._note(stage, step + 1, {("loss", "all"): float(loss)})
            if (step + 1) % recipe.eval_every == 0 or step + 1 == steps:
                raw = {k: v.detach().clone() for k, v in parts.state_dict().items()}
                parts.load_state_dict(average)
                self._note(stage, step + 1, {("accuracy_pct", k): v for k, v in evaluate().items()})
                parts.load_state_dict(raw)
                curves = [row for row in self.curves if row["stage"] == stage]
                saved = dict(step=step + 1, average=average, parts=raw, curves=curves,
                             optimizers=[o.state_dict() for o in optimizers])  # fmt: skip
                torch.save(saved, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
        parts.load_state_dict(average)

    def _note(self, stage: str, step: int, values: dict[tuple[str, str], float]) -> None:
        for (metric, task), value in values.items():
            self.curves.append(dict(stage=stage, step=step, metric=metric, task=task, value=round(value, 4)))
        print(stage, step, *(f"{task} {value:.3g}" for (_, task), value in values.items()), flush=True)

    # ---- tower -----------------------------------------------------------------------------------------------------

    def _tower_loss(self, rng: np.random.Generator) -> Tensor:
        logits, truth = self._tower_pass([sample_scene(rng) for _ in range(self.recipe.tower_batch)])
        return tower_loss(logits, truth)

    def _tower_pass(self, scenes: list[Scene]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tower = self.model.model.vision_tower
        with torch.autocast("cpu", torch.bfloat16):
            states = tower(self.pixels(scenes), output_hidden_states=True).hidden_states[-2][:, 1:]
            logits = {name: head(states).float() for name, head in self.heads.items()}
        return logits, patch_truth(scenes, round(states.shape[1] ** 0.5))

    @torch.no_grad()
    def _tower_accuracy(self) -> dict[str, float]:
        logits, truth = self._tower_pass(held_out(256, self.recipe.seed))
        shown = truth["category"] > 0
        return {name: 100 * float((logits[name].argmax(-1) == truth[name])[shown].float().mean()) for name in HEADS}

    # ---- answers ---------------------------------------------------------------------------------------------------

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """Draw the scenes and send them through the model's own image processor."""
        return self.processor.image_processor([draw_scene(s) for s in scenes], return_tensors="pt")["pixel_values"]

    def _answer_loss(self, rng: np.random.Generator, captions: bool = False) -> Tensor:
        scenes = [sample_scene(rng) for _ in range(self.recipe.batch)]
        batch = pack(self.tokenizer, scenes, rng, self.recipe.n_questions, captions, self.model.config.image_seq_length)
        logits = packed_logits(self.model, batch, None if captions else self.pixels(scenes))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="none")
        weight = batch["weight"][:, 1:].flatten()
        return (loss * weight).sum() / weight.sum()

    def _accuracy(self, captions: bool = False) -> dict[str, float]:
        return task_accuracy(self.model, self.processor, n_scenes=self.recipe.eval_scenes, seed=self.recipe.seed,
                             captions=captions)  # fmt: skip


def _optimizers(parts: nn.Module, recipe: Recipe, scale: float) -> list[torch.optim.Optimizer]:
    """Muon on the weight matrices inside the layers, AdamW on embeddings, heads, norms and biases."""
    matrices, rest = [], []
    for name, p in parts.named_parameters():
        inner = p.ndim == 2 and "embed" not in name and ".layers." in name or "projector" in name and p.ndim == 2
        (matrices if inner else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=recipe.lr_rest * scale, betas=(0.9, 0.98), weight_decay=0.01)
    muon = torch.optim.Muon(
        matrices, lr=recipe.lr * scale, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    ) if matrices else None  # fmt: skip
    optimizers = [o for o in (adam, muon) if o is not None]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _set_rate(optimizers: list, step: int, steps: int) -> None:
    """Warm up over 100 steps, hold, and fall linearly to nothing over the last 40 %."""
    share = min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def held_out(n_scenes: int, seed: int) -> list[Scene]:
    """Scenes that no training step draws: the seed sequence of evaluation is its own."""
    rng = np.random.default_rng([seed, 1000])
    return [sample_scene(rng) for _ in range(n_scenes)]


# ---- the tower's labels --------------------------------------------------------------------------------------------


def patch_truth(scenes: list[Scene], side: int) -> dict[str, Tensor]:
    """What each of `side` x `side` image patches shows: class indices [n, side²], 0 = background for the category."""
    centres = (np.arange(side) + 0.5) * SIZE / side
    truth = {name: np.zeros((len(scenes), side, side), dtype=np.int64) for name in HEADS}
    offset = np.zeros((len(scenes), side, side, 2), dtype=np.float32)
    for i, scene in enumerate(scenes):
        truth["place"][i] = PLACES.index(scene.place)
        for thing in scene.things:
            reach = 0.55 * thing.size + 0.25 * SIZE / side
            here = np.ix_(np.abs(centres - thing.y) <= reach, np.abs(centres - thing.x) <= reach)
            truth["category"][i][here] = 1 + CATEGORIES.index(thing.category)
            for kind, values in ATTRIBUTES.items():
                truth[kind][i][here] = values.index(thing.attribute(kind))
            offset[i][here] = (thing.x / SIZE, thing.y / SIZE)
    tensors = {name: torch.from_numpy(v).flatten(1) for name, v in truth.items()}
    return tensors | {"centre": torch.from_numpy(offset).flatten(1, 2)}


def tower_loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Cross-entropies of the heads, attributes and centre on patches that show a thing; background counts 0.15."""
    shown = truth["category"] > 0
    weight = torch.ones(HEADS["category"])
    weight[0] = 0.15
    loss = F.cross_entropy(logits["category"].flatten(0, 1), truth["category"].flatten(), weight)
    loss = loss + 0.2 * F.cross_entropy(logits["place"].flatten(0, 1), truth["place"].flatten())
    for kind in ATTRIBUTES:
        loss = loss + F.cross_entropy(logits[kind][shown], truth[kind][shown])
    return loss + 5 * F.mse_loss(logits["centre"][shown], truth["centre"][shown])


# ---- packed questions ----------------------------------------------------------------------------------------------


def draft_questions(scene: Scene, rng: np.random.Generator, n: int) -> list:
    """`n` questions about a scene: one of each task, the rest from the other groups and facts."""
    drafts = [ask(_one(rng, group), scene, rng) for group in TASK_GENERATORS.values()]
    bridges = (*BRIDGES, factual)
    while len(drafts) < n:
        drafts.append(ask(_one(rng, bridges), scene, rng))
    return [d for d in drafts if d is not None]


def _one(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def pack(tokenizer, scenes: list[Scene], rng, n_questions: int, captions: bool, n_image_tokens: int) -> dict[str, Tensor]:
    """Lay the questions of each scene out behind their shared prefix; padded to the longest.

    Returns ids, position, segment (0 prefix, k question, -1 padding), weight of each token's loss, and answer (1 where
    a token belongs to an answer), all [n_scenes, length]; drafts: the questions, per scene.
    """
    head, tail = PROMPT.split("<image>")
    rows, drafts = [], []
    n_constant = len(tokenizer(tail.format(question="?"), add_special_tokens=False).input_ids) - 2  # all but "\n?"
    for scene in scenes:
        asked = draft_questions(scene, rng, n_questions)
        context = caption(scene, rng) if captions else "<image>"
        texts = [head + context] + [head + context + tail.format(question=d.text) for d in asked]
        prefix, *questions = tokenizer(texts).input_ids
        questions = [tokens[len(prefix) :] for tokens in questions]
        answers = tokenizer([" " + d.answer.capitalize() for d in asked], add_special_tokens=False).input_ids
        if not captions:
            prefix = prefix[:-1] + [prefix[-1]] * n_image_tokens
        weight = QUESTION_WEIGHT if captions else 0.0
        rows.append(_row(prefix, questions, answers, tokenizer.eos_token_id, n_constant, weight))
        drafts.append(asked)
    length = max(len(row["ids"]) for row in rows)
    empty = dict(ids=tokenizer.pad_token_id, position=0, segment=-1, weight=0.0, answer=0)
    packed = {k: torch.tensor([row[k] + [v] * (length - len(row[k])) for row in rows]) for k, v in empty.items()}
    return packed | {"drafts": drafts}


def _row(prefix: list, questions: list[list], answers: list[list], eos: int, suffix: int, prefix_weight: float) -> dict:
    n = len(prefix)
    row = dict(ids=list(prefix), position=list(range(n)), segment=[0] * n, weight=[prefix_weight] * n, answer=[0] * n)
    for k, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        size = len(question) + len(answer) + 1
        row["ids"] += question + answer + [eos]
        row["position"] += range(n, n + size)
        row["segment"] += [k] * size
        row["weight"] += [0.0] + [QUESTION_WEIGHT] * (len(question) - 1 - suffix) + [0.02] * suffix
        row["weight"] += [1.0] * len(answer) + [0.2]
        row["answer"] += [0] * len(question) + [1] * len(answer) + [0]
    return row


def _half_attention(module, query, key, value, attention_mask, scaling: float, **_):
    """Plain attention in bfloat16 throughout: on a CPU twice as fast to train as the fused kernels at this size."""
    with torch.autocast("cpu", enabled=False):
        key, value = (repeat_kv(x.bfloat16(), module.num_key_value_groups) for x in (key, value))
        scores = (query.bfloat16() * scaling) @ key.transpose(-1, -2) + attention_mask
        return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("half_eager", _half_attention)
AttentionMaskInterface.register("half_eager", sdpa_mask)  # without it the name would be silently non-causal


def packed_logits(model: nn.Module, batch: dict[str, Tensor], pixels: Tensor | None) -> Tensor:
    """Next-token logits [n_scenes, length, vocab] of a packed batch; `pixels` None where captions stand in."""
    core = model.model
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = core.language_model.embed_tokens(batch["ids"])
        if pixels is not None:
            with torch.no_grad():
                states = core.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            features = core.multi_modal_projector(states).to(embeddings.dtype)
            image = batch["ids"] == model.config.image_token_id
            embeddings = embeddings.masked_scatter(image.unsqueeze(-1), features)
        segment = batch["segment"]
        seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        seen = (seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril()).unsqueeze(1)
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -1e9)
        states = core.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=batch["position"], use_cache=False
        ).last_hidden_state
        return model.lm_head(states).float()


@torch.no_grad()
def task_accuracy(
    model: nn.Module, processor, *, n_scenes: int, seed: int, captions: bool = False, shuffled: bool = False
) -> dict[str, float]:
    """Share (%) of held-out questions whose every answer token is the most probable one, per task.

    `shuffled` gives each question another scene's picture: what a blind model would reach.
    """
    scenes, rng = held_out(n_scenes, seed), np.random.default_rng([seed, 1001])
    batch = pack(processor.tokenizer, scenes, rng, 10, captions, model.config.image_seq_length)
    shown = scenes[1:] + scenes[:1] if shuffled else scenes
    pixels = None
    if not captions:
        pictures = [draw_scene(s) for s in shown]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    logits = packed_logits(model, batch, pixels)
    wrong = (logits[:, :-1].argmax(-1) != batch["ids"][:, 1:]) & (batch["answer"][:, 1:] == 1)
    hits: dict[str, list[bool]] = {}
    detailed = {g.__name__: task for task, group in TASK_GENERATORS.items() for g in group} | {"existThatOrC": "LogicalObj"}
    for i, asked in enumerate(batch["drafts"]):
        failed = set(batch["segment"][i, 1:][wrong[i]].tolist())
        for k, draft in enumerate(asked, start=1):
            hits.setdefault(detailed.get(draft.detailed, "other"), []).append(k not in failed)
    return {task: 100 * float(np.mean(v)) for task, v in sorted(hits.items())}
