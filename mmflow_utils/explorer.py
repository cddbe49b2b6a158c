"""Explore knockouts by hand: choose a sample, a flow and a layer, and see what becomes of the answer.

Explorer(model, samples, window=3)     # in a notebook with a running kernel
"""

import base64
from collections.abc import Sequence
from functools import cache
from html import escape
from io import BytesIO
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure
from traitlets import Bunch

from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.data.sample import Sample, load_image
from mmflow_utils.engine.checks import attention_from
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.experiments.lens import lens_logits
from mmflow_utils.models.adapter import VLM
from mmflow_utils.plots.explorer import plot_choice
from mmflow_utils.plots.style import shown
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_PATCHES_TO_QUESTION, IMAGE_TO_QUESTION, window_layers
from mmflow_utils.prompts.image_patches import locate_image_patches

FLOWS = (*IMAGE_TO_QUESTION, *FLOW_TO_LAST, *IMAGE_PATCHES_TO_QUESTION)


class Explorer(widgets.VBox):
    """Widgets to choose a knockout, and its figure; they open at the one that hurts the first sample most.

    When a sample, a window or a head is chosen, all knockouts are computed in one sweep, so that a flow or a layer is
    shown at once. A flow that a prompt doesn't have isn't offered for it. Shown are the picture with the image patches
    that are cut off, or with what the flow's target attends to in that layer, all heads or one; the change in the
    answer's probability around each layer; and the words that the logit lens (final norm at every layer) reads at the
    last position of the intact model.

    Args:
        model: the model.
        samples: questions that it answers correctly, of one task or several.
        window: layers cut at once, to begin with.

    Raises:
        ValueError: there are no samples; what `encode` refuses.

    Example:
        >>> explorer = Explorer(model, samples)
        >>> explorer.layer.value = 4
        >>> explorer.chosen["token"], explorer.figure
        ('Square', <Figure size 1050x402 with 3 Axes>)
    """

    def __init__(self, model: VLM, samples: Sequence[Sample], *, window: int = 3):
        if not samples:
            raise ValueError("expected samples to explore, got none: load some with load_samples")
        self.model, self.samples = model, list(samples)
        # What was computed is kept, by the number of the sample.
        self._encoded = cache(lambda number: encode(model, self.samples[number]))
        self._swept, self._read = cache(self._sweep), cache(self._read_words)
        self._attention = cache(lambda number, target: attention_from(model, self._encoded(number), [target])[target])
        tasks = list(dict.fromkeys(sample.task or "" for sample in self.samples))
        n_layers = model.n_layers
        wide = {"layout": widgets.Layout(width="95%"), "style": {"description_width": "5em"}}
        self.task = widgets.Dropdown(options=tasks, description="Task", **wide)
        self.sample = widgets.Dropdown(description="Question", **wide)
        self.flow = widgets.Dropdown(description="Flow", **wide)
        # A slider that is dragged reports where it stops: a figure takes longer to draw than a step to move.
        sliding = {"continuous_update": False, **wide}
        self.layer = widgets.IntSlider(min=0, max=n_layers - 1, description="Layer", **sliding)
        start = min(window, n_layers)
        self.window = widgets.IntSlider(value=start, min=1, max=n_layers, description="Window", **sliding)
        heads = {f"attention, head {head}": slice(head, head + 1) for head in range(model.n_heads)}
        heats = {"image patches cut off": None, "attention, mean of heads": slice(None), **heads}
        self.heat = widgets.Dropdown(options=heats, description="Picture", **wide)
        self.view, self.said = widgets.HTML(), widgets.HTML()
        cuts = {"all heads": None} | {f"head {head}": (head,) for head in range(model.n_heads)}
        self.heads = widgets.Dropdown(options=cuts, description="Cut in", **wide)
        controls = [self.task, self.sample, self.flow, self.layer, self.window, self.heads, self.heat]
        self._offer_samples()
        self._offer_flows()
        strongest = self.frame.loc[self.frame["rel_change_pct"].idxmin()]
        self.flow.value, self.layer.value = strongest["flow"], int(strongest["layer"])
        self._draw()
        self._changing = False
        for control in controls:
            control.observe(self._on_change, "value")
        super().__init__([*controls, self.said, self.view])

    def __repr__(self) -> str:
        return "Explorer: widgets to choose task, question, flow, layer and window; they need a running kernel"

    @property
    def frame(self) -> pd.DataFrame:
        """The chosen sample's knockouts in the chosen window, as from `knockout_sweep`."""
        return self._swept(self.sample.value, self.window.value, self.heads.value)

    @property
    def chosen(self) -> pd.Series:
        """The chosen knockout: its row of `frame`."""
        rows = self.frame
        return rows[(rows["flow"] == self.flow.value) & (rows["layer"] == self.layer.value)].iloc[0]

    @property
    def words(self) -> pd.DataFrame:
        """What the lens reads after the chosen layer: token and probability, the most probable first."""
        words = self._read(self.sample.value)
        return words[words["layer"] == self.layer.value]

    @property
    def sentence(self) -> str:
        """What the chosen knockout does to the answer."""
        row = self.chosen
        cut = window_layers(int(row["layer"]), window=int(row["window"]), n_layers=self.model.n_layers)
        where = f"layers {cut[0]} to {cut[-1]}" if len(cut) > 1 else f"layer {cut[0]}"
        where = where if self.heads.value is None else f"{self.heads.label} of {where}"
        change = f"{format_number(row['p_base'], 2)} to {format_number(row['p_knockout'], 2)}"
        return (
            f"{shown(row['flow'])} cut in {where}: the probability of {row['token'].strip()!r} "
            f"goes from {change} ({format_number(row['rel_change_pct'], 0)} %)."
        )

    @property
    def figure(self) -> Figure:
        """The figure of the choice."""
        sample, row = self.samples[self.sample.value], self.chosen
        return plot_choice(
            load_image(sample),
            self._patches(row),
            self.frame,
            self.words,
            flow=row["flow"],
            layer=int(row["layer"]),
            title=f"{sample.question} → {sample.answer}",
            subtitle=f"{self.model.name} · {self.sentence}",
        )

    def _sweep(self, number: int, window: int, heads: tuple[int, ...] | None) -> pd.DataFrame:
        options: Any = {"window": window, "heads": heads, "n_check": 0, "progress": False}
        return knockout_sweep(self.model, [self.samples[number]], FLOWS, **options).frame

    def _read_words(self, number: int) -> pd.DataFrame:
        """The five words that the lens finds most probable at `last` after each layer, nothing cut."""
        resid_post = run_reference(self.model, self._encoded(number), []).resid_post[1:]
        found = lens_logits(self.model, resid_post).softmax(-1).topk(5)
        tokens = [self.model.tokenizer.decode([token]) for token in found.indices.flatten().tolist()]
        words = pd.DataFrame({"token": tokens, "probability": found.values.flatten().tolist()})
        return words.assign(layer=words.index // 5)

    def _patches(self, row: pd.Series) -> pd.DataFrame:
        """The image patches that are cut off, none where these are words; or all, each with its attention (%)."""
        encoded, name, heads = self._encoded(self.sample.value), row["source"], self.heat.value
        if "image" not in encoded.positions or (heads is None and not name.startswith("image")):
            return pd.DataFrame(columns=["x", "y", "w", "h", "set"])
        patches = locate_image_patches(self.model, encoded, [name])
        if heads is None:
            return patches.dropna(subset="set")
        seen = self._attention(self.sample.value, row["target"])[int(row["layer"]), heads].mean(0)
        return patches.assign(weight=100 * seen[patches["position"]].numpy())

    def _offer_samples(self) -> None:
        mine = [n for n, sample in enumerate(self.samples) if (sample.task or "") == self.task.value]
        self.sample.options = [(f"{self.samples[n].question} → {self.samples[n].answer}", n) for n in mine]
        self.sample.index = 0

    def _offer_flows(self) -> None:
        """Offer what this prompt has, and keep what was chosen if it is among that."""
        before, found = self.flow.value, list(dict.fromkeys(self.frame["flow"]))
        self.flow.options = [(shown(name), name) for name in found]
        self.flow.value = before if before in found else found[0]

    def _on_change(self, change: Bunch) -> None:
        if self._changing:  # what one choice offers anew must not draw again and again
            return
        self._changing = True
        try:
            if change.owner is self.task:
                self._offer_samples()
            if change.owner in (self.task, self.sample):
                self._offer_flows()
            self._draw()
        finally:
            self._changing = False

    def _draw(self) -> None:
        png = BytesIO()
        self.figure.savefig(png, format="png", dpi=90)
        data = base64.b64encode(png.getvalue()).decode()
        self.said.value = words = escape(self.sentence)
        self.view.value = f'<img src="data:image/png;base64,{data}" alt="{words}" style="max-width:100%">'
