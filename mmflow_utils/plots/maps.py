"""Maps over layers: one cell for each knockout or patch."""

from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from mmflow_utils.plots.style import FLOW_COLORS, TASK_ORDER, add_title, need, ordered, shown, styled

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


@styled
def plot_maps(
    summary: pd.DataFrame, *, row: str, panel: str = "task", label: str, title: str = "", subtitle: str = ""
) -> Figure:
    """Draw a mean for each value of `row` and layer, in panels of one scale about zero.

    Args:
        summary: Columns `row`, whose values stand from top to bottom as they come, `panel`, layer and mean.
        row, panel: The columns that tell rows and panels apart.
        label: Of the scale, with the mean's unit. Cells of a tenth of the scale or more have their number in them.

    Raises:
        ValueError: A column is missing or there are no rows.
    """
    need(summary, [row, panel, "layer", "mean"])
    panels, names, layers = ordered(summary[panel], TASK_ORDER), ordered(summary[row], ()), sorted({*summary["layer"]})
    most, n_columns = float(summary["mean"].abs().max()) or 1.0, min(len(panels), 3 if len(layers) <= 8 else 2)
    n_rows, wide, tall = ceil(len(panels) / n_columns), min(0.4 * len(layers), 7.6 / n_columns), 0.26 * len(names)
    size = (n_columns * (wide + 0.2) + 2.3, n_rows * (tall + 0.62))
    figure, grid = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    look: dict[str, Any] = {"cmap": CHANGE, "norm": Normalize(-most, most), "linecolor": "#E6E6E6", "linewidths": 0.6}
    for n, (axis, name) in enumerate(zip(grid.flat, panels, strict=False)):
        cells = summary[summary[panel] == name].pivot(index=row, columns="layer", values="mean").reindex(names, axis=0)
        numbers = cells.map(lambda mean: f"{mean:.0f}".replace("-", "−") if abs(mean) >= most / 10 else "")
        words = {"annot": numbers, "fmt": "", "annot_kws": {"fontsize": 6.5, "color": "#1A1A1A"}, "cbar": False}
        sns.heatmap(cells, ax=axis, xticklabels=True, yticklabels=n % n_columns == 0, **words, **look)
        axis.set(xlabel="Layer", ylabel="", title=shown(name), facecolor="#EDEDED")  # gray: nothing was measured
        axis.tick_params(length=0, labelsize=8, labelrotation=0)
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    add_title(figure, title, subtitle, left=1.5, bottom=0.5, gap=0.35, right=0.9)
    figure.subplots_adjust(wspace=0.2 / wide, hspace=0.68 / tall)
    place = figure.add_axes((1 - 0.78 / size[0], 0.2, 0.13 / size[0], 0.5))
    figure.colorbar(ScalarMappable(look["norm"], CHANGE), cax=place, label=label).outline.set_visible(False)
    return figure
