"""A prompt run on from what it shares with the one before: the same numbers as in full, or not at all."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tiny import tiny_sample, tiny_vlm, vlm_of_kind

from mmflow_utils.data.sample import picture_by_picture
from mmflow_utils.engine import answers
from mmflow_utils.engine import prefix as prefixes
from mmflow_utils.engine.answers import answer_together, greedy_answer
from mmflow_utils.engine.packed_pass import PackedPass
from mmflow_utils.engine.prefix import Prefix, run_clean
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_TO_QUESTION,
    Flow,
    Variant,
    variants,
)

pytestmark = pytest.mark.usefixtures("small_slices")
N_LAYERS = 3
KINDS = ("llava", "llava_next", "sliding", "idefics3", "smolvlm", "qwen2_5_vl", "internvl", "gemma3", "llama")
KINDS += ("qwen3_vl", "llava_onevision")
FLOWS = FLOW_TO_LAST + IMAGE_TO_QUESTION + IMAGE_PATCHES_TO_QUESTION
OTHERS = ("Is the cup red or blue?", "Is the cup on the left of the ball or on the right of it?", "What is it?")


@cache
def setting(kind: str):
    """Give a random model and four prompts about one picture."""
    options = {"prompt": "USER: {caption} {question} ASSISTANT:"} if kind == "llama" else {}
    model = vlm_of_kind(kind, n_layers=N_LAYERS, **options)
    with TemporaryDirectory() as folder:
        first = tiny_sample(Path(folder))
        samples = [first, *(replace(first, sample_id=q, question=q, objects=()) for q in OTHERS)]
        return model, [encode(model, sample) for sample in samples]


@pytest.fixture
def starts(monkeypatch):
    """See from which position each pass began."""
    seen, run = [], PackedPass.run

    def watched(packed, encoded):
        found = run(packed, encoded)
        seen.append(packed.start)
        return found

    monkeypatch.setattr(PackedPass, "run", watched)
    return seen


def assert_same(run, plain):
    for ours, theirs in ((run.base, plain.base), (run.variants, plain.variants)):
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(run.resid_post, plain.resid_post, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "intervention"), [*((kind, "mask") for kind in KINDS), ("llava", "mean_value")])
def test_questions_about_one_picture_give_the_reference_numbers(kind, intervention, starts):
    model, prompts = setting(kind)
    prefix = Prefix()
    for encoded in prompts:
        wanted = FLOWS if kind == "llava" else FLOWS[::2]
        held = encoded.positions
        flows = [flow for flow in wanted if flow.source in held and flow.target in held]
        some = variants(encoded.positions, flows, window=2, n_layers=N_LAYERS, intervention=intervention)
        assert_same(run_sweep(model, encoded, some, prefix=prefix), run_reference(model, encoded, some))
    assert starts[0] == 0
    assert all(starts[1:]), "nothing was shared"


@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_run_shares_too(kind):
    model, prompts = setting(kind)
    prefix = Prefix()
    for encoded in prompts:
        assert_same(run_clean(model, encoded, prefix), run_reference(model, encoded, []))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_given_together_are_those_given_alone(kind):
    model, prompts = setting(kind)
    together = answer_together(model, prompts, Prefix(), max_new_tokens=6)
    assert together == [greedy_answer(model, encoded, max_new_tokens=6) for encoded in prompts]
    assert answers._can_pack(model) == (kind not in ("sliding", "gemma3"))


def test_answers_of_a_random_model_differ_between_the_prompts():
    assert len({tuple(said) for said in answer_together(*setting("llava"), Prefix(), max_new_tokens=6)}) > 1


def test_nothing_is_shared_with_another_picture(tmp_path, starts):
    model, prompts = setting("llava")
    other = encode(model, tiny_sample(tmp_path, seed=5))
    prefix = Prefix()
    for encoded in (prompts[0], other, prompts[1]):
        run_sweep(model, encoded, [], prefix=prefix)
    assert starts == [0, 0, 0]


def test_nothing_is_shared_with_another_model(starts):
    model, prompts = setting("llava")
    other, prefix = vlm_of_kind("llava", n_layers=N_LAYERS, n_kv_heads=2), Prefix()
    for one, encoded in zip((model, other, model), prompts, strict=False):
        assert_same(run_sweep(one, encoded, [], prefix=prefix), run_reference(one, encoded, []))
    assert starts == [0, 0, 0]


def test_edits_within_the_picture_share_what_comes_before_them_or_nothing(starts):
    model, prompts = setting("llava")
    prefix = Prefix()
    for encoded in prompts[:2]:
        flow = Flow(source="image", target="image")
        some = variants(encoded.positions, [flow], window=1, n_layers=N_LAYERS)
        assert_same(run_sweep(model, encoded, some, prefix=prefix), run_reference(model, encoded, some))
    assert starts[1] <= prompts[1].positions["image"][0]


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_edits_at_the_pictures_end_share_what_can_be_cut(kind, starts):
    model, prompts = setting(kind)
    prefix = Prefix()
    for encoded in prompts[:2]:
        image, last = encoded.positions["image"], encoded.positions.last
        some = [Variant(layers=range(1, 3), target=(image[-1], last), source=image[:2])]
        assert_same(run_sweep(model, encoded, some, prefix=prefix), run_reference(model, encoded, some))
    # Qwen3-VL's picture enters later layers, too: in its midst nothing can go on.
    assert starts == [0, 0 if kind == "qwen3_vl" else prompts[1].positions["image"][-1]]


def test_questions_are_visited_picture_by_picture_and_their_rows_come_as_given(tmp_path, starts):
    model, _ = setting("llava")
    pictures = {name: tiny_sample(tmp_path, sample_id=name, seed=seed) for seed, name in enumerate("ab")}
    wanted = [("a", OTHERS[0]), ("b", OTHERS[1]), ("a", OTHERS[1]), ("b", OTHERS[0])]
    samples = [
        replace(pictures[name], sample_id=f"{name}{n}", question=question, objects=())
        for n, (name, question) in enumerate(wanted)
    ]
    assert picture_by_picture(samples) == [0, 2, 1, 3]
    found = knockout_sweep(model, samples, FLOW_TO_LAST, window=1, n_check=0, progress=False)
    assert list(dict.fromkeys(found.frame.sample_id)) == [sample.sample_id for sample in samples]
    assert [start > 0 for start in starts] == [False, True, False, True]
    alone = [knockout_sweep(model, [sample], FLOW_TO_LAST, window=1, progress=False).frame for sample in samples]
    assert found.frame.p_knockout.tolist() == pytest.approx([p for frame in alone for p in frame.p_knockout], abs=1e-5)


def test_a_model_whose_stored_keys_do_not_fit_is_run_in_full(monkeypatch, starts):
    model = tiny_vlm("llava", n_layers=N_LAYERS)
    _, prompts = setting("llava")
    going_on = Prefix.decoder_arguments

    def shifted(*args):  # as if positions were counted from the picture's end
        kwargs = going_on(*args)
        n_rows = kwargs["inputs_embeds"].shape[1]
        return kwargs | {"position_ids": torch.arange(n_rows)[None]}

    monkeypatch.setattr(Prefix, "decoder_arguments", shifted)
    prefix = Prefix()
    for encoded in prompts:
        assert_same(run_sweep(model, encoded, [], prefix=prefix), run_reference(model, encoded, []))
    assert starts == [0] * len(prompts)
    assert prefixes._PROVEN[model.hf] is False
    alone = [greedy_answer(model, encoded) for encoded in prompts]
    assert answer_together(model, prompts, prefix) == alone


def test_answers_are_given_together_within_the_room_of_one_pass(monkeypatch):
    model, prompts = setting("llava")
    monkeypatch.setattr(answers, "ENOUGH_ROWS", 0)
    counted, read = [], answers._SideBySide.read_prompts

    def counting(side_by_side):
        counted.append(len(side_by_side.prompts))
        return read(side_by_side)

    monkeypatch.setattr(answers._SideBySide, "read_prompts", counting)
    many = [*prompts, *prompts]
    said = answer_together(model, many, Prefix(), max_new_tokens=3)
    assert said == [greedy_answer(model, encoded, max_new_tokens=3) for encoded in many]
    assert len(counted) > 1
    most = max(encoded.positions.n_tokens for encoded in many)
    assert max(counted) * min(len(e.inputs["input_ids"][0]) - e.positions["image"][-1] - 1 for e in many) <= most
