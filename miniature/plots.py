"""The figure of a training run."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmflow_utils.plots import style


@style.styled
def plot_learning_curves(frame: pd.DataFrame, *, title: str = "Learning curves", subtitle: str = "") -> Figure:
    """Draw a training run: one panel per metric, one line per task, stages one after the other.

    Args:
        frame: Columns stage, step, metric, task, value. A missing task (None) is the whole set. Steps may go
            on from stage to stage or begin anew.
        title, subtitle: Above the figure.

    Raises:
        ValueError: A column is missing or there are no rows.
    """
    style.need(frame, ["stage", "step", "metric", "task", "value"])
    data, spans = _steps_end_to_end(frame.dropna(subset="value"))
    data = data.assign(task=data["task"].astype(object).where(data["task"].notna(), "all"))
    looks = style.line_looks(data["task"], style.TASK_COLORS | {"all": "#333333"}, (*style.TASK_ORDER, "all"))
    metrics = list(dict.fromkeys(data["metric"]))
    handles = [style.legend_handle(*look) for look in looks.values()]
    figure, axes = style.panel_grid(len(metrics), title, subtitle, handles)
    rows = _rows_of_names(spans)
    n_rows = max(rows.values(), default=0) + 1
    for axis, metric in zip(axes, metrics, strict=True):
        axis.set_title(_metric_name(metric), loc="left", pad=7 if len(spans) < 2 else 9 + 11 * n_rows)
        for task, (label, color, dashes) in looks.items():
            curve = data[(data["metric"] == metric) & (data["task"] == task)].sort_values("at")
            mark: dict[str, Any] = {"marker": "o", "markersize": 3} if len(curve) < 30 else {}
            for _, part in curve.groupby("stage", sort=False):  # no line across stages: the data change there
                axis.plot(part["at"], part["value"], color=color, label=label, linestyle=dashes, **mark)
        axis.margins(x=0.02)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        for i, (stage, (start, end)) in enumerate(spans.items() if len(spans) > 1 else ()):
            if i:
                axis.axvline(start, color="#999999", linewidth=0.9, linestyle=(0, (2, 2)), label="_stage")
            text: dict[str, Any] = {"fontsize": 8, "color": "#555555", "ha": "center", "va": "bottom"}
            text |= {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points"}
            axis.annotate(str(stage), ((start + end) / 2, 1), (0, 2 + 11 * rows[stage]), **text)
    style.label_outside(figure, axes, "Step", "")
    for axis in axes:  # each metric has a scale of its own
        axis.tick_params(labelleft=True)
    room = 11 * (n_rows - 1) / 72 / figure.get_figheight()  # of the names' further rows
    figure.subplots_adjust(wspace=0.22, top=figure.subplotpars.top - room)
    return figure


def _rows_of_names(spans: dict[object, tuple[float, float]]) -> dict[object, int]:
    """Give each stage's name a row above the axis, so that the names of short stages don't meet."""
    whole = max((end for _, end in spans.values()), default=1.0) or 1.0
    filled: list[float] = []  # how far each row is taken, as a share of the axis
    rows = {}
    for stage, (start, end) in spans.items():
        center, half = (start + end) / 2 / whole, 0.012 * len(str(stage)) + 0.01
        rows[stage] = next((n for n, taken in enumerate(filled) if taken <= center - half), len(filled))
        filled[rows[stage] :] = [center + half, *filled[rows[stage] + 1 :]]
    return rows


def _metric_name(metric: str) -> str:
    """Name a measure with its unit: accuracy_pct is "Accuracy (%)"."""
    stem, unit = (metric.removesuffix("_pct"), " (%)") if metric.endswith("_pct") else (metric, "")
    return stem[:1].upper() + stem[1:].replace("_", " ") + unit


def _steps_end_to_end(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[object, tuple[float, float]]]:
    """Add `at`, the step counted over all stages, and return each stage's first and last."""
    offset, end, parts = 0.0, 0.0, []
    spans: dict[object, tuple[float, float]] = {}
    for stage, part in frame.groupby("stage", sort=False, dropna=False):
        if spans and part["step"].min() + offset < end:  # this stage counts from its own beginning
            offset = end
        parts.append(part.assign(at=part["step"] + offset))
        start = end if spans else float(parts[-1]["at"].min())
        end = float(parts[-1]["at"].max())
        spans[stage] = (start, end)
    return pd.concat(parts), spans
