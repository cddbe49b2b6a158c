"""From answers to claims: how many are right (Table 2), and from which layer on the lens reads them (§7)."""

import numpy as np
import pandas as pd

from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.analysis.stats import summarize


def group_accuracy(asked: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Give the accuracy of each structural x semantic group, with its interval over pictures (Table 2).

    Args:
        asked: The record of `ask_questions`; questions that couldn't be asked are left out.
        n_boot, seed: Of the bootstrap over pictures.

    Returns:
        structural, semantic, accuracy_pct, ci_low and ci_high (95 %), n and n_clusters (pictures).
    """
    heard = asked[asked.prediction.notna()].assign(accuracy_pct=lambda f: 100.0 * f.correct)
    table = summarize(heard, "accuracy_pct", by=("structural", "semantic"), n_boot=n_boot, seed=seed)
    return table.rename(columns={"mean": "accuracy_pct"}).drop(columns="interval")


def decision_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Find from which layer on the answer is the most probable word.

    Args:
        frame: of `logit_lens`.

    Returns:
        One row per sample, protocol and word: the answer capitalized, noncapitalized, and "Either case" (a
        change of case doesn't end it). `first_layer` is the first layer after which it is the most probable
        word, `settled_layer` the first from which it stays so up to the last; NaN where there is none, so a
        mean over them is one over the samples that have it: show its n.

    Raises:
        ValueError: a column is missing.
    """
    keys = ["sample_id", "image_id", "task", "protocol", "word"]
    if missing := [name for name in (*keys, "layer", "rank") if name not in frame]:
        raise ValueError(f"Expected the frame of logit_lens, got one without {', '.join(missing)}.")
    answers = frame[frame.word.str.endswith("answer")]
    ranks = pd.concat([answers, answers.assign(word="Either case")])
    # A task may be missing (None), which a group's key may not be.
    best = ranks.groupby([*keys, "layer"], dropna=False)["rank"].min().unstack("layer")
    layers, on_top = best.columns.to_numpy(dtype=float), best.to_numpy() == 1
    stays = np.logical_and.accumulate(on_top[:, ::-1], axis=1)[:, ::-1]
    table = best.index.to_frame(index=False)
    for name, held in (("first_layer", on_top), ("settled_layer", stays)):
        table[name] = [layers[row.argmax()] if row.any() else np.nan for row in held]
    return table


def decision_curves(decisions: pd.DataFrame, *, n_layers: int) -> pd.DataFrame:
    """Say for each sample and layer whether the answer has been on top by then, and whether it stays there.

    Args:
        decisions: from `decision_layers`.
        n_layers: decoder layers.

    Returns:
        One row per row of `decisions`, `event` ("Was on top": the most probable word after this layer or an
        earlier one; "Stays on top": from this layer to the last) and layer, with `share_pct`, 0 or 100: its
        mean is the share of samples. A sample whose answer never comes counts as 0.

    Example:
        >>> decisions = pd.DataFrame({"sample_id": ["a", "b"], "first_layer": [1, 2], "settled_layer": [2, np.nan]})
        >>> decision_curves(decisions, n_layers=3).groupby(["event", "layer"]).share_pct.mean().tolist()
        [0.0, 0.0, 50.0, 0.0, 50.0, 100.0]
    """
    events = {"Was on top": "first_layer", "Stays on top": "settled_layer"}
    keys = decisions.drop(columns=list(events.values()))
    parts = [
        keys.assign(event=event, layer=layer, share_pct=100.0 * (decisions[column] <= layer))
        for event, column in events.items()
        for layer in range(n_layers)
    ]
    return pd.concat(parts, ignore_index=True)


def describe_decisions(decisions: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> list[str]:
    """Write one finding per task and protocol: the layer from which the answer, in either case, stays the likeliest.

    The layer is a mean over the samples in which that happens, with its interval over images.
    """
    lines = []
    either = decisions[decisions.word == "Either case"]
    for (task, protocol), part in either.groupby(["task", "protocol"], dropna=False):
        settled = part.dropna(subset="settled_layer")
        name = f"{'No task' if pd.isna(task) else task}, {protocol} lens"
        counted = f"{len(settled)} of {len(part)} samples"
        if settled.empty:
            lines.append(f"{name}: the answer is never the most probable word to the end ({counted}).")
            continue
        row = summarize(settled, "settled_layer", by=["task"], n_boot=n_boot, seed=seed).iloc[0]
        interval = f"95 % interval {format_number(row.ci_low)} to {format_number(row.ci_high)}"
        lines.append(
            f"{name}: on average the answer first becomes the most probable word after layer "
            f"{format_number(settled.first_layer.mean())} and stays so from layer {format_number(row['mean'])} on "
            f"({interval}, {counted}, on {row.n_clusters} images)."
        )
    return lines
