"""Attention of packed rows: to the clean keys that all share, and to their own branch's.

What attends comes in by a keyword argument of the decoder layer, named `PACKED_ATTENTION`, which the library hands
down to its attention function: so nothing is stored on the model.
"""

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

__all__ = ["PACKED_ATTENTION", "Attend", "Block", "Capture", "as_index", "keys_only"]

PACKED_ATTENTION = "mmflow_packed"
# So many own keys stand side by side in one call: enough to keep it busy, few enough that the scores between
# strangers, which are masked, cost little.
_OWN_KEYS = 128


class _Stop(Exception):
    """Leaves a layer whose keys and values are all that was wanted."""


class Capture:
    """The library's own attention, remembering rotated keys and values, each [key_heads, pos, d_head]."""

    def __init__(self, key: Any = None, value: Any = None, *, stop: bool = False):
        self.key, self.value, self.stop = key, value, stop
        self.laid_out: dict[int, list[Tensor]] = {}  # see Attend
        self.other: Tensor | None = None  # the values in the run on another picture

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.key, self.value = key[0], value[0]
        if self.stop:
            raise _Stop
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def keys_only(layer: nn.Module, hidden: Float[Tensor, "1 r d"], kwargs: dict) -> Capture:
    """Run a layer as far as its rotated keys and values."""
    capture = Capture(stop=True)
    with suppress(_Stop):
        layer.forward(hidden, **kwargs, **{PACKED_ATTENTION: capture})
    return capture


@dataclass(frozen=True, kw_only=True)
class Block:
    """Packed rows of one branch that attend to the same keys."""

    rows: list[int]  # where they stand in the packed sequence
    positions: tuple[int, ...]  # and in the prompt
    low: int  # keys of positions below are the clean run's
    keys: int | None = None  # where those from `low` on begin among the own ones; None: they too are the clean run's
    edit: tuple[tuple[int, ...], str] | None = None  # source positions and intervention
    heads: tuple[int, ...] | None = None  # the query heads in which it holds; None: all


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """What blocks of one shape attend to: `n_prefix` clean keys, then own ones."""

    n_prefix: int
    prefix: Int[Tensor, " p"] | None  # the clean positions; None: all below `low`
    own: list[int]  # own positions, counted from `low`
    sees: Bool[Tensor, "m keys"]
    deaf: Bool[Tensor, " m"] | None  # rows that see nothing at all, if there are any: they get nothing
    touched: Bool[Tensor, "m keys"] | None  # edges whose value is replaced
    shares: Float[Tensor, "m keys"] | None  # what their weight becomes, even or 0; None: it falls on other values
    masks: dict[int, Tensor] = field(default_factory=dict)  # by the number of blocks side by side

    def mask(self, n_blocks: int, dtype: torch.dtype) -> Float[Tensor, "rows all_keys"]:
        """Return what is added to the scores of blocks side by side: none attends to another's own keys."""
        if n_blocks not in self.masks:
            # A row that sees nothing must not become NaN; its outcome is thrown away.
            sees = self.sees | ~self.sees.any(1, keepdim=True)
            own = torch.block_diag(*[sees[:, self.n_prefix :]] * n_blocks)
            seen = torch.cat([sees[:, : self.n_prefix].repeat(n_blocks, 1), own], dim=1)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self.masks[n_blocks] = mask.masked_fill_(~seen, -torch.inf)
        return self.masks[n_blocks]


class Attend:
    """Attention of packed rows, in place of the library's.

    Blocks of one shape go through the fused kernel together: the shared keys once, the own ones side by side. Query
    heads that share a key head (grouped-query attention) become further rows.
    """

    def __init__(self, blocks: list[Block], clean: Capture, own: Capture | None, *, mask: Tensor | None, known: dict):
        self.clean, self.own, self.layer_mask, self.known = clean, own, mask, known
        self.groups = defaultdict(list)
        # First all that attend as ever: where an edit holds in some heads, the row's others do so, too.
        others = [replace(block, edit=None, heads=None) for block in blocks if block.heads is not None]
        for block in sorted([*others, *blocks], key=lambda block: block.edit is not None):
            self.groups[block.positions, block.low, block.edit, block.keys is None].append(block)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        own = self.own or Capture(key[0], value[0])
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # [rows, heads, d_head]
        for blocks in self.groups.values():
            keys = self._keys(blocks[0], key.device)
            for some, rows, mixed in self._group(blocks, keys, query[0], own, scaling):
                mixed = mixed.transpose(0, 1)
                if any(block.heads is not None for block in some):
                    mixed = torch.where(_held(some, out), mixed, out[rows])
                out[rows] = mixed
        return out[None], None

    def _group(self, blocks: list[Block], keys: _Keys, query: Tensor, own: Capture, scaling: float):
        """Attend, a few blocks at a time: which, their packed rows and mixed values [heads, rows, d_head]."""
        n_prefix, n_own = keys.n_prefix, len(keys.own)
        room = max(_OWN_KEYS, blocks[0].low // 8, n_own)
        together = room // max(1, n_own) if keys.touched is None else 1
        both = self._with_room(keys, blocks[0].low, room)
        mix = _fused if keys.touched is None else partial(_replaced, self.clean.other)
        for n in range(0, len(blocks), together):
            some = blocks[n : n + together]
            source = self.clean if some[0].keys is None else own
            begins = [some[0].low if block.keys is None else block.keys for block in some]
            index = as_index([begin + n for begin in begins for n in keys.own], query.device)
            k, v = (one[:, : n_prefix + len(some) * n_own] for one in both)
            k[:, n_prefix:], v[:, n_prefix:] = source.key[:, index], source.value[:, index]
            rows = as_index([row for block in some for row in block.rows], query.device)
            folded = query[:, rows].reshape(len(k), -1, query.shape[-1])
            mixed = mix(folded, k, v, keys, len(some), scaling).reshape(len(query), -1, v.shape[-1])
            if keys.deaf is not None:
                mixed = mixed.masked_fill(keys.deaf.repeat(len(some))[:, None], 0)
            yield some, rows, mixed

    def _with_room(self, keys: _Keys, low: int, room: int) -> list[Tensor]:
        """Lay out the shared clean keys and values with room for more; once for all groups that need no more."""
        whole, needed = keys.prefix is None, keys.n_prefix + room
        if whole and low in self.clean.laid_out and self.clean.laid_out[low][0].shape[1] >= needed:
            return self.clean.laid_out[low]
        prefix, both = slice(low) if whole else keys.prefix, []
        for clean in (self.clean.key, self.clean.value):
            both.append(clean.new_empty(len(clean), needed, clean.shape[-1]))
            both[-1][:, : keys.n_prefix] = clean[:, prefix]
        if whole:
            self.clean.laid_out[low] = both
        return both

    def _keys(self, block: Block, device: torch.device) -> _Keys:
        """Determine which keys the blocks of one shape attend to, and which of them each row sees."""
        name = block.positions, block.low, block.edit, device, id(self.layer_mask)
        if name in self.known:
            return self.known[name]
        source, intervention = block.edit or ((), "mask")
        at = torch.tensor(block.positions, device=device)
        keys = torch.arange(block.positions[-1] + 1, device=device)
        sources = torch.isin(keys, torch.tensor(source, device=device, dtype=keys.dtype))
        touched = shares = None
        if intervention == "mask":
            keys = keys[~sources]
        else:
            touched = (keys <= at[:, None]) & sources
            if intervention != "resample":
                shares = touched / touched.sum(1, keepdim=True).clamp(min=1) * (intervention == "mean_value")
        sees = keys <= at[:, None]
        if self.layer_mask is not None:
            sees = self.layer_mask[at.to(self.layer_mask.device)].to(device)[:, keys]
        prefix, own = keys[keys < block.low], keys[keys >= block.low] - block.low
        self.known[name] = _Keys(
            n_prefix=len(prefix),
            prefix=None if len(prefix) == block.low else prefix,
            own=own.tolist(),
            sees=sees,
            deaf=None if sees.any(1).all() else ~sees.any(1),
            touched=touched,
            shares=shares,
        )
        return self.known[name]


def _held(blocks: list[Block], out: Float[Tensor, "rows heads d_head"]) -> Bool[Tensor, "some heads 1"]:
    """Tell for each row of some blocks in which heads its edit holds."""
    held = torch.zeros(len(blocks), out.shape[1], dtype=torch.bool)
    for n, block in enumerate(blocks):
        held[n, slice(None) if block.heads is None else list(block.heads)] = True
    return held.repeat_interleave(len(blocks[0].positions), 0)[..., None].to(out.device)


def as_index(rows: list[int], device: torch.device) -> slice | Tensor:
    """Index with a slice where one does it: no copy is made."""
    first = rows[0] if rows else 0
    if rows == list(range(first, first + len(rows))):
        return slice(first, first + len(rows))
    return torch.tensor(rows, device=device)


def _fused(q: Tensor, k: Tensor, v: Tensor, keys: _Keys, n_blocks: int, scaling: float) -> Tensor:
    mask = keys.mask(n_blocks, q.dtype)
    if (fold := q.shape[1] // len(mask)) > 1:
        mask = mask.repeat(fold, 1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling)[0]


def _replaced(other: Tensor | None, q: Tensor, k: Tensor, v: Tensor, keys: _Keys, _: int, scaling: float) -> Tensor:
    """Attend with the pattern left alone and other values on some edges."""
    # To give all sources their mean value is to spread the weight that falls on them evenly over them.
    assert keys.touched is not None
    fold = q.shape[1] // len(keys.sees)
    pattern = (q @ k.transpose(1, 2)).float() * scaling + keys.mask(1, torch.float32).repeat(fold, 1)
    pattern = pattern.softmax(-1)
    touched = keys.touched.repeat(fold, 1)
    lost, pattern = pattern * touched, pattern.masked_fill(touched, 0)
    if keys.shares is None:
        assert other is not None  # its positions are those of the keys: where values are replaced, no key is left out
        return pattern.to(v.dtype) @ v + lost.to(v.dtype) @ other[:, : v.shape[1]]
    pattern += lost.sum(-1, keepdim=True) * keys.shares.repeat(fold, 1)
    return pattern.to(v.dtype) @ v


def _attention(module, query, key, value, attention_mask, **kwargs):
    """Attend by what this call brings along for its packed rows; without it, as the library does."""
    attend = kwargs.pop(PACKED_ATTENTION, None) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(module, query, key, value, attention_mask, **kwargs)


# Without a mask function of its own, an attention function is given no mask and silently sees the future.
AttentionInterface.register(PACKED_ATTENTION, _attention)
AttentionMaskInterface.register(PACKED_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
