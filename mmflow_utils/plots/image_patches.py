"""Image patches over the picture, colored by set or shaded by attention, and the distribution of their norms."""

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from mmflow_utils.plots.style import add_title, draw_picture, empty_panels, need, set_color, styled
from mmflow_utils.prompts.flows import pretty_name

_VIEWS, _HEAT = ("Whole picture", "Tiles"), "YlOrRd"


@styled
def plot_image_patches(
    image: object,
    patches: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    objects: Iterable = (),
    title: str = "",
    subtitle: str = "",
    width: float = 3.2,
    columns: int = 3,
    weight_label: str = "Attention to an image token (%, square-root scale)",
) -> Figure:
    """Draw which piece of the picture each image token stands for, colored by position set or as a heat map.

    Args:
        image: The stored picture, a PIL picture or an array (height, width, 3).
        patches: From `locate_image_patches`: x, y, w, h (pixels), view and set; or several by the title of
            their panel. Tiles have a panel of their own beside the whole picture's. A patch in no set is only
            outlined, one in the padding isn't seen. With a column `weight`, such as the attention that a token gets
            (%), patches are shaded by it, on one scale for all panels, over a gray picture, and sets outlined.
        objects: Things with a box (`Sample.objects`), outlined in every panel; a box of None is passed over.
        width: Of a panel, in inches.
        columns: Panels side by side.
        weight_label: What the weights are, with their unit.

    Raises:
        ValueError: A column is missing or there are no rows.
    """
    panels, objects = _panels(patches), list(objects)
    scale = heat_scale(panels.values())
    rows, columns = ceil(len(panels) / columns), min(columns, len(panels))
    figure, axes = empty_panels(len(panels), columns)
    for axis, (name, part) in zip(axes, panels.items(), strict=True):
        pixels = draw_picture(axis, image, gray=bool(scale))
        axis.set_title(name, fontsize=9.5, pad=4)
        draw_patches(axis, part, scale)
        for box in (thing.box for thing in objects if thing.box):
            look: dict[str, Any] = {"fill": False, "edgecolor": "#1A1A1A", "linewidth": 1.6, "linestyle": (0, (3, 2))}
            axis.add_patch(Rectangle((box.x - 0.5, box.y - 0.5), box.w, box.h, **look))
    names = dict.fromkeys(kind for part in panels.values() for kind in part["set"].dropna())
    handles = [Patch(color=set_color(kind), alpha=0.7, label=pretty_name(kind)) for kind in names]
    in_row = max(1, int(columns * width / 2.3))
    room, gap = 0.15 + 0.22 * ceil(len(handles) / in_row), 0.35  # inches: the legend, a panel's title
    wide = (columns * width - 0.2) / (columns + 0.06 * (columns - 1))
    tall = wide * pixels.shape[0] / pixels.shape[1]
    side = 0.8 if scale else 0  # a heat map's scale
    figure.set_size_inches(columns * width + side, rows * tall + (rows - 1) * gap + room)
    add_title(figure, title, subtitle, bottom=room, gap=gap, right=0.1 + side)
    figure.subplots_adjust(wspace=0.06, hspace=gap / tall)
    legend: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.1 / (columns * width), 0), "ncols": in_row}
    figure.legend(handles=handles, handlelength=1.2, borderaxespad=0.2, borderpad=0, **legend)
    if scale:
        total, bottom = columns * width + side, axes[-1].get_position().y0
        beside = (1 - side / total, bottom, 0.12 / total, axes[0].get_position().y1 - bottom)
        bar = figure.colorbar(scale, cax=figure.add_axes(beside))
        bar.set_label(weight_label, fontsize=8.5)
        bar.outline.set_visible(False)
    return figure


def heat_scale(tables: Iterable[pd.DataFrame]) -> ScalarMappable | None:
    """Return the scale from 0 to the largest weight of some patches; None where they have no weights."""
    most = [table["weight"].max() for table in tables if "weight" in table]
    return ScalarMappable(PowerNorm(0.5, 0, max(most) or 1), _HEAT) if most else None


def _panels(patches: pd.DataFrame | Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return one table per panel: each view of each table."""
    found = {}
    for name, table in (patches if isinstance(patches, Mapping) else {"": patches}).items():
        need(table, ["x", "y", "w", "h", "view", "set"])
        views = sorted(table["view"].unique())
        for view in views:
            parts = [name, _VIEWS[view] if len(views) > 1 else ""]
            found[" · ".join(part for part in parts if part)] = table[table["view"] == view]
    return found


def draw_patches(axis: plt.Axes, patches: pd.DataFrame, scale: ScalarMappable | None) -> None:
    """Draw the patches of each set in its color or, with the scale of a heat map, shaded by their weight."""
    for name, group in patches.query("w > 0 and h > 0").groupby("set", dropna=False):
        kind = None if pd.isna(name) else name
        # Pixel i covers i - 0.5 to i + 0.5 in imshow's coordinates.
        squares = [Rectangle((p.x - 0.5, p.y - 0.5), p.w, p.h) for p in group.itertuples()]
        look: dict[str, Any] = {"facecolor": to_rgba(set_color(kind), 0.45) if kind else "none"}
        look |= {"edgecolor": (1, 1, 1, 0.7), "linewidth": 0.6}
        if scale:
            colors = scale.to_rgba(group["weight"])
            colors[:, 3] = 0.1 + 0.75 * np.asarray(scale.norm(group["weight"]), dtype=float)  # the picture is seen
            look = {"facecolor": colors, "edgecolor": "none"}
            look |= {"edgecolor": set_color(kind), "linewidth": 1.4, "zorder": 2} if kind else {}
        axis.add_collection(PatchCollection(squares, label=kind or "in no set", **look))


@styled
def plot_norms(
    norms: pd.Series, *, threshold: float, title: str = "Norms of image patches", subtitle: str = ""
) -> Figure:
    """Draw the distribution of image patch norms and the threshold (Fig. 15).

    The axis of counts is logarithmic, since what the threshold parts off is rare.

    Args:
        norms: One number per image patch.
        threshold: The norm above which patches count as high-norm.

    Raises:
        ValueError: There are no norms.
    """
    values = np.asarray(norms, dtype=float)
    if not len(values):
        raise ValueError("expected the norms of image patches to draw, got none")
    figure, axis = plt.subplots(figsize=(9.2, 2.8))
    low, high = min(values.min(), threshold), max(values.max(), threshold)
    step = (high - low) / 60 or 1.0
    # A bin's edge at the threshold: no bar stands on both sides of it.
    bins = threshold + step * np.arange(-ceil((threshold - low) / step) - 1, ceil((high - threshold) / step) + 2)
    above = values > threshold
    for part, kind, label in ((~above, "image", "not above"), (above, "image_high_norm", "above the threshold")):
        text = f"{label}: {int(part.sum()):,} image patches"
        axis.hist(values[part], bins=list(bins), color=set_color(kind), alpha=0.85, label=text)
    axis.axvline(threshold, color="#333333", linewidth=1.2, linestyle="--", label=f"threshold {threshold:.1f}")
    axis.set(yscale="log", xlabel="Norm of the features that the projector receives", ylabel="Image patches")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.10g}"))
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.4, borderpad=0)
    add_title(figure, title, subtitle, left=0.75, bottom=0.5, gap=0.4)
    return figure
