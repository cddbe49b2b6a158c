"""Explore knockouts by hand: choose a sample, a flow and a layer, and see what becomes of the answer.

Explorer(model, samples, window=3)     # in a notebook with a running kernel
"""

import base64
from collections.abc import Sequence
from functools import cached_property
from html import escape
from io import BytesIO

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure
from traitlets import Bunch

from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.data.sample import Sample, load_image
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.experiments.lens import lens_logits
from mmflow_utils.models.adapter import VLM
from mmflow_utils.plots.explorer import plot_choice
from mmflow_utils.plots.style import shown
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_PATCHES_TO_QUESTION, IMAGE_TO_QUESTION, Flow
from mmflow_utils.prompts.image_patches import locate_image_patches

FLOWS = (*IMAGE_TO_QUESTION, *FLOW_TO_LAST, *IMAGE_PATCHES_TO_QUESTION)


class _Examined:
    """One sample in one model; what was computed is kept."""

    def __init__(self, model: VLM, sample: Sample, flows: Sequence[Flow]):
        self.model, self.sample, self.flows = model, sample, flows
        self.image, self.encoded = load_image(sample), encode(model, sample)
        self._frames: dict[int, pd.DataFrame] = {}

    def frame(self, window: int) -> pd.DataFrame:
        """Every flow, cut around every layer: one sweep."""
        if window not in self._frames:
            result = knockout_sweep(self.model, [self.sample], self.flows, window=window, n_check=0, progress=False)
            self._frames[window] = result.frame
        return self._frames[window]

    @cached_property
    def words(self) -> pd.DataFrame:
        """The five words that the lens finds most probable at `last` after each layer, nothing cut."""
        resid_post = run_reference(self.model, self.encoded, []).resid_post[1:]
        found = lens_logits(self.model, resid_post).softmax(-1).topk(5)
        tokens = [self.model.tokenizer.decode([token]) for token in found.indices.flatten().tolist()]
        words = pd.DataFrame({"token": tokens, "probability": found.values.flatten().tolist()})
        return words.assign(layer=words.index // 5)

    def patches(self, name: str) -> pd.DataFrame:
        """The image patches of a position set; none where it holds words."""
        if not name.startswith("image") or "image" not in self.encoded.positions:
            return pd.DataFrame(columns=["x", "y", "w", "h", "set"])
        return locate_image_patches(self.model, self.encoded, [name]).dropna(subset="set")


class Explorer(widgets.VBox):
    """Widgets to choose a knockout, and its figure; they open at the one that hurts the first sample most.

    When a sample or a window is chosen, all of its knockouts are computed in one sweep, so that a flow or a
    layer is shown at once. Shown are the picture with the image patches that are cut off, the change in the
    answer's probability around each layer, and the words that the logit lens (final norm at every layer)
    reads at the last position of the intact model.

    Args:
        model: the model.
        samples: questions that it answers correctly, of one task or several.
        window: layers cut at once, to begin with.
        flows: what can be cut. What a prompt doesn't have isn't offered for it.

    Raises:
        ValueError: there are no samples; a position set that no prompt has; what `encode` refuses.

    Example:
        >>> explorer = Explorer(model, samples)
        >>> explorer.layer.value = 4
        >>> explorer.chosen["token"], explorer.figure
        ('Square', <Figure size 1050x402 with 3 Axes>)
    """

    def __init__(self, model: VLM, samples: Sequence[Sample], *, window: int = 3, flows: Sequence[Flow] = FLOWS):
        if not samples:
            raise ValueError("expected samples to explore, got none: load some with load_samples")
        self.model, self.samples, self.flows = model, list(samples), tuple(flows)
        self._examined: dict[str, _Examined] = {}
        tasks = list(dict.fromkeys(sample.task or "" for sample in self.samples))
        last = model.n_layers - 1
        wide = {"layout": widgets.Layout(width="95%"), "style": {"description_width": "5em"}}
        self.task = widgets.Dropdown(options=tasks, description="Task", **wide)
        self.sample = widgets.Dropdown(description="Question", **wide)
        self.flow = widgets.Dropdown(description="Flow", **wide)
        # A slider that is dragged reports where it stops: a figure takes longer to draw than a step to move.
        sliding = {"continuous_update": False, **wide}
        self.layer = widgets.IntSlider(min=0, max=last, description="Layer", **sliding)
        self.window = widgets.IntSlider(
            value=min(window, model.n_layers), min=1, max=model.n_layers, description="Window", **sliding
        )
        self.view, self.said = widgets.HTML(), widgets.HTML()
        controls = [self.task, self.sample, self.flow, self.layer, self.window]
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
    def examined(self) -> _Examined:
        """The chosen sample."""
        sample = self.samples[self.sample.value]
        if sample.sample_id not in self._examined:
            self._examined[sample.sample_id] = _Examined(self.model, sample, self.flows)
        return self._examined[sample.sample_id]

    @property
    def frame(self) -> pd.DataFrame:
        """The chosen sample's knockouts in the chosen window, as from `knockout_sweep`."""
        return self.examined.frame(self.window.value)

    @property
    def chosen(self) -> pd.Series:
        """The chosen knockout: its row of `frame`."""
        rows = self.frame
        return rows[(rows["flow"] == self.flow.value) & (rows["layer"] == self.layer.value)].iloc[0]

    @property
    def words(self) -> pd.DataFrame:
        """What the lens reads after the chosen layer: token and probability, the most probable first."""
        words = self.examined.words
        return words[words["layer"] == self.layer.value]

    @property
    def sentence(self) -> str:
        """What the chosen knockout does to the answer."""
        row = self.chosen
        first = row["layer"] - row["window"] // 2
        last = min(first + row["window"], self.model.n_layers) - 1
        where = f"layers {max(first, 0)} to {last}" if last > max(first, 0) else f"layer {last}"
        change = f"{format_number(row['p_base'], 2)} to {format_number(row['p_knockout'], 2)}"
        return (
            f"{shown(row['flow'])} cut in {where}: the probability of {row['token'].strip()!r} "
            f"goes from {change} ({format_number(row['rel_change_pct'], 0)} %)."
        )

    @property
    def figure(self) -> Figure:
        """The figure of the choice."""
        examined, row = self.examined, self.chosen
        return plot_choice(
            examined.image,
            examined.patches(row["source"]),
            self.frame,
            self.words,
            flow=row["flow"],
            layer=int(row["layer"]),
            title=f"{examined.sample.question} → {examined.sample.answer}",
            subtitle=f"{self.model.name} · {self.sentence}",
        )

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
        self.said.value = escape(self.sentence)
        self.view.value = (
            f'<img src="data:image/png;base64,{data}" alt="{escape(self.sentence)}" style="max-width:100%">'
        )
