"""Activation patching: a prompt in which some positions hold what they held in a run with another picture.

found = run_patched(model, encoded, donor, [Patch(positions=encoded.positions["image"], layers=range(3, 4))])
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmflow_utils.engine.closeness import need_numbers
from mmflow_utils.engine.packed_pass import PackedPass
from mmflow_utils.engine.plan import Branch
from mmflow_utils.engine.reference import collect_stream
from mmflow_utils.models.adapter import VLM, text_inputs
from mmflow_utils.prompts.encoding import Encoded

__all__ = ["Patch", "Patched", "run_patched", "run_patched_reference"]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What is put in: at the entry of each of `layers`, the donor's residual stream at `positions` (ascending)."""

    positions: tuple[int, ...]
    layers: range


@dataclass(frozen=True)
class Patched:
    """Float32 logits at the last position: of the prompt as it is, of its donor, and under each patch."""

    base: Float[Tensor, " vocab"]
    donor: Float[Tensor, " vocab"]
    variants: Float[Tensor, "n_patches vocab"]


@torch.inference_mode()
def run_patched(model: VLM, encoded: Encoded, donor: Encoded, patches: Sequence[Patch]) -> Patched:
    """Run a prompt clean and under every patch, exactly, beside one clean pass of it and one of its donor.

    Before a patch's first layer nothing changes, and by causality nothing before its first position: only the rows from
    there on are computed anew, packed, against the clean keys and values of what comes before.

    Args:
        model, encoded: The model and the prompt that is run.
        donor: The same question about another picture of as many tokens; its states are put in.
        patches: What is put in, one run each.

    Raises:
        ValueError: Prompts that differ in more than the picture; a layer or position that isn't there; NaN among the
            logits; a part of image tokens that attend to later ones.
    """
    stream, theirs = _run_donor(model, encoded, donor, patches)
    branches: list[Branch] = []
    for n, patch in enumerate(patches):
        if patch.positions and patch.layers:
            born = patch.layers.start - 1  # a branch's edit is in the layer before what enters the patched one
            rows = range(patch.positions[0], encoded.positions.last + 1)
            first = branches[-1].first + len(branches[-1].rows) if branches else 0
            place: Any = {"born": born, "until": born, "rows": rows, "first": first, "variants": [n]}
            branches.append(Branch(target=patch.positions, source=(), intervention="mask", heads=None, **place))
    packed = _PatchedPass(model, branches, [encoded.positions.last], None)
    packed.patches, packed.stream = patches, stream
    found = packed.run(encoded)
    read = [found.get(n, packed.base)[0] for n in range(len(patches))]
    return _gather(encoded, packed.base[0], theirs, read)


class _PatchedPass(PackedPass):
    """The packed pass, whose branches hold what a donor's run left at all positions, layer by layer (`stream`)."""

    patches: Sequence[Patch]
    stream: list[Float[Tensor, "n d"]]

    def _before(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = super()._before(i, layer, args, kwargs)
        for branch in self.branches:
            if branch.born == i - 1:
                self._copy_parent(branch, self.clean_in)
            if i in self.patches[branch.variants[0]].layers:
                rows = torch.tensor(branch.target, device=self.rows.device) + (branch.first - branch.rows[0])
                self.rows[rows] = self.stream[i][list(branch.target)].to(self.rows)
        return given

    def _slices(self, i: int) -> list[list[Branch]]:
        return super()._slices(i - 1)  # there is nothing to compute in the layer before a patch


@torch.inference_mode()
def run_patched_reference(model: VLM, encoded: Encoded, donor: Encoded, patches: Sequence[Patch]) -> Patched:
    """Return what `run_patched` does, by plain hooks and a full forward pass of the decoder for each patch."""
    stream, theirs = _run_donor(model, encoded, donor, patches)
    kwargs, own = text_inputs(model, encoded.inputs)
    rows = []
    for patch in patches:
        with ExitStack() as hooks:
            for i in patch.layers:
                put = partial(_put, list(patch.positions), stream[i])
                hooks.enter_context(model.layers[i].register_forward_pre_hook(put))
            states = model.text(**kwargs).last_hidden_state[0, encoded.positions.last]
            rows.append(model.unembed(states).float().cpu())
    return _gather(encoded, own[0].float().cpu(), theirs, rows)


def _put(positions: list[int], state: Tensor, _: nn.Module, args: tuple) -> tuple:
    hidden = args[0].clone()
    hidden[0, positions] = state[positions].to(hidden)
    return hidden, *args[1:]


def _run_donor(
    model: VLM, encoded: Encoded, donor: Encoded, patches: Sequence[Patch]
) -> tuple[list[Float[Tensor, "n d"]], Float[Tensor, " vocab"]]:
    """Return the donor's residual stream at all positions, and its logits at the last; refuse what doesn't fit."""
    ids, theirs = encoded.inputs["input_ids"], donor.inputs["input_ids"]
    if not torch.equal(ids, theirs):
        raise ValueError(
            f"Expected samples {encoded.sample.sample_id} and {donor.sample.sample_id} to differ in the picture alone, "
            f"got prompts of {ids.shape[1]} and {theirs.shape[1]} tokens: pair one question's pictures of one size."
        )
    positions = {p for patch in patches for p in patch.positions} - {*range(ids.shape[1])}
    layers = {i for patch in patches for i in patch.layers} - {*range(model.n_layers)}
    if positions or layers:
        raise ValueError(
            f"A patch names positions {sorted(positions)} and layers {sorted(layers)} that aren't there: "
            f"the prompt has {ids.shape[1]} tokens, the model {model.n_layers} layers."
        )
    with collect_stream(model, list(range(ids.shape[1]))) as stream:
        logits = model.hf(**donor.inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
    return stream, logits.float().cpu()


def _gather(encoded: Encoded, base: Tensor, donor: Tensor, rows: Sequence[Tensor]) -> Patched:
    variants = torch.stack([base, *rows])[1:]
    need_numbers(encoded, base, donor, variants)
    return Patched(base, donor, variants)
