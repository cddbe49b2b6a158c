"""Attention knockout over samples, flows and layers: the measurement of the paper's figures (§3.2, §4-6).

frame = knockout_sweep(model, samples, FLOW_TO_LAST, window=9)
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.checks import rounding
from mmflow_utils.engine.reference import Run, run_reference
from mmflow_utils.engine.sweep import engine
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import (
    MODULE_INTERVENTIONS,
    Flow,
    Intervention,
    Variant,
    flow_problem,
    variants,
)

__all__ = ["COLUMNS", "knockout_sweep"]

COLUMNS = (
    "sample_id",
    "image_id",
    "task",
    "flow",
    "source",
    "target",
    "layer",
    "window",
    "n_layers_blocked",
    "token",
    "p_base",
    "p_knockout",
    "rel_change_pct",
    "logprob_change",
    "logit_diff_base",
    "logit_diff_change",
)


def knockout_sweep(
    model: VLM,
    samples: Iterable[Sample],
    flows: Flow | Sequence[Flow],
    *,
    window: int,
    intervention: Intervention = "mask",
    method: str = "sweep",
    layers: Sequence[int] | None = None,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    n_check: int = 2,
    tolerance: float | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Block each flow around each layer in each sample, and measure what becomes of the answer (§3.2).

    The answer is the token that the intact model finds most probable at `last`. Only samples that the
    model answers correctly belong here (§4): choose them first.

    Args:
        model: the model.
        samples: questions.
        flows: what to block.
        window: width in layers; the paper's is 9.
        intervention: what is done at a flow's edges, or to the modules at its target (App. D).
        method: `sweep` rides on one clean pass; `reference` runs the model in full for each row.
        layers: the layers to visit, every one by default.
        encoder: makes the prompt and its positions; replace it for other positions or a longer prompt
            (App. C, App. E).
        n_check: how many samples the sweep is held against the reference on.
        tolerance: largest difference in probability that this check allows; by default 1e-4 in float32, and
            what rounding makes likely in half precision.
        progress: show a bar.

    Returns:
        One row per sample, flow and layer, with `COLUMNS`: probabilities `p_base` and `p_knockout` of that
        token, `rel_change_pct` = 100 (p_knockout - p_base) / p_base, `logprob_change` (nats), and the logit
        difference of the true and false option's first tokens, clean and its change, NaN without options.
        `attrs["skipped"]` lists `{sample_id, flow, reason}` where a flow isn't in a prompt;
        `attrs["max_check_diff"]` is the check's largest difference, None if none was made.

    Raises:
        ValueError: a position set that no prompt has; the check failed; anything that `encode` refuses.

    Example:
        >>> frame = knockout_sweep(model, samples, FLOW_TO_LAST, window=9)
        >>> frame.groupby(["flow", "layer"]).rel_change_pct.mean()
    """
    flows = (flows,) if isinstance(flows, Flow) else tuple(flows)
    run_variants = engine(method)
    tolerance = rounding(model.dtype) if tolerance is None else tolerance
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    differences: list[float] = []
    for sample in tqdm(list(samples), desc="Knockout", unit="question", disable=not progress):
        encoded = encoder(model, sample)
        found = _blockable(encoded, flows, intervention, skipped)
        if not found:
            continue
        planned = variants(
            encoded.positions,
            found,
            window=window,
            n_layers=model.n_layers,
            layers=layers,
            intervention=intervention,
        )
        run = run_variants(model, encoded, planned)
        if method == "sweep" and len(differences) < n_check:
            differences.append(_check(model, encoded, planned, run, tolerance))
        rows += _measure(model, sample, planned, run, window)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.attrs |= {"skipped": skipped, "max_check_diff": max(differences, default=None)}
    return frame


def _blockable(
    encoded: Encoded, flows: Iterable[Flow], intervention: Intervention, skipped: list[dict[str, str]]
) -> list[Flow]:
    """Keep the flows that this prompt has; note the others with their reason."""
    spans, found = encoded.positions, []
    for flow in flows:
        names = (flow.target,) if intervention in MODULE_INTERVENTIONS else (flow.source, flow.target)
        for name in names:
            if name not in spans and name not in spans.missing:
                raise ValueError(f"{flow}: {spans.why_missing(name)}.")
        if reason := flow_problem(spans, flow, intervention=intervention):
            skipped.append({"sample_id": encoded.sample.sample_id, "flow": str(flow), "reason": reason})
        else:
            found.append(flow)
    return found


def _check(model: VLM, encoded: Encoded, planned: Sequence[Variant], run: Run, tolerance: float) -> float:
    """Run a sample the plain way too, and give the largest difference in any probability."""
    plain = run_reference(model, encoded, planned)
    ours = torch.cat([run.base[None], run.variants]).double().softmax(-1)
    theirs = torch.cat([plain.base[None], plain.variants]).double().softmax(-1)
    worst = (ours - theirs).abs().max().item()
    if not worst <= tolerance:
        raise ValueError(
            f"The sweep and the plain forward passes differ by {worst:.1e} in probability on sample "
            f"{encoded.sample.sample_id}, more than the tolerance of {tolerance:.1e}: set method='reference' "
            "for this model."
        )
    return worst


def _measure(model: VLM, sample: Sample, planned: Sequence[Variant], run: Run, window: int) -> list[dict[str, Any]]:
    """Turn logits into rows: one per variant."""
    token = int(run.base.argmax())
    base, changed = run.base.double().log_softmax(-1), run.variants.double().log_softmax(-1)
    logprob_change = (changed[:, token] - base[token]).tolist()
    text = model.tokenizer.decode([token])
    diff_base, diff_change = _logit_differences(model, sample, run, text)
    p_base = base[token].exp().item()
    shared = {"sample_id": sample.sample_id, "image_id": sample.image_id, "task": sample.task}
    rows = []
    for n, variant in enumerate(planned):
        p_knockout = changed[n, token].exp().item()
        rows.append(
            shared
            | {
                "flow": str(variant.flow),
                "source": variant.flow.source,
                "target": variant.flow.target,
                "layer": variant.layer,
                "window": window,
                "n_layers_blocked": variant.n_layers_blocked,
                "token": text,
                "p_base": p_base,
                "p_knockout": p_knockout,
                "rel_change_pct": 100 * (p_knockout - p_base) / p_base,
                "logprob_change": logprob_change[n],
                "logit_diff_base": diff_base,
                "logit_diff_change": diff_change[n],
            }
        )
    return rows


def _logit_differences(model: VLM, sample: Sample, run: Run, text: str) -> tuple[float, list[float]]:
    """Give logit(true option) - logit(false option), clean, and its change in each variant.

    First tokens count, in the letter case of the model's own answer; NaN without options, or where both
    begin with the same token and the difference says nothing.
    """
    nothing = float("nan"), [float("nan")] * len(run.variants)
    if not sample.option_true or not sample.option_false:
        return nothing
    spell = str.capitalize if text.strip()[:1].isupper() else str.lower
    true, false = (model.first_token_id(spell(word)) for word in (sample.option_true, sample.option_false))
    if true == false:
        return nothing
    base = (run.base[true] - run.base[false]).item()
    return base, (run.variants[:, true] - run.variants[:, false] - base).tolist()
