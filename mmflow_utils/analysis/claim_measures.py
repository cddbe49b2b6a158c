"""What is measured for a claim: from one or two lines to a number with its 95 % interval."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmflow_utils.analysis.flow_stages import SHARE, Draws, Measured, depth_of, strongest_index, with_interval
from mmflow_utils.analysis.sentences import format_number

NOTHING = (float("nan"),) * 3


@dataclass(frozen=True)
class Line:
    """One line of one model: its effect in every draw, and the band that holds for all layers at once."""

    draws: Draws
    low: Float[np.ndarray, " n_layers"]
    high: Float[np.ndarray, " n_layers"]
    layers: Float[np.ndarray, " n_layers"]
    n_layers: int
    has_stage: bool
    n: int
    n_clusters: int


def strongest(line: Line) -> str:
    """Write the strongest effect with its band's ends, its layer, and how deep that lies: 0 first, 1 last."""
    at = strongest_index(line.draws[:1])[0]
    effect, *ends = (format_number(numbers[at]) for numbers in (line.draws[0], line.low, line.high))
    deep = format_number(depth_of(line.layers[at], line.n_layers), 2)
    return f"{effect} ({' to '.join(ends)}) at layer {line.layers[at]:.0f} of {line.n_layers}, depth {deep}"


def _center(line: Line) -> Float[np.ndarray, " draws"]:
    """Mean layer weighted by the effect, where it has SHARE of its most: the strongest layer jumps on a plateau."""
    weight = np.where(line.draws >= SHARE * line.draws.max(1, keepdims=True), line.draws, 0.0).clip(0)
    with np.errstate(invalid="ignore"):
        return (weight @ line.layers) / weight.sum(1)


def later(first: Line, second: Line) -> Measured:
    """How much later the center of the second line lies, in layers."""
    return with_interval(_center(second) - _center(first))


def depth(line: Line) -> Measured:
    """Depth of the strongest layer (%): 0 is the first, 100 the last."""
    strongest = np.where(np.isfinite(line.draws).all(1), line.layers[strongest_index(line.draws)], np.nan)
    return with_interval(100 * depth_of(strongest, line.n_layers))


def at_both_ends(first: Line, second: Line) -> Measured:
    """The first line's effect minus the second's, at the first layer or at the last, where it is less."""
    apart = first.draws - second.draws
    return with_interval(np.minimum(apart[:, 0], apart[:, -1]))


# The greatest of many noisy layers is too great, in the data and in resamples. What follows takes its
# interval from the band that holds for all layers at once, which is not misled.


def stronger(first: Line, second: Line) -> Measured:
    """The first line's largest effect minus the second's."""
    value = first.draws[0].max() - second.draws[0].max()
    return value, first.low.max() - second.high.max(), first.high.max() - second.low.max()


def in_second_half(line: Line) -> Measured:
    """The effect at the first layer of the second half."""
    at = np.flatnonzero(line.layers >= line.n_layers / 2)[:1]
    return (line.draws[0, at[0]], line.low[at[0]], line.high[at[0]]) if len(at) else NOTHING


def largest(line: Line, *_: Line) -> Measured:
    """The largest effect of the first line at any layer, of either sign."""
    nearest = np.maximum(np.maximum(line.low, -line.high), 0.0)  # of the band to 0
    furthest = np.maximum(np.abs(line.low), np.abs(line.high))
    return np.abs(line.draws[0]).max(), nearest.max(), furthest.max()


def two_drops(line: Line) -> Measured:
    """How far the effect sinks between its two peaks."""
    if len(line.layers) < 3:
        return NOTHING
    mean = line.draws[0]
    return _valley(mean, mean), _valley(line.low, line.high), _valley(line.high, line.low)


def _valley(peaks: Float[np.ndarray, " n_layers"], between: Float[np.ndarray, " n_layers"]) -> float:
    """Say how far a curve sinks between two peaks, counted from the lower one; 0 or less with one peak.

    >>> curve = np.array([60.0, 10.0, 21.0, 0.0])
    >>> float(_valley(curve, curve))
    11.0
    """
    before, after = np.maximum.accumulate(peaks), np.maximum.accumulate(peaks[::-1])[::-1]
    return (np.minimum(before[:-2], after[2:]) - between[1:-1]).max()
