"""Norms belong to the patch they are drawn at, the threshold follows its rule, and the sets follow both."""

import numpy as np
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.models.adapter import picture_features, text_inputs
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.norms import (
    SINK_FLOWS,
    encode_by_norm,
    find_norm_threshold,
    measure_norms,
    patch_norms,
)

FAMILIES = ["llava", "llava_next"]


def test_no_sample_no_norms():
    assert measure_norms(tiny_vlm(), [], progress=False).columns.tolist() == ["image_id", "image_patch", "norm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_projected_features_are_the_embeddings_at_the_positions_of_their_norms(family, tmp_path):
    model = tiny_vlm(family)
    encoded = encode(model, tiny_sample(tmp_path, size=(48, 40)))
    features = picture_features(model, encoded.inputs)
    projected = model.hf.base_model.multi_modal_projector(features)
    ordered = model.in_token_order(projected, encoded.inputs)
    image = list(encoded.positions["image"])
    embeddings = text_inputs(model, encoded.inputs)[0]["inputs_embeds"][0, image]
    torch.testing.assert_close(ordered[~ordered.isnan().any(-1)], embeddings)
    by_hand = model.in_token_order(features, encoded.inputs).norm(dim=-1)
    np.testing.assert_allclose(patch_norms(model, encoded), by_hand[~by_hand.isnan()], rtol=1e-6)


def test_no_hook_is_left_even_after_an_error(tmp_path):
    model = tiny_vlm()
    inputs = encode(model, tiny_sample(tmp_path)).inputs
    picture_features(model, inputs)
    with pytest.raises(RuntimeError):
        picture_features(model, {"pixel_values": inputs["pixel_values"][:, :2]})
    assert not model.hf.base_model.multi_modal_projector._forward_pre_hooks


def test_a_picture_of_several_questions_is_measured_once(tmp_path):
    model = tiny_vlm()
    samples = [tiny_sample(tmp_path, sample_id=f"q{k}", image_id=f"image-{k // 2}", seed=k // 2) for k in range(4)]
    norms = measure_norms(model, samples, progress=False)
    assert list(norms.columns) == ["image_id", "image_patch", "norm"]
    assert (norms.groupby("image_id").size() == 16).all() and norms.image_id.nunique() == 2
    assert (norms.norm > 0).all()


def test_outliers_are_parted_off_by_the_fence():
    rng = np.random.default_rng(0)
    bulk, sinks = rng.lognormal(3, 0.2, 5000), rng.uniform(150, 200, 30)
    cut = find_norm_threshold([*bulk, *sinks])
    assert bulk.max() < cut.value < sinks.min() and "Tukey" in cut.rule and cut.has_outliers


def test_without_outliers_no_patch_is_above_the_threshold_and_the_rule_says_so():
    norms = np.random.default_rng(0).normal(40, 3, 5760)
    for some in (norms, [10.0, 11.0, 12.0], [5.0], [3.0] * 9):
        cut = find_norm_threshold(some)
        assert not cut.has_outliers and cut.rule == "no patch beyond Tukey's outer fence of the log norms"
        assert np.max(some) <= cut.value


def test_a_given_threshold_is_used_as_it_is():
    cut = find_norm_threshold([1.0, 2.0], given=57.0)
    assert (cut.value, cut.rule, cut.has_outliers) == (57.0, "given", False)
    assert find_norm_threshold([1.0, 58.0], given=57.0).has_outliers


@pytest.mark.parametrize(
    ("norms", "given", "said"),
    [
        ([], 0.0, "positive finite"),
        ([0.0, 1.0], 0.0, "positive finite"),
        ([1.0, np.nan], 0.0, "positive finite"),
        ([1.0], -1.0, "above 0"),
    ],
)
def test_norms_and_thresholds_that_cannot_be_are_refused(norms, given, said):
    with pytest.raises(ValueError, match=said):
        find_norm_threshold(norms, given=given)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sets_part_the_image_patches_by_norm(family, tmp_path):
    model, sample = tiny_vlm(family), tiny_sample(tmp_path, size=(48, 48))
    plain = encode(model, sample).positions
    norms = dict(zip(plain["image"], patch_norms(model, encode(model, sample)), strict=True))
    threshold = float(np.quantile(list(norms.values()), 0.7))
    positions = encode_by_norm(model, sample, threshold=threshold).positions
    high = set(positions["image_high_norm"])
    assert high == {p for p, norm in norms.items() if norm > threshold} and high
    for name in ("image_related", "image_other"):
        assert set(positions[f"{name}_low_norm"]) == set(plain[name]) - high
        assert positions[name] == plain[name]


def test_an_empty_set_is_missing_for_a_reason(tmp_path):
    model = tiny_vlm()
    positions = encode_by_norm(model, tiny_sample(tmp_path), threshold=1e9).positions
    assert "above" in positions.why_missing("image_high_norm")
    assert positions["image_related_low_norm"] == positions["image_related"]
    positions = encode_by_norm(model, tiny_sample(tmp_path), threshold=1e-9).positions
    assert "high norm" in positions.why_missing("image_related_low_norm")
    assert positions["image_high_norm"] == positions["image"]
    positions = encode_by_norm(model, tiny_sample(tmp_path, objects=()), threshold=1e9).positions
    assert "no object" in positions.why_missing("image_other_low_norm")


def test_without_high_norms_the_experiment_is_experiment_04_to_the_last_digit(tmp_path):
    def encoder(model, sample):
        return encode_by_norm(model, sample, threshold=1e9)

    result = knockout_sweep(tiny_vlm(), [tiny_sample(tmp_path)], SINK_FLOWS, window=2, encoder=encoder, progress=False)
    tables = result.frame.pivot(index="layer", columns="source", values="p_knockout")
    np.testing.assert_allclose(tables.image_related_low_norm, tables.image_related, rtol=1e-5)
    assert [row["flow"] for row in result.skipped] == ["High-norm image patches -> Question"]


def test_no_picture_no_norms(tmp_path):
    model = tiny_vlm("llama", prompt="{question} ASSISTANT:")
    with pytest.raises(ValueError, match="shows no picture"):
        patch_norms(model, encode(model, tiny_sample(tmp_path)))
