"""What different ways of doing the same cost."""

import pandas as pd
from matplotlib.figure import Figure

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
    """Draw a bar for each way, on a logarithmic axis, ours in blue: a panel per value of `panel`.

    Args:
        frame: One row for each way and panel.
        value: The column of the cost; a `bound` in the same row is marked by a line.
        way, panel: The columns that tell bars and panels apart.
        panel_text: A panel's title, with {} for its value.
        ours: The way that is drawn in blue.
        unit: Of the cost, for the axis.
        title, subtitle: Above the panels.

    Raises:
        ValueError: A column is missing or there are no rows.
    """
    need(frame, [value, way, panel])
    names = list(dict.fromkeys(frame[way]))
    handles = [legend_handle(ours, OURS, "-"), legend_handle("other ways", OTHERS, "-")]
    marked = "bound" in frame and frame["bound"].notna().any()
    if marked:
        handles.append(legend_handle("rows that must be computed at all", "#D55E00", "-"))
    figure, axes = panel_grid(frame[panel].nunique(), title, subtitle, handles)
    for i, (axis, (name, part)) in enumerate(zip(axes, frame.groupby(panel), strict=True)):
        axis.set_title(panel_text.format(name), loc="left")
        costs = part.set_index(way)[value]
        at = [names.index(one) for one in costs.index]
        colors = [OURS if one == ours else OTHERS for one in costs.index]
        axis.barh(at, costs, color=colors, height=0.62)
        for y, cost in zip(at, costs, strict=True):
            axis.text(cost * 1.08, y, _short(cost), va="center", fontsize=8.5)
        if marked and (bound := part["bound"].dropna()).size:
            y = names.index(ours)
            axis.plot([bound.iloc[0]] * 2, [y - 0.42, y + 0.42], color="#D55E00", linewidth=2.2)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlim=(0.5, 5 * frame[value].max()), ylim=(len(names) - 0.4, -0.6), xlabel=unit.capitalize())
        axis.set_yticks(range(len(names)), names if i == 0 else [""] * len(names))
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
    figure.subplots_adjust(left=1.35 / figure.get_figwidth())
    return figure


def _short(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
