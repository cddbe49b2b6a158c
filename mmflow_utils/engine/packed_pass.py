"""One clean pass, layer by layer, with the rows of all branches beside it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mmflow_utils.engine.closeness import check_head
from mmflow_utils.engine.packed_attention import PACKED_ATTENTION, Attend, Block, Capture, as_index, keys_only
from mmflow_utils.engine.plan import Branch
from mmflow_utils.engine.prefix import Prefix, Uncut
from mmflow_utils.engine.reference import Keep, keep_of
from mmflow_utils.models.adapter import VLM, compute_device
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import heads_in

__all__ = ["ENOUGH_ROWS", "PackedPass", "layer_kwargs_at"]

# So many rows may go through a layer at once where the prompt is shorter: with fewer, fetching the layer's weights
# and calling it would cost as much as the products.
ENOUGH_ROWS = 512
# The positions whose rows are computed, branch by branch: the order of a packed sequence.
Here = Mapping[Branch, tuple[int, ...]]


class PackedPass:
    """One clean pass with the rows of all branches beside it.

    Where a `Prefix` holds the prompt's first positions, the pass computes those from `start` on.

    Attributes:
        base: What is kept of the clean logits at the positions read, [n_read, k].
        resid_post: The clean residual stream there: the embedding, then what leaves each layer (float32).
    """

    def __init__(
        self, model: VLM, branches: list[Branch], read: list[int], keep: Keep | None, prefix: Prefix | None = None
    ):
        self.model, self.branches, self.read, self.keep, self.prefix = model, branches, read, keep, prefix
        self.other: Sequence[Tensor] = ()  # each layer's values in the run on another picture, where needed
        self.start, self.last = 0, model.n_layers - 1
        self.left = torch.empty(0)  # what left the layer before
        self.resid_post: list[Tensor] = []
        self.finals: list[Tensor] = []  # the rows read after the last layer, slice by slice
        self.zeroed: dict[str, list[int]] = {}  # module intervention -> packed rows, while a layer runs on them
        self.keys: list[tuple[Tensor, Tensor]] = []  # the clean run's, layer by layer, for the prefix
        self.known: dict = {}  # what Attend worked out about keys and masks

    def run(self, encoded: Encoded) -> dict[int, Shaped[Tensor, "n_read k"]]:
        """Return what is kept of each variant's logits, by the variant's index in the plan."""
        self.base = keep_of(self._run_clean(encoded), self.keep)
        if not self.branches:
            return {}
        norm = self.model.final_norm
        finals = (self.model.unembed(norm(x.to(compute_device(norm)))) for x in self.finals)
        rows = torch.cat([keep_of(final, self.keep) for final in finals])
        branches = [branch for some in self._slices(self.last) for branch in some]
        found: dict[int, Tensor] = {}
        for branch, own in zip(branches, rows.split([len(b.reads(self.read)) for b in branches]), strict=True):
            # Before its first row a branch is the clean run.
            whole = torch.cat([self.base[: len(self.read) - len(own)], own])
            found |= dict.fromkeys(branch.variants, whole)
        return found

    def _run_clean(self, encoded: Encoded) -> Float[Tensor, "n_read vocab"]:
        """Run the prompt with everything hooked in, and return its clean logits at the positions read."""
        inputs, prefix = encoded.inputs, self.prefix
        first_edited = min([self.read[0], *(branch.rows[0] for branch in self.branches)])
        start = prefix.common(self.model, inputs, first_edited) if prefix else 0
        if prefix and start and prefix.fits(self.model, inputs, start):
            self.start = start
            with suppress(Uncut), self._hooked():
                return prefix.go_on(self.model, inputs, start, slice(None))
            self.start = 0
        with self._hooked():
            out = self.model.hf(**inputs, use_cache=False)
        check_head(self.model, encoded, self.resid_post[-1], out.logits[0])
        if prefix:
            prefix.remember(self.model, inputs, self.keys)
        return out.logits[0]

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Hook into the decoder, and undo it whatever happens."""

        def zero(name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            if rows := self.zeroed.get(name):
                (output[0] if isinstance(output, tuple) else output)[:, rows] = 0

        with ExitStack() as stack:
            for i, layer in enumerate(self.model.layers):
                stack.enter_context(layer.register_forward_pre_hook(partial(self._before, i), with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(partial(self._after, i)))
                modules = {"attention_output": self.model.attention(i), "mlp_output": self.model.mlp(i)}
                for name, module in modules.items():
                    stack.enter_context(module.register_forward_hook(partial(zero, name)))
            stack.enter_context(self.model.attention_kernel(PACKED_ATTENTION))
            yield

    def _before(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """See what goes into a layer of the clean pass; cut the last layer down to the rows that are read."""
        hidden = args[0].to(compute_device(layer))  # layers may be spread over devices: rows follow
        if i == 0:
            self._remember(hidden[0, self._here(self.read)])
            self.rows = hidden.new_empty(sum(len(b.rows) for b in self.branches), hidden.shape[-1])
        self.rows = self.rows.to(hidden.device)
        if i and hidden is not self.left:  # something was added between two layers, as Qwen3-VL adds to the picture
            added = (hidden - self.left.to(hidden.device))[0]
            for branch in self.branches:
                own = self._rows_of(branch)
                own += added[branch.rows[0] - self.start :][: len(own)]
        self.mask = self._square(kwargs.get("attention_mask"))
        self.clean_in, self.kwargs, self.clean = hidden[0], kwargs, Capture()
        if i < self.last:
            return (hidden, *args[1:]), {**kwargs, PACKED_ATTENTION: self.clean}
        self.clean = keys_only(layer, hidden, kwargs)
        rows = list(range(len(self.read)))
        block = Block(rows=rows, positions=tuple(self.read), low=self.read[0])
        here = self._here(self.read)
        kwargs = {**layer_kwargs_at(kwargs, here), PACKED_ATTENTION: self._attend([block])}
        return (hidden[:, here], *args[1:]), kwargs

    def _here(self, positions: Iterable[int]) -> list[int]:
        """Return the rows of this pass that stand for some positions."""
        return [position - self.start for position in positions]

    def _square(self, mask: Tensor | None) -> Bool[Tensor, "n n"] | None:
        """Return which positions a layer's mask lets each position see; a prefix's rows, which aren't run, nothing."""
        if mask is None:
            return None
        if id(mask) not in self.known:
            seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > torch.finfo(mask.dtype).min / 2
            square = F.pad(seen, (0, 0, self.start, 0))
            self._check_order(square)
            # The mask itself is held, so that no other one gets its id.
            self.known[id(mask)] = mask, square
        return self.known[id(mask)][1]

    def _check_order(self, mask: Bool[Tensor, "n n"]) -> None:
        """Refuse rows that depend on what comes after them, as the tokens of an image do in some families."""
        ahead = mask.triu(1)
        both_ways = set((ahead.any(0) | ahead.any(1)).nonzero().flatten().tolist())
        edited = {position for branch in self.branches for position in branch.target}
        cuts = {cut for b in self.branches for cut in (b.rows[0], b.rows[-1] + 1)}
        torn = {cut for cut in cuts if ahead[:cut, cut:].any()}
        if wrong := sorted(both_ways & (edited | set(self.read)) | torn):
            raise ValueError(
                f"Position {wrong[0]} is a target or is read, but lies among tokens that attend to later "
                "ones too (an image's, in this model), which the sweep can't take: set method to reference."
            )

    def _after(self, i: int, layer: nn.Module, args: tuple, hidden: Float[Tensor, "1 m d"]) -> None:
        """Take all branches through the layer that the clean pass has just left."""
        if self.clean.key is None:
            raise ValueError(
                f"{self.model.name} attends in code of its own, not through the library's interface, so that the sweep "
                "can't take part in it: set method to reference."
            )
        self.clean.other = self.other[i] if self.other else None
        if self.prefix and not self.start:
            self.keys.append((self.clean.key, self.clean.value))
        self._remember(hidden[0, self._here(self.read)] if i < self.last else hidden[0])
        self.left = hidden
        for some in self._slices(i):
            index, out = self._through(i, layer, some)
            if i == self.last:
                self.finals.append(out)
                continue
            self.rows[index] = out
            for branch in some:
                if branch.born == i:
                    self._copy_parent(branch, hidden[0], keep=branch.target)

    def _remember(self, state: Float[Tensor, "n_read d"]) -> None:
        # A copy: a view would hold on to the states of all positions, layer after layer.
        self.resid_post.append(state.to("cpu", torch.float32, copy=True))

    def _slices(self, i: int) -> list[list[Branch]]:
        """Divide the families into slices of no more rows than the clean pass, or `ENOUGH_ROWS`; new ones come last."""
        begun = (branch for branch in self.branches if branch.born <= i)
        families = [list(family) for _, family in groupby(begun, key=lambda branch: branch.parent or branch)]
        sizes = [sum(len(branch.rows) for branch in family) for family in families]
        most = max(self.start + len(self.clean_in), ENOUGH_ROWS)
        even = sum(sizes) / max(1, math.ceil(sum(sizes) / most))
        slices: list[list[Branch]] = []
        n_rows = 0
        for family, size in zip(families, sizes, strict=True):
            if not slices or n_rows >= even or n_rows + size > most:
                slices.append([])
                n_rows = 0
            slices[-1] += family
            n_rows += size
        return [sorted(some, key=lambda b: b.born == i) for some in slices]

    def _through(
        self, i: int, layer: nn.Module, some: list[Branch]
    ) -> tuple[slice | Int[Tensor, " r"], Float[Tensor, "r d"]]:
        """Run those rows of some branches that need it through a layer."""
        for branch in some:
            if branch.born == i:
                self._copy_parent(branch, self.clean_in)
        with_keys = {b: tuple(b.rows) for b in some if b.born < i}
        begins = dict(zip(with_keys, accumulate([0, *map(len, with_keys.values())]), strict=False))
        here, own = {b: with_keys.get(b, b.target) for b in some}, None
        if i == self.last:
            if with_keys:
                own = keys_only(layer, self.rows[self._index(with_keys)][None], self._kwargs_at(with_keys))
            here = {branch: branch.reads(self.read) for branch in some}
        blocks, zeroed = self._blocks(i, here, begins)
        index = self._index(here)
        kwargs = {**self._kwargs_at(here), PACKED_ATTENTION: self._attend(blocks, own)}
        self.zeroed = zeroed
        out = layer.forward(self.rows[index][None], **kwargs)[0]  # not layer(...): its hooks are ours
        self.zeroed = {}
        return index, out

    def _blocks(self, i: int, here: Here, begins: Mapping[Branch, int]) -> tuple[list[Block], dict[str, list[int]]]:
        """Sort packed rows by what they attend to, and note those whose module output is zeroed."""
        zeroed: dict[str, list[int]] = defaultdict(list)
        blocks, n_rows = [], 0
        for branch, positions in here.items():
            owner = branch if branch in begins else branch.parent
            keys, low = begins.get(owner) if owner else None, branch.rows[0]
            first, n_rows = n_rows, n_rows + len(positions)
            if not branch.edits(i):  # of many heads all but a layer's: no more is done than must be
                blocks.append(Block(rows=list(range(first, n_rows)), positions=positions, low=low, keys=keys))
                continue
            row = {p: first + n for n, p in enumerate(positions)}
            touched = tuple(p for p in positions if p in branch.target_set)
            if not branch.on_edges:
                zeroed[branch.intervention] += [row[p] for p in touched]
                touched = ()
            rest = tuple(p for p in positions if p not in branch.target_set) if touched else positions
            edited = (branch.source, branch.intervention), heads_in(branch.heads, i)
            for part, (edit, heads) in ((touched, edited), (rest, (None, None))):
                if part:
                    rows = [row[p] for p in part]
                    blocks.append(Block(rows=rows, positions=part, low=low, edit=edit, heads=heads, keys=keys))
        return blocks, zeroed

    def _attend(self, blocks: list[Block], own: Capture | None = None) -> Attend:
        return Attend(blocks, self.clean, own, mask=self.mask, known=self.known)

    def _copy_parent(self, branch: Branch, clean: Float[Tensor, "n d"], keep: tuple[int, ...] = ()) -> None:
        """Copy its parent's rows into a new branch, except those at the positions to keep."""
        own, low = self._rows_of(branch), branch.rows[0]
        kept = [p - low for p in keep]
        mine = own[kept]
        own.copy_(self._rows_of(branch.parent) if branch.parent else clean[low - self.start :][: len(own)])
        own[kept] = mine

    def _rows_of(self, branch: Branch) -> Float[Tensor, "r d"]:
        return self.rows[branch.first :][: len(branch.rows)]

    def _index(self, here: Here) -> slice | Int[Tensor, " r"]:
        rows = [b.first + p - b.rows[0] for b, positions in here.items() for p in positions]
        return as_index(rows, self.rows.device)

    def _kwargs_at(self, here: Here) -> dict:
        return layer_kwargs_at(self.kwargs, self._here(p for positions in here.values() for p in positions))


def layer_kwargs_at(kwargs: dict, positions: list[int]) -> dict:
    """Pick from a layer's keyword arguments what belongs to some positions; no mask, no cache."""

    cos, sin = kwargs["position_embeddings"]
    index = torch.tensor(positions, device=cos.device)

    def pick(value: Tensor, dim: int) -> Tensor:
        return value.index_select(dim, index.to(value.device))

    picked: dict[str, Any] = {
        "attention_mask": None,
        "past_key_values": None,
        "position_embeddings": (pick(cos, -2), pick(sin, -2)),
    }
    if kwargs.get("position_ids") is not None:
        picked["position_ids"] = pick(kwargs["position_ids"], -1)
    return kwargs | picked
