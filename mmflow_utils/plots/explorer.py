"""One knockout of one sample: the picture, the change over layers, and the words that the lens reads."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmflow_utils.plots.image_patches import draw_patches, heat_scale
from mmflow_utils.plots.style import add_title, draw_picture, flow_color, need, ordered, shown, styled


@styled
def plot_choice(
    image: object,
    patches: pd.DataFrame,
    frame: pd.DataFrame,
    words: pd.DataFrame,
    *,
    flow: str,
    layer: int,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw one sample with one flow and one layer of its knockouts (`frame`) chosen.

    `image` is a PIL picture or an array (height, width, 3), `patches` what the flow cuts off, from
    `locate_image_patches`, maybe no rows, or all patches with their attention (`weight`, %), and `words` the tokens
    that the lens reads after the layer, the most probable first, with their probability.
    """
    need(frame, ["flow", "layer", "rel_change_pct"])
    need(words, ["token", "probability"])
    if not ((frame["flow"] == flow) & (frame["layer"] == layer)).any():
        raise ValueError(f"the frame holds no knockout of {flow} at layer {layer}: choose one that it holds")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.1), width_ratios=[2.2, 4, 2])
    scale = heat_scale([patches])
    draw_picture(left, image, gray=bool(scale))
    count = f"{len(patches) or 'no'} image patch{'es' * (len(patches) != 0)} cut off"
    left.set_title(f"{patches['weight'].sum():.0f} % of attention on the picture" if scale else count)
    draw_patches(left, patches, scale)
    _draw_curves(middle, frame, flow, layer)
    _draw_words(right, words, layer)
    add_title(figure, title, subtitle, gap=0.4, left=0.1, bottom=0.5)
    figure.subplots_adjust(wspace=0.42, right=0.97)
    return figure


def _draw_curves(axis: plt.Axes, frame: pd.DataFrame, flow: str, layer: int) -> None:
    """Draw the chosen flow in its color with its layer marked, the others pale."""
    for name in sorted(ordered(frame["flow"], ()), key=lambda name: name == flow):  # the chosen one on top
        curve = frame[frame["flow"] == name].sort_values("layer")
        chosen = name == flow
        look: dict[str, Any] = {"color": flow_color(name), "alpha": 1.0 if chosen else 0.25, "label": shown(name)}
        axis.plot(curve["layer"], curve["rel_change_pct"], marker="o", markersize=3.6 if chosen else 0, **look)
    here = frame[(frame["flow"] == flow) & (frame["layer"] == layer)]["rel_change_pct"].iloc[0]
    axis.axvline(layer, color="#444444", linewidth=0.9, linestyle=(0, (2, 2)), label="_layer")
    axis.plot(layer, here, "o", markersize=9, color=flow_color(flow), markeredgecolor="white", label="_here")
    axis.axhline(0, color="#444444", linewidth=0.9, zorder=1.5, label="_zero")
    axis.set_title(shown(flow))
    axis.set(xlabel="Layer", ylabel="Change in probability (%)", xlim=(-0.5, frame["layer"].max() + 0.5))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _draw_words(axis: plt.Axes, words: pd.DataFrame, layer: int) -> None:
    names = [token.strip() or repr(token) for token in words["token"]]
    at = range(len(words))
    axis.barh(at, 100 * words["probability"], color="#332288", alpha=0.75, height=0.62)
    axis.set(xlim=(0, 100), ylim=(len(words) - 0.4, -0.6), xlabel="Probability (%)")
    axis.set_yticks(at, names)
    axis.set_title(f"Lens after layer {layer}")
    axis.grid(visible=False)
