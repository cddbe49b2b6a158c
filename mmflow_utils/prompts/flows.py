"""Flows of information, windows of layers, and the interventions that block them (paper §3.2, Eq. 7).

A `Flow` names two position sets of a prompt; a `Variant` is one concrete run with that flow blocked in some
layers. Both engines (`reference` and `sweep`) execute variants and know nothing of flows or prompts.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor
from typing import Any, Literal, get_args

from mmflow_utils.prompts.positions import PositionSets

__all__ = [
    "CAPTIONS_TO_LAST", "EDGE_INTERVENTIONS", "FLOORS", "Flow", "flow_problem", "FLOW_TO_LAST", "Heads", "heads_in",
    "IMAGE_PATCHES_TO_QUESTION", "IMAGE_ROUTES", "IMAGE_TO_PARTS", "IMAGE_TO_QUESTION", "Intervention",
    "MODULE_INTERVENTIONS", "NO_PICTURE", "NO_QUESTION", "OTHER_PATCHES_TO_PARTS", "PARTS_TO_LAST", "PARTS_TO_PARTS",
    "pretty_name", "QUESTION_ROUTES", "RELATED_PATCHES_TO_PARTS", "TEMPLATE_TO_LAST", "Variant", "variants",
    "whole_depth", "window_layers", "window_sizes",
]  # fmt: skip

Intervention = Literal["mask", "zero_value", "mean_value", "resample", "attention_output", "mlp_output"]
Placement = Literal["centered", "forward"]
Heads = tuple[tuple[int, int], ...] | None
"""Pairs of layer and query head, ascending; None: all."""
MODULE_INTERVENTIONS: tuple[Intervention, ...] = ("attention_output", "mlp_output")
EDGE_INTERVENTIONS = tuple(name for name in get_args(Intervention) if name not in MODULE_INTERVENTIONS)

_PAPER_WINDOWS, _SHALLOWEST = (1, 3, 5, 7, 9, 11, 15), 32  # App. B; layers of the paper's smaller models
_PRETTY = {
    "image_newline": "Image newlines",
    "image_related": "Related image patches",
    "image_other": "Other image patches",
    "image_random": "Random image patches",
    "image_high_norm": "High-norm image patches",
    "image_related_low_norm": "Related image patches of low norm",
    "image_other_low_norm": "Other image patches of low norm",
    "option_true": "True option",
    "option_false": "False option",
    "after_image": "All after the image",
    "after_question": "All after the question",
}


def pretty_name(name: str) -> str:
    """Name a position set as a figure's legend does.

    >>> pretty_name("image_related"), pretty_name("question_without_options")
    ('Related image patches', 'Question without options')
    """
    return " + ".join(_PRETTY.get(part, part.replace("_", " ").capitalize()) for part in name.split("+"))


def heads_in(heads: Heads, layer: int) -> tuple[int, ...] | None:
    """Return the heads of one layer; None: all of them.

    >>> heads_in(((2, 0), (2, 3), (4, 1)), 2), heads_in(((2, 0),), 3), heads_in(None, 3)
    ((0, 3), (), None)
    """
    if heads is None:
        return None
    return tuple(head for _, head in heads[bisect_left(heads, (layer,)) : bisect_left(heads, (layer + 1,))])


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Information that leaves the positions `source` (keys) and would reach the positions `target` (queries).

    Both are names of position sets (`PositionSets`), or of several joined by "+", which are then cut together. Geva et
    al. call the query `source`: here it is the `target`.

    >>> str(Flow(source="question", target="last")), str(Flow(source="image", target="question+last"))
    ('Question -> Last', 'Image -> Question + Last')
    """

    source: str
    target: str

    def __str__(self) -> str:
        return f"{pretty_name(self.source)} -> {pretty_name(self.target)}"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One intervened run of one prompt: what both engines execute.

    Only causal pairs (source <= target) count; a variant without layers, or an edge intervention without a
    source, changes nothing, which makes it a control.

    Attributes:
        layers: Layers (0-based) in which the intervention holds.
        target: Query positions; for a module intervention, the positions whose module output is zeroed.
        source: Key positions; empty for a module intervention.
        intervention: `mask` sets the edges to -inf before the softmax, `zero_value`, `mean_value` and `resample` keep
            the attention pattern and replace what the edges carry, `attention_output` and `mlp_output` zero the
            output of a module.
        heads: The query heads whose edges are cut, as pairs of layer and head, in ascending order: (15, 6) is head 6 of
            layer 15. None: all heads of all `layers`.
        flow, layer: Labels for the results: the flow, and the layer that the window belongs to.

    Raises:
        ValueError: Positions or heads that are negative, repeated or unsorted; an unknown intervention; a module's
            source or heads; a head of another layer.
    """

    layers: range
    target: tuple[int, ...]
    source: tuple[int, ...] = ()
    intervention: Intervention = "mask"
    heads: Heads = None
    flow: Flow | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.intervention not in get_args(Intervention):
            names = ", ".join(get_args(Intervention))
            raise ValueError(f"intervention must be one of {names}, got {self.intervention!r}")
        if not isinstance(self.layers, range) or self.layers.step != 1 or self.layers.start < 0:
            raise ValueError(f"layers must be a range of consecutive layers from 0 up, not {self.layers!r}")
        if not self.target:
            raise ValueError("a variant needs at least one target position, got none")
        for name, held in (("target", self.target), ("source", self.source)):
            if held and (held[0] < 0 or not all(a < b for a, b in zip(held, held[1:], strict=False))):
                raise ValueError(f"{name} positions must be 0 or more, ascending, each once, got {held[:8]}")
        if (self.source or self.heads is not None) and self.intervention in MODULE_INTERVENTIONS:
            raise ValueError(f"{self.intervention!r} zeroes a module at its targets: leave source and heads out")
        heads = self.heads or ()
        if list(heads) != sorted(set(heads)) or any(at not in self.layers or head < 0 for at, head in heads):
            raise ValueError(f"heads must be (layer, head) pairs within {self.layers}, ascending, got {heads[:8]}")

    @property
    def n_layers_blocked(self) -> int:
        """Number of layers in which the intervention really holds: windows are clipped at both ends."""
        return len(self.layers)


def window_layers(layer: int, *, window: int, n_layers: int, placement: Placement = "centered") -> range:
    """Return the layers of the window of `window` layers (the paper's is 9) that belongs to a layer.

    Args:
        layer, window, n_layers: The layer, the window's width and the number of layers, l, w and L.
        placement: `centered` gives `max(0, l - w//2) … min(L, l + ceil(w/2)) - 1` (§3.2, App. B); `forward`
            gives `l … min(l + w, L) - 1`, the module knockout's (App. D).

    Raises:
        ValueError: A width below 1, or a layer outside the model.

    >>> window_layers(0, window=9, n_layers=40), window_layers(20, window=9, n_layers=40)
    (range(0, 5), range(16, 25))
    >>> window_layers(38, window=9, n_layers=40, placement="forward")
    range(38, 40)
    """
    if window < 1:
        raise ValueError(f"window must be a width of 1 or more layers, got {window}")
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is outside the model: its layers are 0 to {n_layers - 1}")
    if placement not in get_args(Placement):
        raise ValueError(f"placement must be one of {', '.join(get_args(Placement))}, got {placement!r}")
    before = window // 2 if placement == "centered" else 0
    return range(max(0, layer - before), min(n_layers, layer - before + window))


def whole_depth(n_layers: int) -> dict[str, Any]:
    """Return the window and the one layer with which `variants` cuts a flow in all layers at once.

    >>> window_layers(*whole_depth(4)["layers"], window=whole_depth(4)["window"], n_layers=4)
    range(0, 4)
    """
    return {"window": 2 * n_layers, "layers": [0]}


def window_sizes(n_layers: int) -> list[int]:
    """Return the widths of windows to compare in a model of that depth (App. B, Figs 7-8).

    From 32 layers on, the paper's 1, 3, 5, 7, 9, 11, 15; in a shallower model each is scaled by n_layers / 32.

    Raises:
        ValueError: A model without layers.

    >>> window_sizes(40), window_sizes(12)
    ([1, 3, 5, 7, 9, 11, 15], [1, 2, 3, 4, 6])
    """
    if n_layers < 1:
        raise ValueError(f"expected a model of 1 or more layers, got {n_layers}")
    scale = min(1.0, n_layers / _SHALLOWEST)
    return sorted({max(1, floor(width * scale + 0.5)) for width in _PAPER_WINDOWS})


def flow_problem(positions: PositionSets, flow: Flow, *, intervention: Intervention = "mask") -> str | None:
    """Return why a flow can't be blocked in a prompt, or None when it can.

    >>> positions = PositionSets(n_tokens=4, sets={"question": (1, 2), "last": (3,)}, missing={"image": "text only"})
    >>> flow_problem(positions, Flow(source="last", target="question"))
    'no position of Last comes before one of Question: nothing flows back in time'
    >>> flow_problem(positions, Flow(source="question", target="last")) is None
    True
    """
    edges = intervention not in MODULE_INTERVENTIONS
    for name in (flow.source, flow.target) if edges else (flow.target,):
        if name not in positions:
            return positions.why_missing(name)
    if edges and min(positions[flow.source]) > max(positions[flow.target]):
        source, target = pretty_name(flow.source), pretty_name(flow.target)
        return f"no position of {source} comes before one of {target}: nothing flows back in time"
    return None


def variants(
    positions: PositionSets,
    flows: Iterable[Flow],
    *,
    window: int,
    n_layers: int,
    layers: Sequence[int] | None = None,
    intervention: Intervention = "mask",
    placement: Placement | None = None,
    heads: Iterable[int] | None = None,
) -> list[Variant]:
    """List the runs of an experiment on one prompt: each flow, blocked around each layer.

    Args:
        positions: The prompt's position sets.
        flows: Flows to block. A module intervention acts on the flow's target; its source is not used.
        window, n_layers: Width of the window, and depth of the model, in layers.
        layers: Layers to visit, every layer by default.
        intervention: What is done to the edges or modules.
        placement: How the window lies about its layer; by default `centered` for edges and `forward` for modules.
        heads: The query heads to block in each layer of the window, all by default.

    Returns:
        Flow by flow, within a flow in the order of `layers`.

    Raises:
        ValueError: No flow, or one that can't be blocked (see `flow_problem`); a layer outside the model or named
            twice; a bad window or intervention.

    >>> positions = PositionSets(n_tokens=6, sets={"image": (1, 2), "question": (3, 4), "last": (5,)})
    >>> [v.layers for v in variants(positions, IMAGE_TO_QUESTION, window=3, n_layers=3)]
    [range(0, 2), range(0, 3), range(1, 3)]
    """
    flows = (flows,) if isinstance(flows, Flow) else tuple(flows)
    layers = range(n_layers) if layers is None else tuple(layers)
    if not flows or not layers:
        raise ValueError(f"expected at least one flow and one layer, got {len(flows)} flows, {len(layers)} layers")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers names a layer twice: {list(layers)}")
    modules = intervention in MODULE_INTERVENTIONS
    placement = placement or ("forward" if modules else "centered")
    windows = [(i, window_layers(i, window=window, n_layers=n_layers, placement=placement)) for i in layers]
    heads = None if heads is None else sorted(set(heads))
    chosen = {held: None if heads is None else tuple(product(held, heads)) for _, held in windows}
    found, how = [], {"intervention": intervention}
    for flow in flows:
        if problem := flow_problem(positions, flow, intervention=intervention):
            raise ValueError(f"can't block {flow}: {problem}")
        source, target = () if modules else positions[flow.source], positions[flow.target]
        found += [
            Variant(layers=held, target=target, source=source, flow=flow, layer=i, heads=chosen[held], **how)
            for i, held in windows
        ]
    return found


def _each(sources: str, targets: str) -> tuple[Flow, ...]:
    return tuple(Flow(source=a, target=b) for a in sources.split() for b in targets.split())


_PARTS = "option_true option_false objects question_without_options question_without_objects"

FLOW_TO_LAST = _each("question image last", "last")
"""Experiment 1, Fig. 3."""
TEMPLATE_TO_LAST = _each("template", "last")
"""What stands between the question and the last position, as a way to it."""
IMAGE_TO_QUESTION = _each("image", "question")
"""Experiment 2, Fig. 4."""
IMAGE_PATCHES_TO_QUESTION = _each("image_related image_other", "question")
"""§6, Fig. 5."""
CAPTIONS_TO_LAST = _each("captions question", "last")
"""App. G, Fig. 17: the language model alone, captions in place of the image."""
PARTS_TO_LAST = _each(f"{_PARTS} options", "last")
"""App. J.1, Fig. 32."""
PARTS_TO_PARTS = _each("question_without_options", "option_true option_false") + _each(
    "question_without_objects", "objects"
)
"""App. J.2, Fig. 33."""
IMAGE_TO_PARTS = _each("image", _PARTS)
"""App. J.3, Fig. 34."""
OTHER_PATCHES_TO_PARTS = _each("image_other", _PARTS)
"""App. J.4, Fig. 35."""
RELATED_PATCHES_TO_PARTS = _each("image_related", _PARTS)
"""App. J.5, Fig. 36."""
NO_PICTURE, NO_QUESTION = _each("image", "after_image"), _each("question", "after_question")
"""Cut in all layers: no picture, or no question, at all; what a flow from it can be expected to cost at most."""
FLOORS = {str(NO_PICTURE[0]): "No picture at all", str(NO_QUESTION[0]): "No question at all"}
"""How a figure calls them."""
IMAGE_ROUTES = _each("image", "last question template question+last") + NO_PICTURE
QUESTION_ROUTES = _each("question", "last template") + NO_QUESTION + PARTS_TO_LAST + _each("options+objects", "last")
"""Ways to the answer, to be cut in all layers, alone and together: where each of two carries it, only both show it."""
