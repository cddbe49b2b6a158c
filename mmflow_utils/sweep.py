"""The fast way: all variants of a prompt ride on one clean forward pass, exactly.

A variant that edits the layers [a, b) at the positions T is the clean run below layer `a`, and by causality only
positions from min(T) on ever change. So one clean pass runs as the library runs it; a hook on each decoder layer
sees the layer's clean input, keys and values, and calls the same layer again on those rows of all variants that
differ, packed into one sequence. The library's own norms, projections and MLP run; only attention between packed
rows is ours. What need not be computed is not:

- In the layer where a variant begins, only the rows in T differ from the clean run's.
- Variants that begin alike (windows clipped at layer 0) are one until the first of them ends; it forks off there,
  and in that layer, again, only the rows in T differ.
- In the last layer only the row that is read matters; the others give their keys and values and stop.
- The key of an edge that is knocked out is left out, not masked.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mmflow_utils.encode import Encoded
from mmflow_utils.flows import EDGE_INTERVENTIONS, Variant
from mmflow_utils.models import VLM
from mmflow_utils.reference import Run

__all__ = ["count_rows", "run_sweep"]

_NAME = "mmflow_ride"
# Own keys of this many rows stand side by side in one attention call: enough to keep it busy, few enough that the
# scores between strangers, which are masked, cost little.
_KEYS_TOGETHER = 128


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

    The same numbers as `run_reference`, up to rounding, and the same definitions: a target with no key left to
    attend to gets nothing from attention.

    Args:
        model: The model.
        encoded: The prompt.
        variants: What to change, one run each.
        read: Position whose logits are wanted; the last by default.
        chunk: Variants that share one clean pass: all by default. When memory runs out fewer are taken, and what
            is done by then is kept.

    Raises:
        ValueError: A variant that names a layer or a position that isn't there, or such a `read`.
    """
    n_tokens, n_layers = encoded.spans.n_tokens, model.n_layers
    read = encoded.spans.last if read is None else read
    _check(variants, read, n_tokens=n_tokens, n_layers=n_layers)
    # In the order of their families, so that those that share their start come into one chunk.
    order = [n for branch in _plan(variants, read, n_layers) for n in branch.variants]
    rows: dict[int, Tensor] = {}
    clean: _Ride | None = None

    @find_executable_batch_size(starting_batch_size=chunk or max(1, len(order)))
    def ride(size: int) -> None:
        nonlocal clean
        while clean is None or len(rows) < len(order):
            now = order[len(rows) : len(rows) + size]
            this = _Ride(model, _plan([variants[n] for n in now], read, n_layers), read)
            logits = this.run(encoded)
            rows.update((now[n], row) for n, row in logits.items())
            clean = clean or this

    ride()
    found = [rows.get(n, clean.base) for n in range(len(variants))]
    empty = clean.base.new_empty(0, len(clean.base))
    return Run(
        base=clean.base,
        variants=torch.stack(found) if found else empty,
        resid_post=torch.stack(clean.resid_post),
    )


def count_rows(
    variants: Sequence[Variant], *, n_tokens: int, n_layers: int, read: int | None = None
) -> dict[str, int]:
    """Count rows x layers of a sweep: of the clean pass, of the plain bound, and what is computed here.

    `bound` counts the rows min(T) … read of every variant in every layer from its window's first, once where
    windows share their start; `computed` the rows that run through a whole layer, and `keys_only` those that
    stop at their keys and values.
    """
    read = n_tokens - 1 if read is None else read
    counts = {"clean": n_tokens * n_layers, "bound": 0, "computed": 0, "keys_only": 0}
    for branch in _plan(variants, read, n_layers):
        own, whole = branch.n_rows(read), n_layers - 1 - branch.born
        counts["bound"] += own * (n_layers - branch.born)
        counts["keys_only"] += own if whole else 0
        counts["computed"] += 1 + (len(branch.target) + own * (whole - 1) if whole else 0)
    return counts


def _check(variants: Sequence[Variant], read: int, *, n_tokens: int, n_layers: int) -> None:
    if not 0 <= read < n_tokens:
        raise ValueError(f"read must be a position of the prompt, 0 to {n_tokens - 1}, got {read}")
    for variant in variants:
        if variant.layers and variant.layers[-1] >= n_layers:
            raise ValueError(
                f"a variant holds in {variant.layers}, but the model has the layers 0 to {n_layers - 1}: "
                "make variants with this model's n_layers"
            )
        if max(variant.target + variant.source) >= n_tokens:
            raise ValueError(
                f"a variant names position {max(variant.target + variant.source)}, but the prompt has "
                f"{n_tokens} tokens: make variants from this prompt's spans"
            )


# The plan: which rows differ from those of which other run, and from which layer on


@dataclass(eq=False)
class _Branch:
    """Rows of one run, or of several still alike, that differ from their parent's from layer `born` on.

    The edit holds in the layers [born, until). A parent of None is the clean run. `first` is the row of position
    `low` in the buffer of all branches' rows.
    """

    target: tuple[int, ...]
    source: tuple[int, ...]
    intervention: str
    born: int
    until: int
    variants: list[int]
    parent: "_Branch | None" = None
    first: int = 0

    @property
    def low(self) -> int:
        return self.target[0]

    @cached_property
    def target_set(self) -> frozenset[int]:
        return frozenset(self.target)

    def n_rows(self, read: int) -> int:
        return read + 1 - self.low

    def edits(self, layer: int) -> bool:
        return self.born <= layer < self.until


def _plan(variants: Sequence[Variant], read: int, n_layers: int) -> list[_Branch]:
    """List the branches, each family (same start, same edit) together, its trunk first.

    Variants that change nothing at the read position are in no branch: theirs are the clean logits.
    """
    families = defaultdict(lambda: defaultdict(list))
    for n, variant in enumerate(variants):
        target, source = _effective(variant, read)
        # What the last layer does elsewhere, nobody reads.
        stop = variant.layers.stop if read in target else min(variant.layers.stop, n_layers - 1)
        if target and variant.layers.start < stop:
            key = variant.layers.start, target, source, variant.intervention
            families[key][stop].append(n)
    plan = []
    for (start, target, source, intervention), stops in families.items():
        edit = dict(target=target, source=source, intervention=intervention)
        last = max(stops)
        trunk = _Branch(**edit, born=start, until=last, variants=stops[last])
        early = sorted(set(stops) - {last})
        plan += [trunk] + [_Branch(**edit, born=b, until=b, variants=stops[b], parent=trunk) for b in early]
    for before, branch in zip(plan, plan[1:], strict=False):
        branch.first = before.first + before.n_rows(read)
    return plan


def _effective(variant: Variant, read: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the targets and sources that can matter at `read`: by causality, no edge runs backwards."""
    target = tuple(t for t in variant.target if t <= read)
    if variant.intervention not in EDGE_INTERVENTIONS or not target:
        return target, ()
    source = tuple(s for s in variant.source if s <= target[-1])
    return (tuple(t for t in target if t >= source[0]), source) if source else ((), ())


# The ride


class _Ride:
    """One clean pass with the rows of all branches beside it."""

    def __init__(self, model: VLM, plan: list[_Branch], read: int):
        self.model, self.plan, self.read = model, plan, read
        self.last = model.n_layers - 1
        self.resid_post: list[Tensor] = []
        self.finals: list[Tensor] = []  # per slice: the read rows after the last layer
        self.zeroed: dict[str, list[int]] = {}  # module intervention -> packed rows, during a call
        self.keys: dict = {}  # what _Attend worked out about keys and masks, for the next layer

    def run(self, encoded: Encoded) -> dict[int, Tensor]:
        """Give each variant's logits (float32, [vocab]) at the read position, by its index in the plan."""
        with _riding(self.model, self):
            out = self.model.hf(**encoded.inputs, use_cache=False)
        self.base = out.logits[0, -1].float()
        self.resid_post = [resid.to(self.base.device) for resid in self.resid_post]
        if not self.plan:
            return {}
        norm = self.model.final_norm
        final = norm(torch.cat(self.finals).to(_device(norm)))
        logits = self.model.unembed(final).float().to(self.base.device)
        branches = [branch for some in self._slices(self.last) for branch in some]
        return {n: row for branch, row in zip(branches, logits, strict=True) for n in branch.variants}

    def before(self, i: int, layer: nn.Module, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """Look at what goes into a layer of the clean pass; cut the last layer down to the row that is read."""
        hidden = hidden.to(_device(layer))
        if i == 0:
            self.resid_post.append(hidden[0, self.read].float())
            n_rows = sum(branch.n_rows(self.read) for branch in self.plan)
            self.rows = hidden.new_empty(n_rows, hidden.shape[-1])
        self.rows = self.rows.to(hidden.device)
        self.clean_in, self.kwargs, self.clean = hidden[0], kwargs, _Capture()
        if i < self.last:
            return hidden, {**kwargs, _NAME: self.clean}
        self.clean = _keys_only(layer, hidden, {**kwargs, "past_key_values": None})
        block = _Block(rows=[0], positions=(self.read,), low=self.read)
        return hidden[:, [self.read]], {**_at(kwargs, [self.read]), _NAME: _Attend(self, [block])}

    def after(self, i: int, layer: nn.Module, hidden: Tensor) -> None:
        """Take all branches through the layer that the clean pass has just left."""
        self.resid_post.append(hidden[0, self.read if i < self.last else 0].float())
        for some in self._slices(i):
            index, out = self._through(i, layer, some)
            if i == self.last:
                self.finals.append(out)
                continue
            self.rows[index] = out
            for branch in (b for b in some if b.born == i):
                self._seed(branch, hidden[0], keep=branch.target)

    def _slices(self, i: int) -> Iterator[list[_Branch]]:
        """Take families until they have more rows than the clean pass: so the layer's peak is no higher.

        Within a slice come those with keys of their own, then those that begin in this layer.
        """
        some, n_rows = [], 0
        for branch in (b for b in self.plan if b.born <= i):
            n_rows += branch.n_rows(self.read)
            if some and branch.parent is None and n_rows > len(self.clean_in):
                yield sorted(some, key=lambda b: b.born == i)
                some, n_rows = [], branch.n_rows(self.read)
            some.append(branch)
        if some:
            yield sorted(some, key=lambda b: b.born == i)

    def _through(self, i: int, layer: nn.Module, some: list[_Branch]) -> tuple[Tensor, Tensor]:
        """Run the rows of some branches that need it through a layer: their buffer rows and new states."""
        for branch in (b for b in some if b.born == i):
            self._seed(branch, self.clean_in)
        with_keys = {b: tuple(range(b.low, self.read + 1)) for b in some if b.born < i}
        begins = dict(zip(with_keys, accumulate([0, *map(len, with_keys.values())]), strict=False))
        here, own = {b: with_keys.get(b, b.target) for b in some}, None
        if i == self.last:
            if with_keys:
                own = _keys_only(layer, self.rows[self._index(with_keys)][None], self._kwargs_at(with_keys))
            here = dict.fromkeys(some, (self.read,))
        blocks, self.zeroed = self._blocks(i, here, begins)
        kwargs = {**self._kwargs_at(here), _NAME: _Attend(self, blocks, own)}
        index = self._index(here)
        try:
            return index, layer.forward(self.rows[index][None], **kwargs)[0]
        finally:
            self.zeroed = {}

    def _blocks(
        self, i: int, here: dict[_Branch, tuple[int, ...]], begins: dict[_Branch, int]
    ) -> tuple[list["_Block"], dict[str, list[int]]]:
        """Sort packed rows by what they may attend to, and note those whose module output is zeroed."""
        blocks, zeroed, n_rows = [], defaultdict(list), 0
        for branch, positions in here.items():
            row = {p: n_rows + n for n, p in enumerate(positions)}
            n_rows += len(positions)
            touched = tuple(p for p in positions if p in branch.target_set) if branch.edits(i) else ()
            if branch.intervention not in EDGE_INTERVENTIONS:
                zeroed[branch.intervention] += [row[p] for p in touched]
                touched = ()
            others = tuple(p for p in positions if p not in branch.target_set) if touched else positions
            keys = begins.get(branch if branch in begins else branch.parent)
            for part, edit in ((touched, (branch.source, branch.intervention)), (others, None)):
                if part:
                    rows = [row[p] for p in part]
                    blocks.append(_Block(rows=rows, positions=part, low=branch.low, edit=edit, keys=keys))
        return blocks, zeroed

    def _seed(self, branch: _Branch, clean: Tensor, keep: tuple[int, ...] = ()) -> None:
        """Copy a new branch's rows from its parent's, save those at the positions to keep."""
        n_rows, kept = branch.n_rows(self.read), [p - branch.low for p in keep]
        own = self.rows[branch.first : branch.first + n_rows]
        mine = own[kept]
        parent = branch.parent
        own.copy_(clean[branch.low : self.read + 1] if parent is None else self.rows[parent.first :][:n_rows])
        own[kept] = mine

    def _index(self, here: dict[_Branch, tuple[int, ...]]) -> Tensor:
        rows = [b.first + p - b.low for b, positions in here.items() for p in positions]
        return torch.tensor(rows, device=self.rows.device)

    def _kwargs_at(self, here: dict[_Branch, tuple[int, ...]]) -> dict:
        return _at(self.kwargs, [p for positions in here.values() for p in positions])


@contextmanager
def _riding(model: VLM, ride: _Ride) -> Iterator[None]:
    """Hook a ride into the decoder, and take it out again whatever happens."""
    handles = []

    def before(i, layer, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        hidden, kwargs = ride.before(i, layer, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def zero(name, module, args, output):
        if rows := ride.zeroed.get(name):
            first = output[0] if isinstance(output, tuple) else output
            first[:, rows] = 0
        return output

    try:
        for i, layer in enumerate(model.layers):
            handles.append(layer.register_forward_pre_hook(partial(before, i), with_kwargs=True))
            handles.append(layer.register_forward_hook(lambda layer, _, out, i=i: ride.after(i, layer, out)))
            for name, module in (("attention_output", model.attention(i)), ("mlp_output", model.mlp(i))):
                handles.append(module.register_forward_hook(partial(zero, name)))
        with model.attention_kernel(_NAME):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _at(kwargs: dict, positions: list[int]) -> dict:
    """Pick from a layer's keyword arguments what belongs to these positions; no mask, no cache."""

    def pick(value: Tensor, dim: int) -> Tensor:
        return value.index_select(dim, torch.tensor(positions, device=value.device))

    picked = {**kwargs, "attention_mask": None, "past_key_values": None}
    cos, sin = kwargs["position_embeddings"]
    picked["position_embeddings"] = pick(cos, -2), pick(sin, -2)
    if kwargs.get("position_ids") is not None:
        picked["position_ids"] = pick(kwargs["position_ids"], -1)
    return picked


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


# Attention


class _Stop(Exception):
    """Leaves a layer whose keys and values are all that was wanted."""


class _Capture:
    """Attention as the library does it, remembering rotated keys and values ([kv_heads, pos, d_head])."""

    def __init__(self, key: Tensor | None = None, value: Tensor | None = None, stop: bool = False):
        self.key, self.value, self.stop = key, value, stop

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.key, self.value = key[0], value[0]
        if self.stop:
            raise _Stop
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def _keys_only(layer: nn.Module, hidden: Tensor, kwargs: dict) -> _Capture:
    capture = _Capture(stop=True)
    with suppress(_Stop):
        layer.forward(hidden, **kwargs, **{_NAME: capture})
    return capture


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Packed rows of one branch that may attend to the same keys.

    Keys below the position `low` are the clean run's. Those from `low` on begin at the row `keys` of the packed
    sequence (or of the one captured before); where `keys` is None, they too are the clean run's.
    """

    rows: list[int]
    positions: tuple[int, ...]
    low: int
    edit: tuple[tuple[int, ...], str] | None = None  # source, intervention
    keys: int | None = None


@dataclass(frozen=True)
class _Keys:
    """What the blocks of one shape attend to: clean positions below `low`, and their own from `low` on."""

    prefix: Tensor
    own: Tensor  # counted from `low`
    sees: Tensor  # bool [positions, prefix + own]
    averages: (
        Tensor | None
    )  # [positions, prefix + own]: each target's sources, weights that sum to 1 or are 0
    touched: Tensor | None  # bool [positions, prefix + own]: edges whose value is replaced
    masks: dict[int, Tensor]


class _Attend:
    """Attention of packed rows: to the clean keys that all share, and to their branch's own.

    Blocks of one shape go through the fused kernel together, on the shared keys once and the own keys side by
    side; what stands in between is masked. Query heads that share a key head become further rows.
    """

    def __init__(self, ride: _Ride, blocks: list[_Block], own: _Capture | None = None):
        self.own, self.clean, self.known = own, ride.clean, ride.keys
        self.layer_mask = ride.kwargs.get("attention_mask")
        self.groups = defaultdict(list)
        for block in blocks:
            self.groups[block.positions, block.low, block.edit, block.keys is None].append(block)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        own = self.own or _Capture(key[0], value[0])
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # [rows, heads, d_head]
        for blocks in self.groups.values():
            keys = self._keys(blocks[0], key.device)
            replaced = keys.touched is not None
            together = max(_KEYS_TOGETHER, len(keys.prefix) // 8) // max(1, len(keys.own))
            together = 1 if replaced else max(1, together)
            for n in range(0, len(blocks), together):
                some = blocks[n : n + together]
                rows = torch.tensor([row for block in some for row in block.rows], device=query.device)
                k = self._side_by_side(some, keys, self.clean.key, own.key)
                v = self._side_by_side(some, keys, self.clean.value, own.value)
                mixed = self._replaced if replaced else self._fused
                # [heads, rows, d] -> [key heads, heads that share it x rows, d]
                q = query[0][:, rows].reshape(len(k), -1, query.shape[-1])
                mix = mixed(q, k, v, keys, len(some), scaling).reshape(query.shape[1], len(rows), -1)
                deaf = ~keys.sees.any(1).repeat(len(some))
                out[rows] = mix.masked_fill(deaf[:, None], 0).transpose(0, 1)
        return out[None], None

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, keys: _Keys, n_blocks: int, scaling: float) -> Tensor:
        mask = self._mask(keys, n_blocks, q.dtype)
        mask = mask.repeat(q.shape[1] // len(mask), 1)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)[0]

    def _replaced(
        self, q: Tensor, k: Tensor, v: Tensor, keys: _Keys, n_blocks: int, scaling: float
    ) -> Tensor:
        """Attend with the pattern left alone and other values on the edges.

        To give all sources their mean value is to spread the weight that falls on them evenly over them.
        """
        fold = q.shape[1] // len(keys.sees)
        scores = (q @ k.transpose(1, 2)).float() * scaling + self._mask(keys, 1, torch.float32).repeat(
            fold, 1
        )
        pattern = scores.softmax(-1)
        touched, averages = keys.touched.repeat(fold, 1), keys.averages.repeat(fold, 1)
        on_sources = (pattern * touched).sum(-1, keepdim=True)
        return (pattern.masked_fill(touched, 0) + on_sources * averages).to(v.dtype) @ v

    def _keys(self, block: _Block, device: torch.device) -> _Keys:
        """Find the keys of a block's shape: positions, and which of them each row sees."""
        name = block.positions, block.low, block.edit, device, id(self.layer_mask)
        if name in self.known:
            return self.known[name]
        source, intervention = block.edit or ((), "mask")
        at = torch.tensor(block.positions, device=device)
        keys = torch.arange(block.positions[-1] + 1, device=device)
        sources = torch.isin(keys, torch.tensor(source, device=device, dtype=keys.dtype))
        if intervention == "mask":
            keys = keys[~sources]
        sees = keys <= at[:, None]
        touched = averages = None
        if intervention != "mask":
            touched = sees & sources
            share = touched / touched.sum(1, keepdim=True).clamp(min=1)
            averages = share * (intervention == "mean_value")
        if self.layer_mask is not None:
            mask = self.layer_mask[0, 0].to(device)
            mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            sees = mask[at][:, keys]
        prefix, own = keys[keys < block.low], keys[keys >= block.low] - block.low
        self.known[name] = _Keys(prefix, own, sees, averages, touched, {})
        return self.known[name]

    @staticmethod
    def _mask(keys: _Keys, n_blocks: int, dtype: torch.dtype) -> Tensor:
        """Give what is added to the scores of `n_blocks` blocks side by side ([blocks x positions, keys])."""
        if n_blocks not in keys.masks:
            n_rows, n_prefix, n_own = len(keys.sees), len(keys.prefix), len(keys.own)
            mask = torch.zeros(n_rows, n_prefix + n_own, dtype=dtype, device=keys.sees.device)
            # A row that sees nothing must not become NaN; its outcome is thrown away.
            mask = mask.masked_fill(~keys.sees & keys.sees.any(1, keepdim=True), -torch.inf)
            wide = mask.new_full((n_blocks, n_rows, n_prefix + n_blocks * n_own), -torch.inf)
            wide[:, :, :n_prefix] = mask[:, :n_prefix]
            for n in range(n_blocks):
                wide[n, :, n_prefix + n * n_own :][:, :n_own] = mask[:, n_prefix:]
            keys.masks[n_blocks] = wide.flatten(0, 1)
        return keys.masks[n_blocks]

    @staticmethod
    def _side_by_side(blocks: list[_Block], keys: _Keys, clean: Tensor, own: Tensor) -> Tensor:
        """Lay out clean keys (or values) and the own ones of some blocks: [heads, prefix + blocks x own, d]."""
        if blocks[0].keys is None:
            begins, own = [blocks[0].low] * len(blocks), clean
        else:
            begins = [block.keys for block in blocks]
        index = (torch.tensor(begins, device=own.device)[:, None] + keys.own).flatten()
        return torch.cat([clean[:, keys.prefix], own[:, index]], dim=1)


def _attention(module, query, key, value, attention_mask, **kwargs):
    """Hand attention to whoever rides on this call, if anyone does; else it is the library's own."""
    rider = kwargs.pop(_NAME, None) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return rider(module, query, key, value, attention_mask, **kwargs)


# Without a mask function of its own, an attention function is given no mask and silently sees the future.
AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
