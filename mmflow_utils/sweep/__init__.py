"""The fast way: all variants of a prompt ride on one clean forward pass, exactly.

A variant that edits the layers [a, b) at the positions T is the clean run below layer `a`, and by
causality only positions from min(T) on ever change. So one clean pass runs as the library runs it; a hook
on each layer sees its clean input, keys and values, and calls the same layer again on those rows of all
variants that differ, packed into one sequence (`ride`). The library's own norms, projections and MLP run;
only the attention between packed rows is ours (`attention`). What need not be computed is not (`plan`):

- In the layer where a variant begins, only the rows in T differ from the clean run's.
- Variants that begin alike (windows clipped at layer 0) are one until the first of them ends; it leaves the
  others there, and in that layer, again, only the rows in T differ.
- In the last layer only the row that is read matters; the others give their keys and values and stop.
- The key of an edge that is knocked out is left out, not masked.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from mmflow_utils.encode import Encoded
from mmflow_utils.flows import Variant
from mmflow_utils.models import VLM
from mmflow_utils.reference import Run
from mmflow_utils.sweep.plan import count_rows, plan_branches
from mmflow_utils.sweep.ride import Ride

__all__ = ["count_rows", "run_sweep"]


@torch.inference_mode()
def run_sweep(
    model: VLM,
    encoded: Encoded,
    variants: Sequence[Variant],
    *,
    read: int | None = None,
    chunk: int | None = None,
) -> Run:
    """Run a prompt clean and under every variant, for the price of a few clean passes (§3.2).

    The same numbers as `run_reference`, up to rounding, and the same definitions: a target with no key left
    to attend to gets nothing from attention.

    Args:
        model: the model; its attention runs fused (`sdpa`) here, whatever it is set to.
        encoded: the prompt.
        variants: what to change, one run each.
        read: position whose logits are wanted; the last by default.
        chunk: variants that share one clean pass: all by default. When memory runs out fewer are taken, and
            what is done by then is kept.

    Raises:
        ValueError: a variant that names a layer or a position that isn't there; such a `read`; a chunk
            below 1.
    """
    n_layers = model.n_layers
    read = encoded.spans.last if read is None else read
    _check(variants, read, chunk, n_tokens=encoded.spans.n_tokens, n_layers=n_layers)
    # In the order of their families: those that share their start come into one chunk.
    order = [n for b in plan_branches(variants, read=read, n_layers=n_layers) for n in b.variants]
    rows: dict[int, Tensor] = {}
    clean: list[Ride] = []

    def ride(size: int) -> None:
        while not clean or len(rows) < len(order):
            now = order[len(rows) : len(rows) + size]
            branches = plan_branches([variants[n] for n in now], read=read, n_layers=n_layers)
            this = Ride(model, branches, read)
            logits = this.run(encoded)
            rows.update((now[n], row) for n, row in logits.items())
            clean[:] = clean or [this]

    size = chunk or max(1, len(order))
    if not _fits(ride, size):
        smaller = iter([size >> n for n in range(1, size.bit_length() + 1)])
        fits = find_executable_batch_size(
            ride, starting_batch_size=next(smaller), reduce_batch_size_fn=lambda: next(smaller)
        )
        fits()
    base = clean[0].base
    found = [rows.get(n, base) for n in range(len(variants))]
    return Run(
        base=base,
        variants=torch.stack(found) if found else base.new_empty(0, len(base)),
        resid_post=torch.stack(clean[0].resid_post),
    )


def _fits(ride, size: int) -> bool:
    """Try at once: accelerate's decorator collects garbage first, which takes as long as a small sweep."""
    try:
        ride(size)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def _check(
    variants: Sequence[Variant], read: int, chunk: int | None, *, n_tokens: int, n_layers: int
) -> None:
    if not 0 <= read < n_tokens:
        raise ValueError(f"Expected `read` to be a position from 0 to {n_tokens - 1}, got {read}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"Expected `chunk` to be a number of variants, 1 or more, got {chunk}.")
    for variant in variants:
        if variant.layers and variant.layers[-1] >= n_layers:
            raise ValueError(
                f"A variant acts in {variant.layers}, but the model's layers are 0 to {n_layers - 1}."
            )
        if (position := max((*variant.target, *variant.source))) >= n_tokens:
            raise ValueError(
                f"A variant names position {position}, but the prompt has {n_tokens} tokens, image tokens "
                "expanded."
            )
