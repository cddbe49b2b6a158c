"""The look of all figures: colors that mean one thing everywhere, and the frame around panels."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from math import ceil
from typing import Any, Literal
from zlib import crc32

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmflow_utils.data.tasks import TASKS
from mmflow_utils.prompts import flows

TASK_ORDER = tuple(TASKS)
_TASK_SHADES = ("#332288", "#3D9BD1", "#117733", "#B59A00", "#CC5A6E", "#7A1F5C")
TASK_COLORS = dict(zip(TASK_ORDER, _TASK_SHADES, strict=True))

SET_COLORS = {  # one color per position set, the same in prompts, pictures and curves
    "question": "#0072B2",
    "image": "#D55E00",
    "last": "#333333",
    "captions": "#A0522D",
    "template": "#E08ACB",
    "image_related": "#882255",
    "image_other": "#C98500",
    "image_random": "#8A8A8A",
    "image_newline": "#8A8A8A",
    "image_related_low_norm": "#882255",  # as the whole set: in one figure the dashes differ
    "image_other_low_norm": "#C98500",
    "image_high_norm": "#117733",
    "option_true": "#009E73",
    "option_false": "#C24E8E",
    "options": "#332288",
    "objects": "#8C6D46",
    "question_without_options": "#3D9BD1",
    "question_without_objects": "#5C2A12",
}
_NAMED = {"other": "#8A8A8A"}  # questions that belong to no task, in learning curves
_INTO_QUESTION = {"image": "#009E73", "captions": "#CC79A7"}
_SPARE = ("#44AA99", "#999933", "#6A4C93", "#CC5A6E", "#117733")
_WHOLE = ("image", "image_related", "image_other", "image_random", "captions", "last", "question")


def set_color(name: str) -> str:
    """Return the color of a position set; an unknown one gets a spare by its name, the same everywhere."""
    return (SET_COLORS | _NAMED).get(name, _SPARE[crc32(name.encode()) % len(_SPARE)])


def _color_of(flow: flows.Flow) -> str:
    if flow.target == "question" and flow.source in _INTO_QUESTION:
        return _INTO_QUESTION[flow.source]  # beside Image -> Last in one figure, so not in the image's color
    # A flow into a part of the question is identified by that part, any other by where it comes from.
    return set_color(flow.source if flow.target in _WHOLE else flow.target)


_FIRST = (*flows.FLOW_TO_LAST, *flows.IMAGE_TO_QUESTION, *flows.IMAGE_PATCHES_TO_QUESTION)  # a legend's order
_ALL = [flows.Flow(source=source, target=target) for source in SET_COLORS for target in SET_COLORS]
FLOW_COLORS = {str(flow): _color_of(flow) for flow in dict.fromkeys((*_FIRST, *_ALL))}

# The words that the logit lens follows, and what becomes of the answer among all words. False options are
# both gray and differ by their dashes: what matters is how far the answer is from them.
WORD_COLORS = {
    "Capitalized answer": "#332288",
    "Noncapitalized answer": "#D1603D",
    "False option": "#8A8A8A",
    "Capitalized false option": "#8A8A8A",
    "Was on top": "#3D9BD1",
    "Stays on top": "#117733",
}
MODULE_COLORS = {"Attention": "#3D9BD1", "MLP": "#7A1F5C"}

STYLE: dict[str, Any] = {  # what differs from matplotlib's own defaults
    "pdf.fonttype": 42,  # journals want whole fonts
    "font.size": 9.5,
    "text.parse_math": False,  # a "$" in a question is a dollar
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 7,
    "axes.labelcolor": "#333333",
    "grid.color": "#E6E6E6",
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.9,
    "legend.frameon": False,
}


def set_style() -> None:
    """Let the figures that you draw by hand look like ours, for the rest of the session."""
    plt.style.use(["default", STYLE])


def flow_color(flow: object) -> str:
    """Return the color of a flow, the same in every figure; an unknown flow gets one by its name.

    Example:
        >>> flow_color("Question -> Last")
        '#0072B2'
    """
    return FLOW_COLORS.get(str(flow)) or set_color(str(flow))


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in our style and leave pyplot alone: a closed figure shows once in a notebook, not twice."""

    @wraps(draw)
    def drawn(*args, **kwargs):
        with plt.style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return drawn


def shown(value: object) -> str:
    """Write a column's value as a figure does: a flow with an arrow."""
    return str(value).replace("->", "→")


def ordered(values: Iterable, first: Sequence[object]) -> list:
    """Return the distinct values: those in `first` in its order, then the others as they come."""
    found = list(dict.fromkeys(values))
    return [v for v in first if v in found] + [v for v in found if v not in first]


def need(frame: pd.DataFrame, columns: Iterable[str]) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"expected the columns {', '.join(missing)}, but the frame has {', '.join(map(str, frame))}")
    if frame.empty:
        raise ValueError("expected rows to draw, got an empty frame: was every sample skipped?")


def line_looks(values: pd.Series, colors: Mapping | None, first: Sequence) -> dict:
    """Map each line to (label, color, dashes); lines of one color in one figure differ by their dashes."""
    if pd.api.types.is_numeric_dtype(values):
        numbers = sorted(set(values))
        scale = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(numbers)))
        return {n: (f"{values.name} {n:g}", to_hex(c), "-") for n, c in zip(numbers, scale, strict=True)}
    looks: dict = {}
    used: Counter[str] = Counter()
    for value in ordered(values, first):
        color = (colors or {}).get(value) or flow_color(value)
        looks[value] = (shown(value), color, ("-", "--", ":", "-.")[used[color] % 4])
        used[color] += 1
    return looks


def legend_handle(label: str, color: str, dashes: Literal["-", "--", ":", "-."]) -> Line2D:
    return Line2D([], [], color=color, linestyle=dashes, label=label, linewidth=2.4)


def empty_panels(n: int, columns: int, size: tuple[float, float] | None = None) -> tuple[Figure, list[plt.Axes]]:
    """Return a figure of n panels, so many in a row; the size is in inches."""
    figure, axes = plt.subplots(ceil(n / columns), columns, figsize=size, squeeze=False)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, list(axes.flat[:n])


def panel_grid(
    n: int, title: str, subtitle: str, handles: list[Line2D], *, columns: int | None = None
) -> tuple[Figure, list[plt.Axes]]:
    """Return a figure of n panels, at most three in a row (four make a square), under a title and one legend."""
    columns = columns or {1: 1, 2: 2, 4: 2}.get(n, 3)
    rows, width = ceil(n / columns), {1: 6.4, 2: 8.4}.get(columns, 10.0)
    longest = max(len(str(handle.get_label())) for handle in handles)
    in_row = min(len(handles), max(1, int(width / (0.55 + 0.078 * longest))))
    in_row = ceil(len(handles) / ceil(len(handles) / in_row))  # 4 + 3 rather than 6 + 1
    height = 3.1 if rows == 1 else 2.15
    figure, axes = empty_panels(n, columns, (width, rows * height + (rows - 1) * 0.55 + 0.62))
    gap = 0.52 + 0.21 * ceil(len(handles) / in_row)
    below = add_title(figure, title, subtitle, gap=gap, left=0.72, bottom=0.58, right=0.15)
    figure.subplots_adjust(wspace=0.14, hspace=0.55 / height)
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.1 / width, below), "ncols": in_row}
    figure.legend(handles=handles, borderaxespad=0, borderpad=0, handlelength=1.8, columnspacing=1.6, **where)
    return figure, axes


def label_outside(figure: Figure, axes: list[plt.Axes], x_label: str, y_label: str) -> None:
    """Label the outer panels only; a panel with none below it counts as outer, which matplotlib's own way misses."""
    grid = axes[0].get_gridspec()
    columns = grid.ncols if grid else 1
    for i, axis in enumerate(axes):
        is_lowest, is_first = i + columns >= len(axes), i % columns == 0
        axis.set(xlabel=x_label if is_lowest else "", ylabel=y_label if is_first else "")
        axis.tick_params(labelbottom=is_lowest, labelleft=is_first)


def add_title(
    figure: Figure, title: str, subtitle: str, *, gap: float = 0.1, left: float = 0.1, bottom: float = 0.1, right=0.1
) -> float:
    """Put title and subtitle above the axes, and grow the figure by their room; margins are in inches.

    Return where the text ends, as a share of the figure's height.
    """
    width, height = figure.get_size_inches()
    title, subtitle = (textwrap.fill(shown(t), max(20, int(width * k))) for t, k in ((title, 9.5), (subtitle, 13.5)))
    first, second = (k * (t.count("\n") + 1) if t else 0.0 for t, k in ((title, 0.23), (subtitle, 0.19)))
    total = height + 0.1 + first + second + gap
    figure.set_size_inches(width, total)
    figure.subplots_adjust(left / width, bottom / total, 1 - right / width, height / total)
    edge = 0.1 / width
    figure.text(edge, 1 - 0.08 / total, title, fontsize=12.5, fontweight="bold", va="top")
    figure.text(edge, 1 - (0.08 + first) / total, subtitle, fontsize=9.5, color="#555555", va="top")
    return 1 - (0.13 + first + second) / total


def draw_picture(axis: plt.Axes, image: object, *, gray: bool = False) -> np.ndarray:
    """Draw a picture without axes, small ones with sharp pixels; return it as an array (height, width, 3)."""
    pixels = np.asarray(image)
    if gray:  # and pale, so that what is laid over it stands out
        pixels = np.repeat(64 + 0.75 * pixels.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    axis.imshow(pixels, interpolation="nearest" if pixels.shape[1] < 200 else "antialiased")
    axis.set_axis_off()
    return pixels
