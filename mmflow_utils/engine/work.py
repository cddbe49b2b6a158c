"""What a prompt costs the decoder, counted and not timed: floating-point operations and bytes of cache.

work = work_of(model, encoded, Pruning(from_layer=20))
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmflow_utils.engine.pruning import Pruning
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, image_positions

__all__ = ["Work", "count_work", "equal_work", "prompt_lengths", "work_of"]

FASTV_LAYER = 2  # Chen et al. 2024 rank by the second layer's attention and remove from the third (K = 2) on


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a prompt and the tokens decoded after it cost the decoder.

    Attributes:
        first_token_flops: Floating-point operations (a multiplication and an addition are two) to the first logits.
        next_token_flops: Those of each further token.
        cache_bytes: Keys and values of the prompt.
    """

    first_token_flops: int
    next_token_flops: tuple[int, ...]
    cache_bytes: int


def count_work(config: Any, n_tokens: Sequence[int], *, n_new: int = 1, itemsize: int = 4) -> Work:
    """Count the decoder's work on a prompt that has `n_tokens[i]` positions in layer i.

    Matrix products count, as for torch's FlopCounterMode: projections, gated MLP, scores and mixed values (the full
    square: a causal kernel may do half), the unembedding of one position; not the image encoder. Torch's own counter
    would have to run the model for each number of tokens that `equal_work` compares; a test holds the two together.

    Args:
        config: The decoder's configuration, of a Llama-like architecture.
        n_tokens: Positions in each layer.
        n_new: Tokens to be decoded, the first included.
        itemsize: Bytes of a number in the cache.

    Raises:
        ValueError: Not one length for each layer; an `n_new` below 1.

    Example:
        >>> from types import SimpleNamespace
        >>> shape = dict(hidden_size=2, intermediate_size=3, num_attention_heads=1, num_key_value_heads=1)
        >>> count_work(SimpleNamespace(**shape, num_hidden_layers=1, vocab_size=5), [4]).first_token_flops
        420
    """
    if len(n_tokens) != config.num_hidden_layers or n_new < 1:
        raise ValueError(
            f"Expected {config.num_hidden_layers} prompt lengths, one a layer, and n_new of 1 or more, "
            f"got {len(n_tokens)} and {n_new}."
        )
    d_model, heads = config.hidden_size, config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or d_model // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    weights = 2 * d_model * d_head * (heads + key_heads) + 3 * d_model * config.intermediate_size
    unembed = 2 * d_model * config.vocab_size

    def work(rows: int, keys: int) -> int:
        return 2 * rows * weights + 4 * rows * keys * heads * d_head

    return Work(
        first_token_flops=sum(work(n, n) for n in n_tokens) + unembed,
        next_token_flops=tuple(sum(work(1, n + t) for n in n_tokens) + unembed for t in range(1, n_new)),
        cache_bytes=sum(2 * key_heads * d_head * n * itemsize for n in n_tokens),
    )


def prompt_lengths(n_layers: int, n_tokens: int, n_image: int, pruning: Pruning | None = None) -> list[int]:
    """Return the number of positions in each layer.

    >>> prompt_lengths(4, 10, 6, Pruning(from_layer=3, n_kept=1))
    [10, 10, 10, 5]
    """
    pruning = pruning or Pruning(from_layer=n_layers)
    gone = n_image - pruning.n_kept
    return [n_tokens - gone * (layer >= pruning.from_layer) for layer in range(n_layers)]


def work_of(model: VLM, encoded: Encoded, pruning: Pruning | None = None, *, n_new: int = 1) -> Work:
    """Count the decoder's work on a prompt, with or without image tokens, in the model's own precision."""
    config, n_image = model.text.config, len(image_positions(encoded))
    lengths = prompt_lengths(model.n_layers, encoded.positions.n_tokens, n_image, pruning)
    return count_work(config, lengths, n_new=n_new, itemsize=model.dtype.itemsize)


def equal_work(
    model: VLM, encoded: Encoded, pruning: Pruning, *, choice: str, from_layer: int = FASTV_LAYER, seed: int = 0
) -> Pruning | None:
    """Return the pruning from a layer on that keeps the most image tokens for no more work than another pruning.

    Args:
        model, encoded: The model and the prompt.
        pruning: Whose work to the first token is the limit.
        choice, from_layer, seed: Of the pruning that is sought, see `Pruning`; FastV's layer by default.

    Returns:
        The pruning; None where even keeping no token costs more, or the model has no such layer.
    """
    if from_layer > model.n_layers:
        return None
    n_image = len(image_positions(encoded))
    found = [Pruning(from_layer=from_layer, n_kept=n, choice=choice, seed=seed) for n in range(n_image + 1)]
    flops = work_of(model, encoded, pruning).first_token_flops
    n_fitting = bisect_right(found, flops, key=lambda one: work_of(model, encoded, one).first_token_flops)
    return found[n_fitting - 1] if n_fitting else None
