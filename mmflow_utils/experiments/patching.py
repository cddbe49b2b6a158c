"""Activation patching over pairs, position sets and layers: where does it stand which of two answers is given?

The causal counterpart of the knockout. A pair is one question about two pictures, with two answers: the first picture
is run, and what the other one's run holds is put in its place.

result = patch_sweep(model, load_pairs(model, params))
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mmflow_utils.data.sample import Sample, picture_size
from mmflow_utils.engine.closeness import check_close, probabilities, rounding
from mmflow_utils.engine.patching import Patch, Patched, run_patched, run_patched_reference
from mmflow_utils.experiments.curation import WITHOUT, ask_in_parts, curate, read_questions
from mmflow_utils.experiments.knockout import stays_first
from mmflow_utils.experiments.loop import Loop
from mmflow_utils.models.adapter import VLM
from mmflow_utils.params import Params
from mmflow_utils.prompts.encoding import Encoded, encode, image_positions
from mmflow_utils.prompts.flows import pretty_name, window_layers
from mmflow_utils.prompts.positions import HAS_NONE, PositionSets
from mmflow_utils.results.record import Result

__all__ = ["SETS", "Pair", "find_pairs", "load_pairs", "patch_sweep", "with_pairs"]

SETS = (
    "image", "image_related", "image_other", "question", "options", "objects", "rest_of_question", "template", "last",
)  # fmt: skip
COLUMNS = (
    "sample_id", "image_id", "task", "positions", "layer", "window", "n_positions", "token", "token_donor", "p_base",
    "p_patched", "p_donor", "logit_diff_base", "logit_diff_patched", "logit_diff_donor", "recovery_pct", "flipped_pct",
)  # fmt: skip
LEAST_GAP = 1.0  # of the logit difference: less can't be divided by
SHARE = 5  # of `n_samples`, one in so many: a pair takes more rows than a sample's knockouts do


@dataclass(frozen=True, kw_only=True)
class Pair(Sample):
    """A sample, and the same question about another picture, with another answer."""

    other: Sample


def find_pairs(samples: Iterable[Sample]) -> list[Pair]:
    """Pair samples that ask the same about two pictures of one size, with different answers, each sample once."""
    waiting: dict[tuple, list[Sample]] = {}
    pairs = []
    for sample in samples:
        size = None
        with suppress(Exception):  # a broken file raises what it likes; why it can't be used is said where it is asked
            size = picture_size(sample)
        alike = waiting.setdefault((sample.task, sample.question, size), [])
        first = next((one for one in alike if one.answer != sample.answer and one.image_id != sample.image_id), None)
        if first is None:
            alike.append(sample)
        else:
            alike.remove(first)
            pairs.append(Pair(**vars(first), other=sample))
    return pairs


def with_pairs(params: Params) -> Params:
    """Return parameters whose questions are the minimal pairs in a folder `pairs` beside them, if there is one."""
    folder = Path(params.questions).parent / "pairs"
    files = {"questions": "val_balanced_questions.json", "scene_graphs": "val_sceneGraphs.json", "images": "images"}
    moved = params.model_copy(update={name: str(folder / file) for name, file in files.items()})
    return moved if moved.path("questions").is_file() else params


def load_pairs(model: VLM, params: Params) -> list[Pair]:
    """Give pairs of which the model answers both questions correctly: a fifth of `n_samples` in each task, or all.

    They are the minimal pairs, where there are any (`with_pairs`), or else found among the questions.

    Raises:
        ValueError: There is none.
    """
    params = with_pairs(params)
    samples, _ = read_questions(params, tasks=params.tasks)
    pairs, ask = find_pairs(samples), ask_in_parts(params, params.folder / "pairs")

    def ask_both(model: VLM, some: Sequence[Sample]) -> pd.DataFrame:
        record = ask(model, [*some, *(one.other for one in some if isinstance(one, Pair))])
        record, others = record[: len(some)].copy(), record[len(some) :].reset_index(drop=True)
        record["correct"] &= others["correct"]
        if WITHOUT in record:
            record[WITHOUT] = record[WITHOUT].eq(True) | others[WITHOUT].eq(True)
        return record

    n_pairs = max(1, params.n_samples // SHARE)
    kept, _ = curate(model, pairs, tasks=params.tasks, n_samples=n_pairs, seed=params.seed, ask=ask_both)
    if not kept:
        raise ValueError(
            f"{params.model} answers none of the {len(pairs)} pairs in {params.questions} correctly on both pictures: "
            "name other `questions`, or look at what it says in notebook 01."
        )
    return [pair for pair in kept if isinstance(pair, Pair)]


def patch_sweep(
    model: VLM,
    samples: Iterable[Pair],
    *,
    sets: Sequence[str] = SETS,
    layers: Sequence[int] | None = None,
    window: int = 1,
    method: str = "sweep",
    n_check: int = 2,
    progress: bool = True,
) -> Result:
    """Put what the other picture's run holds at each position set into each layer, and see whose answer comes.

    Args:
        model, progress: As for `knockout_sweep`.
        samples: pairs, both of whose questions it answers correctly.
        sets: position sets. Here `image_related` are the patches of either picture's objects, and `rest_of_question`
            is neither option nor object.
        layers: at whose entry the states are put in; every one by default.
        window: so many layers, from that one on, have them put in.
        method: `sweep` computes what a patch changes beside one clean pass; `reference` runs the model for each row.
        n_check: how many pairs are held against the reference, each set in one layer or two.

    Returns:
        A frame of one row per pair, position set and layer, with `COLUMNS`. With the first tokens a and b of the
        other picture's answer and of this one's: `logit_diff_…` = logit(a) - logit(b) in this picture's run, in the
        patched one and in the other picture's; `recovery_pct` = 100 (patched - base) / (donor - base): 0 nothing came
        over, 100 all; `p_…` the probabilities of a; `flipped_pct` 100 if a is the most probable token, else 0.

    Raises:
        ValueError: the check failed; anything that `encode` or `run_patched` refuses.
    """
    loop, n_layers = Loop(model, method=method, n_check=n_check), model.n_layers
    layers = range(n_layers) if layers is None else layers
    windows = [window_layers(i, window=window, n_layers=n_layers, placement="forward") for i in layers]
    run = run_patched if method == "sweep" else run_patched_reference

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        assert isinstance(encoded.sample, Pair), "samples come from find_pairs"
        donor = encode(model, encoded.sample.other)
        held = _name_sets(encoded, donor)
        for name in sets:
            if name not in held:
                loop.skip(encoded, held.why_missing(name), positions=pretty_name(name))
        planned = [(name, some) for name in sets if name in held for some in windows]
        patches = [Patch(positions=held[name], layers=some) for name, some in planned]
        found = run(model, encoded, donor, patches)
        if loop.checks:
            loop.differences.append(_check(model, encoded, donor, patches, found, every=len(windows) + 1))
        a, b = int(found.donor.argmax()), int(found.base.argmax())
        logits = torch.stack([found.base, found.donor, *found.variants])
        base, donor, *patched = (logits[:, a] - logits[:, b]).tolist()
        if donor - base < LEAST_GAP:  # 0 where both answers begin with the same token
            reason = (
                f"the pictures move the answers' logits apart by less than {LEAST_GAP:g}: there is nothing to recover"
            )
            loop.skip(encoded, reason, positions="all of them")
            return []
        p_base, p_donor, *p_patched = probabilities(logits)[:, a].tolist()
        flipped = stays_first(model, found.donor, found.variants)
        tokens = model.tokenizer.decode([b]), model.tokenizer.decode([a])
        rows = []
        for (name, some), p, diff, is_flipped in zip(planned, p_patched, patched, flipped, strict=True):
            labels = pretty_name(name), some.start, window, len(held[name]), *tokens
            recovery = 100 * (diff - base) / (donor - base)
            values = *labels, p_base, p, p_donor, base, diff, donor, recovery, 100.0 * is_flipped
            rows.append(dict(zip(COLUMNS[3:], values, strict=True)))
        return rows

    return loop.over(samples, measure, COLUMNS, name="Patching", progress=progress)


def _name_sets(encoded: Encoded, donor: Encoded) -> PositionSets:
    """Name what both pictures' objects cover, and what is left of the question."""
    held = encoded.positions
    if "image_related" in held and "image_related" in donor.positions:
        related = {*held["image_related"], *donor.positions["image_related"]}
        held = held.with_(image_related=related, image_other={*held["image"]} - related)
    named = {*held.get("options"), *held.get("objects")}
    # What ends the picture's rows is part of it here: it too has looked at the picture.
    held = held.with_(rest_of_question={*held["question"]} - named, image=image_positions(encoded))
    lost = [name for name, none in HAS_NONE.items() if held.missing.get(name, none) != none]
    return held.with_missing(rest_of_question=held.why_missing(lost[0])) if lost else held  # it may hold their words


def _check(model: VLM, encoded: Encoded, donor: Encoded, patches: Sequence[Patch], found: Patched, every: int) -> float:
    """Hold one in so many patches against the plain way, and all of the donor's states, put in, against the donor."""
    plain = run_patched_reference(model, encoded, donor, patches[::every])
    whole = Patch(positions=tuple(range(encoded.positions.n_tokens)), layers=range(1))
    theirs = run_patched(model, encoded, donor, [whole])
    ours = torch.cat([found.base[None], found.variants[::every], theirs.variants])
    other = torch.cat([plain.base[None], plain.variants, plain.donor[None]])
    return check_close(encoded, probabilities(ours), probabilities(other), tolerance=rounding(model.dtype))
