"""How sure a mean over images is: a score interval where its measure has limits, the bootstrap's percentiles elsewhere.

The share of questions that are answered, or of an answer's probability that is lost, can't pass its limits, and a dozen
samples without a loss don't show that there is none: where a flow matters to few samples, these lose everything.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.special import stdtrit
from scipy.stats.mstats import hdquantiles

# What one sample can show of a measure. Where nothing ends a range, it reaches as far as what was seen on the curve.
RANGES = {"rel_change_pct": (-100.0, np.inf), "change": (-100.0, np.inf), "effect": (-np.inf, 100.0)}
RANGES |= {"logprob_change": (-np.log(1e6), np.inf), "logit_diff_change": (-np.inf, np.inf)}
RANGES |= dict.fromkeys(("probability", "jaccard"), (0.0, 1.0))
RANGES |= dict.fromkeys(("probability_pct", "left_pct", "accuracy_pct", "correct_pct", "share_pct"), (0.0, 100.0))

Cells = Float[np.ndarray, "groups clusters"]
PerGroup = Float[np.ndarray, " groups"]
Ends = Float[np.ndarray, "2 groups"]


def clusters_that_count(counts: Cells) -> PerGroup:
    """Return how many clusters of equal size tell as much (Kish), at least 2."""
    return np.maximum(2.0, counts.sum(1) ** 2 / np.maximum((counts**2).sum(1), 1))


def standard_error(sums: Cells, counts: Cells) -> PerGroup:
    """Return the standard error of each group's mean, from the deviations of its clusters."""
    n = np.maximum(counts.sum(1, keepdims=True), 1)
    return np.sqrt(((sums - counts * (sums.sum(1, keepdims=True) / n)) ** 2).sum(1)) / n[:, 0]


def widened(tail: float | PerGroup, counts: Cells) -> PerGroup:
    """Return the lower normal score of the expanded percentile: t in place of z, n - 1 in place of n."""
    n = clusters_that_count(counts)
    return np.sqrt(n / (n - 1)) * stdtrit(n - 1, tail)


def percentile_interval(resampled: Float[np.ndarray, "n_boot groups"], tails: PerGroup) -> Ends:
    """Cut off the tails of each group's resampled means."""
    ends = np.full((2, len(tails)), np.nan)
    for tail in set(tails):
        alike = tails == tail
        ends[:, alike] = np.quantile(resampled[:, alike], [tail, 1 - tail], axis=0)
    return ends


def score_interval(
    mean: PerGroup, width: PerGroup, k: PerGroup, limits: tuple[float, float], seen: Ends, floors: Ends
) -> Ends:
    """Find the means that are z standard errors away from those observed, with the error that they would have.

    Were a share s of the n images at a limit, `room` away, the mean would be off by d = s room, and its variance
    (1 - s) error**2 + s (1 - s) room**2 / n. Both ends solve d**2 = z**2 times that. Of samples at 0 and 100 this is
    Wilson's interval (1927).

    Args:
        mean, width: as observed; z errors, with z widened for few images.
        k: z**2 / n.
        limits: what one sample can show; infinite: as much as `seen`, the extremes of the whole curve.
        floors: the least distance of either end.
    """
    ends, variance = [], width**2
    for sign, limit, most, floor in zip((-1, 1), limits, seen, floors, strict=True):
        furthest = np.fmax(sign * most, 0.0 if np.isinf(limit) else sign * limit)
        room = np.maximum(furthest - sign * mean, 1e-9)
        half = k * room - variance / room
        off = (half + np.sqrt(half**2 + 4 * (1 + k) * variance)) / (2 * (1 + k))
        end = sign * mean + np.hypot(off, floor)
        ends.append(sign * (end if np.isinf(limit) else np.minimum(end, furthest)))
    return np.array(ends)


def greatest_deviation(
    deviation: Float[np.ndarray, "n_boot groups"], curve: Int[np.ndarray, " groups"], level: float
) -> PerGroup:
    """Return for each curve what its greatest standardized deviation stays below in `level` of the resamples.

    It makes the sup-t band of Montiel Olea and Plagborg-Møller (2019), which holds for any widths that the deviations
    are divided by. Here these are the standard errors with the smallest effect that counts added in quadrature,
    as Tusher, Tibshirani and Chu (2001) steady their statistic: where all images agree, or nothing but the
    machine's rounding varies, the quotient goes to 0 instead of to noise over noise, and the band is a
    continuous function of the data.
    """
    most = np.full(len(curve), np.nan)
    there = np.isfinite(deviation).all(0)
    for name in np.unique(curve[there]):
        rows = there & (curve == name)
        # Harrell and Davis's quantile (1982) averages order statistics, so that the band hangs on no single one.
        most[rows] = hdquantiles(deviation[:, rows].max(1), prob=[level])[0]
    return most
