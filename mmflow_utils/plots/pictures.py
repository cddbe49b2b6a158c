"""Pictures with boxes, contact sheets, and the table of accuracies."""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.plots.style import add_title, draw_picture, empty_panels, need, ordered, styled

_PALETTE = ("#D55E00", "#0072B2", "#009E73", "#882255", "#C98500", "#332288")


@styled
def plot_accuracy(frame: pd.DataFrame, *, title: str = "Accuracy by kind of question", subtitle: str = "") -> Figure:
    """Draw accuracy as the table of structural x semantic groups (Table 2 of the paper), with n in each cell.

    Args:
        frame: One row per group: structural and semantic (GQA's names), accuracy_pct (%) and n; ci_low and ci_high
            (%), if there, are printed too.

    Raises:
        ValueError: A column is missing, a group is duplicated, or there are no rows.
    """
    need(frame, ["structural", "semantic", "accuracy_pct", "n"])
    frame = frame.assign(structural=frame["structural"].str.lower(), semantic=frame["semantic"].str.lower())
    if frame.duplicated(["structural", "semantic"]).any():
        raise ValueError("a structural x semantic group is duplicated: select one model before drawing")
    rows = ordered(frame["structural"], ("verify", "query", "choose", "logical", "compare"))
    names = {"obj": "Object", "attr": "Attribute", "cat": "Category", "rel": "Relation", "global": "Global"}
    columns = ordered(frame["semantic"], tuple(names))
    figure, axis = plt.subplots(figsize=(1.1 + 1.35 * len(columns), 0.1 + 0.85 * len(rows)))
    colors = mpl.colormaps["Blues"]  # up to 0.6 of it, where dark text still stands out
    for row in frame.to_dict("records"):
        at = (columns.index(row["semantic"]), rows.index(row["structural"]))
        known = row["n"] > 0 and np.isfinite(row["accuracy_pct"])
        shade = colors(0.6 * row["accuracy_pct"] / 100) if known else "#F2F2F2"
        axis.add_patch(Rectangle((at[0] - 0.48, at[1] - 0.46), 0.96, 0.92, color=shade, linewidth=0))
        big = f"{format_number(row['accuracy_pct'])} %" if known else "–"
        small = f"n = {int(row['n']):,}"
        if known and np.isfinite(row.get("ci_low", np.nan)):
            small = f"{format_number(row['ci_low'], 0)} to {format_number(row['ci_high'], 0)}, {small}"
        axis.text(at[0], at[1] - 0.12, big, color="#1A1A1A", ha="center", va="center", fontsize=12, fontweight="bold")
        axis.text(at[0], at[1] + 0.24, small, color="#1A1A1A", ha="center", va="center", fontsize=8)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axis.set_xticks(range(len(columns)), [names.get(c, c.capitalize()) for c in columns])
    axis.set_yticks(range(len(rows)), [r.capitalize() for r in rows])
    axis.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=10)
    axis.spines[:].set_visible(False)
    axis.grid(visible=False)
    add_title(figure, title, subtitle, gap=0.4, left=1.0)
    return figure


@styled
def plot_sample(
    image: object, objects: Iterable = (), *, title: str = "", subtitle: str = "", width: float = 5.0
) -> Figure:
    """Draw a picture with its labeled boxes.

    Args:
        image: A PIL picture or an array (height, width, 3).
        objects: Things with a name and a box (`Sample.objects`); those without box are named below the picture.
        width: Of the figure, in inches.
    """
    figure, axis = plt.subplots()
    pixels = draw_picture(axis, image)
    height = width * pixels.shape[0] / pixels.shape[1]
    objects = list(objects)
    absent = [thing.name for thing in objects if not thing.box]
    inch = pixels.shape[0] / height  # in pixels of the picture
    line = 0.19 * inch  # the height of a label
    taken: list[tuple[float, float]] = []
    for thing, color in zip((thing for thing in objects if thing.box), cycle(_PALETTE), strict=False):
        box, halo = thing.box, [withStroke(linewidth=4.5, foreground="white")]
        # Pixel i covers i - 0.5 to i + 0.5 in imshow's coordinates.
        look: dict[str, Any] = {"edgecolor": color, "linewidth": 2.2, "path_effects": halo, "clip_on": False}
        axis.add_patch(Rectangle((box.x - 0.5, box.y - 0.5), box.w, box.h, fill=False, label=thing.name, **look))
        top = max(box.y - 0.5 - line, 0.02 * inch)
        while any(abs(top - other) < line and abs(box.x - left) < pixels.shape[1] / 4 for left, other in taken):
            top += line
        taken.append((box.x, top))
        patch = {"boxstyle": "square,pad=0.15", "facecolor": color, "edgecolor": "white", "linewidth": 0.8}
        text: dict[str, Any] = {"color": "white", "fontsize": 8.5, "fontweight": "bold", "va": "top"}
        axis.text(box.x + 0.01 * inch, top, thing.name, bbox=patch, **text)
    figure.set_size_inches(width, height + (0.4 if absent else 0.1))
    add_title(figure, title, subtitle, bottom=0.4 if absent else 0.1)
    if absent:
        note = f"not in the picture: {', '.join(absent)}"
        at = 0.12 / figure.get_size_inches()[1]
        figure.text(0.1 / width, at, note, fontsize=8.5, color="#555555", style="italic")
    return figure


@styled
def plot_contact_sheet(
    images: Sequence, captions: Sequence[str] = (), *, columns: int = 4, title: str = "", subtitle: str = ""
) -> Figure:
    """Draw pictures in a grid, each with its caption below, whose line breaks are kept.

    Raises:
        ValueError: No pictures, or captions whose number differs from the pictures'.
    """
    if not len(images) or len(captions) not in (0, len(images)):
        raise ValueError(f"expected pictures and as many captions (or none), got {len(images)} and {len(captions)}")
    columns = min(columns, len(images))
    cell = 10.0 / max(columns, 3)
    lines = [[textwrap.fill(line, int(cell * 13.5)) for line in str(text).split("\n")] for text in captions]
    wrapped = ["\n".join(parts) for parts in lines] or [""] * len(images)
    room = 0.17 * max(text.count("\n") + 1 if text else 0 for text in wrapped)  # inches
    figure, axes = empty_panels(len(images), columns, (cell * columns, ceil(len(images) / columns) * (cell + room)))
    for axis, image, text in zip(axes, images, wrapped, strict=True):
        draw_picture(axis, image)
        axis.set_anchor("N")
        below: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
        axis.annotate(text, (0, 0), (0, -5), fontsize=8.5, **below)
    add_title(figure, title, subtitle, bottom=room + 0.15)
    figure.subplots_adjust(wspace=0.08, hspace=(room + 0.12) / cell)
    return figure
