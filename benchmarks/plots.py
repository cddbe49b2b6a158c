"""What different ways of doing the same cost."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmflow_utils.plots.style import legend_handle, need, panel_grid, styled

OURS, OTHERS = "#0072B2", "#8A8A8A"


@styled
def plot_costs(
    frame: pd.DataFrame,
    *,
    value: str = "clean_passes",
    way: str = "way",
    panel: str = "n_layers",
    panel_text: str = "{} layers",
    ours: str = "sweep",
    unit: str = "clean passes",
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw a dot for each way, on a logarithmic axis, ours in blue: a panel per value of `panel`.

    Args:
        frame: One row for each way and panel.
        value: The column of the cost; a `bound` in the same row is marked by a line.
        way, panel: The columns that tell dots and panels apart.
        panel_text: A panel's title, with {} for its value.
        ours: The way that is drawn in blue.
        unit: Of the cost, for the axis.
        title, subtitle: Above the panels.

    Raises:
        ValueError: A column is missing or there are no rows.
    """
    need(frame, [value, way, panel])
    names = list(dict.fromkeys(frame[way]))
    handles = [_dot(ours, OURS), _dot("other ways", OTHERS)]
    marked = "bound" in frame and frame["bound"].notna().any()
    if marked:
        handles.append(legend_handle("row bound", "#D55E00", "-"))
    figure, axes = panel_grid(frame[panel].nunique(), title, subtitle, handles)
    for i, (axis, (name, part)) in enumerate(zip(axes, frame.groupby(panel), strict=True)):
        axis.set_title(panel_text.format(name), loc="left")
        costs = part.set_index(way)[value]
        at = [names.index(one) for one in costs.index]
        colors = [OURS if one == ours else OTHERS for one in costs.index]
        axis.hlines(at, 0, costs, color="#D9D9D9", linewidth=1)  # to the name; a length says nothing on this axis
        axis.scatter(costs, at, s=70, color=colors, zorder=3)
        for y, cost in zip(at, costs, strict=True):
            axis.annotate(_short(cost), (cost, y), (8, 0), textcoords="offset points", va="center", fontsize=8.5)
        if marked and (bound := part["bound"].dropna()).size:
            y = names.index(ours)
            axis.plot([bound.iloc[0]] * 2, [y - 0.3, y + 0.3], color="#D55E00", linewidth=2.2)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlim=(0.5, 5 * frame[value].max()), ylim=(len(names) - 0.4, -0.6), xlabel=unit.capitalize())
        axis.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
    figure.subplots_adjust(left=1.35 / figure.get_figwidth())
    return figure


def _dot(label: str, color: str) -> Line2D:
    return Line2D([], [], color=color, marker="o", markersize=8, linestyle="", label=label)


def _short(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
