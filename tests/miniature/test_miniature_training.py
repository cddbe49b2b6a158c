"""Packed questions are plain forwards, and training that was stopped goes on as if it hadn't been."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tiny import fill_weights
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from miniature import precision
from miniature.build import PROMPT, build_model, build_tokenizer
from miniature.drawing import draw_scene
from miniature.next import build_next_processor, give_tiles
from miniature.optimize import optimizer_step
from miniature.packing import ATTENTION, pack, packed_logits, picture_tokens
from miniature.projector import KINDS, boost_attribute, share_of_variance, shown_features, warm_projector
from miniature.save import save_miniature
from miniature.score import task_accuracy
from miniature.train import Recipe, Trainer
from miniature.views import look_at
from miniature.world import FRAMES, sample_scene
from mmflow_utils.data.tasks import TASKS
from mmflow_utils.params import QUESTION_PROMPT, ROOT

pytestmark = pytest.mark.slow


@cache
def scenes(n=16):
    rng = np.random.default_rng(7)
    return tuple(sample_scene(rng) for _ in range(n))


@cache
def processor():
    return AutoProcessor.from_pretrained(ROOT / "assets" / "mini", backend="pil")


@cache
def next_model():
    """A random LLaVA-NeXT of those weights, with grouped heads, and its newline as loud as a word."""
    return give_tiles(model(), processor().tokenizer).requires_grad_(False).eval()


@cache
def model(n_layers=2):
    """A random model that attends far from evenly, so that a wrong mask or position shows."""
    built = build_model(processor().tokenizer, seed=0, n_layers=n_layers).requires_grad_(False).eval()
    fill_weights(built, seed=1)
    return built


def test_the_tokenizer_gives_back_every_question():
    tokenizer = build_tokenizer(seed=0)
    assert PROMPT == QUESTION_PROMPT  # the parameters' default prompt is the one trained on
    records = json.loads((ROOT / "assets/miniature/val_balanced_questions.json").read_text()).values()
    texts = {text for r in records for text in (r["question"], f" {r['answer'].capitalize()}")}
    texts |= {PROMPT.format(question=r["question"]).replace("<image>", "") for r in records}
    texts = sorted(texts)
    every = tokenizer(texts, add_special_tokens=False).input_ids
    for text, ids, said in zip(texts, every, tokenizer.batch_decode(every), strict=True):
        assert tokenizer.unk_token_id not in ids
        assert said.strip() == text.strip()


@pytest.mark.parametrize("word", ["Triangular", "Plastic", "Material"])
def test_some_answers_have_several_subwords(word):
    tokens = processor().tokenizer(f" {word}", add_special_tokens=False).input_ids
    assert len(tokens) > 1
    assert len(processor().tokenizer(" Red", add_special_tokens=False).input_ids) == 1


def shown(kind):
    """A model, its processor, and scenes that it is asked about."""
    if kind != "llava_next":
        return model(), processor(), list(scenes()[:3])
    rng = np.random.default_rng(0)
    framed = [sample_scene(rng, frames=(frame,)) for frame in FRAMES]
    return next_model(), build_next_processor(processor().tokenizer), framed


@torch.no_grad()
def packed(kind):
    net, sees, some = shown(kind)
    pictures = None if kind == "captions" else picture_tokens(net, sees, some, half=False)
    n_image_tokens = pictures and [len(tokens) for tokens in pictures]
    rng = np.random.default_rng(4)
    batch = pack(sees.tokenizer, some, rng, n_questions=8, n_image_tokens=n_image_tokens)
    return batch, pictures


def logits_of(kind, batch, pictures):
    net = shown(kind)[0]
    net.set_attn_implementation({"text_config": ATTENTION})
    return packed_logits(net, batch, pictures, half=False)


@torch.inference_mode()
def largest_difference(kind, batch, pictures):
    """Between the packed logits and those of one plain forward for each question."""
    together = logits_of(kind, batch, pictures)
    net, sees, some = shown(kind)
    net.set_attn_implementation({"text_config": "sdpa"})
    worst = 0.0
    for i, drafts in enumerate(batch.drafts):
        prefix = batch.ids[i, batch.segment[i] == 0]
        for k, draft in enumerate(drafts, start=1):
            here = batch.segment[i] == k
            if pictures is None:
                inputs = {"input_ids": torch.cat([prefix, batch.ids[i, here]])[None]}
            else:
                text = f"{PROMPT.format(question=draft.text)} {draft.answer.capitalize()}</s>"
                inputs = sees(text=text, images=draw_scene(some[i]), return_tensors="pt")
                assert inputs["input_ids"][0].tolist() == [*prefix.tolist(), *batch.ids[i, here].tolist()]
            alone = net(**inputs).logits[0, len(prefix) :]
            worst = max(worst, float((alone - together[i, here]).abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["llava", "llava_next", "captions"])
def test_a_packed_forward_equals_one_for_each_question(kind):
    batch, pictures = packed(kind)
    assert largest_difference(kind, batch, pictures) < 1e-4
    # Controls: were the positions to run on, or the questions to see one another, it would show.
    running = torch.arange(batch.ids.shape[1]).expand_as(batch.position)
    assert largest_difference(kind, replace(batch, position=running), pictures) > 0.01
    inside = logits_of(kind, replace(batch, segment=batch.segment.clamp(max=0)), pictures)
    assert (inside - logits_of(kind, batch, pictures))[batch.segment > 1].abs().max() > 0.01


def test_the_loss_counts_answers_most_and_no_token_across_questions():
    batch, _ = packed("llava")
    weight = batch.weight
    assert (weight[batch.answer == 1] == 1).all() and batch.answer.any(1).all()
    assert (weight[batch.segment == 0] == 0).all() and (weight[batch.segment == -1] == 0).all()
    starts = batch.segment[:, 1:] != batch.segment[:, :-1]
    assert (weight[:, 1:][starts] == 0).all()
    captions, _ = packed("captions")
    assert (captions.weight[captions.segment == 0] > 0).all()  # a caption's words are learnt too
    for i, drafts in enumerate(batch.drafts):
        said = processor().tokenizer.decode(batch.ids[i, (batch.segment[i] == 1) & (batch.answer[i] == 1)])
        assert said.strip() == drafts[0].answer.capitalize()


# ---- training --------------------------------------------------------------------------------------------

SHORT = Recipe(
    text_steps=4,
    align_steps=4,
    joint_steps=2,
    batch=2,
    joint_batch=1,
    n_questions=6,
    eval_every=2,
    eval_scenes=2,
    held_scenes=8,
)


def muon_steps(monkeypatch, half, *, n=3):
    """Take a few steps of Muon where the processor computes in `half`; returns the weights."""
    monkeypatch.setattr(precision, "HALF", half)
    weight = nn.Parameter(torch.zeros(12, 6))
    towards = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    optimizers = [torch.optim.Muon([weight], lr=0.1, weight_decay=0.0)]
    for step in range(n):
        optimizer_step((weight * towards.roll(step, 0)).sum(), nn.ParameterList([weight]), optimizers)
    return weight.detach()


def test_muon_takes_the_same_steps_where_bfloat16_would_be_emulated(monkeypatch):
    rounded, exact = (muon_steps(monkeypatch, half) for half in (torch.bfloat16, torch.float32))
    assert exact.norm() > 0.5 and (rounded - exact).norm() < 0.02 * exact.norm()
    with precision.AsHalf():
        given = torch.ones(2)
        made = given.bfloat16()
    assert made.dtype is torch.float32 and made is not given  # it is divided in place
    assert not torch.equal(rounded, exact)  # so the one was bfloat16's


class Stopped(Exception):
    """What ends a run before its time."""


def trainer(folder, stop_at=None):
    made = Trainer(build_model(processor().tokenizer, seed=0, n_layers=2), processor(), SHORT, folder)
    loss_of, calls = made._answer_loss, []

    def counted(rng, **options):
        calls.append(rng)
        if len(calls) == stop_at:
            raise Stopped
        return loss_of(rng, **options)

    made._answer_loss = counted
    return made


def train(folder, stop_at=None):
    made = trainer(folder, stop_at)
    made.text()
    made.align()
    return made


@pytest.mark.parametrize("stop_at", [4, 8])  # in the second half of the first stage, and of the second
def test_resuming_changes_nothing(tmp_path, stop_at, whole):
    with pytest.raises(Stopped):
        train(tmp_path, stop_at)
    resumed = train(tmp_path)
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.curves == whole.curves
    untrained = build_model(processor().tokenizer, seed=0, n_layers=2).state_dict()
    changed = {name for name in ours if not torch.equal(ours[name], untrained[name])}
    assert {name.split(".")[1] for name in changed} == {"language_model", "multi_modal_projector", "weight"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_the_projector_begins_with_what_the_heads_read(tmp_path):
    made = trainer(tmp_path)
    pixels = look_at(list(scenes()[:16]), processor().image_processor).pixels
    warm_projector(made.model, made.heads, pixels, seed=0)
    tower, projector = made.model.model.vision_tower, made.model.model.multi_modal_projector.linear_1
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
        passed = projector(states)
        assert passed.mean(0).abs().max() < 1e-2 and 0.5 < passed.std(0).mean() < 2
        # What no head reads doesn't pass: a direction at right angles to all of them.
        heads = torch.cat([head.weight for head in made.heads.values()])
        blind = torch.linalg.svd(heads).Vh[-1]
        assert torch.allclose(projector(states + 100 * blind), passed, atol=1e-2)
        assert not torch.allclose(projector(states + 100 * heads[0]), passed, atol=1)


def test_a_fact_is_said_louder_and_nothing_is_lost(tmp_path):
    made, views = trainer(tmp_path), look_at(list(scenes()[:48]), processor().image_processor)
    with torch.no_grad():
        before, truth = shown_features(made.model, views)
        boost_attribute(made.model, views, "color", share=1.0, seed=0)
        after, _ = shown_features(made.model, views)
    grown = {kind: share_of_variance(after, truth[kind]) / share_of_variance(before, truth[kind]) for kind in KINDS}
    assert max(grown, key=grown.get) == "color" and grown["color"] > 3
    # It is a linear map that loses nothing: the features before can be read off those after.
    centered, wanted = after - after.mean(0), before - before.mean(0)
    back = centered @ torch.linalg.lstsq(centered, wanted).solution
    assert (back - wanted).norm() < 0.05 * wanted.norm()


def test_what_carries_a_fact_that_is_said_louder_is_held(tmp_path):
    recipe = replace(SHORT, louder=((1, "color", 1.0, 2),))
    made = Trainer(build_model(processor().tokenizer, seed=0, n_layers=2), processor(), recipe, tmp_path)
    core = made.model.model
    learns = []
    for step in range(4):
        made._speak_up(step)
        learns.append(core.multi_modal_projector.linear_1.weight.requires_grad)
        assert core.language_model.layers[0].mlp.up_proj.weight.requires_grad == learns[-1]
    assert learns == [True, False, False, True]


def test_the_share_of_variance_by_hand():
    features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 1.0], [2.0, -1.0]])
    assert share_of_variance(features, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.5)
    assert share_of_variance(features, torch.tensor([0, 1, 1, 0])) == pytest.approx(0)
    assert share_of_variance(features, torch.arange(4)) == pytest.approx(1)


def test_a_finished_stage_is_not_trained_again(whole):
    before = [dict(row) for row in whole.curves]
    whole.text()
    assert sorted(map(str, whole.curves)) == sorted(map(str, before))
    losses = [row for row in whole.curves if row["metric"] == "loss"]
    assert sorted((row["stage"], row["step"]) for row in losses) == [
        *(("align", 1), ("align", 4)),
        *(("text", 1), ("text", 4)),
    ]


def test_a_saved_miniature_loads_as_any_model(tmp_path, whole):
    record = save_miniature(whole, tmp_path, n_scenes=50)
    assert json.loads((tmp_path / "training.json").read_text()) == json.loads(json.dumps(record))
    assert set(record["accuracy_pct"]["intact"]) == {*TASKS, "other"}
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = AutoProcessor.from_pretrained(tmp_path, backend="pil")(
        text=PROMPT.format(question="Is the cup red or blue?"),
        images=draw_scene(scenes()[0]),
        return_tensors="pt",
    )
    with torch.inference_mode():
        assert torch.equal(loaded(**inputs).logits, whole.model(**inputs).logits)


def test_accuracy_counts_whole_answers(monkeypatch):
    # Predicting each token that comes next is all right; one wrong answer token is one wrong question.
    def oracle(_, batch, pictures, *, half):
        right = torch.nn.functional.one_hot(batch.ids.roll(-1, 1), 440).float()
        first = [int(torch.nonzero(row)[0]) for row in batch.answer]
        for i, place in enumerate(first):
            right[i, place - 1] = 0
            right[i, place - 1, 3] = 1
        return right

    monkeypatch.setattr("miniature.score.packed_logits", oracle)
    accuracy = task_accuracy(model(), processor(), n_scenes=10, seed=0)
    assert accuracy.pop("ChooseAttr") == 0  # the first question of each scene
    assert set(accuracy.values()) == {100.0}
