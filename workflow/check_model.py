"""What `workflow.check` asks of a model itself: its prompt, its boxes, its answers, its adapter, its sweep, its time.

Each check takes a `Look`, gives what it found in a few words, and raises a ValueError where something is wrong.
"""

import base64
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from math import ceil
from pathlib import Path
from statistics import mean

import torch
from huggingface_hub import snapshot_download
from PIL import ImageOps
from torch import Tensor

import mmflow_utils as mm
from benchmarks.model_costs import CARD, SHAPES, build, count_of, plan
from benchmarks.model_costs import prompt as counted_prompt
from mmflow_utils.data.sample import Sample, is_correct, load_image
from mmflow_utils.engine.closeness import check_close, probabilities, rounding
from mmflow_utils.models.adapter import VLM, decoder_inputs
from mmflow_utils.models.load import load_without_weights
from mmflow_utils.models.partial import adapter_base
from mmflow_utils.models.sources import find_checkpoint
from mmflow_utils.params import ROOT, Params, project_path
from mmflow_utils.prompts.encoding import Encoded, image_positions
from mmflow_utils.prompts.image_patches import locate_image_patches
from workflow.conversations import PAPER, judge_text, judge_tokens
from workflow.report_time import passes_of_report, questions_of_report

N_SHOWN, N_TIMED, MOST_ASKED = 3, 2, 12
BYTES = {"float32": 4.0, "int8": 1.0, "nf4": 0.5}  # of a stored weight; 2 in half precision
LEAST_SHARE = 0.95  # of what changes in the processed picture when boxes are painted over: under their patches
LEAST_RATIO = 1.5  # and how much more the features of these change than the others'


class Untold(Exception):
    """Why something can't be checked."""


@dataclass
class Look:
    """A model's parameters, and what the checks have found for those after them."""

    params: Params
    fetch: bool = False
    passed: set[str] = field(default_factory=set)
    samples: list[Sample] = field(default_factory=list)
    shown: list[Sample] = field(default_factory=list)
    skeleton: VLM | None = None  # without weights
    model: VLM | None = None
    answer_s: float | None = None

    @property
    def sees(self) -> bool:
        return "{caption}" not in self.params.prompt

    @property
    def own(self) -> bool:
        """Whether the model comes with this project."""
        return project_path(self.params.checkpoint).is_relative_to(ROOT / "assets")

    @property
    def folder(self) -> Path:
        """Where the checkpoint's small files lie, whatever else is missing."""
        folder = project_path(self.params.checkpoint)
        with suppress(Exception):  # what isn't in the cache raises what the library likes
            if not folder.is_dir():
                cached = dict(revision=self.params.revision, local_files_only=True)
                folder = Path(snapshot_download(self.params.checkpoint, **cached))
            if not (folder / "config.json").is_file() and (base := adapter_base(folder)):
                folder = find_checkpoint(base, fetch=False)
        if not folder.is_dir():
            raise Untold("none of the checkpoint's files is here")
        return folder

    def some(self) -> list[Sample]:
        """Return three samples: the model's own, or the miniature's."""
        if not self.shown:
            drawn = Params(prompt=self.params.prompt)
            self.shown = choose(mm.read_questions(drawn, tasks=drawn.tasks)[0], self.params)
        return self.shown

    def ready(self) -> VLM:
        """Return the model, without weights if there are none: prompts can be made with it."""
        if self.model is None and self.skeleton is None:
            self.skeleton = load_without_weights(self.params, self.folder)
        return self.model or self.skeleton  # type: ignore[return-value]

    def prompts(self) -> list[Encoded]:
        return [mm.encode(self.ready(), sample) for sample in self.some()]

    def whole(self) -> VLM:
        if self.model is None:
            raise Untold("needs the model, which wasn't loaded")
        return self.model


def choose(samples: Sequence[Sample], params: Params) -> list[Sample]:
    """Choose three samples with boxes, of as many tasks as there are."""
    boxed = [sample for sample in samples if any(thing.box for thing in sample.objects)] or list(samples)
    n = ceil(N_SHOWN / len({sample.task for sample in boxed}))
    return mm.stratified_sample(boxed, n=n, seed=params.seed, by=lambda sample: sample.task)[:N_SHOWN]


def costs(look: Look, *, in_half: bool = False) -> dict:
    """Count memory and work as docs/models.md does: on a prompt of the model's own, or of the length given there.

    Args:
        look: The model.
        in_half: As checkpoints are stored, whatever `dtype` says.
    """
    dtype = "bfloat16" if in_half else look.params.dtype
    how = {"itemsize": 4 if dtype == "float32" else 2, "weight": BYTES.get(dtype, 2.0)}
    with suppress(ValueError, Untold):
        return count_of(look.ready(), look.prompts()[0], **how)
    return count_of(*by_shape(look.params.model), **how)


def by_shape(name: str) -> tuple[VLM, Encoded]:
    """Build a model and a prompt from the shape that benchmarks/ knows."""
    if name not in SHAPES:
        raise Untold("its shape can't be known without config.json")
    model = build(name, SHAPES[name])
    return model, counted_prompt(model, SHAPES[name])


def look_at_prompt(look: Look) -> str:
    try:
        model = look.ready()
    except (ValueError, Untold) as error:
        asked = look.params.prompt.replace("{caption}", "<image>")
        name = next((name for name, text in PAPER.items() if text == asked), None)
        words = f"its words are those of {name}, " if name else ""
        raise Untold(f"{words}its tokens can't be known without a tokenizer ({str(error)[:60]} …)") from None
    name = judge_text(model, own=look.own)
    said = [judge_tokens(model, encoded, own=look.own) for encoded in look.prompts()]
    return f"{name}; {said[0]}"


def look_at_boxes(look: Look) -> str:
    """Draw the patches over the pictures, and paint boxes over: nothing else may change in what the model is shown."""
    if not look.sees:
        return "not applicable: it reads text alone"
    try:
        model, prompts = look.ready(), look.prompts()
    except Untold as error:
        raise Untold(f"needs the picture processor: {error}") from None
    page = write_page(look, model, prompts)
    for encoded in told_apart(prompts):
        under, elsewhere = changes(model, encoded, partial(pixels, model))
        share = (under.sum() / (under.sum() + elsewhere.sum())).item()
        if not share >= LEAST_SHARE:
            said = encoded.sample.question
            raise ValueError(
                f"Of what changes when the boxes of {said!r} are painted over, {share:.0%} is under their patches, "
                f"less than {LEAST_SHARE:.0%}; see {page}."
            )
    n = [len(encoded.positions["image"]) for encoded in prompts]
    return f"{', '.join(map(str, n))} image tokens, drawn over their pictures in {page}"


def look_at_features(look: Look) -> str:
    """Paint boxes over: the features that the decoder gets must change most at the boxes' tokens."""
    model = look.whole()
    if not look.sees:
        return "not applicable: it reads text alone"
    ratios = []
    for encoded in told_apart(look.prompts()):
        under, elsewhere = changes(model, encoded, partial(features, model))
        ratios.append((under.mean() / elsewhere.mean().clamp(min=1e-9)).item())
        if not ratios[-1] >= LEAST_RATIO:
            raise ValueError(
                f"With the boxes of {encoded.sample.question!r} painted over, the features of their patches change "
                f"{ratios[-1]:.2f} times as much as the others', not {LEAST_RATIO:g} times: tokens and patches differ."
            )
    least = min(ratios)
    times = "more than 100" if least > 100 else f"at least {least:.1f}"
    return f"painted over, boxes change their own tokens {times} times as much as the others"


def told_apart(prompts: Sequence[Encoded]) -> list[Encoded]:
    """Leave out prompts of which no image token, or every one, lies under a box."""
    found = [encoded for encoded in prompts if {"image_related", "image_other"} <= {*encoded.positions.sets}]
    if not found:
        raise Untold("no box of the three samples has patches under it and beside it")
    return found


def changes(model: VLM, encoded: Encoded, of: Callable[[Encoded], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what painting a sample's boxes over changes at the image tokens under them, and at the others."""
    with tempfile.TemporaryDirectory() as folder:
        changed = (of(encoded) - of(mm.encode(model, painted(encoded.sample, Path(folder))))).abs().mean(-1)
    at = image_positions(encoded)
    sets = ({*encoded.positions.get(name)} for name in ("image_related", "image_other"))
    under, elsewhere = (torch.tensor([position in held for position in at]) for held in sets)
    return changed[under], changed[elsewhere]


def painted(sample: Sample, folder: Path) -> Sample:
    """Return the sample with its picture inverted inside its boxes."""
    picture = load_image(sample)
    for box in (thing.box for thing in sample.objects if thing.box):
        right, below = min(picture.width, ceil(box.x + box.w)), min(picture.height, ceil(box.y + box.h))
        sides = (int(box.x), int(box.y), right, below)
        picture.paste(ImageOps.invert(picture.crop(sides)), sides)
    picture.save(file := folder / "painted.png")
    return replace(sample, image=file)


def pixels(model: VLM, encoded: Encoded) -> Tensor:
    """Return each image token's piece of the processed picture."""
    tiles, side = model.tiles(encoded.inputs).float().cpu(), model.image_patch_size
    patches = torch.nn.functional.unfold(tiles, side, stride=side).transpose(1, 2)
    return model.in_token_order(patches, encoded.inputs)


def features(model: VLM, encoded: Encoded) -> Tensor:
    """Return what the decoder is given at the picture's positions."""
    return decoder_inputs(model, encoded.inputs)["inputs_embeds"][0, image_positions(encoded)].float().cpu()


def write_page(look: Look, model: VLM, prompts: Sequence[Encoded]) -> Path:
    """Write a page of the pictures under their own image tokens, each with its prompt, and return it."""
    parts = []
    for encoded in prompts:
        sample, patches = encoded.sample, locate_image_patches(model, encoded)
        drawn = mm.plot_image_patches(load_image(sample), patches, objects=sample.objects, width=4.5)
        drawn.savefig(png := io.BytesIO(), format="png", dpi=110)
        picture = f'<img alt="" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'
        words = mm.plot_prompt(encoded.tokens, encoded.positions).data
        named = ", ".join(thing.name for thing in sample.objects if thing.box)
        parts.append(f"<h2>{escape(sample.question)}</h2><p>Boxes: {escape(named)}</p>{picture}{words}")
    page = look.params.folder / "check.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    title = f"{look.params.model}: pictures and prompts as the model is given them"
    style = "body{font-family:sans-serif;max-width:62em;margin:2em auto}img{max-width:100%}"
    head = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
    page.write_text(head + "\n".join(parts), encoding="utf-8")
    return page.relative_to(ROOT) if page.is_relative_to(ROOT) else page


def load(look: Look) -> str:
    start = time.perf_counter()
    look.model = mm.load_model(look.params)
    taken = time.perf_counter() - start
    return f"{look.model.n_layers} layers in {look.params.dtype} on {look.model.device}, {taken:.0f} s"


def look_at_answers(look: Look) -> str:
    """Ask three questions, and more where none of them is answered correctly: a model may know few kinds."""
    model, said, start = look.whole(), [], time.perf_counter()
    more = mm.stratified_sample(look.samples, n=MOST_ASKED, seed=look.params.seed, by=lambda sample: sample.task)
    for sample in [*look.some(), *more][:MOST_ASKED]:
        words = mm.answer(model, mm.encode(model, sample))
        said.append((sample, words, is_correct(words, sample)))
        n_right = sum(right for *_, right in said)
        if len(said) >= N_SHOWN and n_right:
            break
    look.answer_s = (time.perf_counter() - start) / len(said)
    said.sort(key=lambda one: not one[2])
    shown = "; ".join(f"{sample.question} {words!r} ({sample.answer})" for sample, words, _ in said[:N_SHOWN])
    if not {"data", "pictures"} <= look.passed:
        raise Untold(f"the model's own data isn't here, so these don't count: {shown}")
    if not n_right:
        raise ValueError(f"None of {len(said)} answers is right, such as: {shown}.")
    return f"{n_right} of {len(said)} right: {shown}"


def look_at_adapter(look: Look) -> str:
    model = look.whole()
    rows = mm.check_model(model, look.prompts()[0], strict=False)
    if len(wrong := rows[~rows.passed]):
        raise ValueError("; ".join(f"{row.check}: {row.detail}" for row in wrong.itertuples()))
    return f"all of {len(rows)} hold"


def look_at_sweep(look: Look) -> str:
    """Hold the sweep against full forward passes: six flows around the first, the middle and the last layer."""
    model = look.whole()
    if look.params.method != "sweep":
        return f"not applicable: method is {look.params.method}"
    encoded, places = look.prompts()[0], {0, model.n_layers // 2, model.n_layers - 1}
    planned = [variant for variant in plan(model, encoded) if variant.layer in places]
    runs = (mm.run_sweep(model, encoded, planned), mm.run_reference(model, encoded, planned))
    both = (probabilities(torch.cat([run.base[None], run.variants])) for run in runs)
    allowed = rounding(model.dtype)
    worst = check_close(encoded, *both, tolerance=allowed)
    return f"{len(planned)} knockouts differ by at most {worst:.1e} in {look.params.dtype}, {allowed:.0e} allowed"


def estimate_time(look: Look) -> str:
    """Time a sweep, and count how many such passes the notebooks of this model's batch compute."""
    params = look.params
    if look.model is None:
        model, encoded = by_shape(params.model)
        cost = count_of(model, encoded)
        passes, n = passes_of_report(params, [encoded.positions], model.n_layers)
        counted = spoken(passes * cost["seconds"] / cost["passes"])
        raise Untold(
            f"no model to time; counted for an {CARD}, as in docs/models.md, the knockouts of {n} notebooks between "
            f"whole sets of positions take {counted}"
        )
    model, prompts, seconds, passed = look.model, look.prompts(), [], []
    mm.run_sweep(model, prompts[0], [])  # warms up
    for encoded in prompts[-N_TIMED:]:
        start = time.perf_counter()
        mm.run_sweep(model, encoded, plan(model, encoded))
        seconds.append(time.perf_counter() - start)
        passed.append(count_of(model, encoded)["passes"])
    pass_s = sum(seconds) / sum(passed)
    passes, n = passes_of_report(params, [encoded.positions for encoded in prompts], model.n_layers)
    asked = questions_of_report(params)
    whole = passes * pass_s + asked * (look.answer_s or 3 * pass_s)
    return (
        f"about {spoken(whole)} on this machine, one run at a time, where nothing is stored yet: the knockouts of {n} "
        f"notebooks, {passes:,.0f} clean passes of {1000 * pass_s:.0f} ms (timed: six flows at all layers are "
        f"{mean(passed):.1f} passes, {mean(seconds):.2f} s), and {asked:,.0f} questions to answer"
    )


def spoken(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{ceil(seconds / 60)} min"
