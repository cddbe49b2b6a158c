"""Image tokens removed from a layer on: not computed, not cached, in the prompt and in decoding (App. F).

with image_tokens_removed(model, encoded, Pruning(from_layer=20)):
    answer(model, encoded)
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmflow_utils.engine.closeness import check_close, need_numbers, probabilities, rounding
from mmflow_utils.engine.packed_attention import PACKED_ATTENTION
from mmflow_utils.engine.packed_pass import layer_kwargs_at
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.models.adapter import VLM, text_inputs
from mmflow_utils.prompts.encoding import Encoded, image_positions
from mmflow_utils.prompts.flows import Variant

__all__ = ["Pruning", "Removal", "compare_to_knockout", "greedy_decode", "image_tokens_removed", "read_prompt"]

CHOICES = ("random", "attention")
Prompt = tuple[Float[Tensor, "1 n d"], Tensor]  # what enters the decoder, and its positions


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which image tokens are gone, and from where on.

    Attributes:
        from_layer: The first layer (0-based) without them; as many as there are layers removes nothing.
        n_kept: How many image tokens stay all the same.
        choice: Which these are: `random`, or those that the last position gave most `attention` to in the
            layer before, averaged over heads, as FastV does (Chen et al. 2024).
        seed: Of the random choice.
    """

    from_layer: int
    n_kept: int = 0
    choice: str = "random"
    seed: int = 0


class Removal:
    """A pruning at work on one prompt; `kept` are the prompt's positions that remain, once it has run."""

    def __init__(self, model: VLM, encoded: Encoded, pruning: Pruning):
        self.model, self.pruning = model, pruning
        self.image, self.n_tokens = image_positions(encoded), encoded.positions.n_tokens
        self.kept: list[int] = list(range(self.n_tokens))
        self.received: Float[Tensor, " n"] | None = None  # attention from the last position, mean over heads
        self._picked: tuple = ()  # what a layer was given, and what of it remains: the next is given the same

    def before(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Change what a layer is called with: rows of the prompt that are gone, and columns of its mask."""
        hidden = args[0]
        # In decoding a layer is called with the rows of new tokens, none of which is gone.
        reads_prompt = kwargs["position_embeddings"][0].shape[-2] == self.n_tokens
        if i < self.pruning.from_layer:  # just one layer before is hooked, to be watched
            return args, kwargs | ({PACKED_ATTENTION: self.watch} if reads_prompt else {})
        if reads_prompt and i == self.pruning.from_layer:
            self.kept, self._picked = self._choose(), ()
            hidden = hidden[:, self.kept]
        return (hidden, *args[1:]), self._remaining(kwargs, reads_prompt)

    def watch(self, module, query, key, value, attention_mask, *, scaling, **kwargs) -> tuple:
        """Attend as the library does, and note what the last position attends to: one row of the pattern."""
        # Query heads that share keys are neighbors.
        last = query[0, :, -1].reshape(key.shape[1], -1, query.shape[-1])
        pattern = ((last @ key[0].transpose(1, 2)).float() * scaling).softmax(-1)
        self.received = pattern.flatten(0, 1).mean(0)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    def _remaining(self, kwargs: dict, reads_prompt: bool) -> dict:
        """Pick what belongs to the tokens that remain: rotary positions as they were, the same cache."""
        given, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        if self._picked and self._picked[0] is given and self._picked[1] is mask:
            return self._picked[2]
        held = {"attention_mask": self._mask(mask, reads_prompt), "past_key_values": kwargs.get("past_key_values")}
        left = (layer_kwargs_at(kwargs, self.kept) if reads_prompt else kwargs) | held
        self._picked = given, mask, left
        return left

    def _choose(self) -> list[int]:
        """Return the positions that remain: all of the text, and the image tokens that are chosen."""
        if self.pruning.choice == "attention":
            assert self.received is not None  # `watch` ran in the layer before
            best = self.received[self.image].topk(self.pruning.n_kept).indices.tolist()
            chosen = [self.image[n] for n in best]
        else:
            chosen = np.random.default_rng(self.pruning.seed).permutation(self.image)[: self.pruning.n_kept].tolist()
        gone = set(self.image) - set(chosen)
        return [p for p in range(self.n_tokens) if p not in gone]

    def _mask(self, mask: Tensor | None, reads_prompt: bool) -> Tensor | None:
        """Cut a mask down to what remains; fused attention has none, and stays causal as it is told."""
        if mask is None or not reads_prompt and self.pruning.from_layer == 0:
            return mask  # the library sizes a mask by the first layer's cache, here already without the image
        columns = torch.tensor([*self.kept, *range(self.n_tokens, mask.shape[-1])], device=mask.device)
        mask = mask.index_select(-1, columns)
        return mask.index_select(-2, columns) if reads_prompt else mask


@contextmanager
def image_tokens_removed(model: VLM, encoded: Encoded, pruning: Pruning | None) -> Iterator[Removal | None]:
    """Run the model without image tokens from a layer on, while the block runs (App. F).

    They are neither computed nor cached there, in the prompt as in decoding; newline tokens of LLaVA-NeXT are image
    tokens. What remains keeps its rotary position. The library's own layers run, in the attention kernel that is
    set; a choice by attention sets the fused one (`sdpa`), and adds a row of scores in one layer.

    Args:
        model: The model.
        encoded: The one prompt that it will be run on, by `greedy_decode` or by the library's `generate`.
        pruning: What to remove; None removes nothing.

    Yields:
        The removal; its `kept` are the positions of the prompt that remained.

    Raises:
        ValueError: A prompt without picture; a layer, or a number of tokens, that isn't there; a choice by attention
            with no layer before; a decoder with sliding windows.
    """
    if pruning is None:
        yield None
        return
    check_pruning(model, encoded, pruning)
    removal = Removal(model, encoded, pruning)
    watched = pruning.choice == "attention" and pruning.from_layer < model.n_layers
    with ExitStack() as stack:
        for i in range(pruning.from_layer - watched, model.n_layers):
            hook = partial(removal.before, i)
            stack.enter_context(model.layers[i].register_forward_pre_hook(hook, with_kwargs=True))
        if watched:
            stack.enter_context(model.attention_kernel(PACKED_ATTENTION))
        yield removal


def check_pruning(model: VLM, encoded: Encoded, pruning: Pruning) -> None:
    """Refuse what can't be done to this prompt in this model."""
    n_image, n_layers = len(image_positions(encoded)), model.n_layers
    if pruning.choice not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, got {pruning.choice!r}.")
    if not 0 <= pruning.from_layer <= n_layers:
        raise ValueError(f"from_layer must be 0 to {n_layers} in this model, got {pruning.from_layer}.")
    if not 0 <= pruning.n_kept <= n_image:
        raise ValueError(f"n_kept must be 0 to the prompt's {n_image} image tokens, got {pruning.n_kept}.")
    if pruning.choice == "attention" and pruning.from_layer == 0:
        raise ValueError("A choice by attention looks at the layer before: set from_layer to 1 or more.")
    if getattr(model.text.config, "sliding_window", None):
        raise ValueError(
            f"{model.name} attends in sliding windows, whose reach would change with the tokens removed: "
            "choose a model with full attention."
        )


def prompt_embeds(model: VLM, encoded: Encoded) -> Prompt:
    """Encode a prompt's picture and return what enters the decoder's first layer, and at which positions.

    Raises:
        ValueError: A prompt without picture; a model that isn't itself when it reads these alone, as it lets the tokens
            of an image attend to one another, say.
    """
    image_positions(encoded)  # refuses a prompt without
    given, own = text_inputs(model, encoded.inputs)
    need_numbers(encoded, own)
    embeds, at = given["inputs_embeds"], given.get("position_ids")
    prompt = embeds, torch.arange(embeds.shape[1], device=embeds.device)[None] if at is None else at
    both = probabilities(read_prompt(model, prompt)[0]), probabilities(own[0])
    names = ("A prompt read without its picture's path", "the library's own output")
    advice = f"removing image tokens isn't proven for {model.name}, choose another model"
    check_close(encoded, *both, tolerance=rounding(model.dtype), names=names, advice=advice)
    return prompt


@torch.inference_mode()
def read_prompt(model: VLM, prompt: Prompt) -> tuple[Float[Tensor, " vocab"], Cache]:
    """Run the decoder over a prompt whose picture is already encoded; return its last logits and a cache."""
    out = model.text(inputs_embeds=prompt[0], position_ids=prompt[1], use_cache=True)
    return model.unembed(out.last_hidden_state[:, -1:])[0, -1], out.past_key_values


@torch.inference_mode()
def continue_prompt(
    model: VLM, first: int, cache: Cache, position: int, n_new: int, *, stop: Sequence[int] = ()
) -> list[int]:
    """Decode greedily until there are `n_new` new tokens, of which the first is given and stands at `position`."""
    new = [first]
    while len(new) < n_new and new[-1] not in stop:
        # Positions are counted in the whole prompt: a cache without the image would count fewer.
        at = torch.tensor([[position + len(new) - 1]], device=model.device)
        ids = torch.tensor([[new[-1]]], device=model.device)
        out = model.text(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
        new.append(int(model.unembed(out.last_hidden_state[:, -1:])[0, -1].argmax()))
    return new


def greedy_decode(
    model: VLM,
    encoded: Encoded,
    pruning: Pruning | None = None,
    *,
    embeds: Prompt | None = None,
    max_new_tokens: int = 8,
) -> list[int]:
    """Answer greedily, with or without image tokens, and return the new tokens.

    Args:
        model, encoded: The model and the prompt.
        pruning: What to remove; None for the intact model.
        embeds: The prompt with its picture encoded (`prompt_embeds`), where it is decoded more than once.
        max_new_tokens: Stop after so many, if the model doesn't.

    Example:
        >>> ids = greedy_decode(model, mm.encode(model, sample), Pruning(from_layer=8))
        >>> model.tokenizer.decode(ids, skip_special_tokens=True)
        'Round'
    """
    embeds = prompt_embeds(model, encoded) if embeds is None else embeds
    ends: Any = model.hf.generation_config.eos_token_id
    stop = [ends] if isinstance(ends, int) else list(ends or ())
    with image_tokens_removed(model, encoded, pruning):
        logits, cache = read_prompt(model, embeds)
        # Where positions have three dimensions, those of an image are fewer than its tokens.
        position = int(embeds[1].max()) + 1
        return continue_prompt(model, int(logits.argmax()), cache, position, max_new_tokens, stop=stop)


@torch.inference_mode()
def compare_to_knockout(
    model: VLM, encoded: Encoded, pruning: Pruning, *, knockout_from: int | None = None, tolerance: float = inf
) -> float:
    """Compare a removal with the plain way: the same tokens blocked from all that remain, in the same layers.

    A removed token is one that nobody may attend to any more: what becomes of its own row doesn't matter.

    Args:
        model, encoded: The model and the prompt.
        pruning: What is removed.
        knockout_from: Where the knockout begins, for a control that must differ; by default where the removal does.
        tolerance: The largest difference that is no error.

    Returns:
        The largest difference in probability at the last position.

    Raises:
        ValueError: A difference above the tolerance.
    """
    embeds = prompt_embeds(model, encoded)
    with image_tokens_removed(model, encoded, pruning) as removal:
        logits, _ = read_prompt(model, embeds)
    assert removal is not None
    layers = range(pruning.from_layer if knockout_from is None else knockout_from, model.n_layers)
    gone = tuple(sorted({*range(removal.n_tokens)} - {*removal.kept}))
    # Without anything gone the variant has no source and is the clean run.
    target = tuple(p for p in removal.kept if not gone or p > gone[0])
    run = run_reference(model, encoded, [Variant(layers=layers, target=target, source=gone)])
    return check_close(
        encoded,
        probabilities(logits),
        probabilities(run.variants[0]),
        tolerance=tolerance,
        names=(f"Removing image tokens ({pruning})", "knocking them out"),
        advice=f"removing image tokens isn't proven for {model.name}, choose another model",
    )
