"""The map of flows x layers: one cell for each knockout."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from mmflow_utils.plots.style import FLOW_COLORS, add_title, need, ordered, shown, styled

# White at no change, so that what a cut does not touch recedes, and only the grid is seen; a rise is rare and
# another hue.
CHANGE = LinearSegmentedColormap.from_list(
    "change", [(0, "#08306B"), (0.25, "#4F90C8"), (0.5, "#FFFFFF"), (1, "#D9822B")]
)


@styled
def plot_map(frame: pd.DataFrame, *, value: str = "rel_change_pct", title: str = "", subtitle: str = "") -> Figure:
    """Draw the change in the answer's probability for each flow (row) and layer (column).

    Args:
        frame: columns flow, layer and `value`; several samples are averaged.
        value: the column to draw, in %.
        title: bold first line, such as the question and its answer.
        subtitle: second line.

    Raises:
        ValueError: a column is missing or there are no rows.
    """
    need(frame, ["flow", "layer", value])
    cells = frame.pivot_table(index="flow", columns="layer", values=value, aggfunc="mean")
    cells = cells.loc[ordered(frame["flow"], tuple(FLOW_COLORS))]
    width = min(10.0, 2.4 + 0.62 * cells.shape[1])
    figure, axis = plt.subplots(figsize=(width, 0.55 + 0.48 * len(cells)))
    top = max(100.0, float(cells.max(axis=None)))  # drops run to -100 %, rises know no bound
    look: dict[str, Any] = {
        "cmap": CHANGE,
        "norm": TwoSlopeNorm(0, -100, top),
        "edgecolor": "#E6E6E6",
        "linewidth": 0.8,
    }
    axis.pcolormesh(cells.columns, range(len(cells)), cells, **look)
    for (row, name), column in ((r, c) for r in enumerate(cells.index) for c in cells.columns):
        change = cells.loc[name, column]
        if abs(change) >= 5:
            color = "white" if change < -45 else "#1A1A1A"
            axis.text(column, row, f"{change:.0f}".replace("-", "−"), ha="center", va="center", fontsize=8, color=color)
    axis.invert_yaxis()
    axis.set_yticks(range(len(cells)), [shown(name) for name in cells.index])
    axis.set_xticks([layer for layer in cells.columns if len(cells.columns) <= 16 or layer % 5 == 0])
    axis.set_xlabel("Layer")
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    subtitle = " · ".join(part for part in (subtitle, "numbers: change in probability (%)") if part)
    add_title(figure, title, subtitle, left=1.55, bottom=0.5)
    return figure
