"""Which rows of which variant differ from another run's, and from which layer on. Knows no model."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mmflow_utils.prompts.flows import EDGE_INTERVENTIONS, Heads, Variant, heads_in

__all__ = ["Branch", "count_rows", "plan_branches"]


@dataclass(eq=False, kw_only=True)
class Branch:
    """Rows of one run, or of several still alike, that differ from their parent's from layer `born` on."""

    target: tuple[int, ...]  # the edit, as in a `Variant`
    source: tuple[int, ...]
    intervention: str
    heads: Heads  # those that are cut
    born: int  # it holds in the layers [born, until)
    until: int
    rows: range  # positions from min(target) to the last that is read; what comes later nobody reads
    first: int  # where these begin among those of all branches
    variants: list[int]  # those that end as this branch does, by index
    parent: "Branch | None" = None  # the branch that it leaves; None for the clean run

    @cached_property
    def target_set(self) -> frozenset[int]:
        return frozenset(self.target)

    @property
    def on_edges(self) -> bool:
        return self.intervention in EDGE_INTERVENTIONS

    def reads(self, read: Sequence[int]) -> tuple[int, ...]:
        """Pick of the positions that are read those where this branch can differ from the clean run."""
        return tuple(position for position in read if position >= self.rows[0])

    def edits(self, layer: int) -> bool:
        return self.born <= layer < self.until and heads_in(self.heads, layer) != ()


def plan_branches(variants: Sequence[Variant], *, read: Sequence[int], n_layers: int) -> list[Branch]:
    """List the branches; each family (same start, same edit) stands together, its trunk first.

    The trunk keeps the edit longest; where a variant of the family ends before, a branch leaves it. A variant that
    changes nothing at the positions read (in ascending order) is in no branch: its logits are the clean ones.

    >>> early, late = (Variant(layers=range(0, stop), target=(5,), source=(1, 2)) for stop in (2, 3))
    >>> [(b.born, b.until, b.variants) for b in plan_branches([early, late], read=[5], n_layers=4)]
    [(0, 3, [1]), (2, 2, [0])]
    """
    families: dict[tuple, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    last_read, read_set = read[-1], set(read)
    for n, variant in enumerate(variants):
        target, source = _what_matters(variant, last_read)
        # What the last layer does at other positions nobody reads.
        is_read = not read_set.isdisjoint(target)
        stop = variant.layers.stop if is_read else min(variant.layers.stop, n_layers - 1)
        if target and variant.layers.start < stop:
            family = variant.layers.start, target, source, variant.intervention, variant.heads
            families[family][stop].append(n)
    branches: list[Branch] = []
    for (start, target, source, intervention, heads), ends in families.items():
        last, trunk = max(ends), None
        for end in (last, *sorted(ends.keys() - {last})):
            branches.append(
                Branch(
                    target=target,
                    source=source,
                    intervention=intervention,
                    heads=heads,
                    born=end if trunk else start,
                    until=end,
                    rows=range(target[0], last_read + 1),
                    first=branches[-1].first + len(branches[-1].rows) if branches else 0,
                    variants=ends[end],
                    parent=trunk,
                )
            )
            trunk = trunk or branches[-1]
    return branches


def _what_matters(variant: Variant, last_read: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the targets and sources that can matter up to a position: by causality, no edge runs backwards."""
    target = tuple(t for t in variant.target if t <= last_read and variant.heads != ())
    if variant.intervention not in EDGE_INTERVENTIONS or not target:
        return target, ()
    source = variant.source  # ascending, and long: most often all of it counts
    if source and source[-1] > target[-1]:
        source = tuple(s for s in source if s <= target[-1])
    return (tuple(t for t in target if t >= source[0]), source) if source else ((), ())


def count_rows(
    variants: Sequence[Variant], *, n_tokens: int, n_layers: int, read: Sequence[int] = ()
) -> dict[str, int]:
    """Count rows x layers of a sweep that reads some positions, by default the last.

    Returns:
        `clean`: those of a clean pass. `bound`: the rows from min(target) to the last that is read, of every variant
        in every layer from its window's first, once where windows share their start. `computed`: those that the
        sweep takes through a whole layer, beside the clean pass. `keys_only`: those that stop at keys and values.

    >>> count_rows([Variant(layers=range(1, 3), target=(2, 3), source=(0,))], n_tokens=6, n_layers=4)
    {'clean': 24, 'bound': 12, 'computed': 7, 'keys_only': 4}
    """
    read = read or (n_tokens - 1,)
    counts = {"clean": n_tokens * n_layers, "bound": 0, "computed": 0, "keys_only": 0}
    for branch in plan_branches(variants, read=read, n_layers=n_layers):
        own, before_last = len(branch.rows), n_layers - 1 - branch.born
        counts["bound"] += own * (before_last + 1)
        counts["computed"] += len(branch.reads(read))
        counts["computed"] += len(branch.target) + own * (before_last - 1) if before_last else 0
        counts["keys_only"] += own if before_last else 0
    return counts
