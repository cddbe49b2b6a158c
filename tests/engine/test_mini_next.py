"""`mini-next`, a trained LLaVA-NeXT: tiles, newline tokens, grouped heads, and the instruments on it."""

import json
from dataclasses import asdict
from functools import cache

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from miniature.next import NEXT_RECIPE, begin
from miniature.train import Recipe
from miniature.world import FRAMES
from mmflow_utils.data.tasks import TASKS
from mmflow_utils.engine.pruning import Pruning, compare_to_knockout
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.curation import ask_questions, read_questions, stratified_sample
from mmflow_utils.models.load import load_model
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION, variants

pytestmark = pytest.mark.slow

PARAMS = Params.from_yaml(ROOT / "params" / "mini-next.yaml")
# Patches of the whole picture (8 x 8) and of its tiles, and a newline token for each row of the tiles.
TOKENS = {
    (224, 224): (64 + 16 * 16, 16),
    (256, 192): (64 + 16 * 12, 12),
    (192, 256): (64 + 12 * 16, 16),
    (320, 160): (64 + 16 * 8, 8),
    (160, 320): (64 + 8 * 16, 16),
}


@cache
def mini_next():
    """Give the model as the notebooks load it, and the questions of its split."""
    questions, skipped = read_questions(PARAMS, tasks=PARAMS.tasks)
    assert len(skipped) == 0
    return load_model(PARAMS), questions


@cache
def one_of(frame):
    """Encode a question about a picture of that width and height."""
    model, questions = mini_next()
    return encode(model, next(s for s in questions if Image.open(s.image).size == frame))


def record():
    return json.loads((PARAMS.path("checkpoint") / "training.json").read_text())


# ---- the model -----------------------------------------------------------------------------------------


def test_it_is_the_librarys_own_llava_next_with_tiles_and_grouped_heads():
    model, _ = mini_next()
    assert type(model.hf) is LlavaNextForConditionalGeneration and model.has_tiles
    assert (model.n_layers, model.n_heads, model.text.config.num_key_value_heads) == (12, 4, 2)
    assert model.value_proj(0).weight.shape == (64, 128)
    weights = sum(file.stat().st_size for file in PARAMS.path("checkpoint").glob("*.safetensors"))
    assert weights < 15e6


@pytest.mark.parametrize("frame", FRAMES)
def test_a_picture_takes_as_many_tokens_as_its_shape_asks_for(frame):
    positions = one_of(frame).positions
    assert (len(positions["image"]), len(positions["image_newline"])) == TOKENS[frame]


def test_it_answers_nine_of_ten_questions_of_each_task_and_not_without_its_picture():
    made = record()
    intact, shuffled = made["accuracy_pct"]["intact"], made["accuracy_pct"]["shuffled"]
    assert made["n_scenes"] >= 300
    assert {task: intact[task] for task in TASKS if intact[task] < 90} == {}
    assert all(shuffled[task] < intact[task] - 30 for task in TASKS)


def test_it_answers_so_where_the_notebooks_ask_it_too():
    model, questions = mini_next()
    asked = ask_questions(model, stratified_sample(questions, n=12, seed=1, by=lambda s: s.task), progress=False)
    assert len(asked) == 12 * len(TASKS)
    assert asked.correct.mean() > 0.9


# ---- how it came about -----------------------------------------------------------------------------------


def test_it_was_trained_by_the_recipe_that_stands_in_the_package():
    told = asdict(Recipe(**record()["recipe"]))  # what became a choice later was what is the default now
    assert json.dumps(told) == json.dumps(asdict(NEXT_RECIPE))
    assert list(dict.fromkeys(row["stage"] for row in record()["curves"])) == ["tower", "joint"]


def test_it_began_with_the_weights_of_mini_and_their_heads_averaged_in_pairs():
    model, processor = begin(NEXT_RECIPE)
    mini = LlavaForConditionalGeneration.from_pretrained(ROOT / "assets" / "mini").state_dict()
    for name, weight in model.state_dict().items():
        if name == "model.image_newline":
            line_break = processor.tokenizer.convert_tokens_to_ids("\n")
            assert torch.equal(weight, mini["model.language_model.embed_tokens.weight"][line_break])
        elif "language_model" in name and name.endswith(("k_proj.weight", "v_proj.weight")):
            a, b, c, d = mini[name].split(32)
            assert torch.allclose(weight, torch.cat([(a + b) / 2, (c + d) / 2]))
        else:
            assert torch.equal(weight, mini[name]), name


def test_a_recipe_that_begins_with_nothing_begins_with_random_weights(monkeypatch):
    stored = AutoTokenizer.from_pretrained(ROOT / "assets" / "mini")
    monkeypatch.setattr("miniature.next.build_tokenizer", lambda seed: stored)
    model, _ = begin(Recipe())
    mini = LlavaForConditionalGeneration.from_pretrained(ROOT / "assets" / "mini")
    assert type(model) is LlavaForConditionalGeneration and model.lm_head.weight.std() < 0.03
    assert not torch.equal(model.lm_head.weight, mini.lm_head.weight)


# ---- the instruments on it -------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", FRAMES)
def test_the_sweep_equals_plain_passes(frame):
    model, _ = mini_next()
    encoded = one_of(frame)
    flows = (*FLOW_TO_LAST, *IMAGE_TO_QUESTION)
    every = variants(encoded.positions, flows, window=3, n_layers=model.n_layers)
    fast, slow = (run(model, encoded, every[::6]) for run in (run_sweep, run_reference))
    assert (fast.variants.softmax(-1) - slow.variants.softmax(-1)).abs().max() < 1e-5
    # Control: were two variants exchanged, it would show.
    assert (fast.variants.flip(0).softmax(-1) - slow.variants.softmax(-1)).abs().max() > 1e-3


def test_removing_its_image_tokens_is_knocking_them_out():
    model, _ = mini_next()
    half = Pruning(from_layer=model.n_layers // 2)
    assert compare_to_knockout(model, one_of(FRAMES[0]), half) < 1e-5
    assert compare_to_knockout(model, one_of(FRAMES[0]), half, knockout_from=0) > 1e-3
