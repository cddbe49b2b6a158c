"""What is enough: all edges from picture and question are cut, except some flows in some layers.

stages = {"both stages": [(Flow(source="image", target="question"), range(8, 12)), (FLOW_TO_LAST[0], range(14, 20))]}
frame = keep_flows(model, samples, stages).frame
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.closeness import probabilities
from mmflow_utils.engine.reference import intervene, run_reference
from mmflow_utils.experiments.knockout import stays_first
from mmflow_utils.experiments.loop import Loop
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import NO_PICTURE, NO_QUESTION, Flow, Variant, flow_problem
from mmflow_utils.prompts.positions import PositionSets
from mmflow_utils.results.record import Result

__all__ = ["all_but", "keep_flows"]

Kept = Sequence[tuple[Flow, range]]  # flows, each with the layers in which it stays
COLUMNS = ("sample_id", "image_id", "task", "kept", "token", "p_base", "p_kept", "correct_pct")


def keep_flows(
    model: VLM,
    samples: Iterable[Sample],
    kept: Mapping[str, Kept],
    *,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    progress: bool = True,
) -> Result:
    """Cut all edges from picture and question to what comes after them, except some, and see what is still answered.

    The complement of a knockout: for what is still answered, the kept flows suffice. Each choice is a forward pass.

    Args:
        model, samples, encoder, progress: As for `knockout_sweep`.
        kept: By the name of a choice, the flows that stay, each with its layers; none cuts all.

    Returns:
        A frame of one row per sample and choice, with `COLUMNS`: probabilities `p_base` and `p_kept` of the token that
        the intact model finds most probable, and `correct_pct`, 100 if it still is, else 0. `skipped` lists
        `{sample_id, choice, reason}` where a prompt lacks a flow that is to be kept.

    Example:
        >>> keep_flows(model, samples, {"nothing": []}, progress=False).frame.kept.tolist()
        ['nothing', 'nothing', 'nothing', 'nothing']
    """
    loop = Loop(model, encoder)

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        base, rows = run_reference(model, encoded, []).base, []
        token = int(base.argmax())
        for name, flows in kept.items():
            if problem := next(filter(None, (flow_problem(encoded.positions, flow) for flow, _ in flows)), None):
                loop.skip(encoded, problem, choice=name)
                continue
            with ExitStack() as stack:
                for cut in all_but(encoded.positions, flows, n_layers=model.n_layers):
                    stack.enter_context(intervene(model, cut, encoded.positions.n_tokens))
                left = run_reference(model, encoded, []).base
            p_base, p_kept = probabilities(torch.stack([base, left]))[:, token].tolist()
            found = {"kept": name, "token": model.tokenizer.decode([token]), "p_base": p_base, "p_kept": p_kept}
            rows.append(found | {"correct_pct": 100.0 * stays_first(model, base, left[None])[0]})
        return rows

    return loop.over(samples, measure, COLUMNS, name="Sufficiency", progress=progress)


def all_but(positions: PositionSets, kept: Kept, *, n_layers: int) -> list[Variant]:
    """Return the cuts that leave, of all edges from picture and question to what comes after them, the kept ones."""
    cuts = []
    for layer in range(n_layers):
        stay = [flow for flow, layers in kept if layer in layers]
        for whole in (*NO_PICTURE, *NO_QUESTION):
            targets: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for target in positions.get(whole.target):
                open_ = {s for flow in stay if target in positions[flow.target] for s in positions[flow.source]}
                targets[tuple(s for s in positions.get(whole.source) if s not in open_)].append(target)
            layers = range(layer, layer + 1)
            cuts += [Variant(layers=layers, target=tuple(t), source=s) for s, t in targets.items() if s]
    return cuts
