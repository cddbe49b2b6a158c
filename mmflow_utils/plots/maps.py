"""Maps over layers: a cell for each knockout, patch or head; the panels of a map share one scale about zero."""

from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mmflow_utils.plots.style import FLOW_COLORS, TASK_ORDER, add_title, empty_panels, need, ordered, shown, styled

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
    most, columns = float(summary["mean"].abs().max()) or 1.0, min(len(panels), 3 if len(layers) <= 8 else 2)
    wide, tall, scale = min(0.4 * len(layers), 7.6 / columns), 0.26 * len(names), Normalize(-most, most)
    size = (columns * (wide + 0.2) + 2.3, ceil(len(panels) / columns) * (tall + 0.62))
    figure, axes = empty_panels(len(panels), columns, size)
    look: dict[str, Any] = {"cmap": CHANGE, "norm": scale, "linecolor": "#E6E6E6", "linewidths": 0.6, "cbar": False}
    for n, (axis, name) in enumerate(zip(axes, panels, strict=True)):
        cells = summary[summary[panel] == name].pivot(index=row, columns="layer", values="mean").reindex(names, axis=0)
        numbers = cells.map(lambda mean: f"{mean:.0f}".replace("-", "−") if abs(mean) >= most / 10 else "")
        words = {"annot": numbers, "fmt": "", "annot_kws": {"fontsize": 6.5, "color": "#1A1A1A"}}
        sns.heatmap(cells, ax=axis, xticklabels=True, yticklabels=n % columns == 0, **words, **look)
        axis.set(xlabel="Layer", ylabel="", title=shown(name), facecolor="#EDEDED")  # gray: nothing was measured
        axis.tick_params(length=0, labelsize=8, labelrotation=0)
    add_title(figure, title, subtitle, left=1.5, bottom=0.5, gap=0.35, right=0.9)
    figure.subplots_adjust(wspace=0.2 / wide, hspace=0.68 / tall)
    _draw_scale(figure, scale, label)
    return figure


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
    wide, scale = min((0.85 if words else 0.45) * len(x), 8.2 / columns), Normalize(-most, most)
    tall, room = wide * len(y) / len(x) / (1 + words), 1.0 if words else 0.55  # inches: names of the cells
    size = (columns * (wide + room) + 1.0, ceil(len(panels) / columns) * (tall + 0.85))
    figure, axes_of = empty_panels(len(panels), columns, size)
    for axis, name in zip(axes_of, panels, strict=True):
        mine = data[data[panel] == name].pivot(index=axes[1], columns=axes[0], values=value)
        cells = mine.reindex(index=y, columns=x)
        axis.pcolormesh(cells, cmap=CHANGE, norm=scale, edgecolors="#E6E6E6", linewidth=0.4)
        _mark(axis, cells.to_numpy(dtype=float), n_marked, most)
        axis.set_title(shown(name))
        if not words:
            axis.set(xlabel=axes[0].capitalize(), ylabel=axes[1].capitalize())
        for side, names in ((axis.xaxis, x), (axis.yaxis, y)):
            step = 1 if len(names) <= 16 else 5
            side.set_ticks([n + 0.5 for n in range(0, len(names), step)], names[::step], fontsize=7.5)
        axis.tick_params(length=0)
        axis.grid(visible=False)
    add_title(figure, title, subtitle, left=room, bottom=0.55, gap=0.35, right=1.0)
    figure.subplots_adjust(wspace=room / wide, hspace=0.85 / tall)
    _draw_scale(figure, scale, label)
    return figure


def _draw_scale(figure: Figure, scale: Normalize, label: str) -> None:
    """Draw the one scale of all panels at the figure's right."""
    inch = 1 / figure.get_figwidth()
    place = figure.add_axes((1 - 0.85 * inch, 0.2, 0.13 * inch, 0.5))
    figure.colorbar(ScalarMappable(scale, CHANGE), cax=place, label=label).outline.set_visible(False)


def _mark(axis: plt.Axes, cells: np.ndarray, n_marked: int, most: float) -> None:
    """Write the numbers that are farthest from zero."""
    far, digits = np.abs(np.nan_to_num(cells)), 0 if most >= 10 else 2
    for row, column in zip(*np.unravel_index(np.argsort(-far, axis=None)[:n_marked], cells.shape), strict=True):
        if far[row, column] >= most / 10:
            text = f"{cells[row, column]:.{digits}f}".replace("-", "−")
            ink, halo = ("white", "#08306B") if cells[row, column] < -0.45 * most else ("#1A1A1A", "white")
            look: dict[str, Any] = {"color": ink, "path_effects": [withStroke(linewidth=1.8, foreground=halo)]}
            axis.text(column + 0.5, row + 0.5, text, fontsize=7.5, ha="center", va="center", **look)
