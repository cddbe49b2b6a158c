"""What a question's positions have come to mean by the last layer, and what changes it (App. D, App. K).

The meaning of a position is read as the ten words that the model would find most probable there. A module is
zeroed, or an edge cut, and the Jaccard similarity says how many of these words are left.

frame = module_knockout(model, samples, window=9)     # attention, MLP zeroed at the question, Figs 12-13
frame = question_semantics(model, samples, window=9)  # Image -> Question cut, Fig. 37
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mmflow_utils.encode import Encoded, encode
from mmflow_utils.flows import (
    EDGE_INTERVENTIONS,
    IMAGE_TO_QUESTION,
    MODULE_INTERVENTIONS,
    Flow,
    Intervention,
    Variant,
    flow_problem,
    variants,
)
from mmflow_utils.models import VLM, text_inputs
from mmflow_utils.reference.engine import intervene
from mmflow_utils.samples import Sample

__all__ = ["SEMANTICS_COLUMNS", "jaccard", "module_knockout", "question_semantics", "top_words"]

SEMANTICS_COLUMNS = (
    "sample_id",
    "image_id",
    "task",
    "knockout",
    "intervention",
    "layer",
    "window",
    "n_layers_blocked",
    "n_positions",
    "top_k",
    "pooled",
    "jaccard",
)
_MODULE_NAMES = {"attention_output": "Attention", "mlp_output": "MLP"}


def module_knockout(
    model: VLM,
    samples: Iterable[Sample],
    modules: Sequence[Intervention] = MODULE_INTERVENTIONS,
    *,
    window: int,
    positions: str = "question",
    **options: Any,
) -> pd.DataFrame:
    """Zero the output of attention, or of the MLP, at the question, and see which words are left (App. D).

    Args:
        model: the model.
        samples: questions that it answers correctly.
        modules: `attention_output`, `mlp_output` or both.
        window: layers zeroed, l … min(l + window, L) - 1; the paper's is 9.
        positions: the position set where modules are zeroed and words are read.
        options: as in `question_semantics`.

    Returns:
        A frame as from `question_semantics`; `knockout` is "Attention" or "MLP".

    Raises:
        ValueError: as `question_semantics`; something that isn't a module.

    Example:
        >>> frame = module_knockout(model, samples, window=9)
        >>> summarise(frame, "jaccard", by=("task", "knockout", "layer"))
    """
    if unknown := [name for name in modules if name not in MODULE_INTERVENTIONS]:
        raise ValueError(f"modules must be among {', '.join(MODULE_INTERVENTIONS)}, got {unknown}.")
    here = Flow(source=positions, target=positions)
    plan = [(_MODULE_NAMES[module], here, module) for module in modules]
    return _measure_each(model, samples, plan, window=window, positions=positions, **options)


def question_semantics(
    model: VLM,
    samples: Iterable[Sample],
    flows: Flow | Sequence[Flow] = IMAGE_TO_QUESTION,
    *,
    window: int,
    positions: str = "question",
    intervention: Intervention = "mask",
    **options: Any,
) -> pd.DataFrame:
    """Cut Image -> Question around each layer, and see which of the question's words are left (App. K).

    Args:
        model: the model.
        samples: questions that it answers correctly.
        flows: what to cut.
        window: width in layers, centred; the paper's is 9.
        positions: the position set where words are read.
        intervention: what is done at the edges.
        options: `top_k`, the words read at a position (10); `pooled`, False to compare (position, word)
            pairs, so that a word counts once for each position, as the paper's 10·|Q| words say, True to
            compare the vocabulary of all positions together; `layers` to visit (every one); `encoder`;
            `progress`.

    Returns:
        One row per sample, knockout and layer, with `SEMANTICS_COLUMNS`; `jaccard` is 1 where the words after
        the last layer are those of the intact model and 0 where none is left. `attrs["skipped"]` lists
        `{sample_id, knockout, reason}`.

    Raises:
        ValueError: a position set that no prompt has; a bad window, layer or `top_k`; what `encode` refuses.
    """
    if intervention not in EDGE_INTERVENTIONS:
        raise ValueError(
            f"intervention must be one of {', '.join(EDGE_INTERVENTIONS)}, got {intervention!r}."
        )
    flows = (flows,) if isinstance(flows, Flow) else flows
    plan = [(str(flow), flow, intervention) for flow in flows]
    return _measure_each(model, samples, plan, window=window, positions=positions, **options)


def jaccard(
    original: Int[Tensor, "n_positions k"], intervened: Int[Tensor, "n_positions k"], *, pooled: bool = False
) -> float:
    """Share of words in common, of all words that either has (App. D).

    Args:
        original, intervened: token ids of the words at each position.
        pooled: compare sets of words, not of (position, word) pairs.

    >>> here, there = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[3, 2], [1, 5]])
    >>> round(jaccard(here, there), 3), jaccard(here, there, pooled=True)
    (0.143, 0.6)
    """
    a, b = (
        {(0 if pooled else position, word) for position, row in enumerate(words.tolist()) for word in row}
        for words in (original, intervened)
    )
    return len(a & b) / len(a | b)


@torch.inference_mode()
def top_words(
    model: VLM,
    encoded: Encoded,
    variants: Sequence[Variant],
    *,
    positions: Sequence[int],
    top_k: int = 10,
) -> tuple[Int[Tensor, "n_positions k"], Int[Tensor, "n_variants n_positions k"]]:
    """Give the most probable words at some positions after the last layer, clean and under every variant.

    One full forward pass for each variant, with the interventions of `run_reference`. Only the words are
    kept: the logits of a whole question would fill the memory.

    Raises:
        ValueError: no position; a `top_k` below 1 or above the vocabulary.
    """
    n_words = model.unembed.weight.shape[0]
    if not positions or not 1 <= top_k <= n_words:
        raise ValueError(
            f"Expected positions to read and a top_k of 1 to {n_words} words, got {len(positions)} positions "
            f"and a top_k of {top_k}."
        )

    def words(hidden: Tensor) -> Tensor:
        return model.unembed(hidden[0, list(positions)]).topk(top_k).indices.cpu()

    kwargs, hidden = text_inputs(model, encoded.inputs)
    changed = []
    for variant in variants:
        with intervene(model, variant, encoded.spans.n_tokens):
            changed.append(words(model.text(**kwargs).last_hidden_state))
    base = words(hidden)
    return base, torch.stack(changed) if changed else base.new_empty(0, *base.shape)


def _measure_each(
    model: VLM,
    samples: Iterable[Sample],
    plan: Sequence[tuple[str, Flow, Intervention]],
    *,
    window: int,
    positions: str,
    top_k: int = 10,
    pooled: bool = False,
    layers: Sequence[int] | None = None,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    progress: bool = True,
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for sample in tqdm(list(samples), desc="Semantics", unit="question", disable=not progress):
        encoded = encoder(model, sample)
        planned = [
            (label, variant)
            for label, flow, intervention in _possible(encoded, plan, positions, skipped)
            for variant in variants(
                encoded.spans,
                [flow],
                window=window,
                n_layers=model.n_layers,
                layers=layers,
                intervention=intervention,
            )
        ]
        if not planned:
            continue
        read = encoded.spans[positions]
        base, changed = top_words(model, encoded, [v for _, v in planned], positions=read, top_k=top_k)
        shared = {"sample_id": sample.sample_id, "image_id": sample.image_id, "task": sample.task}
        shared |= {"window": window, "n_positions": len(read), "top_k": top_k, "pooled": pooled}
        rows += [
            shared
            | {
                "knockout": label,
                "intervention": variant.intervention,
                "layer": variant.layer,
                "n_layers_blocked": variant.n_layers_blocked,
                "jaccard": jaccard(base, words, pooled=pooled),
            }
            for (label, variant), words in zip(planned, changed, strict=True)
        ]
    frame = pd.DataFrame(rows, columns=list(SEMANTICS_COLUMNS))
    frame.attrs["skipped"] = skipped
    return frame


def _possible(
    encoded: Encoded,
    plan: Sequence[tuple[str, Flow, Intervention]],
    positions: str,
    skipped: list[dict[str, str]],
) -> list[tuple[str, Flow, Intervention]]:
    """Keep what this prompt has; note the rest with its reason. A name that no prompt knows is an error."""
    spans, found = encoded.spans, []
    for label, flow, intervention in plan:
        for name in (flow.source, flow.target, positions):
            if name not in spans and name not in spans.missing:
                raise ValueError(f"{label}: {spans.why_missing(name)}.")
        problem = flow_problem(spans, flow, intervention=intervention)
        if problem is None and positions not in spans:
            problem = spans.why_missing(positions)
        if problem:
            skipped.append({"sample_id": encoded.sample.sample_id, "knockout": label, "reason": problem})
        else:
            found.append((label, flow, intervention))
    return found
