"""Many questions about one picture in one sequence: how the miniatures are trained and scored quickly.

    prefix (the picture, or a caption in its place) | question, answer, </s> | question, answer, </s> | …

Each question attends to the prefix and to itself, and its rotary positions go on from the prefix. That gives
the same numbers as one plain forward for each question, several times as fast.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, repeat

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase, ProcessorMixin
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

from miniature.build import PROMPT
from miniature.drawing import draw_scene
from miniature.precision import HALF, in_half
from miniature.questions import GENERATORS, ask
from miniature.questions.bridges import BRIDGES
from miniature.questions.draft import Draft, pick
from miniature.questions.extras import describe, factual
from miniature.questions.tasks import TASK_GENERATORS
from miniature.world import Scene, caption

__all__ = ["ATTENTION", "Packed", "pack", "packed_logits", "picture_tokens", "visible"]

ATTENTION = "eager_in_mask_dtype"
# How much the prediction of a token counts in the loss. A real language model has learned to predict every
# token: so do these, though the answer counts most, and the instruction, always the same, next to nothing.
ANSWER, END, WORD, INSTRUCTION = 1.0, 0.2, 0.3, 0.02


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Questions behind their shared prefixes: a row for each scene, padded to the longest."""

    ids: Int[Tensor, "scene token"]
    position: Int[Tensor, "scene token"]
    segment: Int[Tensor, "scene token"]  # 0 the prefix, k the k-th question with its answer, -1 padding
    weight: Float[Tensor, "scene token"]  # of the loss where this token is predicted
    answer: Int[Tensor, "scene token"]  # 1 where a token belongs to an answer
    drafts: list[list[Draft]]  # the questions of each scene


def pack(
    tokenizer: PreTrainedTokenizerBase,
    scenes: list[Scene],
    rng: np.random.Generator,
    *,
    n_questions: int,
    n_image_tokens: Sequence[int] | None,
    described: bool = False,
    more: Sequence[str] = (),
    word_weight: float = WORD,
    told: list[Scene] | None = None,
) -> Packed:
    """Ask `n_questions` about each scene and lay them out behind its picture, or behind a caption of it.

    Args:
        tokenizer: The miniature's.
        scenes: A row of the batch each.
        rng: Draws questions and captions.
        n_questions: Questions that share a scene; a few less where the scene doesn't allow one.
        n_image_tokens: Tokens that each picture takes; None lays out captions in their place.
        described: Ask for descriptions too, of each thing and of their row.
        more: Types of questions (`GENERATORS`) that are asked once more for each time they stand here.
        word_weight: How much the prediction of a caption's or a question's words counts in the loss, beside 1
            for an answer.
        told: The scenes that the captions tell of, by default those that are asked about.
    """
    head, _ = PROMPT.split("<image>")
    captions = n_image_tokens is None
    n_taken = [0] * len(scenes) if captions else n_image_tokens
    rows, drafts = [], []
    for scene, other, n_tokens in zip(scenes, told or scenes, n_taken, strict=True):
        asked = _draft_questions(scene, rng, n_questions, more) + (describe(scene) if described else [])
        before = head + (caption(other, rng) if captions else "<image>")
        tails = [_tail(draft) for draft in asked]
        texts = [before + tail.format(question=d.text) for tail, d in zip(tails, asked, strict=True)]
        prefix, *prompts = tokenizer([before, *texts]).input_ids
        questions = [prompt[len(prefix) :] for prompt in prompts]
        # What comes after the question; "\n" and "?" are a token each.
        n_after = [len(tokenizer(t.format(question="?"), add_special_tokens=False).input_ids) - 2 for t in tails]
        answers = [f" {draft.answer.capitalize()}" for draft in asked]
        answers = tokenizer(answers, add_special_tokens=False).input_ids
        if not captions:
            prefix += [prefix[-1]] * (n_tokens - 1)
        parts = zip(questions, n_after, answers, strict=True)
        prefix_weight = word_weight if captions else 0.0
        rows.append(_row(prefix, parts, tokenizer.eos_token_id, prefix_weight, word_weight))
        drafts.append(asked)
    longest = max(map(len, rows))
    padding = (tokenizer.pad_token_id, 0, -1, 0.0, 0)
    rows = [row + [padding] * (longest - len(row)) for row in rows]
    names = ("ids", "position", "segment", "weight", "answer")
    columns = {name: torch.tensor([[token[i] for token in row] for row in rows]) for i, name in enumerate(names)}
    return Packed(**columns, drafts=drafts)


def _draft_questions(scene: Scene, rng: np.random.Generator, n: int, more: Sequence[str]) -> list[Draft]:
    """Draft up to `n` different questions: one of each task, one by a fact, the rest of the other groups."""
    drafts = [ask(pick(rng, group), scene, rng) for group in TASK_GENERATORS.values()]
    drafts.append(ask(factual, scene, rng))
    while len(drafts) < n:
        drafts.append(ask(pick(rng, BRIDGES), scene, rng))
    drafts += [ask(generator, scene, rng) for name in more for generator in GENERATORS if generator.__name__ == name]
    return list({draft.text: draft for draft in drafts if draft is not None}.values())


def _tail(draft: Draft) -> str:
    """Return the prompt from the picture on; as in LLaVA's training, a description isn't asked for one word."""
    tail = PROMPT.split("<image>")[1]
    return "\n{question} ASSISTANT:" if draft.detailed == "describe" else tail


def _row(
    prefix: list[int],
    parts: Iterable[tuple[list[int], int, list[int]]],
    eos: int,
    prefix_weight: float,
    word_weight: float,
) -> list[tuple[int, int, int, float, int]]:
    """Lay out one scene's questions and answers: id, position, segment, weight and answer of each token.

    The parts are the ids of a question, how many of them come after its words, and the ids of its answer.
    A question's first token counts for nothing: the token before it belongs to another question.
    """
    tokens = [(token, i, 0, prefix_weight, 0) for i, token in enumerate(prefix)]
    for segment, (question, n_after, answer) in enumerate(parts, start=1):
        n_words = len(question) - 1 - n_after
        weights = [0.0] + [word_weight] * n_words + [INSTRUCTION] * n_after + [ANSWER] * len(answer) + [END]
        is_answer = [0] * len(question) + [1] * len(answer) + [0]
        ids = [*question, *answer, eos]
        tokens += zip(ids, count(len(prefix)), repeat(segment), weights, is_answer, strict=False)
    return tokens


def picture_tokens(
    model: nn.Module, processor: ProcessorMixin, scenes: list[Scene], *, half: bool = True
) -> list[Float[Tensor, "_ d"]]:
    """Draw scenes and return what stands at their image tokens: the projector's output, newlines included.

    Args:
        model: A LLaVA-1.5 or a LLaVA-NeXT.
        processor: Its processor.
        scenes: A picture each.
        half: Compute in `HALF`, as in training, or in float32.
    """
    seen = processor.image_processor([draw_scene(scene) for scene in scenes], return_tensors="pt")
    with in_half(half):
        return list(model.get_image_features(**seen).pooler_output)


def packed_logits(
    model: nn.Module,
    batch: Packed,
    pictures: list[Float[Tensor, "_ d"]] | None,
    *,
    half: bool = True,
) -> Float[Tensor, "scene token vocab"]:
    """Predict the next token at each place of a packed batch.

    Args:
        model: A LLaVA whose decoder attends as `ATTENTION`, which keeps to the mask's precision.
        batch: What `pack` laid out.
        pictures: `picture_tokens` of the scenes, or None where captions stand in for them.
        half: Compute in `HALF`, as in training, or in float32.
    """
    core = model.model
    with in_half(half):
        embeddings = core.language_model.embed_tokens(batch.ids)
        if pictures is not None:
            image = batch.ids == model.config.image_token_id
            embeddings = embeddings.masked_scatter(image.unsqueeze(-1), torch.cat(pictures).to(embeddings.dtype))
        mask = torch.zeros(1, dtype=HALF if half else torch.float32)
        states = core.language_model(
            inputs_embeds=embeddings,
            attention_mask=torch.where(visible(batch.segment).unsqueeze(1), mask, -1e9),
            position_ids=batch.position,
            use_cache=False,
        ).last_hidden_state
        return model.lm_head(states).float()


def visible(segment: Int[Tensor, "scene token"]) -> Bool[Tensor, "scene token token"]:
    """Return which keys (last axis) each query sees: what came before in the prefix and in its own question."""
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return seen & torch.ones(seen.shape[1:], dtype=torch.bool).tril()


def _attention_in_mask_dtype(module, query, key, value, attention_mask, scaling: float, **_):
    """Attend plainly in the mask's precision: bfloat16 on a CPU trains twice as fast as fused kernels."""
    with torch.autocast("cpu", enabled=False):
        query, key, value = (x.to(attention_mask.dtype) for x in (query, key, value))
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        scores = (query * scaling) @ key.transpose(-1, -2) + attention_mask
        return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention_in_mask_dtype)
# A name without a mask function gets no mask at all, and is silently non-causal.
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
