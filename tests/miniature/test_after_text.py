"""The miniature that read before it saw: what it began with, its recipe, and that it answers."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import mmflow_utils as mm
from miniature import AFTER_TEXT_RECIPE, Recipe, begin
from mmflow_utils.params import ROOT, Params

FOLDER = ROOT / "assets" / "mini-after-text"


def test_it_begins_with_a_decoder_that_read_and_an_encoder_that_saw():
    model, processor = begin(AFTER_TEXT_RECIPE)
    reader = LlamaForCausalLM.from_pretrained(ROOT / "assets" / "mini-text", dtype=torch.float32)
    mini = LlavaForConditionalGeneration.from_pretrained(ROOT / "assets" / "mini", dtype=torch.float32)
    mine, its = model.model.language_model.state_dict(), reader.model.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in its)
    assert torch.equal(model.lm_head.weight, reader.lm_head.weight)
    tower, seen = (one.model.vision_tower.state_dict() for one in (model, mini))
    assert all(torch.equal(tower[name], seen[name]) for name in seen)
    assert not torch.equal(model.lm_head.weight, mini.lm_head.weight)  # mini's own decoder is another
    assert processor.tokenizer.get_vocab()["<image>"] == model.config.image_token_id


def test_it_was_trained_by_the_recipe_that_stands_in_the_package():
    record = json.loads((FOLDER / "training.json").read_text("utf-8"))
    told = asdict(Recipe(**record["recipe"]))  # what became a choice later was what is the default now
    assert json.dumps(told) == json.dumps(asdict(AFTER_TEXT_RECIPE))
    assert list(dict.fromkeys(row["stage"] for row in record["curves"])) == ["tower", "align", "joint"]


@pytest.mark.slow
def test_it_answers_as_its_record_says():
    params = Params.from_yaml(ROOT / "params" / "mini-after-text.yaml")
    tasks = ["ChooseAttr", "ChooseRel", "QueryAttr"]
    questions, _ = mm.read_questions(params, tasks=tasks)
    asked = mm.stratified_sample(questions, n=8, seed=2, by=lambda sample: sample.task)
    heard = mm.ask_questions(mm.load_model(params), asked, progress=False)
    assert len(heard) == 24 and heard.correct.mean() > 0.85
