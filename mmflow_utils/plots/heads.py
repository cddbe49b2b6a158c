"""Maps of heads x layers, with one scale about zero for all panels."""

from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mmflow_utils.plots.maps import CHANGE
from mmflow_utils.plots.style import TASK_ORDER, add_title, need, ordered, shown, styled


@styled
def plot_heads(
    summary: pd.DataFrame,
    *,
    value: str = "mean",
    axes: tuple[str, str] = ("layer", "head"),
    panel: str = "task",
    n_marked: int = 3,
    label: str = "Change in probability (%)",
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw a number for each head of each layer, a panel per task, in colors about zero that mean the same in all.

    Args:
        summary: Columns `value`, those of `axes` (across, upwards) and `panel`, which may be missing.
        n_marked: Cells of a panel whose number is written: the farthest from zero, if a tenth of the scale or more.
        label: Of the scale, with its unit.
    """
    need(summary, [*axes, value])
    data = summary if panel in summary else summary.assign(**{panel: ""})
    panels, most = ordered(data[panel], TASK_ORDER), float(data[value].abs().max()) or 1.0
    words = data[axes[0]].dtype.kind not in "iu"
    x, y = (ordered(data[name], TASK_ORDER if words else sorted(set(data[name]))) for name in axes)
    columns = min(len(panels), 3 if len(x) <= 16 else 2)
    rows, wide = ceil(len(panels) / columns), min((0.85 if words else 0.45) * len(x), 8.2 / columns)
    tall, scale = wide * len(y) / len(x) / (1 + words), ScalarMappable(Normalize(-most, most), CHANGE)
    room = 1.0 if words else 0.55  # inches: names of the cells
    size = (columns * (wide + room) + 1.0, rows * (tall + 0.85))
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, name in zip(grid.flat, panels, strict=False):
        mine = data[data[panel] == name].pivot(index=axes[1], columns=axes[0], values=value)
        cells = mine.reindex(index=y, columns=x)
        axis.pcolormesh(cells, cmap=CHANGE, norm=scale.norm, edgecolors="#E6E6E6", linewidth=0.4)
        _mark(axis, cells.to_numpy(dtype=float), n_marked, most)
        axis.set_title(shown(name))
        if not words:
            axis.set(xlabel=axes[0].capitalize(), ylabel=axes[1].capitalize())
        for side, names in ((axis.xaxis, x), (axis.yaxis, y)):
            step = 1 if len(names) <= 16 else 5
            side.set_ticks([n + 0.5 for n in range(0, len(names), step)], names[::step], fontsize=7.5)
        axis.tick_params(length=0)
        axis.grid(visible=False)
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    add_title(figure, title, subtitle, left=room, bottom=0.55, gap=0.35, right=1.0)
    figure.subplots_adjust(wspace=room / wide, hspace=0.85 / tall)
    bar = figure.colorbar(scale, cax=figure.add_axes((1 - 0.85 / size[0], 0.2, 0.13 / size[0], 0.5)), label=label)
    bar.outline.set_visible(False)
    return figure


def _mark(axis: plt.Axes, cells: np.ndarray, n_marked: int, most: float) -> None:
    """Write the numbers that are farthest from zero."""
    far, digits = np.abs(np.nan_to_num(cells)), 0 if most >= 10 else 2
    for row, column in zip(*np.unravel_index(np.argsort(-far, axis=None)[:n_marked], cells.shape), strict=True):
        if far[row, column] >= most / 10:
            text = f"{cells[row, column]:.{digits}f}".replace("-", "−")
            ink, halo = ("white", "#08306B") if cells[row, column] < -0.45 * most else ("#1A1A1A", "white")
            look: dict[str, Any] = {"color": ink, "path_effects": [withStroke(linewidth=1.8, foreground=halo)]}
            axis.text(column + 0.5, row + 0.5, text, fontsize=7.5, ha="center", va="center", **look)
