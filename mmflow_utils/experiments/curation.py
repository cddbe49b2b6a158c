"""Which questions does the model answer correctly? The samples that every experiment reads (§4, App. A).

Example:
    >>> asked = ask_questions(model, stratified_sample(samples, n=2, seed=0, by=lambda s: s.structural))
    >>> asked[["prediction", "correct"]].values.tolist()
    [['White', True], ['Square', True]]
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from mmflow_utils.data.authors import read_authors
from mmflow_utils.data.captions import add_captions, captions_file
from mmflow_utils.data.fields import picture_file
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.data.sample import Sample, frame_to_samples, is_correct, picture_by_picture, samples_to_frame
from mmflow_utils.engine.answers import answer_together, greedy_answer
from mmflow_utils.engine.prefix import Prefix
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.knockout import stays_first
from mmflow_utils.models.adapter import VLM
from mmflow_utils.params import Params
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import NO_PICTURE, variants, whole_depth
from mmflow_utils.results.frames import identity_of, load_frame, manifest, save_frame, wants_fresh
from mmflow_utils.results.resume import measure_in_parts

__all__ = [
    "answer", "as_text", "ask_in_parts", "ask_questions", "curate", "load_samples", "needs_picture", "read_questions",
    "stratified_sample",
]  # fmt: skip

# What a curated set depends on: everything else may change without asking the model again.
DEPENDS_ON = (
    "model", "checkpoint", "revision", "language_model", "prompt", "do_pad", "dtype", "seed", "n_samples",
    "needs_picture",
)  # fmt: skip
ABOUT_SAMPLE = ("sample_id", "image_id", "structural", "semantic", "detailed", "task", "answer")
COLUMNS = (*ABOUT_SAMPLE, "prediction", "correct", "reason")
WITHOUT = "answered_without_picture"


def answer(model: VLM, encoded: Encoded, *, max_new_tokens: int = 8) -> str:
    """Let the model answer greedily, and strip what it says (§4)."""
    return as_text(model, greedy_answer(model, encoded, max_new_tokens=max_new_tokens))


def as_text(model: VLM, tokens: Sequence[int]) -> str:
    """Return an answer's tokens as words."""
    return model.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


def needs_picture(model: VLM, encoded: Encoded, prefix: Prefix | None = None) -> bool:
    """Return whether the answer's first token falls behind once nothing after the picture may look at it."""
    cut = variants(encoded.positions, NO_PICTURE, n_layers=model.n_layers, **whole_depth(model.n_layers))
    run = run_sweep(model, encoded, cut, prefix=prefix)
    return not any(stays_first(model, run.base, run.variants))


def ask_questions(
    model: VLM, samples: Iterable[Sample], *, without_picture: bool = False, progress: bool = True
) -> pd.DataFrame:
    """Ask the model each question and judge its answer: equal to the label once both are lower-case.

    Questions about one picture are asked together, which costs little more than one of them.

    Args:
        model: The model.
        samples: The questions.
        without_picture: Also see whether what is answered correctly is answered so without the picture.
        progress: Show a bar.

    Returns:
        One row per sample: sample_id, image_id, structural, semantic, detailed, task, answer, prediction,
        correct and reason. A picture or prompt that can't be used leaves `prediction` empty and says why in
        `reason`; a wrong answer has its own words there; a correct one has None. `answered_without_picture`, if
        that was asked too, is None where the answer is wrong.
    """
    samples, prefix = list(samples), Prefix()
    rows: dict[int, dict] = {}
    with tqdm(total=len(samples), desc="Asking", unit="question", disable=not progress) as bar:
        for _, picture in groupby(picture_by_picture(samples), key=lambda n: samples[n].image_id):
            places = list(picture)
            some = [samples[n] for n in places]
            rows |= zip(places, _judge(model, some, prefix, without_picture), strict=True)
            bar.update(len(some))
    columns = [*COLUMNS, *([WITHOUT] if without_picture else [])]
    return pd.DataFrame([rows[n] for n in range(len(samples))], columns=columns)


def _judge(model: VLM, samples: Sequence[Sample], prefix: Prefix, without_picture: bool) -> list[dict]:
    """Return a row for each of several questions about one picture."""
    prompts: dict[int, Encoded] = {}
    answers: dict[int, str | ValueError] = {}
    for n, sample in enumerate(samples):
        try:
            prompts[n] = encode(model, sample)
        except ValueError as error:  # one unusable question doesn't stop the others; its reason is kept
            answers[n] = error
    answers |= zip(prompts, _ask(model, list(prompts.values()), prefix), strict=True)
    rows = [{name: getattr(sample, name) for name in ABOUT_SAMPLE} for sample in samples]
    for n, said in answers.items():
        if isinstance(said, ValueError):
            rows[n] |= dict(prediction=None, correct=False, reason=str(said))
            continue
        correct = is_correct(said, samples[n])
        if correct and without_picture:
            rows[n][WITHOUT] = not needs_picture(model, prompts[n], prefix)
        rows[n] |= dict(prediction=said, correct=correct, reason=None if correct else f"answered {said!r}")
    return rows


def _ask(model: VLM, prompts: Sequence[Encoded], prefix: Prefix) -> list[str | ValueError]:
    """Return what the model says to each prompt, or why it says nothing; asked alone where together won't do."""
    try:
        return [as_text(model, tokens) for tokens in answer_together(model, prompts, prefix)]
    except ValueError as error:
        if len(prompts) == 1:
            return [error]
        return [said for encoded in prompts for said in _ask(model, [encoded], prefix)]


def stratified_sample(
    samples: Iterable[Sample], *, n: int | None, seed: int, by: Callable[[Sample], Any]
) -> list[Sample]:
    """Draw at most `n` samples (None for all) of each kind that `by` tells apart, in a seeded order.

    The order of one kind depends neither on the other kinds nor on `n`: the draw of a kind begins with any
    smaller draw of it.

    >>> stratified_sample([], n=3, seed=0, by=lambda sample: sample.task)
    []
    """
    kinds: dict[object, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(by(sample), []).append(sample)
    return [s for kind in sorted(kinds, key=str) for s in _shuffled(kinds[kind], seed)[:n]]


def _shuffled(samples: list[Sample], seed: int) -> list[Sample]:
    ordered = sorted(samples, key=lambda s: s.sample_id)
    return [ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))]


def curate(
    model: VLM,
    samples: Iterable[Sample],
    *,
    tasks: Iterable[str],
    n_samples: int,
    seed: int,
    ask: Callable[[VLM, Sequence[Sample]], pd.DataFrame] = ask_questions,
) -> tuple[list[Sample], pd.DataFrame]:
    """Ask each task's questions in a seeded order until `n_samples` are answered correctly (App. A).

    Args:
        model: The model.
        samples: Candidates of all tasks.
        tasks: Whose questions are asked.
        n_samples: How many correct answers each task needs.
        seed: Of the order.
        ask: Asks some questions; `ask_in_parts` makes one that keeps the answers.

    Returns:
        The correctly answered samples, task by task, less those that the record says are answered without the picture
        too; and the record of all that was asked (`ask_questions`).
    """
    tasks, samples = list(tasks), list(samples)
    left = {task: iter(_shuffled([s for s in samples if s.task == task], seed)) for task in tasks}
    kept: dict[str | None, list[Sample]] = {task: [] for task in tasks}
    rows: dict[str | None, list[dict]] = {task: [] for task in tasks}
    # So many have to be asked in any case; those of all tasks together, since they are about the same pictures.
    while asked := [sample for task in tasks for sample in islice(left[task], n_samples - len(kept[task]))]:
        record = ask(model, asked)
        fits = record.correct & ~record[WITHOUT].eq(True) if WITHOUT in record else record.correct
        for sample, fit, row in zip(asked, fits, record.to_dict("records"), strict=True):
            kept[sample.task] += [sample] * bool(fit)
            rows[sample.task].append(row)
    whole = [row for task in tasks for row in rows[task]]
    return [s for task in tasks for s in kept[task]], pd.DataFrame(whole, columns=list(whole[0] if whole else COLUMNS))


def ask_in_parts(params: Params, folder: Path) -> Callable[[VLM, Sequence[Sample]], pd.DataFrame]:
    """Return what `curate` can ask with so that a killed run goes on: the answers so far are kept in `folder`."""
    numbers, more = count(), {"without_picture": True} if params.needs_picture else {}

    def ask(model: VLM, some: Sequence[Sample]) -> pd.DataFrame:
        path = folder / f"{folder.name}_{next(numbers)}.parquet"
        return measure_in_parts(ask_questions, model, some, path, params, shared=False, **more).frame

    return ask


def read_questions(params: Params, *, tasks: Iterable[str] | None = None) -> tuple[list[Sample], pd.DataFrame]:
    """Read the parameters' GQA files; also a frame of what couldn't be read, with the reasons.

    Where `questions` names a folder, it is that of the authors' CSV files: exactly their questions, with
    their boxes and captions.

    For a text-only model, whose prompt has `{caption}` where others have `<image>`, dense captions come with
    the samples: from Visual Genome's `region_descriptions.json` beside the scene graphs (App. G).

    Without scene graphs (`scene_graphs: null`; GQA's test splits have none) no box is known, and the captions
    are looked for beside the questions.
    """
    questions, images = params.path("questions"), params.path("images")
    if questions.is_dir():
        return read_authors(questions, images, tasks=tasks)
    graphs = params.path("scene_graphs") if params.scene_graphs else None
    samples, left_out = read_gqa(questions, graphs, images, tasks=tasks)
    if "{caption}" in params.prompt:
        samples = add_captions(samples, captions_file(graphs or questions))
    return samples, left_out


def load_samples(model: VLM, params: Params, task: str | None = None, *, fresh: bool | None = False) -> list[Sample]:
    """Give the model's correctly answered samples of one task, or of all of the parameters' tasks.

    They are in `outputs/<model>/samples/`, with the record of what was asked. What isn't there yet for these
    parameters is curated here and kept, so that every notebook can be run on its own with the same result.
    `fresh` curates anew what is there; None: as the environment's `FRESH` says.

    Raises:
        ValueError: a task of which the model answers no question correctly.
    """
    expected = manifest(params, model, fields=DEPENDS_ON)
    tasks, found = [task] if task else params.tasks, {}
    for name in [] if wants_fresh(fresh) else tasks:
        with suppress(ValueError):  # not there, or of other parameters
            stored = frame_to_samples(load_frame(_samples_file(params, name), expected))
            found[name] = [_with_picture_of(params, sample) for sample in stored]
    if missing := [name for name in tasks if name not in found]:
        found |= _curate_and_keep(model, params, missing, expected)
    for name in tasks:
        if not found[name]:
            raise ValueError(
                f"{params.model} answers none of the {name} questions in {params.questions} correctly"
                f"{', and needs the picture for it' * params.needs_picture}: "
                "leave the task out of `tasks`, or look at what it says in notebook 01."
            )
    return [sample for name in tasks for sample in found[name]]


def _with_picture_of(params: Params, sample: Sample) -> Sample:
    """Look for a stored sample's picture where the pictures lie now."""
    here = picture_file(params.path("images"), sample.image_id)
    return replace(sample, image=here) if here.is_file() else sample


def _samples_file(params: Params, name: str) -> Path:
    return params.folder / "samples" / f"{name}.parquet"


def _curate_and_keep(model: VLM, params: Params, tasks: Sequence[str], made_from: dict) -> dict[str, list[Sample]]:
    samples, _ = read_questions(params, tasks=tasks)
    folder = params.folder / "samples" / identity_of(made_from)  # another run's answers stay
    ask = ask_in_parts(params, folder / "asked")
    kept, record = curate(model, samples, tasks=tasks, n_samples=params.n_samples, seed=params.seed, ask=ask)
    by_task = {task: [sample for sample in kept if sample.task == task] for task in tasks}
    for task, some in by_task.items():
        # The samples come last: where they are, the record is too.
        own = record[record.task == task].reset_index(drop=True)
        save_frame(own, _samples_file(params, f"{task}_asked"), made_from)
        save_frame(samples_to_frame(some), _samples_file(params, task), made_from)
    shutil.rmtree(folder, ignore_errors=True)
    return by_task
