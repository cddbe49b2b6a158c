"""The plain slow way: one full forward pass of the decoder for every variant.

It is the oracle that the fast sweep is compared with, and the fallback where the sweep does not fit. It shares
nothing with the sweep: the library's own attention runs, with another mask, another value or a zeroed output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from mmflow_utils.engine.closeness import check_head, need_numbers
from mmflow_utils.models.adapter import VLM, text_inputs
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import EDGE_INTERVENTIONS, Variant, heads_in

__all__ = ["Keep", "Run", "check_request", "collect_stream", "intervene", "keep_of", "run_reference"]

Keep = Callable[[Tensor], Tensor]  # what to keep of logits, row by row: [rows, vocab] -> [rows, k]


@dataclass(frozen=True)
class Run:
    """What an engine returns: float32 logits at one position, clean and under each variant.

    Where several positions were read there is an axis for them before the last, `n_read`; where something else was
    kept of the logits (`keep`), it stands in their place.

    Attributes:
        base: The clean run's logits.
        variants: One row of logits for each variant, in their order.
        resid_post: The clean residual stream there: the embedding, then each layer's output, before the final norm.
    """

    base: Shaped[Tensor, "*n_read vocab"]
    variants: Shaped[Tensor, "n_variants *n_read vocab"]
    resid_post: Float[Tensor, "n_layers_plus_1 *n_read d"]

    @classmethod
    def from_parts(
        cls, encoded: Encoded, base: Tensor, variants: Sequence[Tensor], resid_post: Sequence[Tensor], *, one: bool
    ):
        """Stack what was found at the positions read; where just `one` was asked for, drop their axis."""
        changed = torch.stack([base, *variants])[1:]
        need_numbers(encoded, base, changed)
        states = torch.stack(list(resid_post))
        return cls(base[0], changed[:, 0], states[:, 0]) if one else cls(base, changed, states)


@torch.inference_mode()
def run_reference(
    model: VLM,
    encoded: Encoded,
    variants: Sequence[Variant],
    *,
    read: int | Sequence[int] | None = None,
    keep: Keep | None = None,
    progress: Callable[[], Any] | None = None,
) -> Run:
    """Run a prompt clean and under every variant, each in a full forward pass (§3.2, Eq. 7).

    In the layers of a variant, for each of its causal edges (source <= target), in all heads or those it names:

    - `mask`: the edge gets -inf before the softmax, and the target's attention renormalizes over the keys
      left. A target with no key left gets nothing: its mixed values, before the output projection, are 0.
    - `zero_value`: the attention pattern stays, the value that runs along the edge is 0.
    - `mean_value`: the pattern stays; the value is the mean over this target's sources in this layer and head. What
      the sources have in common gets through, what distinguishes them does not.
    - `resample`: the pattern stays; the value is the source's own in the clean run on the sample's `other_image`.
    - `attention_output`, `mlp_output`: the module's output is 0 at the target positions (App. D).

    Args:
        model: The model.
        encoded: The prompt. The picture's features are computed once.
        variants: What to change, one run each.
        read: Position whose logits are wanted, the last by default; or several, in ascending order, and everything in
            the result has an axis for them.
        keep: What to keep of logits, row by row, where all of them are too much: [rows, vocab] -> [rows, k].
        progress: Called after each variant.

    Raises:
        ValueError: A variant or `read` that names a layer or position that isn't there; NaN among the logits; a model
            whose own output is not what norm and unembedding make of its stream.
    """
    read, one = check_request(model, encoded, variants, read)
    with collect_stream(model, read) as stream:
        kwargs, own = text_inputs(model, encoded.inputs, read)
    check_head(model, encoded, stream[-1], own)

    base, rows = keep_of(own, keep), []
    other = _other_values(model, encoded) if any(one.intervention == "resample" for one in variants) else ()
    for variant in variants:
        with intervene(model, variant, encoded.positions.n_tokens, other):
            rows.append(keep_of(model.unembed(model.text(**kwargs).last_hidden_state[0, read]), keep))
        if progress:
            progress()
    return Run.from_parts(encoded, base, rows, stream, one=one)


def keep_of(logits: Float[Tensor, "rows vocab"], keep: Keep | None) -> Shaped[Tensor, "rows k"]:
    """Return what is kept of logits: all of them without `keep`."""
    return (keep(logits.float()) if keep else logits.float()).cpu()


@contextmanager
def collect_stream(model: VLM, read: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect the residual stream at some positions: what enters layer 0, then what leaves each layer."""
    stream: list[Tensor] = []

    def keep(tensor: Tensor) -> None:
        stream.append(tensor[0, read].float().cpu())

    with ExitStack() as hooks:
        hooks.enter_context(model.layers[0].register_forward_pre_hook(lambda _, args: keep(args[0])))
        for layer in model.layers:
            hooks.enter_context(layer.register_forward_hook(lambda _, __, out: keep(out)))
        yield stream


@contextmanager
def intervene(model: VLM, variant: Variant, n_tokens: int, other: Sequence[Tensor] = ()) -> Iterator[None]:
    """Hold a variant's intervention while the block runs, with `other` values for `resample`; undo it in any case."""
    blocked = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    target, source = (torch.tensor(held, dtype=torch.long) for held in (variant.target, variant.source))
    blocked[target[:, None], source] = source <= target[:, None]
    with ExitStack() as hooks:
        for layer in variant.layers:
            if variant.intervention == "mask":
                _mask_edges(hooks, model, layer, variant, blocked)
            elif variant.intervention in EDGE_INTERVENTIONS:
                _replace_values(hooks, model, layer, variant, blocked, other)
            else:
                _zero_module(hooks, model, layer, variant)
        yield


def _mask_edges(hooks: ExitStack, model: VLM, layer: int, variant: Variant, blocked: Bool[Tensor, "n n"]) -> None:
    """Add the blocked edges to whatever mask the layer is given: causal, sliding or the library's own."""
    edited = _edited_heads(model, layer, variant)
    starved = torch.zeros(len(blocked), len(edited), dtype=torch.bool)

    def change_mask(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = _additive(kwargs.get("attention_mask"), args[0])
        lowest = torch.finfo(mask.dtype).min
        closed = blocked.to(mask.device) & edited.to(mask.device)[:, None, None]  # [heads or 1, n, n]
        left = (mask > lowest / 2) & ~closed
        # A row without an open key has no softmax. It keeps its own mask, and what it then reads is
        # thrown away below.
        starved.copy_(~left.any(-1)[0].T)
        closed = closed & ~starved.T[..., None].to(mask.device)
        mask = mask.expand(-1, len(closed), -1, -1)
        return args, kwargs | {"attention_mask": mask.masked_fill(closed, lowest)}

    def give_nothing(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (model.n_heads, -1))
        return (heads.masked_fill(starved[..., None].to(heads.device), 0.0).flatten(-2),)

    hooks.enter_context(model.layers[layer].register_forward_pre_hook(change_mask, with_kwargs=True))
    hooks.enter_context(model.output_proj(layer).register_forward_pre_hook(give_nothing))


def _edited_heads(model: VLM, layer: int, variant: Variant) -> Bool[Tensor, " heads"]:
    """Tell in which query heads of a layer the intervention holds; one answer for all where it names none."""
    heads = heads_in(variant.heads, layer)
    edited = torch.full((1,) if heads is None else (model.n_heads,), heads is None)
    edited[list(heads or ())] = True
    return edited


def _additive(mask: Tensor | None, hidden: Float[Tensor, "1 n d"]) -> Float[Tensor, "1 heads n n"]:
    """Write a layer's own mask, in any of the library's forms, as one to be added to the scores."""
    n_tokens = hidden.shape[1]
    if mask is None:  # fused attention is told "causal" and gets no mask
        mask = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool, device=hidden.device).tril()
    if mask.ndim != 4 or mask.shape[-2:] != (n_tokens, n_tokens):
        raise ValueError(
            f"Expected an attention mask of shape (1, 1, {n_tokens}, {n_tokens}) in a decoder layer, got "
            f"{tuple(mask.shape)}: load the model with the `sdpa` or `eager` attention kernel."
        )
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, lowest)


def _other_values(model: VLM, encoded: Encoded) -> list[Float[Tensor, "1 n d_values"]]:
    """Return each layer's values in the run on the other picture."""
    values: list[Tensor] = []
    with ExitStack() as hooks:
        for layer in range(model.n_layers):
            hooks.enter_context(model.value_proj(layer).register_forward_hook(lambda _, __, out: values.append(out)))
        model.hf.base_model(**(encoded.other or {}), use_cache=False)
    return values


def _replace_values(
    hooks: ExitStack, model: VLM, layer: int, variant: Variant, blocked: Bool[Tensor, "n n"], other: Sequence[Tensor]
) -> None:
    """Run the layer's attention again with other values, and take what comes out of that for targets and heads."""
    attention, value_proj, output_proj = model.attention(layer), model.value_proj(layer), model.output_proj(layer)
    edited = _edited_heads(model, layer, variant)
    # Targets that see the same sources share a run.
    sources, group = blocked.unique(dim=0, return_inverse=True)
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0].unflatten(-1, (model.n_heads, -1)))

    def rerun(_: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple:
        mixed = seen.pop()
        for n, held in enumerate(sources):
            if held.any():
                with value_proj.register_forward_hook(lambda _, __, v, held=held: other_values(v, held)):
                    attention.forward(*args, **kwargs)
                changed = (group == n)[:, None, None] & edited[:, None]
                mixed = torch.where(changed.to(mixed.device), seen.pop(), mixed)
        output = output_proj(mixed.flatten(-2)), *output[1:]
        seen.clear()
        return output

    def other_values(values: Tensor, held: Tensor) -> Tensor:
        values = values.clone()
        held = held.to(values.device)
        if variant.intervention == "resample":
            values[:, held] = other[layer].to(values.device)[:, held]
        else:
            values[:, held] = values[:, held].mean(1, keepdim=True) if variant.intervention == "mean_value" else 0.0
        return values

    hooks.enter_context(output_proj.register_forward_pre_hook(see))
    hooks.enter_context(attention.register_forward_hook(rerun, with_kwargs=True))


def _zero_module(hooks: ExitStack, model: VLM, layer: int, variant: Variant) -> None:
    """Zero what a module adds to the residual stream at the target positions."""
    module = (model.attention if variant.intervention == "attention_output" else model.mlp)(layer)

    def zero(_: nn.Module, __: tuple, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[:, list(variant.target)] = 0.0
        return (first, *output[1:]) if isinstance(output, tuple) else first

    hooks.enter_context(module.register_forward_hook(zero))


def check_request(
    model: VLM, encoded: Encoded, variants: Sequence[Variant], read: int | Sequence[int] | None
) -> tuple[list[int], bool]:
    """Return the positions to read, and whether just one was asked for; refuse what isn't in the prompt."""
    n_layers, n_tokens = model.n_layers, encoded.positions.n_tokens
    read = encoded.positions.last if read is None else read
    one = isinstance(read, int)
    positions = [read] if isinstance(read, int) else list(read)
    inside = all(0 <= position < n_tokens for position in positions)
    if not positions or not inside or positions != sorted({*positions}):
        raise ValueError(
            f"Expected `read` to be positions from 0 to {n_tokens - 1}, each once and in ascending order, "
            f"got {', '.join(map(str, positions)) or 'none'}."
        )
    for variant in variants:
        if variant.intervention == "resample" and encoded.other is None:
            raise ValueError(
                f"Sample {encoded.sample.sample_id} has no other_image to resample: see with_other_pictures."
            )
        if variant.layers and variant.layers[-1] >= n_layers:
            raise ValueError(f"A variant acts in {variant.layers}, but the model's layers are 0 to {n_layers - 1}.")
        if (head := max((head for _, head in variant.heads or ()), default=0)) >= model.n_heads:
            raise ValueError(f"A variant names head {head}, but the model's query heads are 0 to {model.n_heads - 1}.")
        if (position := max((*variant.target, *variant.source))) >= n_tokens:
            raise ValueError(
                f"A variant names position {position}, but the prompt has {n_tokens} tokens, image tokens expanded."
            )
    return positions, one
