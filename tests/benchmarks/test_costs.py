"""What docs/models.md says that a model costs is what is counted, of the shapes that the models have."""

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model_costs as costs
from benchmarks.speed import SIX_FLOWS, random_llava, random_prompt
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.flows import variants

# Billions of parameters that the hub states for the safetensors of each repository.
STATED = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "llava-v1.6-vicuna-7b": 7.06,
    "llava-v1.6-vicuna-13b": 13.35,
    "llama3-llava-next-8b": 8.36,
    "vicuna-13b-v1.5": 13.02,
    "qwen2.5-vl-7b": 8.29,
    "internvl3-8b": 7.94,
    "gemma-3-4b": 4.30,
    "smolvlm-2b": 2.25,
}


def test_the_page_shows_what_was_counted():
    frame = pd.read_csv(costs.RECORDED)
    assert costs.as_table(frame) in costs.PAGE.read_text(encoding="utf-8")
    files = (ROOT / "params").glob("*.yaml")
    fetched = {f.stem for f in files if not Params.from_yaml(f).checkpoint.startswith("assets/")}
    assert set(frame.model) == set(STATED) == fetched
    assert frame.set_index("model").parameters_b.to_dict() == pytest.approx(STATED, rel=0.002)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "smolvlm-2b"])
def test_counting_again_gives_the_recorded_numbers(name):
    recorded = pd.read_csv(costs.RECORDED).set_index("model").loc[name].to_dict()
    again = costs.count(name, costs.SHAPES[name])
    assert again.pop("model") == name and again.pop("repository") == recorded.pop("repository")
    assert again == pytest.approx(recorded, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "n_image"),
    [  # by each family's own rule, for a picture of 640 x 480
        ("llava-1.5-13b", 24 * 24),
        ("llava-v1.6-vicuna-7b", 24 * 24 + 36 * (48 + 1)),  # a row of 48 and its newline; 48 x 3/4 rows
        ("qwen2.5-vl-7b", 23 * 17),  # 644 x 476 pixels
        ("internvl3-8b", (4 * 3 + 1) * 256),
        ("gemma-3-4b", 256),
        ("smolvlm-2b", (4 * 3 + 1) * 81),
    ],
)
def test_the_picture_has_the_tokens_of_its_family(name, n_image):
    assert pd.read_csv(costs.RECORDED).set_index("model").image_tokens[name] == n_image


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-1.5-7b", "gemma-3-4b", "internvl3-8b"])
def test_the_pictures_path_costs_what_torch_counts(name):
    shape = costs.shrunk(costs.SHAPES[name])
    model = costs.build(name, shape, "cpu", torch.float32)
    encoded = costs.prompt(model, shape)
    model.hf.set_attn_implementation("eager")  # the fused kernel's work on a CPU is not counted
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.hf.get_image_features(encoded.inputs["pixel_values"])
    # Not counted by us: the convolution that cuts the patches, and CLIP's class token.
    assert costs.picture_flops(model, encoded) == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-1.5-7b", "vicuna-13b-v1.5", "qwen2.5-vl-7b", "smolvlm-2b"])
def test_measuring_runs_the_sweep_on_a_prompt_of_true_length(name):
    shape = costs.shrunk(costs.SHAPES[name])
    found = costs.measure(name, shape, n_rounds=1)
    assert found["n_tokens"] == pd.read_csv(costs.RECORDED).set_index("model").prompt_tokens[name]
    assert found["clean_s"] > 0 and found["sweep_s"] > 0
    model = costs.build(name, shape, "cpu", torch.float32)
    encoded = costs.prompt(model, shape)
    run = run_sweep(model, encoded, costs.plan(model, encoded))
    assert len(run.variants) == found["n_knockouts"] and torch.isfinite(run.variants).all()


def test_the_bound_on_memory_is_near_the_recorded_peaks():
    """Peaks of the race of benchmarks/sweep_speed.py, which ran in float32."""
    race = pd.read_csv(ROOT / "benchmarks" / "recorded" / "sweep_speed.csv").query("way == 'sweep'")
    for row in race.itertuples():
        n_image = row.n_tokens - 29
        with torch.device("meta"):
            model = random_llava(n_layers=2, n_image=n_image)
        config = model.text.config
        config.num_hidden_layers = row.n_layers
        planned = variants(random_prompt(model, n_image=n_image).positions, SIX_FLOWS, window=9, n_layers=row.n_layers)
        bound = costs.sweep_memory(config, planned, n_tokens=row.n_tokens, itemsize=4) / 2**20
        assert bound == pytest.approx(row.memory_mb, rel=0.25)
