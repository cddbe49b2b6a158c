"""The explorer without a browser: widgets are set, and what it shows is what the library computes."""

import base64
import re

import ipywidgets as widgets
import pytest
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.engine.checks import attention_pattern
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.experiments.lens import logit_lens
from mmflow_utils.explorer import FLOWS, Explorer
from mmflow_utils.prompts.encoding import encode

RELATED = "Related image patches -> Question"


@pytest.fixture(scope="module")
def model():
    return tiny_vlm(n_layers=4)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [
        tiny_sample(folder, sample_id="q1"),
        tiny_sample(folder, sample_id="q2", seed=1, task="ChooseAttr"),
        tiny_sample(folder, sample_id="q3", seed=2, task="ChooseAttr", objects=()),
    ]


@pytest.fixture
def seen(model, samples):
    """An explorer that draws: a fifth of a second each time."""
    return Explorer(model, samples, window=1)


@pytest.fixture
def explorer(model, samples, monkeypatch):
    """One that draws only when it is asked for its figure."""
    monkeypatch.setattr(Explorer, "_draw", lambda self: None)
    return Explorer(model, samples, window=1)


def test_what_is_chosen_is_what_the_sweep_gives(explorer, model, samples):
    explorer.flow.value, explorer.layer.value, explorer.window.value = "Question -> Last", 2, 3
    frame = knockout_sweep(model, [samples[0]], FLOWS, window=3, progress=False).frame
    (row,) = frame[(frame.flow == "Question -> Last") & (frame.layer == 2)].to_dict("records")
    assert explorer.chosen.to_dict() == pytest.approx(row, nan_ok=True)
    assert abs(row["rel_change_pct"]) > 0.1  # else equality would say little


def test_a_flow_can_be_cut_in_one_head(explorer, model, samples):
    explorer.flow.value, explorer.layer.value, explorer.heads.label = "Question -> Last", 2, "head 1"
    frame = knockout_sweep(model, [samples[0]], FLOWS, window=1, heads=[1], progress=False).frame
    alone = frame[frame.flow == "Question -> Last"].set_index("layer").p_knockout[2]
    assert explorer.chosen["p_knockout"] == pytest.approx(alone)
    assert "cut in head 1 of layer 2" in explorer.sentence
    explorer.heads.value = None
    assert abs(explorer.chosen["p_knockout"] - alone) > 1e-4


def test_the_picture_can_show_what_the_target_attends_to(explorer, model, samples):
    encoded = encode(model, samples[0])
    explorer.flow.value, explorer.layer.value = RELATED, 2
    for name, heads in (("attention, mean of heads", slice(None)), ("attention, head 3", slice(3, 4))):
        explorer.heat.label = name
        patches = explorer._patches(explorer.chosen)
        rows = attention_pattern(model, encoded, 2)[heads, list(encoded.positions["question"])].mean((0, 1))
        assert patches["position"].tolist() == list(encoded.positions["image"])
        assert patches["weight"].tolist() == pytest.approx((100 * rows[list(encoded.positions["image"])]).tolist())
        left = explorer.figure.axes[0]
        assert left.get_title(loc="left") == f"{patches['weight'].sum():.0f} % of attention on the picture"
        related, others = left.collections
        assert len(related.get_facecolors()) == len(encoded.positions["image_related"])
        assert len(others.get_facecolors()) == len(encoded.positions["image_other"])


def test_the_words_are_those_of_the_lens(explorer, model, samples):
    lens = logit_lens(model, [samples[0]], protocol="corrected", progress=False).frame
    for layer in range(model.n_layers):
        explorer.layer.value = layer
        there = lens[lens.layer == layer]
        assert len(explorer.words) == 5 and explorer.words["probability"].is_monotonic_decreasing
        assert explorer.words["token"].iloc[0] == there["top_token"].iloc[0]
        best = there[there["rank"] == 1]
        assert best["probability"].tolist() == pytest.approx([explorer.words["probability"].iloc[0]] * len(best))


def test_it_opens_at_the_knockout_that_hurts_most(explorer):
    assert explorer.chosen["rel_change_pct"] == explorer.frame["rel_change_pct"].min() < -0.1


def test_each_choice_changes_the_figure_and_the_sentence(seen):
    seen.flow.value, seen.layer.value = "Question -> Last", 0
    shown = [(seen.view.value, seen.said.value)]
    for control, value in ((seen.flow, "Image -> Last"), (seen.layer, 3), (seen.window, 2)):
        control.value = value
        shown.append((seen.view.value, seen.said.value))
    pictures, sentences = zip(*shown, strict=True)
    assert len(set(pictures)) == len(set(sentences)) == len(shown)
    assert "Image → Last cut in layers 2 to 3" in seen.sentence


def test_a_choice_is_drawn_once(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(Explorer, "_draw", lambda self: drawn.append(self.task.value))
    explorer.task.value = "ChooseAttr"
    assert drawn == ["ChooseAttr"]
    explorer.sample.value = 2
    explorer.layer.value = 1
    assert len(drawn) == 3


def test_a_task_offers_its_questions_and_a_question_its_flows(explorer):
    assert [value for _, value in explorer.sample.options] == [0]
    explorer.task.value = "ChooseAttr"
    assert [value for _, value in explorer.sample.options] == [1, 2]
    assert RELATED in [name for _, name in explorer.flow.options]
    explorer.flow.value = RELATED
    explorer.sample.value = 2  # nothing in it has a box
    assert RELATED not in [name for _, name in explorer.flow.options]
    assert explorer.chosen["flow"] == explorer.flow.value != RELATED
    assert explorer.chosen["sample_id"] == "q3"


def test_a_chosen_flow_stays_chosen_where_the_next_question_has_it(explorer):
    explorer.flow.value = "Question -> Last"
    explorer.task.value = "ChooseAttr"
    assert explorer.chosen["flow"] == "Question -> Last" and explorer.chosen["sample_id"] == "q2"


def test_the_patches_that_are_cut_off_are_drawn(explorer, model, samples):
    spans = encode(model, samples[0]).positions
    for flow, name in ((RELATED, "image_related"), ("Image -> Question", "image"), ("Last -> Last", "last")):
        explorer.flow.value = flow
        picture = explorer.figure.axes[0]
        n = len(spans[name]) if name != "last" else 0
        assert sum(len(patches.get_paths()) for patches in picture.collections) == n
        assert (f"{n} image patches" if n else "no image patch") in picture.get_title("left")


def test_the_chosen_layer_is_marked_in_the_curve(explorer):
    explorer.flow.value, explorer.layer.value = "Question -> Last", 2
    lines = {line.get_label(): line for line in explorer.figure.axes[1].lines}
    assert lines["_layer"].get_xdata()[0] == 2
    (x,), (y,) = lines["_here"].get_data()
    assert (x, y) == (2, explorer.chosen["rel_change_pct"])
    curve = explorer.frame[explorer.frame.flow == "Question -> Last"]["rel_change_pct"].tolist()
    assert lines["Question → Last"].get_ydata().tolist() == curve
    assert lines["Question → Last"].get_alpha() > lines["Image → Last"].get_alpha()


def test_a_choice_costs_a_forward_pass_only_where_something_new_must_be_known(explorer, model):
    """Seconds differ between machines; how often the decoder runs does not."""
    ran = []
    hook = model.text.register_forward_hook(lambda *_: ran.append("pass"))

    def cost(control, value):
        ran.clear()
        assert control.value != value
        control.value = value
        assert len(explorer.frame) and len(explorer.words) == 5
        return len(ran)

    try:
        assert explorer.frame is not None and len(explorer.words) == 5  # the first sample is known
        explorer.flow.value, explorer.layer.value = "Image -> Question", 0
        assert [cost(explorer.layer, layer) for layer in (3, 1, 2)] == [0, 0, 0]
        assert [cost(explorer.flow, flow) for flow in ("Image -> Last", "Question -> Last")] == [0, 0]
        assert [cost(explorer.window, window) for window in (2, 3, 2, 1)] == [1, 1, 0, 0]
        assert cost(explorer.task, "ChooseAttr") == 2  # the sweep, and the clean run that the lens reads
        assert [cost(explorer.sample, sample) for sample in (2, 1, 2)] == [2, 0, 0]
    finally:
        hook.remove()


def test_the_view_is_a_picture_with_words_for_those_who_do_not_see_it(seen):
    data = re.search(r'base64,([\w+/=]+)"', seen.view.value)[1]
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert "cut in layer 0: the probability of" in re.search(r'alt="([^"]+)"', seen.view.value)[1]


def test_it_works_by_keyboard_and_does_not_draw_while_a_slider_moves(explorer):
    """Tab reaches a browser's own list or slider in the order of the page, and arrow keys change it."""
    *controls, said, view = explorer.children
    choices = [explorer.task, explorer.sample, explorer.flow, explorer.layer, explorer.window]
    choices += [explorer.heads, explorer.heat]
    assert controls == choices
    assert {type(control) for control in controls} == {widgets.Dropdown, widgets.IntSlider}
    assert {type(other) for other in (said, view)} == {widgets.HTML}
    for control in controls:
        assert control.tabbable is not False and not control.disabled and control.description
    assert not explorer.layer.continuous_update and not explorer.window.continuous_update


def test_without_a_kernel_it_is_a_sentence(explorer):
    assert "running kernel" in explorer._repr_mimebundle_()["text/plain"]


def test_no_samples_is_an_error(model):
    with pytest.raises(ValueError, match="load some with load_samples"):
        Explorer(model, [])
