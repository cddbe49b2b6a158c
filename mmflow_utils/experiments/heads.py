"""Which heads carry a flow: each cut alone, exactly; several cut together; and a screen where that costs too much.

table = head_sweep(model, samples, FLOW_TO_LAST).frame                       # every head of every layer
sets = head_sets(table, sizes=(1, 2, 4, 8))                                  # the strongest, random ones, the weakest
curve = head_sweep(model, others, FLOW_TO_LAST, sets=sets).frame
screen = head_screen(model, samples, IMAGE_TO_QUESTION).frame                # a backward pass a sample and flow
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.attribution import attribute_heads
from mmflow_utils.experiments.knockout import ANSWER_COLUMNS, answer_rows, run_edits
from mmflow_utils.experiments.loop import Loop, Wanted
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import Flow, Intervention
from mmflow_utils.results.record import Result

__all__ = ["head_screen", "head_sets", "head_sweep"]

_LABELS = ("sample_id", "image_id", "task", "flow")
TIE = 5e-3  # nats: costs that differ by less are alike
ONE_LAYER: Any = {"window": 1, "layers": [0]}


def head_sweep(
    model: VLM,
    samples: Iterable[Sample],
    flows: Flow | Sequence[Flow],
    *,
    sets: Sequence[Mapping[str, Any]] = (),
    intervention: Intervention = "mask",
    method: str = "sweep",
    n_check: int = 2,
    progress: bool = True,
) -> Result:
    """Cut each flow in one head of one layer at a time, or in sets of heads, and measure what becomes of the answer.

    For a flow to the last position all heads of all layers together cost about one clean pass more, as one row of each
    is computed anew; for a flow to the question they cost many, so `head_screen` tells which are worth it.

    Args:
        model, samples, flows, intervention, method, n_check, progress: As for `knockout_sweep`.
        sets: Heads to cut together, as from `head_sets`: labels and `heads`, pairs of layer and head. By default every
            head alone.

    Returns:
        A frame of one row per sample, flow and set, with its labels (by default `layer` and `head`) and the numbers of
        `knockout_sweep`, `correct_pct` included; `skipped` and `max_check_diff` as there.
    """
    every = product(range(model.n_layers), range(model.n_heads))
    sets = sets or [{"layer": layer, "head": head, "heads": [(layer, head)]} for layer, head in every]
    labels = [{name: value for name, value in one.items() if name != "heads"} for one in sets]
    heads = [tuple(sorted((layer, head) for layer, head in one["heads"])) for one in sets]
    if () in heads:
        raise ValueError(f"Expected each of `sets` to hold a head or more, got none in {labels[heads.index(())]}.")
    flows = [flows] if isinstance(flows, Flow) else flows
    wanted, loop = [(str(flow), flow, intervention) for flow in flows], Loop(model, method=method, n_check=n_check)

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        cuts = [cut for _, cut in loop.plan(encoded, wanted, **ONE_LAYER)]
        planned = [replace(cut, layers=range(h[0][0], h[-1][0] + 1), heads=h) for cut in cuts for h in heads]
        if not planned:
            return []
        run = run_edits(loop, encoded, planned)
        rows = answer_rows(model, encoded.sample, planned, run)
        return [row | label for row, label in zip(rows, labels * len(cuts), strict=True)]

    columns = (*_LABELS, *labels[0], *ANSWER_COLUMNS, "correct_pct")
    return loop.over(samples, measure, columns, name="Heads", progress=progress)


def head_screen(
    model: VLM, samples: Iterable[Sample], flows: Flow | Sequence[Flow], *, progress: bool = True
) -> Result:
    """Estimate every head's `logprob_change` (nats) in `head_sweep`'s frame to first order, by `attribute_heads`."""
    wanted: list[Wanted] = [(str(flow), flow, "mask") for flow in ([flows] if isinstance(flows, Flow) else flows)]
    loop = Loop(model)

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for label, cut in loop.plan(encoded, wanted, **ONE_LAYER):
            found = attribute_heads(model, encoded, source=cut.source, target=cut.target).double().numpy()
            rows += [
                {"flow": label, "layer": layer, "head": head, "logprob_change": change}
                for (layer, head), change in np.ndenumerate(found)
            ]
        return rows

    columns = (*_LABELS, "layer", "head", "logprob_change")
    return loop.over(samples, measure, columns, name="Screen", progress=progress)


def head_sets(table: pd.DataFrame, sizes: Sequence[int], *, n_random: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Choose heads to be cut together by their mean `logprob_change` in a table of one flow.

    Choose on some samples and cut in others: the strongest of many noisy numbers look stronger than they are.

    Returns:
        Labels (`choice`, `n_heads`, `draw`) and `heads`: the `strongest` cost most, the `weakest` change least; of the
        `random` ones there are `n_random` draws.
    """
    mean, rng = table.groupby(["layer", "head"])["logprob_change"].mean(), np.random.default_rng(seed)
    if not all(1 <= n <= len(mean) for n in sizes):
        raise ValueError(f"Expected sizes of 1 to {len(mean)} heads, as the table has, got {list(sizes)}.")
    steps = (mean / TIE).round()  # heads that cost alike come layer by layer, whatever rounding says
    ranked = {"strongest": steps, "weakest": steps.abs()}
    orders = [(choice, 0, costs.sort_values(kind="stable").index) for choice, costs in ranked.items()]
    orders += [("random", draw, mean.index[rng.permutation(len(mean))]) for draw in range(n_random)]
    heads = [(choice, draw, [[*map(int, pair)] for pair in order]) for choice, draw, order in orders]
    return [
        {"choice": choice, "draw": draw, "n_heads": n, "heads": order[:n]}
        for choice, draw, order in heads
        for n in sizes
    ]
