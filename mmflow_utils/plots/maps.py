"""The map of flows x layers: one cell for each knockout."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from mmflow_utils.plots.style import FLOW_COLORS, add_title, need, ordered, shown, styled

# White at no change, so that what a cut does not touch recedes, and only the grid is seen; a rise is rare and
# another hue.
CHANGE = LinearSegmentedColormap.from_list(
    "change", [(0, "#08306B"), (0.25, "#4F90C8"), (0.5, "#FFFFFF"), (1, "#D9822B")]
)


@styled
def plot_map(frame: pd.DataFrame, *, title: str = "", subtitle: str = "") -> Figure:
    """Draw the change in the answer's probability for each flow (row) and layer (column).

    Args:
        frame: Columns flow, layer and rel_change_pct (%); several samples are averaged.

    Raises:
        ValueError: A column is missing or there are no rows.
    """
    need(frame, ["flow", "layer", "rel_change_pct"])
    cells = frame.pivot_table(index="flow", columns="layer", values="rel_change_pct", aggfunc="mean")
    cells = cells.loc[ordered(frame["flow"], tuple(FLOW_COLORS))]
    width = min(10.0, 2.4 + 0.62 * cells.shape[1])
    figure, axis = plt.subplots(figsize=(width, 0.55 + 0.48 * len(cells)))
    top = max(100.0, float(cells.max(axis=None)))  # drops run to -100 %, rises know no bound
    numbers = cells.map(lambda change: f"{change:.0f}".replace("-", "−") if abs(change) >= 5 else "")
    layers = [layer if len(cells.columns) <= 16 or layer % 5 == 0 else "" for layer in cells.columns]
    look: dict[str, Any] = {"cmap": CHANGE, "norm": TwoSlopeNorm(0, -100, top), "linecolor": "#E6E6E6", "cbar": False}
    words = {"annot": numbers, "fmt": "", "annot_kws": {"fontsize": 8}, "xticklabels": layers}
    sns.heatmap(cells, linewidths=0.8, yticklabels=False, ax=axis, **look, **words)
    for text, change in zip(axis.texts, cells.to_numpy()[cells.notna()], strict=True):
        text.set_color("white" if change < -45 else "#1A1A1A")  # seaborn's own choice reads less well in between
    axis.set(xlabel="Layer", ylabel="")
    axis.set_yticks([row + 0.5 for row in range(len(cells))], [shown(name) for name in cells.index])
    axis.tick_params(length=0)
    subtitle = " · ".join(part for part in (subtitle, "numbers: change in probability (%)") if part)
    add_title(figure, title, subtitle, left=1.55, bottom=0.5)
    return figure
