"""The paper's claims as numbers, and what was measured of them in each model: task by task, then all together."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import pandas as pd

from mmflow_utils.analysis import claim_measures as measures
from mmflow_utils.analysis.collect import HELD, LEAD, REMOVED, WRITTEN_BY
from mmflow_utils.analysis.flow_stages import MIDDLE, NEGLIGIBLE, Measured, resample, stage_layers, with_image_numbers
from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.analysis.stats import curves

POOLED = "all tasks"
VERDICTS = ("holds", "does not hold", "differs by task", "undecided", "not applicable", "not measured")
MET = ("met", "not met", "not decided", "not applicable")  # what becomes of a notebook's own expectations
APART = 1.0  # layers between the centers of what comes first and what comes second
OF_STAGES = (measures.two_drops, measures.later, measures.depth)  # about where effects are: each line must have one


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper as a number, and the range in which the number must lie."""

    text: str
    paper: str  # where it is made
    says: str  # the paper's own number; how deep a layer lies: 0 first, 1 last of the 40 of LLaVA-1.5-13b
    lines: Mapping[str, str]  # those that it is about, in the order in which `measure` takes them, to their results
    measure: Callable[..., Measured]  # from lines to the number and its 95 % interval
    measured: str  # what the number is, with its unit
    holds: tuple[float, float] = (NEGLIGIBLE, inf)  # the range
    leads: str = ""  # a difference of two lines that must be above 0 at some layer


def check_claims(effects: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Say for each model which of the paper's claims hold, in each task and in all tasks together.

    A claim **holds** if the whole 95 % interval of its number lies in the claimed range, **does not hold** if all of it
    lies outside, and is **undecided** otherwise. So an order needs centers that are surely a layer apart, and "no
    effect" a band inside ±5 %: an interval that is merely wide shows neither. A claim about an effect that surely
    isn't there is **not applicable**; what a model hasn't stored is **not measured**. A curve of all tasks together may
    show an order that no task has, so where one task says the opposite of another, or of all together, the claim
    **differs by task**.

    Args:
        effects: from `collect_effects`.
        n_boot, seed: of the bootstrap over images.

    Returns:
        One row per model, task (the last is `POOLED`) and claim: model, task, claim, paper, says (the paper's number),
        measured, value, ci_low, ci_high, n, n_clusters, verdict, why (where there is no number), here (effects).
    """
    if effects.empty:
        return pd.DataFrame(columns=["model", "task", *_judge(CLAIMS[0], {})])
    rows, boot = [], {"n_boot": n_boot, "seed": seed}
    for model, mine in effects.groupby("model"):
        of_task = measure_lines(mine, **boot) | measure_lines(mine.assign(task=POOLED), **boot)
        rows += [{"model": model, "task": task} | _judge(claim, of_task[task]) for task in of_task for claim in CLAIMS]
    table = pd.DataFrame(rows)
    opposed = table.groupby(["model", "claim"])["verdict"].transform(lambda said: {*VERDICTS[:2]} <= {*said})
    table.loc[opposed & (table["task"] == POOLED), "verdict"] = "differs by task"
    return table


def measure_lines(mine: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> dict[str, dict[str, measures.Line]]:
    """Bring one model's effects, see `collect_effects`, to what claims are measured of: by task, then by line.

    A task's lines share their draws and can be compared draw by draw.
    """
    by, found = ["task", "line"], defaultdict[str, dict[str, measures.Line]](dict)
    bands, used = stage_layers(mine, by, n_boot=n_boot, seed=seed), with_image_numbers(mine)
    shown = used["image_id"].where(~mine["line"].str.startswith(HELD)).groupby(mine["task"], dropna=False)
    images = {task: np.unique(some.dropna()).tolist() for task, some in shown}
    for ((task, name), band), (_, rows) in zip(curves(bands, by), used.groupby(curves(mine, by).ngroup()), strict=True):
        own = None if name.startswith(HELD) else images[task]  # pairs show pictures of their own
        draws = resample(rows, images=own, n_boot=n_boot, seed=seed)
        numbers = band[["ci_low", "ci_high", "layer", "in_stage", "n", "n_clusters"]].to_numpy(float).T
        low, high, layers, in_stage, *counted = numbers
        n_layers, counts = int(rows["n_layers"].max()), (int(n.min()) for n in counted)
        found[task][name] = measures.Line(draws, low, high, layers, n_layers, bool(in_stage.any()), *counts)
    return found


def tally_claims(table: pd.DataFrame) -> pd.DataFrame:
    """Bring `check_claims` to a row per model and claim: verdicts by task, then all together, beside the paper."""
    pooled = table[table["task"] == POOLED].set_index(["model", "claim"])
    by_task = table[table["task"] != POOLED].groupby(["model", "claim"])
    said = by_task[["task", "verdict"]].apply(lambda rows: count_verdicts(dict(rows.itertuples(index=False))))
    return pooled.assign(tasks=said).rename(columns={"verdict": POOLED})[
        ["tasks", POOLED, "measured", "value", "ci_low", "ci_high", "n", "n_clusters", "why", "here", "says", "paper"]
    ]


def describe_claims(table: pd.DataFrame) -> list[str]:
    """Write one sentence per model and claim of `check_claims`: by task, all together, the paper's number."""
    sentences = []
    for (model, claim), row in tally_claims(table).iterrows():
        evidence = row["why"]
        if not evidence:
            interval = f"95 % interval {format_number(row['ci_low'])} to {format_number(row['ci_high'])}"
            evidence = f"{row['measured']}: {format_number(row['value'])}, {interval}"
        if row["n"]:
            evidence += f", {row['n']} samples on {row['n_clusters']} images; {row['here']}"
        together = f"all together: {row[POOLED]} ({evidence})"
        sentences.append(f"{model}: {claim}: {row['tasks']}; {together}. Paper ({row['paper']}): {row['says']}.")
    return sentences


def count_verdicts(verdicts: Mapping[str, str], words: Sequence[str] = VERDICTS) -> str:
    """Count tasks by verdict, the first of `words` in any case.

    >>> count_verdicts({"A": "holds", "B": "undecided", "C": "undecided"})
    'holds in 1 of 3 tasks (A), undecided in 2 (B, C)'
    """
    if set(verdicts.values()) == {"not measured"}:
        return "not measured"
    parts = []
    for word in words:
        tasks = [str(task) for task, found in verdicts.items() if found == word]
        of = f" of {len(verdicts)} task{'s' * (len(verdicts) != 1)}" if word == words[0] else ""
        parts += [f"{word} in {len(tasks)}{of}" + f" ({', '.join(tasks)})" * bool(tasks)] if tasks or of else []
    return ", ".join(parts)


def _judge(claim: Claim, lines: Mapping[str, measures.Line]) -> dict[str, object]:
    missing = dict.fromkeys(WRITTEN_BY[name] for line, name in claim.lines.items() if line not in lines)
    found = {name: lines[name] for name in claim.lines if name in lines}
    value, low, high = measures.NOTHING
    if missing:
        verdict, why = "not measured", f"run notebook {', '.join(missing)} for this model"
    else:
        verdict, why = _without_number(claim, found, lines.get(claim.leads))
        if not verdict:
            value, low, high = claim.measure(*found.values())
            verdict = _verdict(low, high, claim.holds)
    return {
        "claim": claim.text,
        "paper": claim.paper,
        "says": claim.says,
        "measured": claim.measured,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": 0 if missing else min(line.n for line in found.values()),
        "n_clusters": 0 if missing else min(line.n_clusters for line in found.values()),
        "verdict": verdict,
        "why": why,
        "here": "; ".join(f"{name} {measures.strongest(line)}" for name, line in found.items()),
    }


def _without_number(claim: Claim, lines: Mapping[str, measures.Line], lead: measures.Line | None) -> tuple[str, str]:
    """Judge a claim about effects of which one isn't there; ("", "") where nothing is wanting."""
    of_stages = claim.measure in OF_STAGES
    none = [name for name, line in lines.items() if line.high.max() < NEGLIGIBLE]
    if none and (of_stages or len(none) == len(lines)):
        return "not applicable", f"{' and '.join(none)}: no layer with an effect of {NEGLIGIBLE:g} or more"
    if lead and lead.low.max() <= 0:
        most = f"{claim.leads}: at most {measures.strongest(lead)}"
        return ("does not hold", most) if lead.high.max() <= 0 else ("undecided", most)
    unsure = [name for name, line in lines.items() if of_stages and not line.has_stage]
    if unsure:
        return "undecided", f"{' and '.join(unsure)}: no layer whose effect surely exceeds {NEGLIGIBLE:g}"
    return "", ""


def _verdict(low: float, high: float, holds: tuple[float, float]) -> str:
    """Judge an interval.

    >>> _verdict(1.0, 3.0, (1.0, inf)), _verdict(-2.0, 0.9, (1.0, inf)), _verdict(-1.0, 2.0, (1.0, inf))
    ('holds', 'does not hold', 'undecided')
    """
    if low >= holds[0] and high <= holds[1]:
        return "holds"
    return "does not hold" if high < holds[0] or low > holds[1] else "undecided"


SMALL, LATER, _MIDDLE = (-inf, NEGLIGIBLE), (APART, inf), (100 * MIDDLE[0], 100 * MIDDLE[1])
QUESTION, IMAGE = {"Question -> Last": "flow_to_last"}, {"Image -> Last": "flow_to_last"}
PICTURE = {"Image -> Question": "image_to_question"}
CLAIMS = (
    Claim(
        text="The picture enters the question in two separate stages",
        paper="§5, Fig. 4",
        says="-60 % on average in layers 0-4 (depth 0.01 to 0.11), then -21 % around layer 10 (0.26) in ChooseAttr, "
        "ChooseCat, ChooseRel and QueryAttr, less in the other two",
        lines=PICTURE,
        measure=measures.two_drops,
        measured=f"fall of the effect between its two peaks (%; separate: {NEGLIGIBLE:g} or more)",
    ),
    Claim(
        text="Image -> Question acts before Question -> Last",
        paper="§5, Figs 3-4",
        says="layers 0-4 and around 10 (depth 0.01 to 0.11, 0.26) before the middle layers",
        lines=PICTURE | QUESTION,
        measure=measures.later,
        measured=f"how much later the center of Question -> Last lies (layers; before: {APART:g} or more)",
        holds=LATER,
    ),
    Claim(
        text="Question -> Last is strongest in the middle layers",
        paper="§5, Fig. 3",
        says="up to -30 % in ChooseAttr, in the middle layers",
        lines=QUESTION,
        measure=measures.depth,
        measured="depth of its strongest layer (%, 0 first, 100 last; middle: {:g} to {:g})".format(*_MIDDLE),
        holds=_MIDDLE,
    ),
    Claim(
        text="The last position draws on the question more than on the image",
        paper="§5, Fig. 3",
        says="the question's role is predominant: up to -30 % in ChooseAttr",
        lines=QUESTION | IMAGE,
        measure=measures.stronger,
        measured="largest effect of Question -> Last minus that of Image -> Last (percentage points; "
        f"more: {NEGLIGIBLE:g} or more)",
    ),
    Claim(
        text="What is needed is also enough: the question's words come to hold the answer",
        paper="§5, Figs 3-4",
        says="only cut; by its account the picture's part in the answer passes through the question's words",
        lines={f"{HELD}Question": "patching"} | QUESTION,
        measure=measures.largest,
        measured="most of another picture's answer that comes with its question's states (%, at any layer; enough: "
        "50 or more)",
        holds=(50.0, inf),
    ),
    Claim(
        text="The last position takes nothing from the image directly",
        paper="§5, Fig. 3",
        says="no significant impact in most tasks, a slight one in QueryAttr",
        lines=IMAGE | QUESTION,
        measure=measures.largest,
        measured=f"largest effect of Image -> Last at any layer (%, loss or gain; nothing: within ±{NEGLIGIBLE:g})",
        holds=SMALL,
    ),
    Claim(
        text="Last -> Last is negligible",
        paper="§5, Fig. 3",
        says="negligible change in all tasks",
        lines={"Last -> Last": "flow_to_last"} | QUESTION,
        measure=measures.largest,
        measured=f"its largest effect at any layer (%, loss or gain; negligible: within ±{NEGLIGIBLE:g})",
        holds=SMALL,
    ),
    Claim(
        text="Other image patches act first, related ones second",
        paper="§6, Fig. 5",
        says="other patches dominate the first drop, related ones the second, around layer 10 (depth 0.26)",
        lines={
            "Other image patches -> Question": "image_patch_knockout",
            "Related image patches -> Question": "image_patch_knockout",
        },
        measure=measures.later,
        measured=f"how much later the center of the related patches lies (layers; second: {APART:g} or more)",
        holds=LATER,
    ),
    Claim(
        text="The answer comes in lower case before it is capitalized",
        paper="§7, Fig. 6",
        says="in lower case from near 0 to 20-70 % around the middle layers, then down to nearly 0; the capitalized "
        "form rises a few layers after layer 20 (depth 0.51); not in Llama3-LLaVA-NeXT-8b (App. I.3)",
        lines={"Noncapitalized answer": "logit_lens", "Capitalized answer": "logit_lens"},
        measure=measures.later,
        measured=f"how much later the center of the capitalized answer lies (layers; before: {APART:g} or more)",
        holds=LATER,
        leads=LEAD,
    ),
    Claim(
        text="MLPs shape the question's meaning more than attention",
        paper="App. D, Figs 12-13",
        says="similarity falls by 90 % without the MLP at the first layer and by 25 % at the last, without attention "
        "by 60 % and 10 %",
        lines={"MLP": "module_knockout", "Attention": "module_knockout"},
        measure=measures.at_both_ends,
        measured="similarity lost without the MLP minus without attention, at the first layer or the last, where it "
        f"is less (percentage points; more: {NEGLIGIBLE:g} or more)",
    ),
    Claim(
        text="The second half of the layers can do without the image tokens",
        paper="App. F, Fig. 14",
        says="accuracy intact without them in the last 20 of 40 layers of LLaVA-v1.6-13B (from depth 0.5 on), in "
        "about 40 % less time",
        lines={REMOVED: "efficiency_removed"},
        measure=measures.in_second_half,
        measured=f"loss of accuracy (percentage points; intact: below {NEGLIGIBLE:g})",
        holds=SMALL,
    ),
)
