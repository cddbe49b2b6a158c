"""Do the same heads serve all tasks? Rank correlations between tasks, beside those of a task with itself.

head_agreement(head_sweep(model, samples, [flow]).frame)
"""

from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import ndtri

from mmflow_utils.analysis.flow_stages import NEGLIGIBLE, Measured, resample
from mmflow_utils.analysis.stats import correlate_ranks, soft_ranks

__all__ = ["ALIKE", "DIFFERENT", "SAME", "head_agreement", "judge_agreement"]

SAME, DIFFERENT = "the same task", "different tasks"
ALIKE = 0.1  # tasks share their heads if two correlate by no more than this below one with itself


def head_agreement(frame: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Correlate the ranks of heads, by mean `logprob_change`, between tasks and within each.

    Images are divided in two halves, and only means of different halves are compared: so a task's correlation with
    itself shows how much the noise of so few samples lets one see, and that between two tasks may be held against it. A
    task whose images are all in one half is left out.

    Returns:
        One row per pair of tasks (task, other): `rho` over all heads (of `soft_ranks`, where less than 5 % counts as
        nothing), ci_low and ci_high (95 %, bootstrap over images), n (samples) and n_clusters; at the end the means of
        `SAME` and of `DIFFERENT` tasks.
    """
    half, ranks = frame["image_id"].isin(frame["image_id"].unique()[::2]), {}  # by turns, task after task
    units = frame.assign(
        layer=frame["layer"] * (frame["head"].max() + 1) + frame["head"], effect=frame["logprob_change"]
    )
    for n, (name, part) in enumerate(units.groupby(["task", half])):
        ranks[name] = soft_ranks(resample(part, n_boot=n_boot, seed=seed + n), smallest=NEGLIGIBLE / 100)
    tasks = [task for task in dict.fromkeys(frame["task"]) if {(task, True), (task, False)} <= ranks.keys()]
    rows, pooled = [], dict[str, list[np.ndarray]]({SAME: [], DIFFERENT: []})
    for one, other in combinations_with_replacement(tasks, 2):
        rho = np.mean([correlate_ranks(ranks[one, side], ranks[other, not side]) for side in (True, False)], axis=0)
        pooled[SAME if one == other else DIFFERENT].append(rho)
        rows.append(_row(one, other, rho, frame[frame["task"].isin([one, other])]))
    rows += [_row(kind, "mean", np.mean(found, axis=0), frame) for kind, found in pooled.items() if found]
    return pd.DataFrame(rows)


def judge_agreement(table: pd.DataFrame) -> tuple[Measured, bool | None]:
    """Say whether tasks share their heads, by a table of `head_agreement` with several.

    Returns:
        `SAME` minus `DIFFERENT` with its 95 % interval; True where that surely stays below `ALIKE`, False where it
        surely exceeds it, None otherwise, and where a task's halves don't surely correlate: then nothing is seen.
    """
    means = table[table["other"] == "mean"].set_index("task")
    gap = means["rho"][SAME] - means["rho"][DIFFERENT]
    reach = np.hypot(*((means["ci_high"] - means["ci_low"]) / 2)[[SAME, DIFFERENT]])
    unseen = (table.loc[table["task"] == table["other"], "ci_low"] <= 0).any() or gap - reach <= ALIKE <= gap + reach
    return (gap, gap - reach, gap + reach), None if unseen else bool(gap < ALIKE)


def _row(task: str, other: str, rho: Float[np.ndarray, " draws"], frame: pd.DataFrame) -> dict[str, object]:
    z = np.arctanh(np.clip(rho, -1 + 1e-9, 1 - 1e-9))  # Fisher's: its spread doesn't depend on where it is
    reach = ndtri(0.975) * z[1:].std()  # about the estimate: resamples are noisier, so that theirs is too low
    numbers = {"rho": rho[0], "ci_low": np.tanh(z[0] - reach), "ci_high": np.tanh(z[0] + reach)}
    counts = {"n": frame["sample_id"].nunique(), "n_clusters": frame["image_id"].nunique()}
    return {"task": task, "other": other} | numbers | counts
