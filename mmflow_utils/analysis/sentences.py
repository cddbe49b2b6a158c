"""From summaries to the sentences of a notebook's findings: effect, unit, interval and n, never typed in.

print("\\n".join(describe_strongest(summarize(frame))))
"""

from collections.abc import Iterable, Sequence
from math import isfinite

import numpy as np
import pandas as pd

from mmflow_utils.analysis.stats import SMALLEST, curves, need_columns

TIE = 0.05  # of what is printed with one decimal: means that differ by less are equally strong


def strongest_layer(summary: pd.DataFrame, by: Sequence[str] = ("task", "flow"), *, tie: float = TIE) -> pd.DataFrame:
    """Find the layer with the largest drop (the lowest mean) of each curve.

    Args:
        summary: from `summarize`.
        by: the columns that make a curve; those that the summary lacks are passed over.
        tie: layers whose mean is this close to the lowest (unit of the mean) count as equally strong, and the
            first is taken: else differences at the level of float rounding would choose.

    Returns:
        One row of `summary` per curve, with layers (all the tied ones, such as "3-5") and dropped (the layers
        whose whole interval lies below the smallest effect that counts, `SMALLEST`, or "").
    """
    by = [column for column in by if column in summary]
    need_columns(summary, ["layer", "mean", "ci_low", "ci_high", "n"])
    rows = summary.dropna(subset="mean").sort_values("layer", kind="stable")
    curve, first, tied, dropped = curves(rows, by).ngroup().to_numpy(), [], [], []
    layer, mean, high = (rows[column].to_numpy() for column in ("layer", "mean", "ci_high"))
    for number in range(curve.max(initial=-1) + 1):
        at = np.flatnonzero(curve == number)
        lowest = at[mean[at] <= mean[at].min() + tie]
        first.append(lowest[0])
        tied.append(layer_ranges(layer[lowest]))
        dropped.append(layer_ranges(layer[at[high[at] <= -SMALLEST]]))
    return rows.iloc[first].reset_index(drop=True).assign(layers=tied, dropped=dropped)


def describe_strongest(summary: pd.DataFrame, by: Sequence[str] = ("task", "flow")) -> list[str]:
    """Write one finding per curve: where the drop is largest, how large, its interval, n.

    The largest of many noisy points looks larger than it is: a summary made with `simultaneous_over="layer"`
    allows for that, and the sentence names the kind of interval.

    Example:
        >>> row = dict(task="T", flow="A -> B", layer=4, mean=-43.21, ci_low=-50.0, ci_high=-36.1)
        >>> describe_strongest(pd.DataFrame([row | dict(n=24, n_clusters=20)]))[0].split("; ")[0]
        'T, A -> B: largest drop at layer 4, -43.2 % (95 % interval -50.0 to -36.1, 24 samples on 20 images)'
    """
    sentences = []
    for row in strongest_layer(summary, by).to_dict("records"):
        name = ", ".join(str(row[column]) for column in by if column in row)
        where = _layers(row["layers"])
        effect = f"{format_number(row['mean'])} % ({_evidence(row)})"
        if row["dropped"] and row["ci_high"] <= -SMALLEST:
            text = f"largest drop at {where}, {effect}; at least {SMALLEST:g} % for sure in {_layers(row['dropped'])}"
        elif isfinite(row["ci_high"]):
            text = f"no drop that surely reaches {SMALLEST:g} %; lowest at {where}, {effect}"
        else:
            text = f"lowest at {where}, {effect}; too few images for an interval"
        sentences.append(f"{name}: {text}." if name else f"{text[0].upper()}{text[1:]}.")
    return sentences


def describe_highest(summary: pd.DataFrame, by: Sequence[str] = ("task",)) -> list[str]:
    """Write one finding per curve: where it is highest, how high, and how high it ends.

    Example:
        >>> row = dict(task="T", layer=4, mean=43.2, ci_low=36.1, ci_high=50.0, n=8, n_clusters=6)
        >>> describe_highest(pd.DataFrame([row, row | dict(layer=5, mean=2.0)]))[0].split("; ")[1]
        '2.0 % at layer 5.'
    """
    by, sentences = [column for column in by if column in summary], []
    for _, curve in curves(summary.dropna(subset="mean").sort_values("layer", kind="stable"), by):
        row = curve[curve["mean"] >= curve["mean"].max() - TIE].iloc[0].to_dict()
        end = curve.iloc[-1]
        effect = f"{format_number(row['mean'])} % ({_evidence(row)})"
        close = "" if row["layer"] == end["layer"] else f"; {format_number(end['mean'])} % at layer {end['layer']}"
        name = ", ".join(str(row[column]) for column in by)
        sentences.append(f"{name}: highest at layer {row['layer']}, {effect}{close}.")
    return sentences


def describe_differences(table: pd.DataFrame, by: Sequence[str] = ("task",), *, over: str = "layer") -> list[str]:
    """Write one finding per curve of `paired_difference`: which layers (or `over`) differ, and the largest effect.

    A mean difference below `SMALLEST`, the smallest effect that counts, is not claimed, however sure it is.
    """
    by, sentences = [column for column in by if column in table], []
    for _, curve in curves(table.dropna(subset="p_holm").sort_values(over, kind="stable"), by):
        size = curve["mean"].abs()
        row = curve[size >= size.max() - TIE].iloc[0].to_dict()
        name = ", ".join([*(str(row[column]) for column in by), row["contrast"]])
        differs = curve.loc[(curve["p_holm"] < 0.05) & (size >= SMALLEST), over]
        claim = f"differs in {_layers(layer_ranges(differs), over)}" if len(differs) else f"no {over} differs"
        largest = f"{over} {row[over]}, {format_number(row['mean'])} percentage points ({_evidence(row)})"
        sentences.append(f"{name}: {claim} (Holm p < 0.05, by {SMALLEST:g} or more); largest at {largest}.")
    return sentences


def format_number(value: float | int, digits: int = 1) -> str:
    """Print a number with fixed decimals, alike on every machine: exact ties go away from 0, no "-0.0".

    Example:
        >>> format_number(31.25), format_number(31.25 - 1e-12), format_number(-0.01)
        ('31.3', '31.3', '0.0')
    """
    if not isfinite(value):
        return "n/a" if np.isnan(value) else f"{value:+}"
    text = f"{abs(value) + 1e-4 * 10.0**-digits:.{digits}f}"
    return f"-{text}" if value < 0 and float(text) else text


def layer_ranges(layers: Iterable) -> str:
    """Shorten a set of layers.

    Example:
        >>> layer_ranges([4, 3, 5, 9])
        '3-5, 9'
    """
    numbers = sorted({int(layer) for layer in layers})
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(s) if s == e else f"{s}-{e}" for s, e in zip(starts, ends, strict=True))


def _layers(ranges: str, over: str = "layer") -> str:
    return f"{over}s {ranges}" if "-" in ranges or "," in ranges else f"{over} {ranges}"


def _evidence(row: dict) -> str:
    ends = f"{format_number(row['ci_low'])} to {format_number(row['ci_high'])}"
    return f"{row.get('interval', '95 % interval')} {ends}, {row['n']} samples on {row['n_clusters']} images"
