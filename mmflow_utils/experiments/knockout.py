"""Attention knockout over samples, flows and layers: the measurement of the paper's figures (§3.2, §4-6).

result = knockout_sweep(model, samples, FLOW_TO_LAST, window=9)
result.frame, result.skipped
knockout_sweep(model, samples, IMAGE_ROUTES, window="all").frame    # which way does the answer need at all?
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.closeness import probabilities, rounding
from mmflow_utils.engine.reference import Run
from mmflow_utils.experiments.loop import Loop
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import Flow, Intervention, Variant, whole_depth
from mmflow_utils.results.record import Result

__all__ = ["COLUMNS", "answer_rows", "knockout_sweep", "run_edits", "stays_first"]

ANSWER_COLUMNS = (
    "token", "p_base", "p_knockout", "rel_change_pct", "logprob_change", "logit_diff_base", "logit_diff_change",
)  # fmt: skip
COLUMNS = (
    "sample_id", "image_id", "task", "flow", "source", "target", "layer", "window", "n_layers_blocked", *ANSWER_COLUMNS,
)  # fmt: skip
WHOLE_DEPTH_COLUMNS = (*COLUMNS, "correct_pct")
SOME_ROWS = 64  # of logits, written in float64 at a time: all heads' of a large model would take gigabytes


def knockout_sweep(
    model: VLM,
    samples: Iterable[Sample],
    flows: Flow | Sequence[Flow],
    *,
    window: int | Literal["all"],
    intervention: Intervention = "mask",
    method: str = "sweep",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    n_check: int = 2,
    tolerance: float | None = None,
    progress: bool = True,
) -> Result:
    """Block each flow around each layer in each sample, and measure what becomes of the answer (§3.2).

    The answer is the token that the intact model finds most probable at `last`. Only samples that the
    model answers correctly belong here (§4): choose them first.

    Args:
        model: the model.
        samples: questions.
        flows: what to block.
        window: width in layers; the paper's is 9. `all` blocks each flow in every layer at once, in one row.
        intervention: what is done at a flow's edges, or to the modules at its target (App. D).
        method: `sweep` packs all variants into one clean pass; `reference` runs the model in full for each row.
        layers: the layers to visit, every one by default; of no use with `all`.
        heads: the query heads to block in each layer, all by default; `head_sweep` takes each alone.
        encoder: makes the prompt and its positions; replace it for other positions or a longer prompt
            (App. C, App. E).
        n_check: how many samples the sweep is held against the reference on, in some variants of each.
        tolerance: largest difference in probability that this check allows; by default 1e-4 in float32, and
            what rounding makes likely in half precision.
        progress: show a bar.

    Returns:
        A frame of one row per sample, flow and layer, with `COLUMNS`: probabilities `p_base` and `p_knockout` of
        that token, `rel_change_pct` = 100 (p_knockout - p_base) / p_base, `logprob_change` (nats), and the logit
        difference of the true and false option's first tokens, clean and its change, NaN without options. Where
        all layers are blocked at once, also `correct_pct`: 100 if that token is still the most probable, else 0.
        `skipped` lists `{sample_id, flow, reason}` where a flow isn't in a prompt; `max_check_diff` is the
        check's largest difference in probability, None if none was made.

    Raises:
        ValueError: a position set that no prompt has; the check failed; anything that `encode` refuses.

    Example:
        >>> frame = knockout_sweep(model, samples, mm.FLOW_TO_LAST, window=3).frame
        >>> frame.groupby("flow").rel_change_pct.min().round().to_dict()
        {'Image -> Last': -80.0, 'Last -> Last': -0.0, 'Question -> Last': -100.0}
    """
    flows = (flows,) if isinstance(flows, Flow) else tuple(flows)
    wanted = [(str(flow), flow, intervention) for flow in flows]
    loop = Loop(model, encoder, method, n_check)
    whole = window == "all"
    width = model.n_layers if whole else window
    where = whole_depth(model.n_layers) if whole else {"window": window, "layers": layers}

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        planned = [variant for _, variant in loop.plan(encoded, wanted, heads=heads, **where)]
        if not planned:
            return []
        run = run_edits(loop, encoded, planned, tolerance)
        return [row | {"window": width} for row in answer_rows(model, encoded.sample, planned, run)]

    columns = WHOLE_DEPTH_COLUMNS if whole else COLUMNS
    return loop.over(samples, measure, columns, name="Knockout", progress=progress)


def stays_first(model: VLM, base: Float[Tensor, " vocab"], variants: Float[Tensor, "rows vocab"]) -> list[bool]:
    """Return for each row of logits whether the token that `base` puts first is ahead there.

    By more than rounding, or half of its lead in `base` where that is less: what changes nothing keeps the answer.
    """
    token, own = base.argmax(), probabilities(base[None])
    lead = (own[0, token] - own.index_fill(1, token[None], 0).amax()).item()
    changed = probabilities(variants)
    others = changed.index_fill(1, token[None], 0)
    return (changed[:, token] - others.amax(1) > min(rounding(model.dtype), lead / 2)).tolist()


def run_edits(loop: Loop, encoded: Encoded, planned: Sequence[Variant], tolerance: float | None = None) -> Run:
    """Run variants of a prompt, checked by the probability of every word."""
    return loop.run(
        encoded,
        planned,
        lambda engine, some: engine(loop.model, encoded, some),
        lambda run, some: probabilities(torch.cat([run.base[None], run.variants[some]])),
        tolerance=rounding(loop.model.dtype) if tolerance is None else tolerance,
    )


def answer_rows(model: VLM, sample: Sample, planned: Sequence[Variant], run: Run) -> list[dict[str, Any]]:
    """Turn logits into rows: one per variant."""
    token = int(run.base.argmax())
    base, blocks = run.base.double().log_softmax(-1), run.variants.split(SOME_ROWS)
    changed = torch.cat([rows.double().log_softmax(-1)[:, token].clone() for rows in blocks])  # a view keeps its block
    logprob_change, p_changed = (changed - base[token]).tolist(), changed.exp().tolist()
    text = model.tokenizer.decode([token])
    diff_base, diff_change = _logit_differences(model, sample, run, text)
    p_base, stays = base[token].exp().item(), [s for rows in blocks for s in stays_first(model, run.base, rows)]
    rows = []
    for n, variant in enumerate(planned):
        assert variant.flow is not None  # `variants` labels each
        rows.append(
            {
                "flow": str(variant.flow),
                "source": variant.flow.source,
                "target": variant.flow.target,
                "layer": variant.layer,
                "n_layers_blocked": variant.n_layers_blocked,
                "token": text,
                "p_base": p_base,
                "p_knockout": p_changed[n],
                "rel_change_pct": 100 * (p_changed[n] - p_base) / p_base,
                "logprob_change": logprob_change[n],
                "logit_diff_base": diff_base,
                "logit_diff_change": diff_change[n],
                "correct_pct": 100.0 * stays[n],
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
