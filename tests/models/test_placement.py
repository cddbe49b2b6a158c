"""Where weights lie and how long anything stays in memory: disk, one copy, nothing kept of a sweep."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save, tiny_sample, tiny_vlm, wanted
from tiny_families import FAMILIES
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import accelerate as placement

from mmflow_utils.engine.checks import check_model
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.lens import lens_logits
from mmflow_utils.models.adapter import compute_device
from mmflow_utils.models.load import load_model
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_PATCHES_TO_QUESTION, IMAGE_TO_QUESTION, variants

pytestmark = pytest.mark.slow

FLOWS = FLOW_TO_LAST + IMAGE_TO_QUESTION + IMAGE_PATCHES_TO_QUESTION
PEAK = Path("/proc/self/clear_refs")


def planned(model, encoded):
    return variants(encoded.positions, FLOWS, window=3, n_layers=model.n_layers)


def assert_same(one, other):
    for ours, theirs in ((one.base, other.base), (one.variants, other.variants)):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=["llava", "llava_next", *FAMILIES])
def stored(request, tmp_path_factory):
    """A model's folder, the model when it is loaded whole, a sample, and what plain passes give."""
    folder = save(tiny_vlm(request.param, n_kv_heads=2), tmp_path_factory.mktemp(request.param))
    plain, sample = load_model(wanted(folder)), tiny_sample(folder)
    encoded = encode(plain, sample)
    return folder, plain, sample, run_reference(plain, encoded, planned(plain, encoded))


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_device_map_auto_spreads_a_model_over_memory_and_disk(stored, share, monkeypatch):
    """Spread by the library itself, for a machine whose memory holds only a share of the weights."""
    folder, plain, sample, expected = stored
    n_bytes = sum(weight.nbytes for weight in plain.hf.parameters())
    monkeypatch.setattr(placement, "accelerate_max_memory", lambda *_: {"cpu": int(share * n_bytes)})
    spread = load_model(wanted(folder, device_map="auto"))
    assert spread.layers[-1].mlp.down_proj.weight.device.type == "meta"
    assert spread.device.type == compute_device(spread.layers[-1]).type == "cpu"
    encoded = encode(spread, sample)
    assert_same(run_sweep(spread, encoded, planned(spread, encoded)), expected)
    some = run_reference(spread, encoded, planned(spread, encoded)[::5])  # a pass each, with weights fetched from disk
    assert_same(some, replace(expected, variants=expected.variants[::5]))
    checks = check_model(spread, encoded)
    assert checks["passed"].all(), checks.to_string()
    stream = expected.resid_post[1:]
    torch.testing.assert_close(lens_logits(spread, stream), lens_logits(plain, stream), atol=1e-4, rtol=1e-4)
    said = [m.hf.generate(**encoded.inputs, max_new_tokens=3, do_sample=False) for m in (plain, spread)]
    assert torch.equal(*said)


def test_a_model_that_fits_is_left_whole(tmp_path):
    folder, sample = save(tiny_vlm(), tmp_path / "m"), tiny_sample(tmp_path)
    plain, mapped = load_model(wanted(folder)), load_model(wanted(folder, device_map="auto", device="auto"))
    encoded = encode(mapped, sample)
    some = planned(plain, encoded)
    assert_same(run_sweep(mapped, encoded, some), run_reference(plain, encode(plain, sample), some))


def megabytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1024


@pytest.mark.skipif(not os.access(PEAK, os.W_OK), reason="peak memory is read from /proc, where it begins anew")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_in_memory_once(dtype, tmp_path):
    """The most memory that the process held while it loaded a model of 300 MB, or 600 MB in float32.

    The pages of the file itself are counted with it. Where weights are converted the file is no part of the
    model, and the system may drop its pages at any time.
    """
    shape = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8)
    small = save(tiny_vlm("llama"), tmp_path / "small")
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, pad_token_id=0))
    folder = tmp_path / "large"
    empty.config.save_pretrained(folder)
    for file in small.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    weights = {name: torch.zeros(w.shape, dtype=torch.bfloat16) for name, w in empty.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    del weights
    load_model(wanted(small, prompt="{caption} {question}"))  # what loading itself needs
    gc.collect()
    PEAK.write_text("5")  # the peak begins anew
    before = megabytes("VmRSS")
    model = load_model(wanted(folder, prompt="{caption} {question}", dtype=dtype))
    took, held = megabytes("VmHWM") - before, sum(weight.nbytes for weight in model.hf.parameters()) / 2**20
    on_disk = (folder / "model.safetensors").stat().st_size / 2**20
    assert held > 250 and held == pytest.approx(on_disk * (2 if dtype == "float32" else 1), rel=0.01)
    assert took < 1.25 * held + (on_disk if dtype == "float32" else 0)
    assert dtype == "bfloat16" or took > 0.9 * held  # unconverted, a weight is read when it is used


def still_held(call):
    """Give what a call returns, and how many bytes of tensors are held more after it than before."""
    gc.collect()  # what earlier tests left would be freed in between, and counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        found = call()
        gc.collect()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return found, held, peak


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_nothing_but_the_result_outlives_a_sweep(family, tmp_path, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    model = tiny_vlm(family)
    encoded = encode(model, tiny_sample(tmp_path))
    some = planned(model, encoded)
    run_sweep(model, encoded, some)  # what the library keeps for good
    run, held, peak = still_held(lambda: run_sweep(model, encoded, some))
    result = sum(tensor.untyped_storage().nbytes() for tensor in (run.base, run.variants, run.resid_post))
    n_picture = len(encoded.positions["image"]) * model.text.config.hidden_size * 4
    assert result <= held < result + n_picture < peak  # the picture's features alone would be seen
    _, kept, _ = still_held(lambda: (run_sweep(model, encoded, some), text_features(model, encoded)))
    assert kept >= held + n_picture  # and are, where they are kept


def text_features(model, encoded):
    with torch.inference_mode():
        return model.hf(**encoded.inputs, output_hidden_states=True, use_cache=False).hidden_states


def test_a_sweep_holds_the_clean_states_of_a_layer_or_two_and_not_of_all(tmp_path, monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    peaks = []
    for n_layers in (4, 12):
        model = tiny_vlm("llava_next", n_layers=n_layers)
        encoded = encode(model, tiny_sample(tmp_path))
        few = variants(encoded.positions, FLOW_TO_LAST, window=3, n_layers=n_layers, layers=[0])
        run_sweep(model, encoded, few)
        run, _, peak = still_held(lambda: run_sweep(model, encoded, few))  # noqa: B023
        peaks.append(peak - run.resid_post.nbytes)
    states = encoded.positions.n_tokens * model.text.config.hidden_size * 4
    assert peaks[1] - peaks[0] < 2 * states  # eight layers more
