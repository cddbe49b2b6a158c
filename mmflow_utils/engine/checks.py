"""Checks on one prompt: did the adapter find the right parts, and does a knockout bite?

check_model(model, encoded)
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mmflow_utils.engine.closeness import check_close, probabilities, rounding
from mmflow_utils.engine.reference import intervene, run_reference
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import Variant

__all__ = ["attention_from", "attention_pattern", "check_model"]

_UNSUPPORTED = "the adapter doesn't fit this model"


def check_model(model: VLM, encoded: Encoded, *, strict: bool = True) -> pd.DataFrame:
    """Check on one prompt that the adapter found the right parts and that a knockout bites.

    Args:
        model, encoded: The model and the prompt.
        strict: Raise what fails: nothing that is measured after it would be a result.

    Returns:
        One row per check: `check`, `passed`, `detail`.

    Raises:
        ValueError: A check that failed.
    """
    checks: dict[str, Callable[[VLM, Encoded], object]] = {
        "every layer has its parts": _check_layers,
        "attention and MLP are all that a layer adds": _check_sum,
        # Every clean run's norm and unembedding are held against the library's own output.
        "head of normed residual stream gives the logits": partial(run_reference, variants=[]),
        "empty knockout changes nothing": _check_empty,
        "blocked attention is 0, the rest renormalizes": _check_mask,
        "positions are the words they are called": _check_positions,
    }
    rows = []
    for name, check in checks.items():
        try:
            check(model, encoded)
            problem = ""
        except (AttributeError, ValueError, KeyError, RuntimeError) as error:
            problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        rows.append({"check": name, "passed": not problem, "detail": problem or "as expected"})
        if strict and problem:
            raise ValueError(f"The check that {name} fails on sample {encoded.sample.sample_id}: {problem}")
    return pd.DataFrame(rows)


def _check_layers(model: VLM, encoded: Encoded) -> None:
    for layer in range(model.n_layers):
        model.attention(layer), model.mlp(layer), model.value_proj(layer), model.output_proj(layer)
    if model.n_layers != (said := model.text.config.num_hidden_layers):
        raise ValueError(f"found {model.n_layers} layers, the configuration says {said}")


def _check_sum(model: VLM, encoded: Encoded) -> None:
    """Silence attention and MLP of one layer at every position: what enters it must leave it (Eq. 1)."""
    layer, everywhere = model.n_layers // 2, tuple(range(encoded.positions.n_tokens))
    with ExitStack() as stack:
        for part in ("attention_output", "mlp_output"):
            silent = Variant(layers=range(layer, layer + 1), target=everywhere, intervention=part)
            stack.enter_context(intervene(model, silent, encoded.positions.n_tokens))
        stream = run_reference(model, encoded, []).resid_post
    if worst := (stream[layer + 1] - stream[layer]).abs().max().item():
        raise ValueError(f"without either, layer {layer} still changes the stream by {worst:.1e}")


def _check_empty(model: VLM, encoded: Encoded) -> None:
    nothing = Variant(layers=range(model.n_layers), target=encoded.positions["last"])
    run = run_reference(model, encoded, [nothing])
    both = probabilities(run.variants[0]), probabilities(run.base)
    names = ("An empty knockout", "the clean run")
    check_close(encoded, *both, tolerance=rounding(model.dtype), names=names, advice=_UNSUPPORTED)


def _check_mask(model: VLM, encoded: Encoded) -> None:
    """Block Question -> Last in one layer and look at that layer's attention pattern itself."""
    layer, source = model.n_layers // 2, list(encoded.positions["question"])
    last = encoded.positions.last
    variant = Variant(layers=range(layer, layer + 1), target=(last,), source=tuple(source))
    expected = attention_pattern(model, encoded, layer)[:, last].clone()  # no inference tensor
    blocked = attention_pattern(model, encoded, layer, variant)[:, last]
    if blocked[:, source].any():
        raise ValueError(f"a blocked edge keeps an attention weight of {blocked[:, source].max():.1e}")
    expected[:, source] = 0.0
    expected /= expected.sum(-1, keepdim=True)
    names = ("The other attention weights", "the clean ones, renormalized,")
    check_close(
        encoded, blocked, expected, tolerance=rounding(model.dtype), names=names, unit="weight", advice=_UNSUPPORTED
    )


def attention_pattern(
    model: VLM, encoded: Encoded, layer: int, variant: Variant | None = None
) -> Float[Tensor, "heads n n"]:
    """Return a layer's attention weights [head, target, source], clean or under a variant."""
    return _watch_attention(model, encoded, [layer], slice(None), variant)[0]


def attention_from(model: VLM, encoded: Encoded, targets: Iterable[str]) -> dict[str, Float[Tensor, "layers heads n"]]:
    """Return what every layer's heads attend to, on average over the positions of each set; each row sums to 1."""
    rows = {target: list(encoded.positions[target]) for target in targets}
    seen = torch.stack(_watch_attention(model, encoded, range(model.n_layers), sum(rows.values(), [])))
    parts = seen.split([len(some) for some in rows.values()], dim=2)
    return {target: part.mean(2) for target, part in zip(rows, parts, strict=True)}


@torch.inference_mode()
def _watch_attention(
    model: VLM, encoded: Encoded, layers: Iterable[int], rows: slice | list[int], variant: Variant | None = None
) -> list[Float[Tensor, "heads rows n"]]:
    """Run a prompt once, and return what some rows attend to in some layers."""
    seen: list[Tensor] = []
    with model.attention_kernel("eager"), ExitStack() as stack:
        if variant:
            stack.enter_context(intervene(model, variant, encoded.positions.n_tokens))
        for part in map(model.attention, layers):
            stack.enter_context(part.register_forward_hook(lambda _, __, out: seen.append(out[1][0][:, rows])))
        model.hf.base_model(**encoded.inputs, use_cache=False)
    return [one.float().cpu() for one in seen]


def _check_positions(model: VLM, encoded: Encoded) -> None:
    positions, ids = encoded.positions, encoded.inputs["input_ids"][0].tolist()
    said = model.tokenizer.decode([ids[p] for p in positions["question"]]).strip()
    if "".join(said.split()) != "".join(encoded.sample.question.split()):
        raise ValueError(f"the question's positions read {said!r}, not {encoded.sample.question!r}")
    if wrong := [p for p in positions.get("image") if ids[p] != model.image_token_id]:
        raise ValueError(f"position {wrong[0]} is called an image token, but reads {encoded.tokens[wrong[0]]!r}")
    if not positions.last == positions.n_tokens - 1 == len(ids) - 1:
        raise ValueError(f"last is {positions.last}, but the prompt has {len(ids)} tokens")
