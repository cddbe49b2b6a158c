"""The fast way: all variants of a prompt run beside one clean forward pass, exactly.

A variant that edits the layers [a, b) at the positions T is the clean run below layer `a`, and by
causality only positions from min(T) on ever change. So one clean pass runs as the library runs it; a hook
on each layer sees its clean input, keys and values, and calls the same layer again on those rows of all
variants that differ, packed into one sequence (`packed_pass`). The library's own norms, projections and MLP run;
only the attention between packed rows is ours (`packed_attention`). What need not be computed is not (`plan`):

- In the layer where a variant begins, only the rows in T differ from the clean run's.
- Variants that begin alike (windows clipped at layer 0) are one until the first of them ends; it leaves the
  others there, and in that layer, again, only the rows in T differ.
- In the last layer only the rows that are read matter; the others give their keys and values and stop.
- The key of an edge that is knocked out is left out, not masked.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from mmflow_utils.engine.packed_pass import PackedPass
from mmflow_utils.engine.plan import plan_branches
from mmflow_utils.engine.prefix import Prefix
from mmflow_utils.engine.reference import Keep, Run, check_request, run_reference
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import Variant

__all__ = ["engine", "run_sweep"]


@torch.inference_mode()
def run_sweep(
    model: VLM,
    encoded: Encoded,
    variants: Sequence[Variant],
    *,
    read: int | Sequence[int] | None = None,
    keep: Keep | None = None,
    chunk: int | None = None,
    prefix: Prefix | None = None,
) -> Run:
    """Run a prompt clean and under every variant, for the price of a few clean passes (§3.2).

    The same numbers as from `run_reference`, up to rounding, by the same definitions.

    Args:
        model, encoded, variants, read, keep: As for `run_reference`; attention runs fused (`sdpa`) here, whatever the
            model is set to.
        chunk: Variants that share one clean pass: all by default, fewer when memory runs out.
        prefix: What the prompt before this one left: positions that both begin with are not run again.

    Raises:
        ValueError: As from `run_reference`; a chunk below 1.

    Example:
        >>> encoded = mm.encode(model, sample)
        >>> planned = mm.variants(encoded.positions, mm.FLOW_TO_LAST, window=3, n_layers=model.n_layers)
        >>> run_sweep(model, encoded, planned).variants.shape
        torch.Size([36, 440])
        >>> words = lambda logits: logits.topk(10).indices
        >>> run_sweep(model, encoded, planned, read=[30, 31], keep=words).variants.shape
        torch.Size([36, 2, 10])
    """
    read, one = check_request(model, encoded, variants, read)
    if chunk is not None and chunk < 1:
        raise ValueError(f"Expected `chunk` to be a number of variants, 1 or more, got {chunk}.")
    n_layers = model.n_layers
    # In the order of their families: those that share their start come into one chunk.
    order = [n for b in plan_branches(variants, read=read, n_layers=n_layers) for n in b.variants]
    rows: dict[int, Tensor] = {}
    stream: list[Tensor] = []
    base, size = torch.empty(0), chunk or max(1, len(order))
    other = Prefix()  # what the run on another picture leaves
    if any(variant.intervention == "resample" for variant in variants):
        PackedPass(model, [], read, keep, other).run(replace(encoded, inputs=encoded.other or {}))
    while not stream or len(rows) < len(order):
        now = order[len(rows) : len(rows) + size]
        branches = plan_branches([variants[n] for n in now], read=read, n_layers=n_layers)
        packed = PackedPass(model, branches, read, keep, prefix)
        packed.other = [values for _, values in other.layers]
        try:
            rows.update((now[n], kept) for n, kept in packed.run(encoded).items())
            base, stream = packed.base, packed.resid_post
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
            size //= 2
            del packed
            clear_device_cache(garbage_collection=True)
    found = [rows.get(n, base) for n in range(len(variants))]
    return Run.from_parts(encoded, base, found, stream, one=one)


def engine(method: str) -> Callable[..., Run]:
    """Return the engine of a `method`: `sweep`, or `reference`, the plain way."""
    engines: dict[str, Callable[..., Run]] = {"sweep": run_sweep, "reference": run_reference}
    if method not in engines:
        raise ValueError(f"method must be one of {', '.join(engines)}, got {method!r}.")
    return engines[method]
