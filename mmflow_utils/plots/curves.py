"""Curves over layers."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmflow_utils.plots import style

LEAST, NOTHING = 10.0, 1.0  # %: what an axis shows at least; what isn't worth a panel


def plot_flow(
    summary: pd.DataFrame,
    *,
    title: str | None = None,
    window: int | None = None,
    model: str | None = None,
    y_label: str = "Change in probability (%)",
    floor: pd.DataFrame | None = None,
) -> Figure:
    """Draw what blocking each flow does to the answer's probability, by layer (paper, Figs 3 to 5).

    Args:
        summary: From `summarize`, with columns task, flow, layer, mean, ci_low, ci_high (%) and n.
        title: In place of the usual one, which names the flows.
        window, model: Layers blocked at once and the model's name, for the subtitle.
        y_label: What the mean is, for another measure than the paper's.
        floor: As for `plot_curves`.

    Returns:
        A figure with one panel per task, in the paper's order; tasks without rows have no panel. Of a change in %, the
        axis reaches at least `LEAST` up and down, and tasks whose means all lie within `NOTHING` are named in the
        subtitle instead, as long as any other is left.

    Raises:
        ValueError: A column is missing or nothing is left to draw.
    """
    window_text = f"window of {window} layer{'s' * (window != 1)}" if window else None
    kind = summary["interval"].iloc[0] if "interval" in summary and len(summary) else "95 % interval"
    bands = f"bands: {kind}s over images"
    least, flat = 0.0, ""
    if "(%)" in y_label or "percentage" in y_label:
        least, (summary, flat) = LEAST, _fold(summary, floor)
    subtitle = " · ".join(part for part in (model, window_text, bands, flat) if part)
    flows = style.ordered(summary["flow"], tuple(style.FLOW_COLORS)) if "flow" in summary else []
    what = ", ".join(map(style.shown, flows)) if 0 < len(flows) < 4 else "a flow of information"
    title = title or f"Effect on the answer of blocking {what}"
    return plot_curves(summary, title=title, subtitle=subtitle, y_label=y_label, floor=floor, least=least)


@style.styled
def plot_curves(
    summary: pd.DataFrame,
    *,
    line: str = "flow",
    panel: str = "task",
    across: str | None = None,
    x: str = "layer",
    x_label: str = "Layer",
    y_label: str = "Mean",
    title: str = "",
    subtitle: str = "",
    colors: Mapping[str, str] | None = None,
    floor: pd.DataFrame | None = None,
    least: float = 0.0,
) -> Figure:
    """Draw a summary: a panel per value of `panel`, in it a curve with its interval per value of `line`.

    Args:
        summary: From `summarize`: mean, ci_low, ci_high, and n if known.
        line: The column that tells curves apart. Numbers, such as window sizes, get an ordered scale.
        panel: The column that tells panels apart; a summary that lacks it makes one panel.
        across: A second column that tells panels apart: its values stand side by side.
        x, x_label: The column of the horizontal axis, whole numbers from 0, and its label.
        y_label: Label of the mean, with its unit.
        colors: Colors by value of `line`, in place of the flows' own; their order is the legend's.
        floor: From `summarize`, by `panel` and flow: levels that the curves are compared with, dashed, such as what a
            flow costs that is cut in all layers.
        least: How far the vertical axis reaches at least, up and down.

    Raises:
        ValueError: A column is missing or nothing is left to draw.
    """
    data = _drawable(summary, [panel, *([across] if across else [])], line, x)
    panels = style.ordered(data[panel], (*style.TASK_ORDER, *style.FLOW_COLORS))
    aside = style.ordered(data[across], ()) if across else [None]
    lines = style.line_looks(data[line], colors, (*(colors or {}), *style.FLOW_COLORS))
    floors = [] if floor is None else floor[floor[panel].isin(panels)].to_dict("records")
    limits = _limits(data, [*(row["mean"] for row in floors), least, -least])
    cuts = zip(dict.fromkeys(row["flow"] for row in floors), ("--", ":", "-."), strict=False)
    levels = {flow: (style.shown(flow), "#555555", dashes) for flow, dashes in cuts}
    handles = [style.legend_handle(*look) for look in (*lines.values(), *levels.values())]
    columns = len(aside) if across else None
    figure, axes = style.panel_grid(len(panels) * len(aside), title, subtitle, handles, columns=columns)
    for axis, (name, other) in zip(axes, product(panels, aside), strict=True):
        part = data[data[panel] == name]
        part = part[part[across] == other] if across else part
        shown = " · ".join(style.shown(label) for label in (name, other) if label is not None)
        axis.set_title(shown, loc="left", fontsize=9 if len(shown) > 22 else None)  # n stands beside it
        axis.set_title(_n_text(part), loc="right", fontsize=9, fontweight="normal", color="#555555")
        axis.axhline(0, color="#444444", linewidth=0.9, zorder=1.5, label="_zero")
        for value, (label, color, dashes) in lines.items():
            curve = part[part[line] == value].sort_values(x)
            if len(curve):
                _draw_curve(axis, curve, x, label, color, dashes)
        for row in floors:
            if row[panel] == name:
                label, color, dashes = levels[row["flow"]]
                axis.axhline(row["mean"], color=color, linestyle=dashes, linewidth=1.2, zorder=1.6, label=f"_{label}")
        axis.set(xlim=(-0.5, data[x].max() + 0.5), ylim=limits)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    style.label_outside(figure, axes, x_label, y_label)
    return figure


def _drawable(summary: pd.DataFrame, panels: list[str], line: str, x: str) -> pd.DataFrame:
    panel, *across = panels
    style.need(summary, [*across, line, x, "mean", "ci_low", "ci_high"])
    data = summary.dropna(subset="mean")
    if data.empty:
        raise ValueError("every mean in the summary is NaN: there is nothing to draw")
    if panel not in data:
        data = data.assign(**{panel: ""})
    if data.duplicated([*panels, line, x]).any():
        raise ValueError(
            f"several rows have the same {', '.join(panels)}, {line} and {x}: select one model and one setting"
        )
    return data


def _draw_curve(axis: plt.Axes, curve: pd.DataFrame, x: str, label: str, color: str, dashes: str) -> None:
    low, high = curve["ci_low"].astype(float), curve["ci_high"].astype(float)
    axis.fill_between(curve[x], low, high, color=color, alpha=0.17, linewidth=0, label=label)
    # Dots show that layers are discrete.
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.6} if len(curve) <= 16 else {}
    axis.plot(curve[x], curve["mean"], color=color, linestyle=dashes, label=label, **marker)


def _limits(data: pd.DataFrame, more: Sequence[float]) -> tuple[float, float]:
    """Return one vertical range for all panels, with 0 and `more`; a band far wider than the curves is cut."""
    ends = data[["ci_low", "ci_high", "mean"]].replace([np.inf, -np.inf], np.nan)
    low, high = min(0.0, data["mean"].min()), max(0.0, data["mean"].max())
    reach = (high - low) or float(ends.abs().max(axis=None)) or 1.0
    low, high = (max(min(low, ends.min(axis=None)), low - reach), min(max(high, ends.max(axis=None)), high + reach))
    low, high = min(low, *more), max(high, *more)
    margin = 0.06 * (high - low)
    return float(low - margin), float(high + margin)


def _fold(summary: pd.DataFrame, floor: pd.DataFrame | None) -> tuple[pd.DataFrame, str]:
    """Leave out the tasks in which nothing happens, if others are left, and say which they are."""
    if not {"task", "mean"} <= {*summary}:
        return summary, ""
    most = summary["mean"].abs().groupby(summary["task"]).max()
    flat = [task for task in style.ordered(summary["task"], style.TASK_ORDER) if most[task] < NOTHING]
    if not flat or len(flat) == len(most):
        return summary, ""
    level = {} if floor is None else floor.groupby("task")["mean"].first().to_dict()
    told = f"means within {NOTHING:g} % of 0 in all layers" + ", in brackets the dashed level" * bool(level)
    named = (f"{task} (−{abs(level[task]):.0f} %)" if level.get(task, 0) < -NOTHING else task for task in flat)
    return summary[~summary["task"].isin(flat)], f"{told}: {', '.join(named)}"


def _n_text(part: pd.DataFrame) -> str:
    if "n" not in part or part.empty:  # a model that was not asked this task
        return ""
    few, many = int(part["n"].min()), int(part["n"].max())
    return f"n = {few}" if few == many else f"n = {few} to {many}"
