"""What a question's positions have come to mean by the last layer, and what changes it (App. D, App. K).

The meaning of a position is read as the ten words that the model would find most probable there. A module is
zeroed, or an edge cut, and the Jaccard similarity says how many of these words are left.

module_knockout(model, samples, window=9).frame     # attention, MLP zeroed at the question, Figs 12-13
question_semantics(model, samples, window=9).frame  # Image -> Question cut, Fig. 37
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.loop import Engine, Loop, Wanted
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import (
    EDGE_INTERVENTIONS,
    IMAGE_TO_QUESTION,
    MODULE_INTERVENTIONS,
    Flow,
    Intervention,
    Variant,
)
from mmflow_utils.results.record import Result

__all__ = ["SEMANTICS_COLUMNS", "jaccard", "module_knockout", "question_semantics", "top_words"]

SEMANTICS_COLUMNS = (
    "sample_id", "image_id", "task", "knockout", "intervention", "layer", "window", "n_layers_blocked",
    "n_positions", "top_k", "pooled", "jaccard",
)  # fmt: skip
_NAMES = dict(zip(MODULE_INTERVENTIONS, ("Attention", "MLP"), strict=True))


def module_knockout(
    model: VLM,
    samples: Iterable[Sample],
    modules: Iterable[Intervention] = MODULE_INTERVENTIONS,
    *,
    window: int,
    positions: str = "question",
    **options: Any,
) -> Result:
    """Zero the output of attention, or of the MLP, at the question, and see which words are left (App. D).

    Args:
        model, samples: as for `knockout_sweep`.
        modules: `attention_output`, `mlp_output` or both.
        window: layers zeroed, l … min(l + window, L) - 1; the paper's is 9.
        positions: the position set where modules are zeroed and words are read.
        options: as in `question_semantics`.

    Returns:
        As `question_semantics`; `knockout` is "Attention" or "MLP".

    Raises:
        ValueError: as `question_semantics`; something that isn't a module.

    Example:
        >>> frame = module_knockout(model, samples[:1], window=3).frame
        >>> frame.groupby("knockout").jaccard.min().round(2).to_dict()
        {'Attention': 0.14, 'MLP': 0.06}
    """
    modules = tuple(modules)
    if unknown := [name for name in modules if name not in MODULE_INTERVENTIONS]:
        raise ValueError(f"modules must be among {', '.join(MODULE_INTERVENTIONS)}, got {unknown}.")
    here = Flow(source=positions, target=positions)
    wanted = [(_NAMES[module], here, module) for module in modules]
    return _measure_words(model, samples, wanted, window=window, positions=positions, **options)


def question_semantics(
    model: VLM,
    samples: Iterable[Sample],
    flows: Flow | Sequence[Flow] = IMAGE_TO_QUESTION,
    *,
    window: int,
    positions: str = "question",
    intervention: Intervention = "mask",
    **options: Any,
) -> Result:
    """Cut Image -> Question around each layer, and see which of the question's words are left (App. K).

    Args:
        model, samples, flows: as for `knockout_sweep`.
        window: width in layers, centered; the paper's is 9.
        positions: the position set where words are read.
        intervention: what is done at the edges.
        options: `top_k`, the words read at a position (10); `pooled`, False to compare (position, word)
            pairs, so that a word counts once for each position, as the paper's 10·|Q| words say, True to
            compare the vocabulary of all positions together; `layers`, `method`, `n_check` (1), `encoder` and
            `progress` as for `knockout_sweep`.

    Returns:
        A frame of one row per sample, knockout and layer, with `SEMANTICS_COLUMNS`; `jaccard` is 1 where the
        words after the last layer are those of the intact model and 0 where none is left. `skipped` lists
        `{sample_id, knockout, reason}`; `max_check_diff` is the largest difference in `jaccard` to the reference,
        None if none was computed.

    Raises:
        ValueError: a position set that no prompt has; a bad window, layer or `top_k`; what `encode` refuses.
    """
    if intervention not in EDGE_INTERVENTIONS:
        raise ValueError(f"intervention must be one of {', '.join(EDGE_INTERVENTIONS)}, got {intervention!r}.")
    flows = (flows,) if isinstance(flows, Flow) else flows
    wanted = [(str(flow), flow, intervention) for flow in flows]
    return _measure_words(model, samples, wanted, window=window, positions=positions, **options)


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


def top_words(
    model: VLM,
    encoded: Encoded,
    variants: Sequence[Variant],
    *,
    positions: Sequence[int],
    top_k: int = 10,
    run: Engine = run_sweep,
) -> tuple[Int[Tensor, "n_positions k"], Int[Tensor, "n_variants n_positions k"]]:
    """Give the most probable words at some positions after the last layer, clean and under every variant.

    Only the words are kept: the logits of a whole question would fill the memory. `run` is the engine.

    Raises:
        ValueError: no position; a `top_k` below 1 or above the vocabulary.
    """
    n_words = model.unembed.weight.shape[0]
    if not positions or not 1 <= top_k <= n_words:
        raise ValueError(
            f"Expected positions to read and a top_k of 1 to {n_words} words, got {len(positions)} positions "
            f"and a top_k of {top_k}."
        )
    found = run(model, encoded, variants, read=positions, keep=lambda logits: logits.topk(top_k).indices)
    return found.base, found.variants


def _measure_words(
    model: VLM,
    samples: Iterable[Sample],
    wanted: Sequence[Wanted],
    *,
    window: int,
    positions: str,
    top_k: int = 10,
    pooled: bool = False,
    layers: Sequence[int] | None = None,
    method: str = "sweep",
    n_check: int = 1,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    progress: bool = True,
) -> Result:
    loop = Loop(model, encoder, method, n_check)
    # Rounding may swap words that are about equally probable at the end of the list.
    tolerance = 0.05 if model.dtype.itemsize >= 4 else 0.3

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        planned = loop.plan(encoded, wanted, window=window, layers=layers, needs=[positions], kind="knockout")
        if not planned:
            return []
        read, edits = encoded.positions[positions], [variant for _, variant in planned]

        def compute(run: Engine, some: Sequence[Variant]) -> Tensor:
            base, changed = top_words(model, encoded, some, positions=read, top_k=top_k, run=run)
            return torch.tensor([jaccard(base, words, pooled=pooled) for words in changed], dtype=torch.float64)

        similar = loop.run(encoded, edits, compute, Tensor.__getitem__, tolerance=tolerance, unit="Jaccard similarity")
        return [
            {
                "knockout": label,
                "intervention": variant.intervention,
                "layer": variant.layer,
                "window": window,
                "n_layers_blocked": variant.n_layers_blocked,
                "n_positions": len(read),
                "top_k": top_k,
                "pooled": pooled,
                "jaccard": value,
            }
            for (label, variant), value in zip(planned, similar.tolist(), strict=True)
        ]

    return loop.over(samples, measure, SEMANTICS_COLUMNS, name="Semantics", progress=progress)
