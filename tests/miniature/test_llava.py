"""The recipe around a language model, here a small one: it trains, resumes, and what is stored loads merged."""

import tempfile
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from miniature import llava, save
from miniature.llava import LlavaRecipe, LlavaTrainer, held_out_drafts
from mmflow_utils.models.load import load_model
from mmflow_utils.params import QUESTION_PROMPT

pytestmark = pytest.mark.slow

BASE = "assets/mini-text"
FEW = dict(word_scenes=20, word_steps=10, align_steps=2, lead_steps=1, instruct_steps=4, decay_steps=2, warm_up=1)
FEW |= dict(eval_every=2, eval_scenes=6)
KINDS = {
    "picture": LlavaRecipe(**FEW),
    "frozen": LlavaRecipe(**FEW, frozen=True),
    "caption": LlavaRecipe(**FEW, shown="caption"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The text-only miniature in place of the language model of the package."""
    for module in (llava, save):
        monkeypatch.setattr(module, "BASE", BASE)
        monkeypatch.setattr(module, "IMAGE_TOKEN", "<image>")
    monkeypatch.setattr(llava, "END_TOKEN", "</s>")
    monkeypatch.setattr(llava, "HEAD", "USER: ")
    monkeypatch.setattr(llava, "ASKED", "\n{question} ASSISTANT:")
    monkeypatch.setattr(llava, "DESCRIBED", "\n{question} ASSISTANT:")


@cache
def trained(kind):
    """A trainer at its end, and the weights that it began with."""
    trainer = LlavaTrainer(KINDS[kind], tempfile.mkdtemp())
    before = {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}
    trainer.align()
    trainer.instruct()
    return trainer, before


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_the_recipe_names_is_learnt(kind):
    trainer, before = trained(kind)
    moved = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    learnt = {"adapter" if "lora_" in name else "projector" for name in moved}
    assert learnt == {"picture": {"adapter", "projector"}, "frozen": {"projector"}, "caption": {"adapter"}}[kind]
    assert all("lora_" in name or name.startswith("0.") for name in moved)  # the language model itself stays
    curves = {(row["stage"], row["metric"]) for row in trainer.curves}
    assert ("instruct", "accuracy_pct") in curves and ("instruct", "loss") in curves


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    recipe = KINDS["picture"]
    whole, _ = trained("picture")
    stopped = LlavaTrainer(recipe, tmp_path / "stopped")
    stopped.align()
    fit = stopped.fit
    stopped.fit = lambda stage, parts, steps, *run, **how: fit(stage, parts, 2, *run, **how)
    stopped.set_rate = lambda stage, optimizers, step, steps: LlavaTrainer.set_rate(
        stopped, stage, optimizers, step, recipe.instruct_steps
    )
    stopped.instruct()
    again = LlavaTrainer(recipe, tmp_path / "stopped")
    again.align()
    again.instruct()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_loaded_merged(tmp_path, kind):
    recipe = KINDS[kind]
    trainer, _ = trained(kind)
    folder = tmp_path / "stored"
    record = save.save_llava(trainer, folder, n_scenes=6)
    assert set(record["accuracy_pct"]) == {"intact", "shuffled"} and record["recipe"]["rank"] == recipe.rank
    text_only = recipe.shown == "caption"
    prompt = QUESTION_PROMPT.replace("<image>", "{caption}") if text_only else QUESTION_PROMPT
    wanted = dict(model="m", checkpoint=str(folder), revision=None, prompt=prompt, do_pad=True, dtype="float32")
    wanted |= dict(device="cpu", device_map=None, language_model=None if text_only else BASE)
    model = load_model(SimpleNamespace(**wanted))
    base = load_model(SimpleNamespace(**wanted | dict(checkpoint=BASE, language_model=None)))
    layer, plain = model.layers[3].mlp.up_proj.weight, base.layers[3].mlp.up_proj.weight
    a, b = (trainer.adapter().get(f"model.layers.3.mlp.up_proj.lora_{x}.default.weight") for x in "AB")
    expected = plain if a is None else plain + recipe.alpha / recipe.rank * (b @ a).detach()
    torch.testing.assert_close(layer, expected, atol=1e-4, rtol=0)
    assert (a is None) == torch.equal(layer, plain)
    if not text_only:
        projector = model.hf.model.multi_modal_projector
        torch.testing.assert_close(
            projector.linear_2.weight, trainer.projector[2].weight.detach(), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", ["picture", "caption"])
def test_the_questions_that_are_listed_are_those_that_accuracy_asks(monkeypatch, kind, shuffled):
    trainer, _ = trained(kind)
    asked, n_scenes = [], llava.PART + 2  # more than one part
    monkeypatch.setattr(llava, "share_right", lambda segments, missed, drafts: asked.extend(sum(drafts, [])) or {})
    trainer.accuracy(n_scenes, seed=trainer.recipe.seed + 1, shuffled=shuffled)
    assert asked and held_out_drafts(trainer.recipe, n_scenes, shuffled=shuffled) == asked
