"""The stages of the information flow from the lowest layer up, in the manner of the paper's Fig. 1."""

from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.plots import style

_PARTED = ("Other image patches -> Question", "Related image patches -> Question")
_WHOLE = "Image -> Question"
_FLOWS = (*_PARTED, _WHOLE, "Question -> Last", "Image -> Last")
_WORDS = ("Noncapitalized answer", "Capitalized answer")
_LINES = (*_FLOWS, *_WORDS)
_LANES = {"image": "Image", "question": "Question", "last": "Last"}  # from left to right, an arrow's width apart
_MARK_AT = dict(zip(_FLOWS, (0.33, 0.62, 0.5, 1.4, 1.75), strict=True))
_ENDS = {"Question -> Last": (1, 2), "Image -> Last": (0, 2)}  # lanes; else from the image to the question
_WORD_AT = dict(zip(_WORDS, (2.55, 3.15), strict=True))


@style.styled
def plot_stages(layers: pd.DataFrame, stages: pd.DataFrame, *, title: str = "", subtitle: str = "") -> Figure:
    """Draw what flows where, by layer, from bottom to top: an arrow for each layer of a stage (Fig. 1).

    The wider an arrow, the more of the answer's probability is lost without it. A diamond marks a stage's strongest
    layer, with the interval of that layer. Beside the last position stand the words that the lens reads there. Where
    the patches were divided into related and other ones, these stand for the image.

    Args:
        layers: From `stage_layers` by model and line: mean and in_stage of every layer.
        stages: From `find_stages` by model and line.

    Raises:
        ValueError: A column is missing, there are no rows, or a model's line is duplicated.
    """
    style.need(layers, ["model", "line", "layer", "mean", "in_stage"])
    style.need(stages, ["model", "line", "n_layers", "effect", "strongest", "strongest_low", "strongest_high"])
    if stages.duplicated(["model", "line"]).any() or layers.duplicated(["model", "line", "layer"]).any():
        raise ValueError("a line of a model is duplicated: take the tasks together, or select one")
    models, depths = style.ordered(stages["model"], ()), stages.groupby("model")["n_layers"].max()
    parted = stages.loc[stages["line"].isin(_PARTED), "model"]
    stages = stages[stages["line"].isin(_LINES) & ~(stages["line"].eq(_WHOLE) & stages["model"].isin(parted))]
    stages = stages.sort_values("line", key=lambda lines: lines.map(_LINES.index))
    columns = min(3, len(models))
    figure, axes = style.empty_panels(len(models), columns, (3.6 * columns + 0.4, 4.4 * ceil(len(models) / columns)))
    for axis, model in zip(axes, models, strict=True):
        mine, found = (frame[frame["model"] == model] for frame in (layers, stages))
        _draw_model(axis, mine, found, int(depths[model]))
        axis.set_title(f"{model} · {int(depths[model])} layers", pad=16)  # a number may stand above the last layer
    for axis in axes[::columns]:
        axis.set_ylabel("Layer")
    absent = stages["strongest"].isna()
    n_absent = int(stages[absent].groupby("model").size().max()) if absent.any() else 0
    below = 0.5 + 0.15 * (n_absent + bool(n_absent))  # inches
    there = stages.loc[~absent, "line"].unique()
    handles = [
        style.legend_handle(style.shown(line), style.WORD_COLORS.get(line) or style.flow_color(line), "-")
        for line in there
    ]
    style.add_title(figure, title, subtitle, gap=0.55, left=0.6, bottom=below + 0.22 * ceil(len(handles) / 2))
    figure.subplots_adjust(wspace=0.15, hspace=(below + 0.45) / 4)
    if handles:
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=2)
    return figure


def _draw_model(axis: plt.Axes, layers: pd.DataFrame, stages: pd.DataFrame, n_layers: int) -> None:
    axis.set(xlim=(-0.3, 3.5), ylim=(-0.9, n_layers - 0.1))
    for at, (name, label) in enumerate(_LANES.items()):
        axis.plot([at, at], [0, n_layers - 1], color=style.set_color(name), linewidth=11, alpha=0.25, label="_lane")
        axis.text(at, -0.045, label, transform=axis.get_xaxis_transform(), ha="center", va="top")
    # The strongest first: where two numbers would meet, the weaker one moves up.
    for stage in stages.sort_values("effect", ascending=False, kind="stable").to_dict("records"):
        mine = layers[(layers["line"] == stage["line"]) & layers["in_stage"]]
        (_draw_word if stage["line"] in _WORDS else _draw_flow)(axis, stage["line"], mine, stage)
    absent = [style.shown(line) for line in stages.loc[stages["strongest"].isna(), "line"]]
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "#555555", "va": "top"}
    note = "\n".join(["no stage:", *absent]) if absent else ""
    axis.annotate(note, (0, 0), (0, -26), xycoords="axes fraction", **look)
    axis.set_xticks([])
    axis.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axis.grid(visible=False)


def _draw_flow(axis: plt.Axes, line: str, layers: pd.DataFrame, stage: dict) -> None:
    start, end = _ENDS.get(line, (0, 1))
    color, aside = style.flow_color(line), 0.18 * (line == _PARTED[0]) - 0.18 * (line == _PARTED[1])
    for layer, effect in zip(layers["layer"], layers["mean"], strict=True):
        ends = (start + 0.09, layer + aside), (end - 0.09, layer + aside)
        look = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 0.6 + 0.034 * min(effect, 100)}
        axis.add_patch(FancyArrowPatch(*ends, color=color, shrinkA=0, shrinkB=0, label=line, **look))
    if pd.notna(stage["strongest"]):
        mark, (at, low, high) = _MARK_AT[line], (stage[f"strongest{end}"] for end in ("", "_low", "_high"))
        axis.plot([mark] * 2, [low, high], color="#1A1A1A", linewidth=1.2, label=f"_{line}")
        axis.plot(mark, at + aside, "D", color=color, markeredgecolor="white", markersize=6)
        top = max(high, layers["layer"].max() + aside)
        notes = (note.xy for note in axis.texts if isinstance(note, Annotation))
        met = [y for x, y in notes if abs(x - mark) < 0.75 and abs(y - top) < 0.08 * axis.get_ylim()[1]]
        text: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8, "color": "#1A1A1A"}
        text |= {"xytext": (0, 4 + 11 * len(met)), "textcoords": "offset points"}
        axis.annotate(f"−{format_number(stage['effect'], 0)} % at {at:g}", (mark, max([top, *met])), **text)


def _draw_word(axis: plt.Axes, line: str, layers: pd.DataFrame, stage: dict) -> None:
    if pd.isna(stage["strongest"]):
        return
    at, color = _WORD_AT[line], style.WORD_COLORS[line]
    for layer, effect in zip(layers["layer"], layers["mean"], strict=True):
        axis.plot(at, layer, "s", color=color, markersize=3 + 0.05 * min(effect, 100), label=f"_{line}")
    look: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8.5, "color": color}
    word = "Answer" if line == _WORDS[1] else "answer"
    axis.text(at, -0.05, word, transform=axis.get_xaxis_transform(), **look)
