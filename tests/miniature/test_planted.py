"""The planted model: knockouts and lens must find exactly the route that was written into its weights."""

from functools import cache

import pytest
import torch

from miniature.planted import ANSWER, PICK_UP, build_planted
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.experiments.curation import answer, needs_picture
from mmflow_utils.experiments.sufficiency import keep_flows
from mmflow_utils.models.load import load_model
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_ROUTES,
    IMAGE_TO_QUESTION,
    NO_QUESTION,
    Flow,
    variants,
    whole_depth,
)
from mmflow_utils.prompts.other_pictures import with_other_pictures

pytestmark = pytest.mark.slow

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
ENGINES = {"sweep": run_sweep, "reference": run_reference}
# Where each flow is used, and nowhere else.
ROUTES = {
    Flow(source="image", target="question"): {PICK_UP},
    Flow(source="image_related", target="question"): {PICK_UP},
    Flow(source="image_other", target="question"): set(),
    Flow(source="question", target="last"): {ANSWER},
    Flow(source="image", target="last"): set(),
    Flow(source="last", target="last"): set(),
    Flow(source="template", target="last"): set(),
}
# Cut in all layers: whether the answer needs it.
NEEDED = {"last": False, "question": True, "template": False, "question+last": True, "after_image": True}


@cache
def planted():
    """Give the model, as the notebooks load it, and questions about colors with their correct answers."""
    params = Params.from_yaml(ROOT / "params" / "planted.yaml")
    model = load_model(params)
    found, _ = read_gqa(params.path("questions"), params.path("scene_graphs"), params.path("images"))
    asked = [s for s in found if s.detailed == "chooseAttr" and s.answer in COLORS][:30]
    return model, [(sample, encode(model, sample)) for sample in asked]


@cache
def answered():
    """Give the prompts that it answers, and whose false color nothing else in the picture has."""
    model, asked = planted()
    right = [encoded for sample, encoded in asked if answer(model, encoded).lower() == sample.answer]
    sure = [encoded for encoded in right if run_sweep(model, encoded, []).base.softmax(-1).max() > 0.9]
    return right, sure


def effects(encoded, *, intervention="mask", flows=tuple(ROUTES), engine=run_sweep, **where):
    """Give the change in the answer's probability (%), flow by flow, for each layer."""
    model, _ = planted()
    some = variants(encoded.positions, flows, n_layers=model.n_layers, intervention=intervention, **where)
    run = engine(model, encoded, some)
    base, token = run.base.softmax(-1).max(-1)
    change = 100 * (run.variants.softmax(-1)[:, token] / base - 1)
    return dict(zip(flows, change.view(len(flows), -1).tolist(), strict=True))


def test_the_committed_weights_are_those_that_the_module_sets():
    model, processor = build_planted()
    stored = planted()[0].hf.state_dict()
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(weight, stored[name]) for name, weight in model.state_dict().items())
    assert processor.tokenizer.get_vocab() == planted()[0].tokenizer.get_vocab()


def test_it_answers_questions_about_one_of_two_colors():
    right, sure = answered()
    # The others have both colors in the picture.
    assert len(right) >= 0.75 * len(planted()[1])
    assert len(sure) >= 15


@pytest.mark.parametrize("engine", ENGINES)
def test_a_window_of_one_layer_finds_the_planted_layers_and_no_others(engine):
    prompts = answered()[1]
    for encoded in prompts[:12] if engine == "sweep" else prompts[:1]:
        for flow, found in effects(encoded, window=1, engine=ENGINES[engine]).items():
            if flow.source == "image_other":  # something else of the same color may stand there too
                assert all(abs(change) < 1 for change in found), flow
                continue
            bites = {layer for layer, change in enumerate(found) if change < -1}
            assert bites <= ROUTES[flow], flow
            # A second thing of that color can stand in for the related one.
            if flow.source != "image_related":
                assert bites == ROUTES[flow] and all(found[layer] < -95 for layer in bites), flow


@pytest.mark.parametrize("engine", ENGINES)
def test_cut_in_all_layers_the_answer_needs_the_planted_routes_and_no_others(engine):
    depth, prompts = whole_depth(planted()[0].n_layers), answered()[1]
    assert {flow.target for flow in IMAGE_ROUTES} == NEEDED.keys()
    for encoded in prompts[:12] if engine == "sweep" else prompts[:2]:
        found = effects(encoded, flows=(*IMAGE_ROUTES, *NO_QUESTION), engine=ENGINES[engine], **depth)
        for flow, (change,) in found.items():
            assert change < -95 if NEEDED.get(flow.target, True) else abs(change) < 1, flow
        assert needs_picture(planted()[0], encoded)  # where it answers by more than luck


def test_its_two_stages_are_enough_for_the_answer_and_in_other_layers_they_are_not():
    image, question = IMAGE_TO_QUESTION[0], FLOW_TO_LAST[0]
    first, second = range(PICK_UP, PICK_UP + 1), range(ANSWER, ANSWER + 1)
    kept = {
        "its two stages": [(image, first), (question, second)],
        "exchanged": [(image, second), (question, first)],
        "the first": [(image, first)],
        "the second": [(question, second)],
        "nothing": [],
    }
    model, _ = planted()
    frame = keep_flows(model, [encoded.sample for encoded in answered()[1][:8]], kept, progress=False).frame
    found = frame.set_index("kept").groupby("kept")
    assert found.correct_pct.mean().to_dict() == {name: 100.0 * (name == "its two stages") for name in kept}
    both = frame[frame.kept == "its two stages"]
    assert (both.p_kept / both.p_base - 1).abs().max() < 0.01


def test_the_related_patches_carry_the_answer():
    flow = IMAGE_PATCHES_TO_QUESTION[0]
    changes = [effects(encoded, window=1, flows=(flow,))[flow][PICK_UP] for encoded in answered()[1]]
    assert sum(change < -95 for change in changes) >= 0.6 * len(changes)


def test_a_wider_window_finds_all_windows_that_reach_a_planted_layer():
    found = effects(answered()[1][0], window=3, flows=FLOW_TO_LAST + IMAGE_TO_QUESTION)
    for flow, changes in found.items():
        reach = {layer for planted_in in ROUTES[flow] for layer in range(planted_in - 1, planted_in + 2)}
        assert {layer for layer, change in enumerate(changes) if change < -95} == reach
        assert all(abs(change) < 1 for layer, change in enumerate(changes) if layer not in reach)


def test_values_and_modules_tell_the_same():
    encoded = answered()[1][0]
    image, question = IMAGE_TO_QUESTION[0], FLOW_TO_LAST[0]
    for intervention, flow, layer in (
        ("zero_value", image, PICK_UP),
        ("zero_value", question, ANSWER),
        ("mean_value", question, ANSWER),
    ):
        found = effects(encoded, window=1, intervention=intervention, flows=(flow,))[flow]
        assert [n for n, change in enumerate(found) if change < -20] == [layer], (intervention, flow)
    # What the image tells is that it has the color at all: that all patches have in common.
    same = effects(encoded, window=1, intervention="mean_value", flows=(image,))[image]
    assert all(abs(change) < 1 for change in same)
    module = effects(encoded, window=1, intervention="attention_output", flows=(image,))[image]
    assert [n for n, change in enumerate(module) if change < -95] == [PICK_UP]
    mlp = effects(encoded, window=9, intervention="mlp_output", flows=(image,))[image]
    assert all(abs(change) < 1 for change in mlp)


def test_another_pictures_values_change_nothing_since_the_pattern_tells():
    """Which positions are attended to says what was found; what they hand over is the same in any picture."""
    model, flows = planted()[0], (IMAGE_TO_QUESTION[0], FLOW_TO_LAST[0])
    for sample in with_other_pictures(model, [encoded.sample for encoded in answered()[1][:6]]):
        encoded = encode(model, sample)
        found = effects(encoded, window=1, intervention="resample", flows=flows)
        assert (encoded.other["pixel_values"] != encoded.inputs["pixel_values"]).any()
        for flow, most in zip(flows, (15, 1), strict=True):
            assert all(abs(change) < most for change in found[flow]), flow


def test_the_lens_shows_the_answer_from_the_planted_layer_on():
    model, _ = planted()
    for encoded in answered()[1][:12]:
        run = run_sweep(model, encoded, [])
        token = run.base.argmax()
        seen = model.unembed(model.final_norm(run.resid_post)).softmax(-1)[:, token]
        # Entry 0 is the embedding; entry n + 1 what leaves layer n.
        assert (seen[: ANSWER + 1] < 0.05).all()
        assert (seen[ANSWER + 1 :] > 0.9).all()
