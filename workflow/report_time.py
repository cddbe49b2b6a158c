"""How long a model's whole report computes: what its notebooks cut in each sample, in clean forward passes.

A table says what each notebook cuts; the engine's own plan counts the rows, so that no flow has a price of its own.
What isn't in the table is counted as the six flows of Figs 3 to 5, once for each sample.
"""

from collections.abc import Iterable, Sequence
from statistics import mean

from benchmarks.speed import SIX_FLOWS
from mmflow_utils.engine.plan import count_rows
from mmflow_utils.params import Params
from mmflow_utils.prompts.flows import (
    CAPTIONS_TO_LAST,
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_ROUTES,
    IMAGE_TO_PARTS,
    IMAGE_TO_QUESTION,
    OTHER_PATCHES_TO_PARTS,
    PARTS_TO_LAST,
    PARTS_TO_PARTS,
    QUESTION_ROUTES,
    RELATED_PATCHES_TO_PARTS,
    TEMPLATE_TO_LAST,
    Flow,
    flow_problem,
    variants,
    whole_depth,
    window_sizes,
)
from mmflow_utils.prompts.positions import PositionSets
from workflow.graph import given_by_batch, in_parts, notebooks_of, own_parameter, read_params

__all__ = ["passes_of_report", "passes_of_sample", "questions_of_report"]

ALL_LAYERS = -1
PARTS = (*PARTS_TO_LAST, *PARTS_TO_PARTS, *IMAGE_TO_PARTS, *OTHER_PATCHES_TO_PARTS, *RELATED_PATCHES_TO_PARTS)
NOTHING: tuple[Flow, ...] = ()
# Share of the samples, what is cut in each, and how: the model's window (None), another, or all layers at once.
Cut = tuple[float, Sequence[Flow], int | None]
CUTS: dict[str, list[Cut]] = {  # where a notebook's own parameters say nothing of it
    "01": [],  # asks questions
    "02": [(1, (*FLOW_TO_LAST, *TEMPLATE_TO_LAST), None), (1, (*IMAGE_ROUTES, *QUESTION_ROUTES), ALL_LAYERS)],
    "03": [(1, IMAGE_TO_QUESTION, None)],
    "05": [(2, NOTHING, None)],
    "06": [(1, (*IMAGE_TO_QUESTION * 3,), None)],  # two modules and an edge, read at every position of the question
    "16": [],  # a few samples
    "17": [],  # a few pairs
}
ASKED_FOR_ONE = 4 / 3  # questions for a sample: assumed, three of four answers are right
WAYS_TO_PRUNE = 17  # of answering each of 07's questions, at most
ASKED_BESIDE = 15 * 50 + 200  # by 01 in its groups, and by 12


def passes_of_sample(positions: PositionSets, cuts: Iterable[Cut], *, window: int, n_layers: int) -> float:
    """Count what all cuts of a sample cost, in clean passes: their rows, and one clean pass for each measurement."""
    passes = 0.0
    for share, flows, width in cuts:
        possible = [flow for flow in flows if flow_problem(positions, flow) is None]
        how = whole_depth(n_layers) if width == ALL_LAYERS else {"window": width or window}
        planned = variants(positions, possible, n_layers=n_layers, **how) if possible else []
        rows = count_rows(planned, n_tokens=positions.n_tokens, n_layers=n_layers)
        passes += share * (1 + rows["computed"] / rows["clean"])
    return passes


def passes_of_report(params: Params, prompts: Sequence[PositionSets], n_layers: int) -> tuple[float, int]:
    """Return the clean passes that a model's batch of notebooks computes, and how many notebooks measure in parts.

    Args:
        params: The model's.
        prompts: Positions of some of its prompts, of which the mean counts.
        n_layers: The depth of its decoder.
    """
    six: list[Cut] = [(1, SIX_FLOWS, None)]
    known, how = CUTS | _by_own_parameters(params, n_layers), {"window": params.window, "n_layers": n_layers}
    names = [name for name in notebooks_of(params.model) if in_parts(name)]
    cuts = [cut for name in names for cut in known.get(name[:2], six)]
    one = mean(passes_of_sample(positions, cuts, **how) for positions in prompts)
    return one * params.n_samples * len(params.tasks), len(names)


def _by_own_parameters(params: Params, n_layers: int) -> dict[str, list[Cut]]:
    """Return the cuts of which a notebook's `parameters` cell says how many there are."""

    def share(name: str) -> float:
        return min(1.0, (own_parameter(name, "n_each") or params.n_samples) / params.n_samples)

    def asked(name: str, n: str) -> float:  # may be more than there are samples
        given = given_by_batch(name, read_params(params.model))
        return given.get(n, own_parameter(name, n)) / params.n_samples

    random = IMAGE_PATCHES_TO_QUESTION[:1] * own_parameter("04_image_patch_knockout", "n_draws")
    of_one_task = share("08_window_size") / len(params.tasks)
    flows = (*FLOW_TO_LAST[:2], *IMAGE_TO_QUESTION)
    of_answers = (*FLOW_TO_LAST, *IMAGE_TO_QUESTION, *IMAGE_PATCHES_TO_QUESTION)
    return {
        "04": [(1, (*IMAGE_PATCHES_TO_QUESTION, *random), None)],
        "07": [(asked("07_efficiency_study", "n_asked") * WAYS_TO_PRUNE, NOTHING, None)],
        "08": [(of_one_task, flows, width) for width in window_sizes(n_layers)],
        "09": [(asked("09_last_subword", "n_long"), of_answers * 2, None)],
        "11": [(share("11_unimodal_llm"), (*CAPTIONS_TO_LAST, *IMAGE_TO_QUESTION), None)],
        "13": [(share("13_fine_grained_flow"), PARTS, None)],
    }


def questions_of_report(params: Params) -> float:
    """Return how many questions a model is asked until each task has its samples."""
    return ASKED_FOR_ONE * params.n_samples * len(params.tasks) + ASKED_BESIDE
