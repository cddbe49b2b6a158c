"""From tidy frames to means with intervals, paired differences and corrected tests.

Half of GQA's questions share their image with another question, so rows are not independent: every
interval and test here goes by images (clusters), never by rows. Knows no model and draws nothing.

    summary = summarize(frame)  # one row per task, flow and layer
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import ndtr, ndtri

from mmflow_utils.analysis import intervals

# Columns that set an experiment apart. Averaging over two values of one of these is always a mistake.
SETTINGS = ("model", "window", "intervention", "protocol")
# The smallest effect that counts, in the measure's own unit: half a percentage point, or what is named
# below. What varies by less is not told from the machine's rounding.
SMALLEST = 0.5
_RANK_SPREAD = 0.05  # of ranks, squared: of 48 items one that stands out has 11
SMALLEST_OF = {"logprob_change": 5e-3, "logit_diff_change": 5e-3, "probability": 5e-3, "jaccard": 5e-3}


def summarize(
    frame: pd.DataFrame,
    value: str = "rel_change_pct",
    by: Sequence[str] = ("task", "flow", "layer"),
    *,
    cluster: str | None = "image_id",
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    simultaneous_over: str | None = None,
    smallest: float | None = None,
    limits: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """Average `value` in every group, with an interval over clusters.

    A measure with limits, such as a share of questions or a relative change of probability, has Wilson's score
    interval, which never leaves them and allows for what a few samples don't show. Others have the bootstrap's
    percentiles. Both are widened for the number of clusters (Hesterberg 2015, expanded percentiles; clusters of
    unequal size count for fewer, by Kish's formula): with a few dozen images plain ones cover too little. Curves
    measured on the same images share their resamples.

    Args:
        frame: one row per measurement; rows whose `value` is NaN are left out and not counted.
        value: the column to average, in its own unit.
        by: the columns that make a group.
        cluster: the column of what is drawn anew, or None to draw single rows (too narrow if images repeat).
        n_boot: resamples, at least 100.
        seed: of the resampling; the rows' order and the other groups in the frame do not matter.
        level: coverage of the interval, between 0 and 1.
        simultaneous_over: a column of `by`, such as "layer": the intervals then form a band that covers a
            whole curve at once, as a claim about its lowest point needs. By default each point has its own.
        smallest: the smallest effect that counts (unit of `value`); by default half a percentage point,
            or what `SMALLEST_OF` names. A band is at least that wide on either side, and points that vary by
            much less don't widen it elsewhere.
        limits: what one sample can show; by default what `intervals.RANGES` names, if anything.

    Returns:
        A frame with `by`, mean, ci_low, ci_high (unit of `value`), n (samples), n_clusters, and interval, the
        kind of interval in words. That of a group of one cluster is NaN: one image tells no spread.

    Raises:
        ValueError: a column is missing, there are no rows, a value is infinite or has no cluster, or a group
            mixes settings (models, windows, ...).

    Example:
        >>> rows = pd.DataFrame({"task": "t", "image_id": ["a", "a", "b"], "drop": [1.0, 1.0, 4.0]})
        >>> summarize(rows, "drop", by=["task"])[["mean", "n", "n_clusters"]].to_dict("records")
        [{'mean': 2.0, 'n': 3, 'n_clusters': 2}]
    """
    by = list(by)
    if n_boot < 100 or not 0 < level < 1:
        raise ValueError(f"expected n_boot >= 100 and 0 < level < 1, got n_boot={n_boot} and level={level}")
    if simultaneous_over is not None and simultaneous_over not in by:
        raise ValueError(f"simultaneous_over={simultaneous_over!r} is not one of the grouping columns {by}: add it")
    table, sums, counts, clusters, seen = _cluster_table(frame, value, by, cluster)
    limits = intervals.RANGES.get(value) if limits is None else limits
    smallest = SMALLEST_OF.get(value, SMALLEST) if smallest is None else smallest
    mean, error = table["mean"].to_numpy(), intervals.standard_error(sums, counts)
    z, resampled = np.full(len(table), -ndtri((1 - level) / 2)), np.empty((0, len(table)))
    if simultaneous_over or limits is None:
        resampled = _resample_groups(sums, counts, clusters, n_boot, seed)
    if simultaneous_over:
        error = resampled.std(0)
        curve = curves(table, [column for column in by if column != simultaneous_over]).ngroup().to_numpy()
        deviation = np.abs(resampled - mean) / np.hypot(error, smallest)
        most = intervals.greatest_deviation(deviation, curve, level)
        z = most if limits is None else np.maximum(most, z)
    wide = -intervals.widened(ndtr(-z), counts)
    if limits is not None:
        floors = np.array([wide * smallest * (bool(simultaneous_over) or np.isinf(limit)) for limit in limits])
        share = z**2 / intervals.clusters_that_count(counts)
        low, high = intervals.score_interval(mean, wide * error, share, limits, seen, floors)
    elif simultaneous_over:
        half = np.maximum(wide * np.hypot(error, smallest), smallest)
        low, high = mean - half, mean + half
    else:
        low, high = intervals.percentile_interval(resampled, ndtr(-wide))
    for name, end in (("ci_high", high), ("ci_low", low)):
        table.insert(len(by) + 1, name, np.where(table["n_clusters"] > 1, end, np.nan))
    return table.assign(interval=f"{100 * level:g} %{' simultaneous' if simultaneous_over else ''} interval")


def paired_difference(
    frame: pd.DataFrame,
    a: object,
    b: object,
    *,
    column: str = "flow",
    value: str = "rel_change_pct",
    on: Sequence[str] = ("sample_id", "layer"),
    by: Sequence[str] = ("task", "layer"),
    family: Sequence[str] = (),
    n_boot: int = 1000,
    n_flips: int = 9999,
    seed: int = 0,
    smallest: float | None = None,
) -> pd.DataFrame:
    """Compare two conditions on the same samples: `a` minus `b`, tested by sign flips of whole images.

    The test asks whether the differences are balanced around 0: it flips the sign of all differences of an
    image together, and p is the share of flips whose mean is at least as far from 0 as the one observed,
    less the smallest effect that counts. So a difference that is nothing but rounding has p = 1 everywhere.

    Args:
        frame: holds both conditions, told apart by `column`.
        a, b: values of `column` in the two conditions, e.g. "Related image patches -> Question".
        column: what tells the conditions apart: "flow", "model", "window", "intervention", ...
        value: the column to compare, in its own unit.
        on: the columns that pair a row of `a` with its row of `b`.
        by: the columns that make a group.
        family: the columns that make a family of tests for Holm's correction; none: the table is one family.
        n_boot: resamples for the pointwise 95 % interval.
        n_flips: sign flips for p, which is never below 1 / (n_flips + 1).
        seed: of resamples and flips.
        smallest: the smallest effect that counts (unit of `value`); by default as in `summarize`.

    Returns:
        summarize's frame for the difference, with contrast ("a minus b"), p and p_holm, and n_unpaired, the rows
        of both conditions that have no partner and were left out.

    Raises:
        ValueError: a column or condition is missing, a pair is not unique, or nothing pairs.
    """
    by, keys = list(by), list(dict.fromkeys([*by, *on, "image_id"]))
    need_columns(frame, [*keys, column, value])
    sides = []
    for name in (a, b):
        side = frame.loc[frame[column] == name, [*keys, value]]
        if side.empty:
            found = ", ".join(map(repr, frame[column].unique()[:12]))
            raise ValueError(f"no row has {column} == {name!r}; choose two of the values found: {found}")
        if side.duplicated(keys).any():
            raise ValueError(f"rows of {name!r} are not unique in {keys}: select one setting, or add a column to `on`")
        sides.append(side)
    pairs = sides[0].merge(sides[1], on=keys, suffixes=("_a", "_b"))
    if pairs.empty:
        raise ValueError(f"no row of {a!r} pairs with one of {b!r} in {keys}: were both run on the same samples?")
    pairs["difference"] = pairs[f"{value}_a"] - pairs[f"{value}_b"]
    most = np.diff(intervals.RANGES.get(value, (-np.inf, np.inf)))[0]
    smallest = SMALLEST_OF.get(value, SMALLEST) if smallest is None else smallest
    table = summarize(pairs, "difference", by, n_boot=n_boot, seed=seed, smallest=smallest, limits=(-most, most))
    _, sums, counts, *_ = _cluster_table(pairs, "difference", by, "image_id")
    table.insert(0, "contrast", f"{a} minus {b}")
    table["p"] = np.where(table["n"] > 0, _sign_flip_p(sums, smallest * counts.sum(1), n_flips, seed), np.nan)
    table["p_holm"] = curves(table, list(family))["p"].transform(holm)
    return table.assign(n_unpaired=len(sides[0]) + len(sides[1]) - 2 * len(pairs))


def holm(p: Sequence[float] | np.ndarray | pd.Series) -> np.ndarray:
    """Adjust p values by Holm's step-down method, which holds the chance of any false claim in the family.

    NaN stays NaN and does not count as a test.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def rank_correlation(
    a: Float[np.ndarray, "draws items"], b: Float[np.ndarray, "draws items"], *, smallest: float = SMALLEST
) -> Float[np.ndarray, " draws"]:
    """Correlate `soft_ranks` (Spearman), their spread steadied by a small one of its own: 0 where nothing differs.

    >>> far, near = np.array([[1.0, 40.0, 2.0, 3.0]]), np.array([[0.0, 9.0, 1e-7, -1e-7]])
    >>> rank_correlation(far, far**2, smallest=0.1).round(2), rank_correlation(near, -near).round(2)
    (array([0.96]), array([-0.94]))
    """
    return correlate_ranks(soft_ranks(a, smallest), soft_ranks(b, smallest))


def soft_ranks(values: Float[np.ndarray, "draws items"], smallest: float) -> Float[np.ndarray, "draws items"]:
    """Rank values so that what differs by much less than the smallest effect that counts is tied; of mean 0.

    A rank counts the values below, each by the normal distribution of the difference in units of `smallest`: a
    continuous function of the data, in which the machine's rounding has no say. Values far apart rank as usual.
    """
    ranks = np.array([ndtr((row[:, None] - row) / smallest).sum(-1) for row in values])
    return ranks - ranks.mean(1, keepdims=True)


def correlate_ranks(
    a: Float[np.ndarray, "draws items"], b: Float[np.ndarray, "draws items"]
) -> Float[np.ndarray, " draws"]:
    """Correlate what `soft_ranks` gives."""
    return (a * b).mean(1) / np.sqrt(((a**2).mean(1) + _RANK_SPREAD) * ((b**2).mean(1) + _RANK_SPREAD))


# --- inner parts ---


def need_columns(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Raise a ValueError that names the first missing column and the nearest one there is."""
    for column in columns:
        if column not in frame:
            near = get_close_matches(column, map(str, frame.columns), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(str, frame.columns))}"
            raise ValueError(f"the frame has no column {column!r}: {hint}")


def curves(table: pd.DataFrame, by: list[str]) -> Any:
    """Group a table; without columns to group by, it is one group."""
    return table.groupby(by or np.zeros(len(table)), dropna=False, observed=True)


def _cluster_table(
    frame: pd.DataFrame, value: str, by: list[str], cluster: str | None
) -> tuple[pd.DataFrame, intervals.Cells, intervals.Cells, np.ndarray, intervals.Ends]:
    """Table of groups, sum and count of `value` in each of their clusters, the clusters' names, curves' extremes."""
    need_columns(frame, [*by, value, *([cluster] if cluster else [])])
    if frame.empty:
        raise ValueError(f"expected rows to average {value!r} over, got an empty frame: was every sample skipped?")
    values = frame[value].to_numpy(dtype=float, na_value=np.nan)
    if n_infinite := int(np.isinf(values).sum()):
        raise ValueError(f"{n_infinite} values of {value!r} are infinite: leave out rows with p_base = 0")
    if cluster and (n_missing := int(frame[cluster].isna().sum())):
        raise ValueError(f"{n_missing} rows have no {cluster!r}: fill it in, or choose another cluster")
    groups = frame.groupby(by, dropna=False, observed=True)
    for name in (name for name in SETTINGS if name in frame and name not in by):
        if frame[name].nunique() > 1 and groups[name].nunique().max() > 1:
            raise ValueError(f"one group mixes several values of {name!r}: select one, or add {name!r} to `by`")
    kept = np.isfinite(values)
    ids, names = pd.factorize(frame[cluster] if cluster else groups.cumcount(), sort=True)
    # Arrays from here on: this is called for every table of every notebook, and a frame's own ways take longer.
    group = groups.ngroup().to_numpy()
    first = np.unique(group, return_index=True)[1]
    sums, counts = sums_and_counts(group[kept], ids[kept], values[kept], (len(first), len(names)))
    n = n_rows = counts.sum(1).astype(int)
    if "sample_id" in frame:  # a group may hold several rows of a sample, e.g. one per layer
        samples, named = pd.factorize(frame["sample_id"], use_na_sentinel=False)
        is_in = np.zeros((len(first), len(named)), dtype=bool)
        is_in[group[kept], samples[kept]] = True
        n = is_in.sum(1)
    mean = np.divide(sums.sum(1), n_rows, out=np.full(len(first), np.nan), where=n_rows > 0)
    columns = {name: frame[name].array[first] for name in by}
    table = pd.DataFrame(columns | {"mean": mean, "n": n, "n_clusters": (counts > 0).sum(1)})
    curve = curves(table, [c for c in by if c != "layer"]).ngroup().to_numpy()
    extremes = pd.Series(values[kept]).groupby(curve[group[kept]]).agg(["min", "max"])
    return table, sums, counts, np.asarray(names).astype(str), extremes.reindex(curve).to_numpy().T


def sums_and_counts(
    row: Int[np.ndarray, " values"], column: Int[np.ndarray, " values"], values: Any, shape: tuple[int, int]
) -> tuple[Float[np.ndarray, "rows columns"], Float[np.ndarray, "rows columns"]]:
    """Return the sum and the number of the values in each cell of a table."""
    cell, size = np.ravel_multi_index((row, column), shape), shape[0] * shape[1]
    sums, counts = np.bincount(cell, values, minlength=size), np.bincount(cell, minlength=size)
    return sums.reshape(shape), counts.reshape(shape).astype(float)


def _resample_groups(
    sums: intervals.Cells, counts: intervals.Cells, clusters: np.ndarray, n_boot: int, seed: int
) -> Float[np.ndarray, "n_boot groups"]:
    """Return each group's mean in every resample; a set of clusters always gets the same draws, one alone none."""
    resampled = np.full((n_boot, len(sums)), np.nan)
    patterns, which = np.unique(counts > 0, axis=0, return_inverse=True)
    for n in np.flatnonzero(patterns.sum(1) > 1):  # the groups that have the very same clusters
        rows, columns = np.flatnonzero(which == n), np.flatnonzero(patterns[n])
        seeds = (seed, crc32("\n".join(clusters[columns]).encode()))
        resampled[:, rows] = resample_means(sums[rows][:, columns], counts[rows][:, columns], n_boot, seeds)
    return resampled


def resample_means(
    sums: intervals.Cells, counts: intervals.Cells, n_boot: int, seed: int | tuple[int, ...]
) -> Float[np.ndarray, "n_boot groups"]:
    """Return each group's mean in every resample of the clusters, NaN where none of its own was drawn."""
    weights = _draw_counts(sums.shape[1], n_boot, seed)
    with np.errstate(invalid="ignore"):
        return (weights @ sums.T) / (weights @ counts.T)


@lru_cache(maxsize=8)  # the many curves of a table share their draws
def _draw_counts(n: int, n_boot: int, seed: int | tuple[int, ...]) -> Float[np.ndarray, "n_boot clusters"]:
    """Return how often each cluster is drawn in every resample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float)


def _sign_flip_p(sums: intervals.Cells, slack: intervals.PerGroup, n_flips: int, seed: int) -> intervals.PerGroup:
    """Share of sign flips whose sum is as far from 0 as the one observed, less `slack`."""
    rng = np.random.default_rng(seed)
    observed = np.abs(sums.sum(1)) * (1 - 1e-9) - slack  # a tie counts, in spite of rounding
    as_far, left = np.ones(len(sums)), n_flips
    while left:  # in pieces, so that thousands of images fit in memory
        signs = rng.integers(0, 2, size=(min(left, 1000), sums.shape[1])) * 2.0 - 1
        as_far += (np.abs(signs @ sums.T) >= observed).sum(0)
        left -= len(signs)
    return as_far / (n_flips + 1)
