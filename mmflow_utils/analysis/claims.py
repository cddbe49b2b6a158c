"""The paper's claims as numbers, and what was measured of them in each model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import pandas as pd

from mmflow_utils.analysis import claim_measures as measures
from mmflow_utils.analysis.collect import REMOVED, WRITTEN_BY
from mmflow_utils.analysis.flow_stages import NEGLIGIBLE, Measured, resample, stage_layers
from mmflow_utils.analysis.sentences import format_number


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper as a number, and the open range in which the number must lie."""

    text: str
    paper: str  # where it is made
    lines: Mapping[str, str]  # those that it is about, in the order in which `measure` takes them, to their results
    measure: Callable[..., Measured]  # from lines to the number and its 95 % interval
    measured: str  # what the number is, with its unit
    holds: tuple[float, float] = (0.0, inf)  # the range
    of_stages: bool = True  # it is about where stages are, so each line must have one


def check_claims(effects: pd.DataFrame, *, by_task: bool = False, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Say for each model which of the paper's claims hold.

    A claim **holds** if the whole 95 % interval of its number (bootstrap over images) lies in the claimed
    range, **does not hold** if all of it lies outside, and is **undecided** otherwise. A claim about the
    place of a stage that isn't there does not hold if the band of `stage_layers` excludes every effect that
    counts, and is undecided otherwise. What a model hasn't stored is **not measured**.

    Args:
        effects: from `collect_effects`.
        by_task: a row for each task; by default all tasks are taken together.
        n_boot, seed: of the bootstrap.

    Returns:
        One row per model, (task,) and claim: claim, paper, measured, value, ci_low, ci_high, n, n_clusters,
        verdict, and why, where there is no number.
    """
    by = ["model", "task"] if by_task else ["model"]
    if effects.empty:
        return pd.DataFrame(columns=[*by, *_judge(CLAIMS[0], {})])
    rows = []
    for key, part in effects.groupby(by, dropna=False):
        images, lines = sorted(part["image_id"].unique()), {}
        bands = stage_layers(part, ["line"], n_boot=n_boot, seed=seed)
        for (name, mine), (_, band) in zip(part.groupby("line"), bands.groupby("line"), strict=True):
            draws = resample(mine, images=images, n_boot=n_boot, seed=seed)
            low, high, layers = (band[column].to_numpy(float) for column in ("ci_low", "ci_high", "layer"))
            counted = (int(band[column].min()) for column in ("n", "n_clusters"))
            n_layers, has_stage = int(mine["n_layers"].max()), bool(band["in_stage"].any())
            lines[name] = measures.Line(draws, low, high, layers, n_layers, has_stage, *counted)
        rows += [dict(zip(by, key, strict=True)) | _judge(claim, lines) for claim in CLAIMS]
    return pd.DataFrame(rows)


def describe_claims(table: pd.DataFrame) -> list[str]:
    """Write one sentence per row of `check_claims`: the verdict, the number, its interval, n."""
    sentences = []
    for row in table.to_dict("records"):
        name = ", ".join(str(row[column]) for column in ("model", "task") if column in row)
        evidence = row["why"]
        if not evidence:
            interval = f"95 % interval {format_number(row['ci_low'], 2)} to {format_number(row['ci_high'], 2)}"
            evidence = f"{row['measured']}: {format_number(row['value'], 2)}, {interval}"
        if row["n"]:
            evidence += f", {row['n']} samples on {row['n_clusters']} images"
        sentences.append(f"{name}: {row['claim']}: {row['verdict']} ({evidence}).")
    return sentences


def _judge(claim: Claim, lines: Mapping[str, measures.Line]) -> dict[str, object]:
    missing = [name for line, name in claim.lines.items() if line not in lines]
    found = [lines[name] for name in claim.lines if name in lines]
    value, low, high = measures.NOTHING
    if missing:
        numbers = ", ".join(dict.fromkeys(WRITTEN_BY[name] for name in missing))
        verdict, why = "not measured", f"run notebook {numbers} for this model"
    else:
        verdict, why = _absent(claim, found)
        if not verdict:
            value, low, high = claim.measure(*found)
            verdict = _verdict(low, high, claim.holds)
    return {
        "claim": claim.text,
        "paper": claim.paper,
        "measured": claim.measured,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": 0 if missing else min(line.n for line in found),
        "n_clusters": 0 if missing else min(line.n_clusters for line in found),
        "verdict": verdict,
        "why": why,
    }


def _absent(claim: Claim, lines: Sequence[measures.Line]) -> tuple[str, str]:
    """Judge a claim about stages of which one isn't there; ("", "") where nothing is wanting."""
    named_lines = zip(claim.lines, lines, strict=True)
    wanting = {name: line for name, line in named_lines if claim.of_stages and not line.has_stage}
    if not wanting:
        return "", ""
    named = " and ".join(wanting)
    if any(line.high.max() < NEGLIGIBLE for line in wanting.values()):
        return "does not hold", f"{named}: no layer with an effect of {NEGLIGIBLE:g} or more"
    return "undecided", f"{named}: no stage that the interval tells from 0"


def _verdict(low: float, high: float, holds: tuple[float, float]) -> str:
    """Judge an interval.

    >>> _verdict(0.1, 3.0, (0.0, inf)), _verdict(-2.0, 0.0, (0.0, inf)), _verdict(-1.0, 1.0, (0.0, inf))
    ('holds', 'does not hold', 'undecided')
    """
    if low > holds[0] and high < holds[1]:
        return "holds"
    return "does not hold" if high <= holds[0] or low >= holds[1] else "undecided"


CLAIMS = (
    Claim(
        text="The picture enters the question in two separate stages",
        paper="§5, Fig. 4",
        lines={"Image -> Question": "image_to_question"},
        measure=measures.two_drops,
        measured=f"fall of the effect between its two peaks (%; separate: above {NEGLIGIBLE:g})",
        holds=(NEGLIGIBLE, inf),
    ),
    Claim(
        text="Image -> Question acts before Question -> Last",
        paper="§5, Figs 3-4",
        lines={"Image -> Question": "image_to_question", "Question -> Last": "flow_to_last"},
        measure=measures.later,
        measured="how much later the center of Question -> Last lies (layers)",
    ),
    Claim(
        text="Question -> Last is strongest in the middle layers",
        paper="§5, Fig. 3",
        lines={"Question -> Last": "flow_to_last"},
        measure=measures.depth,
        measured="depth of its strongest layer (0 first, 1 last; middle: 0.25 to 0.75)",
        holds=(0.25, 0.75),
    ),
    Claim(
        text="The last position draws on the question, not directly on the image",
        paper="§5, Fig. 3",
        lines={"Question -> Last": "flow_to_last", "Image -> Last": "flow_to_last"},
        measure=measures.stronger,
        measured="largest effect of Question -> Last minus that of Image -> Last (percentage points)",
        of_stages=False,
    ),
    Claim(
        text="Last -> Last is negligible",
        paper="§5, Fig. 3",
        lines={"Last -> Last": "flow_to_last"},
        measure=measures.largest,
        measured=f"its largest effect at any layer (%; negligible: below {NEGLIGIBLE:g})",
        holds=(-inf, NEGLIGIBLE),
        of_stages=False,
    ),
    Claim(
        text="Other image patches act first, related ones second",
        paper="§6, Fig. 5",
        lines={
            "Other image patches -> Question": "image_patch_knockout",
            "Related image patches -> Question": "image_patch_knockout",
        },
        measure=measures.later,
        measured="how much later the center of the related patches lies (layers)",
    ),
    Claim(
        text="The answer comes in lower case before it is capitalized",
        paper="§7, Fig. 6",
        lines={"Noncapitalized answer": "logit_lens", "Capitalized answer": "logit_lens"},
        measure=measures.later,
        measured="how much later the center of the capitalized answer lies (layers)",
    ),
    Claim(
        text="MLPs shape the question's meaning more than attention",
        paper="App. D, Figs 12-13",
        lines={"MLP": "module_knockout", "Attention": "module_knockout"},
        measure=measures.on_average,
        measured="words lost without the MLP minus without attention, mean of all layers (percentage points)",
        of_stages=False,
    ),
    Claim(
        text="The second half of the layers can do without the image tokens",
        paper="App. F, Fig. 14",
        lines={REMOVED: "efficiency"},
        measure=measures.in_second_half,
        measured=f"loss of accuracy (percentage points; intact: below {NEGLIGIBLE:g})",
        holds=(-inf, NEGLIGIBLE),
        of_stages=False,
    ),
)
