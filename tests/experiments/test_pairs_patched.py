"""What patching measures: whose answer comes, where nothing can come over, and on the planted model, where all does."""

from dataclasses import replace

import pytest
from tiny import tiny_sample, tiny_vlm

from miniature.planted import ANSWER, PICK_UP
from mmflow_utils.data.sample import SceneObject
from mmflow_utils.experiments import patching
from mmflow_utils.experiments.patching import Pair, find_pairs, load_pairs, patch_sweep
from mmflow_utils.models.load import load_model
from mmflow_utils.params import ROOT, Params
from mmflow_utils.results.resume import measure_in_parts
from mmflow_utils.results.version import describe_call

N_LAYERS = 3


def pair_of(folder, *, n=0, **changes):
    own, other = (tiny_sample(folder, sample_id=f"{name}{n}", seed=2 * n + m, **changes) for m, name in enumerate("ab"))
    return Pair(**vars(own), other=replace(other, answer="right"))


@pytest.fixture(autouse=True)
def unsure_models_count(monkeypatch):
    monkeypatch.setattr(patching, "LEAST_GAP", 1e-3)  # a random model's answers are close


@pytest.fixture(scope="module")
def planted():
    return load_model(Params.from_yaml(ROOT / "params/planted.yaml"))


def test_recovery_jumps_at_the_planted_layers_and_nowhere_else(planted, tmp_path):
    params = Params.from_yaml(ROOT / "params/planted.yaml", n_samples=10, outputs=str(tmp_path))
    pairs = load_pairs(planted, params)
    assert len(pairs) == 2 and all(pair.answer != pair.other.answer for pair in pairs)
    result = patch_sweep(planted, pairs, n_check=1, progress=False)
    assert result.max_check_diff < 1e-5
    found = result.frame.groupby(["positions", "layer"]).recovery_pct.agg(["min", "max"]).round(1)
    holds = {
        "Image": range(PICK_UP + 1),
        "Related image patches": range(PICK_UP + 1),
        "Question": range(PICK_UP + 1, ANSWER + 1),
        "Options": range(PICK_UP + 1, ANSWER + 1),
        "Last": range(ANSWER + 1, planted.n_layers),
    }
    for (name, layer), row in found.iterrows():
        expected = 100.0 if layer in holds.get(name, ()) else 0.0
        assert row.tolist() == [expected] * 2, (name, layer)
    assert ((result.frame.flipped_pct == 100) == (result.frame.recovery_pct > 50)).all()


def test_rows_say_what_they_are_called(tmp_path):
    model = tiny_vlm("llava", n_layers=N_LAYERS)
    result = patch_sweep(model, [pair_of(tmp_path)], sets=("image", "question", "options", "last"), progress=False)
    rows = result.frame.set_index(["positions", "layer"])
    assert len(rows) == 4 * N_LAYERS and result.max_check_diff < 1e-5
    assert rows.recovery_pct["Image", 0] == pytest.approx(100, abs=1e-3)  # the text enters as it is
    assert rows.recovery_pct["Question", 0] == pytest.approx(0, abs=1e-3)
    assert rows.p_patched["Image", 0] == pytest.approx(rows.p_donor["Image", 0], abs=1e-6)
    moved = rows.logit_diff_patched - rows.logit_diff_base
    whole = rows.logit_diff_donor - rows.logit_diff_base
    assert (100 * moved / whole).tolist() == pytest.approx(rows.recovery_pct.tolist())
    plain = patch_sweep(model, [pair_of(tmp_path)], sets=("image",), layers=[1], method="reference", progress=False)
    assert plain.frame.p_patched[0] == pytest.approx(rows.p_patched["Image", 1], abs=1e-6)


def test_a_wide_window_puts_the_states_in_again(tmp_path):
    model = tiny_vlm("llava", n_layers=N_LAYERS)
    once, always = (
        patch_sweep(model, [pair_of(tmp_path)], sets=("question",), layers=[1], window=window, progress=False).frame
        for window in (1, N_LAYERS)
    )
    assert (once.p_patched - always.p_patched).abs().item() > 1e-6


def test_what_a_prompt_lacks_is_skipped_with_its_reason(tmp_path):
    model = tiny_vlm("llava", n_layers=N_LAYERS)
    pair = pair_of(tmp_path, option_true=None, option_false=None)
    result = patch_sweep(model, [pair], sets=("options", "last"), n_check=0, progress=False)
    assert result.skipped == [
        {"sample_id": "a0", "positions": "Options", "reason": "options: the question has no options"}
    ]
    alike = replace(pair, other=replace(pair, sample_id="again"))
    (skipped,) = patch_sweep(model, [alike], sets=("last",), n_check=0, progress=False).skipped
    assert "nothing to recover" in skipped["reason"]


def test_a_wrong_patch_is_found_out_by_the_check(tmp_path, monkeypatch):
    model, right = tiny_vlm("llava", n_layers=N_LAYERS), patching.run_patched

    def one_layer_late(model, encoded, donor, patches):
        late = [replace(p, layers=range(p.layers.start + 1, p.layers.stop + 1)) for p in patches[:2]]
        return right(model, encoded, donor, [*late, *patches[2:]])

    monkeypatch.setattr(patching, "run_patched", one_layer_late)
    with pytest.raises(ValueError, match="differ by"):
        patch_sweep(model, [pair_of(tmp_path)], sets=("image",), progress=False)


def test_pairs_ask_the_same_of_pictures_of_one_size_and_answer_otherwise(tmp_path):
    left, right, small, same, third = (
        tiny_sample(tmp_path, sample_id=name, answer=answer, image_size=size)
        for name, answer, size in (
            ("1", "left", (40, 28)),
            ("2", "right", (40, 28)),
            ("3", "right", (20, 28)),
            ("4", "left", (40, 28)),
            ("5", "right", (40, 28)),
        )
    )
    pairs = find_pairs([left, small, same, right, third, replace(right, question="Why?")])
    assert [(pair.sample_id, pair.other.sample_id) for pair in pairs] == [("1", "2"), ("4", "5")]


def test_without_a_known_size_the_pictures_own_counts_and_one_picture_is_no_pair(tmp_path):
    sizes = {"a": (40, 28), "b": (28, 40), "c": (40, 28)}
    left, tall, right = (
        tiny_sample(tmp_path, sample_id=name, size=size, answer="left" if name == "a" else "right")
        for name, size in sizes.items()
    )
    assert left.image_size is None
    again = replace(left, sample_id="again", answer="right")
    missing = replace(right, sample_id="missing", image_id="missing", image=tmp_path / "missing.png")
    pairs = find_pairs([left, again, tall, missing, right])
    assert [(pair.sample_id, pair.other.sample_id) for pair in pairs] == [("a", "c")]


@pytest.mark.parametrize("what", ["options", "objects"])
def test_the_rest_of_a_question_is_none_where_words_of_it_are_lost(what, tmp_path):
    model, pair = tiny_vlm("llava", n_layers=N_LAYERS), pair_of(tmp_path)
    none = {"options": {"option_true": None, "option_false": None}, "objects": {"objects": ()}}[what]
    lost = {"options": {"option_true": "purple"}, "objects": {"objects": (SceneObject(name="phone"),)}}[what]
    rest = {"sets": ("rest_of_question",), "layers": [1], "n_check": 0, "progress": False}
    assert len(patch_sweep(model, [replace(pair, **none)], **rest).frame) == 1
    (skipped,) = patch_sweep(model, [replace(pair, **lost)], **rest).skipped
    assert "is not a whole word of the question" in skipped["reason"] and what in skipped["reason"]


def test_what_is_measured_depends_on_the_other_picture_and_not_on_where_it_lies(tmp_path):
    pair = pair_of(tmp_path)
    seen = describe_call(patch_sweep, [pair], {})["samples"]
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(pair.other.image.read_bytes())
    assert (
        describe_call(patch_sweep, [replace(pair, other=replace(pair.other, image=elsewhere))], {})["samples"] == seen
    )
    assert (
        describe_call(patch_sweep, [replace(pair, other=replace(pair.other, image=pair.image))], {})["samples"] != seen
    )


def test_it_goes_part_by_part(tmp_path):
    model = tiny_vlm("llava", n_layers=N_LAYERS)
    pairs, params = [pair_of(tmp_path, n=n) for n in range(2)], Params(outputs=str(tmp_path))
    options = {"sets": ("image", "last"), "n_check": 1, "progress": False}
    parts = measure_in_parts(patch_sweep, model, pairs, tmp_path / "p.parquet", params, part_size=1, **options)
    whole = patch_sweep(model, pairs, **options).frame
    assert parts.frame.drop(columns="n_positions").round(4).equals(whole.drop(columns="n_positions").round(4))
    assert parts.max_check_diff < 1e-5
