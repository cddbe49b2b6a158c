"""Small frames of every experiment, kept as they were when its version was last raised.

.venv/bin/python tests/helpers/expected_frames.py    # keeps those of each experiment whose version was raised
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import pandas as pd
from tiny import tiny_sample, tiny_vlm

from mmflow_utils import experiments
from mmflow_utils.experiments import patching
from mmflow_utils.experiments.patching import Pair
from mmflow_utils.prompts import subwords
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION
from mmflow_utils.prompts.image_patches import control_flows, encode_random_patches
from mmflow_utils.results.frames import read_frame, save_frame
from mmflow_utils.results.record import Result
from mmflow_utils.results.version import VERSIONS

FOLDER = Path(__file__).parents[1] / "results" / "expected"
COMMAND = ".venv/bin/python tests/helpers/expected_frames.py"
TOLERANCE = 1e-5  # of the largest number in a column, or of 1

EVERY_FLOW = (*FLOW_TO_LAST, *IMAGE_TO_QUESTION)
RANDOM_PATCHES = partial(encode_random_patches, n_draws=2, seed=0)
EDITS = ("zero_value", "mean_value", "attention_output", "mlp_output")
CALLS = {
    "ask_questions": [{}],
    "answer_subwords": [{}, {"max_new_tokens": 3}],
    "head_screen": [{"flows": IMAGE_TO_QUESTION}],
    "head_sweep": [
        {"flows": (FLOW_TO_LAST[0], *IMAGE_TO_QUESTION)},
        {"flows": IMAGE_TO_QUESTION, "sets": [{"layer": 9, "head": 9, "heads": [(0, 1), (1, 0), (1, 3)]}]},
    ],
    "keep_flows": [{"kept": {"nothing": [], "one stage": [(IMAGE_TO_QUESTION[0], range(1, 3))]}}],
    "knockout_sweep": [
        {"flows": EVERY_FLOW, "window": 3},
        {"flows": control_flows(2), "window": 2, "encoder": RANDOM_PATCHES},
        *({"flows": EVERY_FLOW, "window": 2, "intervention": edit} for edit in EDITS),
    ],
    "logit_lens": [{}],
    "module_knockout": [{"window": 2}],
    "question_semantics": [{"window": 2}, {"window": 3, "pooled": True, "top_k": 3}],
    "prune_sweep": [{"removed": [1, 3]}],
    "picture_sweep": [{"scales": (0.5, 0.25)}],
    "patch_sweep": [{}, {"sets": ("image", "last"), "layers": [1], "window": 2}],
}
"""For each experiment the calls whose rows are kept."""
WORDS = {"ask_questions": "correct", "answer_subwords": "answer"}
"""Experiments that measure words and no numbers, and the column that says what is found."""
SAID = "|2right|2right|2"  # what the random model says
ROOMS = [import_module(f"{experiments.__name__}.{module.name}") for module in iter_modules(experiments.__path__)]


def find_experiment(name: str) -> Callable:
    """Return the experiment of a name, wherever it is defined."""
    (experiment,) = (getattr(room, name) for room in (*ROOMS, subwords) if name in getattr(room, "__all__", ()))
    return experiment


def measure(name: str, pictures: Path) -> pd.DataFrame:
    """Measure the rows of an experiment anew, on a random model and a few questions."""
    model = tiny_vlm("llava_next", n_kv_heads=2)
    sizes = [(60 + 30 * n, 60) for n in range(2)]
    samples = [tiny_sample(pictures, sample_id=f"q{n}", seed=n, size=size) for n, size in enumerate(sizes)]
    if name == "patch_sweep":  # by a model that answers otherwise about another picture
        model = tiny_vlm("llava", n_layers=3)
        own, other = (tiny_sample(pictures, sample_id=f"{name}0", seed=n) for n, name in enumerate("ab"))
        samples = [Pair(**vars(own), other=replace(other, answer="right"))]
    if name in WORDS:
        samples += [replace(sample, sample_id=f"{sample.sample_id}-said", answer=SAID) for sample in samples]
    with patch.object(patching, "LEAST_GAP", 1e-3):  # a random model's answers are close
        found = [find_experiment(name)(model, samples, **call, progress=False) for call in CALLS[name]]
    return Result.join([one if isinstance(one, Result) else Result(one) for one in found]).frame


def kept(name: str) -> tuple[pd.DataFrame, int]:
    """Return an experiment's kept rows, and the version that they are of."""
    frame, manifest = read_frame(FOLDER / f"{name}.parquet")
    return frame, manifest["depends_on"]["version"]


def find_changes(frame: pd.DataFrame, expected: pd.DataFrame) -> list[str]:
    """Name the columns that differ by more than rounding."""
    if list(frame) != list(expected) or len(frame) != len(expected):
        return [f"{len(expected)} rows of {', '.join(expected)} became {len(frame)} of {', '.join(frame)}"]
    changed = []
    for name in expected:
        if pd.api.types.is_float_dtype(expected[name]):
            now, before = frame[name].to_numpy(float), expected[name].to_numpy(float)
            scale = max(1.0, np.nanmax(np.abs(before), initial=0.0))
            same = np.allclose(now, before, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
        else:
            # Lists come back from a file as arrays, and what is missing equals nothing.
            now, before = ([repr(np.asarray(value, object)) for value in one[name]] for one in (frame, expected))
            same = now == before
        changed += [] if same else [name]
    return changed


def keep_raised() -> None:
    """Keep the rows of each experiment that has none yet of its version; the others stay as they are."""
    for name, version in VERSIONS.items():
        if (FOLDER / f"{name}.parquet").is_file() and kept(name)[1] == version:
            print(f"{name}: version {version} is kept already")
            continue
        with TemporaryDirectory() as pictures:
            made_from = {"depends_on": {"experiment": name, "version": version}}
            save_frame(measure(name, Path(pictures)), FOLDER / f"{name}.parquet", made_from, fresh=True)
        print(f"{name}: kept the rows of version {version}")


if __name__ == "__main__":
    sys.exit(keep_raised())
