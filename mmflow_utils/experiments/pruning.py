"""What removing image tokens does to the answers, beside other ways to save as much work (App. F, Fig. 14).

frame = prune_sweep(model, samples, removed=range(0, 41, 5)).frame
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from PIL import Image

from mmflow_utils.data.sample import Sample, is_correct, load_image
from mmflow_utils.engine.closeness import rounding
from mmflow_utils.engine.pruning import Pruning, compare_to_knockout, greedy_decode, prompt_embeds
from mmflow_utils.engine.work import equal_work, work_of
from mmflow_utils.experiments.curation import answer, as_text
from mmflow_utils.experiments.loop import Loop
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode, image_positions
from mmflow_utils.results.record import Result

__all__ = ["WAY_COLORS", "picture_sweep", "prune_sweep"]

LAST_LAYERS, RANDOM, FASTV, SMALLER = "No image in the last layers", "Random tokens", "FastV", "Smaller picture"
WAY_COLORS = {LAST_LAYERS: "#D55E00", FASTV: "#332288", RANDOM: "#8A8A8A", SMALLER: "#117733"}
"""The ways to save work, and their colors."""

COLUMNS = (
    "sample_id", "image_id", "task", "way", "n_layers_without", "from_layer", "n_image", "n_kept", "work_pct",
    "cache_pct", "prediction", "correct_pct", "same_pct",
)  # fmt: skip


def prune_sweep(
    model: VLM,
    samples: Iterable[Sample],
    *,
    removed: Sequence[int],
    rivals: bool = True,
    seed: int = 0,
    max_new_tokens: int = 8,
    n_check: int = 2,
    progress: bool = True,
) -> Result:
    """Answer without image tokens in the last layers, and with as little work in other ways (App. F).

    The rivals remove as many image tokens from layer 2 on as makes their counted work to the first token
    equal (or less, by under a token): a random choice, and FastV's, which keeps those that the last position
    attends to most in the layer before. Where even none left would be too much work, there is no row.

    Args:
        model, progress: As for `knockout_sweep`.
        samples: questions, whether the model answers them correctly or not: only so is this an accuracy.
        removed: numbers of last layers without image tokens; 0, the intact model, comes along in any case.
        rivals: run these too.
        seed: of the random choice, which differs from sample to sample.
        max_new_tokens: longest answer.
        n_check: how many samples each removal is held against the knockout of the same tokens on.

    Returns:
        A frame of one row per sample, way and number of layers: from_layer and n_kept (of n_image, newlines
        included); work_pct (operations to the first token) and cache_pct (bytes of the prompt's keys and values),
        of the intact model's; prediction, correct_pct (0 or 100: the answer is the label, both lower-case) and
        same_pct (the same as the intact model's). `max_check_diff` is the check's largest difference in
        probability, None if none was made.

    Raises:
        ValueError: a number of layers that the model lacks; a prompt without picture; the check failed.
    """
    counts = sorted({0, *removed})
    if counts[0] < 0 or counts[-1] > model.n_layers:
        raise ValueError(f"`removed` counts layers, 0 to {model.n_layers} in this model, got {list(removed)}.")
    loop = Loop(model, n_check=n_check)

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        decode = partial(greedy_decode, model, encoded, max_new_tokens=max_new_tokens)
        embeds, rows, worst = prompt_embeds(model, encoded), [], []
        intact = said = as_text(model, decode(embeds=embeds))
        for n_without, way, pruning in _plan(model, encoded, counts, rivals, seed):
            if n_without:
                said = as_text(model, decode(pruning, embeds=embeds))
            if loop.checks:
                worst.append(compare_to_knockout(model, encoded, pruning, tolerance=rounding(model.dtype)))
            row = _about(encoded.sample, said, intact) | _cost(model, encoded, pruning, encoded)
            rows.append(row | {"way": way, "n_layers_without": n_without})
        loop.differences += [max(worst)] if worst else []
        return rows

    return loop.over(samples, measure, COLUMNS, name="Pruning", progress=progress)


def picture_sweep(
    model: VLM,
    samples: Iterable[Sample],
    *,
    scales: Sequence[float] = (0.5,),
    max_new_tokens: int = 8,
    progress: bool = True,
) -> Result:
    """Answer about smaller pictures, the plain way to save work; the library's own `generate` answers.

    A model of any-resolution tiles then has fewer image tokens. One with a fixed grid, as LLaVA-1.5, enlarges
    the picture again: it sees less of it and saves nothing.

    Returns:
        A frame with the columns of `prune_sweep` and `scale`, of the picture's sides; work and cache are in
        percent of the whole picture's.

    Raises:
        ValueError: a scale that isn't above 0 and at most 1.
    """
    if not all(0 < scale <= 1 for scale in scales):
        raise ValueError(f"Expected scales above 0 and at most 1, got {list(scales)}.")
    loop, nothing_removed = Loop(model), Pruning(from_layer=model.n_layers)
    with tempfile.TemporaryDirectory() as folder:

        def measure(whole: Encoded) -> list[dict[str, Any]]:
            intact, rows = answer(model, whole, max_new_tokens=max_new_tokens), []
            for scale in scales:
                small = encode(model, _shrink(whole.sample, scale, Path(folder)))
                said = answer(model, small, max_new_tokens=max_new_tokens)
                row = _about(whole.sample, said, intact) | _cost(model, small, nothing_removed, whole)
                rows.append(row | {"way": SMALLER, "n_layers_without": 0, "scale": scale})
            return rows

        return loop.over(samples, measure, [*COLUMNS, "scale"], name="Pictures", progress=progress)


def _plan(
    model: VLM, encoded: Encoded, counts: Sequence[int], rivals: bool, seed: int
) -> Iterator[tuple[int, str, Pruning]]:
    """List the removals of one prompt: without the image in the last layers, and the rivals of equal work."""
    seed = (seed + crc32(encoded.sample.sample_id.encode())) % 2**32
    for n_without in counts:
        pruning = Pruning(from_layer=model.n_layers - n_without)
        yield n_without, LAST_LAYERS, pruning
        for way, choice in ((RANDOM, "random"), (FASTV, "attention")) if rivals else ():
            if rival := equal_work(model, encoded, pruning, choice=choice, seed=seed):
                yield n_without, way, rival


def _about(sample: Sample, said: str, intact: str) -> dict[str, Any]:
    return {
        "prediction": said,
        "correct_pct": 100.0 * is_correct(said, sample),
        "same_pct": 100.0 * (said == intact),
    }


def _cost(model: VLM, encoded: Encoded, pruning: Pruning, whole: Encoded) -> dict[str, Any]:
    """Count what a removal costs, in percent of the intact model with the whole prompt."""
    n_image = len(image_positions(encoded))
    own, full = work_of(model, encoded, pruning), work_of(model, whole)
    return {
        "from_layer": pruning.from_layer,
        "n_image": n_image,
        "n_kept": pruning.n_kept if pruning.from_layer < model.n_layers else n_image,
        "work_pct": 100 * own.first_token_flops / full.first_token_flops,
        "cache_pct": 100 * own.cache_bytes / full.cache_bytes,
    }


def _shrink(sample: Sample, scale: float, folder: Path) -> Sample:
    """Store a sample's picture at a scale, and ask the same about it; its boxes no longer hold."""
    picture = load_image(sample)
    size = [max(1, round(side * scale)) for side in picture.size]
    file = folder / f"{scale:g}-{sample.image_id}.png"
    picture.resize(size, Image.Resampling.LANCZOS).save(file)
    return replace(sample, image=file, image_size=None, objects=())
