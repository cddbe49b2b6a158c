"""Image patches lie where the processor put them, and the random boxes lie elsewhere, alike in size."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.analysis.stats import paired_difference
from mmflow_utils.data.sample import Box, SceneObject
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.prompts.encoding import encode, find_image_patches
from mmflow_utils.prompts.image_patches import (
    control_flows,
    count_image_patches,
    encode_random_patches,
    locate_image_patches,
    merge_draws,
    random_boxes,
)
from mmflow_utils.prompts.positions import PositionSets

SIZES = [(40, 28), (28, 40), (24, 24), (70, 31)]


def objects(*boxes):
    made = (Box(**dict(zip("xywh", map(float, box), strict=True))) for box in boxes)
    return tuple(SceneObject(name="cup", box=box) for box in made)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "do_pad"), [("llava", True), ("llava", False), ("llava_next", False)], ids=str)
def test_a_box_inside_a_patch_is_found_at_that_patch_and_nowhere_else_in_its_view(family, do_pad, size, tmp_path):
    model = tiny_vlm(family, do_pad=do_pad)
    encoded = encode(model, tiny_sample(tmp_path, size=size))
    patches = locate_image_patches(model, encoded)
    assert sorted(patches.position) == sorted(encoded.positions["image"])
    seen = patches[(patches.w > 3) & (patches.h > 3)]  # room for a whole pixel, away from the edges
    assert len(seen) >= 4
    for patch in seen.itertuples():
        x, y = (float(round(at)) for at in (patch.x + patch.w / 2 - 0.5, patch.y + patch.h / 2 - 0.5))
        found = find_image_patches(model, encoded, [Box(x=x, y=y, w=1.0, h=1.0)])
        assert patch.position in found
        same_view = patches[(patches.view == patch.view) & patches.position.isin(found)]
        assert len(same_view) == 1


@pytest.mark.parametrize("size", SIZES)
def test_without_cropping_the_patches_of_a_view_cover_the_picture_once(size, tmp_path):
    for family in ("llava", "llava_next"):
        model = tiny_vlm(family)
        patches = locate_image_patches(model, encode(model, tiny_sample(tmp_path, size=size)))
        assert set(patches.view) == ({0, 1} if family == "llava_next" else {0})
        for view, part in patches.groupby("view"):
            area = (part.w * part.h).sum()
            # Cut-away padding may take a row of the tiles' patches with it: the library's own doing.
            assert area == pytest.approx(size[0] * size[1], rel=0.02 if view == 0 else 0.35)


def test_a_cropped_picture_has_no_patch_beyond_the_crop(tmp_path):
    model = tiny_vlm(do_pad=False)
    patches = locate_image_patches(model, encode(model, tiny_sample(tmp_path, size=(60, 20))))
    assert patches.x.min() == pytest.approx(20, abs=0.5) and (patches.x + patches.w).max() == pytest.approx(40, abs=0.5)


def test_a_large_picture_is_located_finer_than_its_256_shades(tmp_path):
    model = tiny_vlm()
    patches = locate_image_patches(model, encode(model, tiny_sample(tmp_path, size=(1200, 1200))))
    assert np.allclose(sorted(set(patches.x.round())), [0, 300, 600, 900], atol=1.5)


def test_each_patch_names_its_set_and_the_first_name_wins(tmp_path):
    model = tiny_vlm()
    encoded = encode(model, tiny_sample(tmp_path))
    patches = locate_image_patches(model, encoded)
    assert set(patches.position[patches.set == "image_related"]) == set(encoded.positions["image_related"])
    assert set(locate_image_patches(model, encoded, ["image", "image_related"]).set) == {"image"}
    assert locate_image_patches(model, encoded, ["image_related"]).set.isna().sum() == len(
        encoded.positions["image_other"]
    )


def test_no_picture_no_patches(tmp_path):
    model = tiny_vlm("llama", prompt="{question} ASSISTANT:")
    with pytest.raises(ValueError, match="shows no picture"):
        locate_image_patches(model, encode(model, tiny_sample(tmp_path)))


def grid(n, side):
    x, y = np.meshgrid(np.arange(n) * side, np.arange(n) * side)
    return pd.DataFrame({"x": x.ravel(), "y": y.ravel(), "w": side, "h": side}).astype(float)


def test_moved_boxes_keep_their_size_and_reach_as_many_other_patches():
    boxes = [Box(x=3.5, y=4.0, w=17.5, h=9.0), Box(x=60.0, y=60.0, w=8.0, h=8.0)]
    rng = np.random.default_rng(1)
    places = set()
    for _ in range(20):
        moved = random_boxes(boxes, grid(10, 8), (80, 80), rng=rng)
        assert [(box.w, box.h) for box in moved] == [(17.5, 9.0), (8.0, 8.0)]
        assert all(0 <= box.x <= 80 - box.w and 0 <= box.y <= 80 - box.h for box in moved)
        places.add((moved[0].x, moved[0].y))
    assert len(places) > 10


def test_where_there_is_no_room_no_boxes_are_made_up():
    whole = [Box(x=0.0, y=0.0, w=70.0, h=70.0)]
    assert random_boxes(whole, grid(10, 8), (80, 80), rng=np.random.default_rng(0)) is None
    beyond = [Box(x=200.0, y=0.0, w=8.0, h=8.0)]  # it lies on no patch: nothing to be like
    assert random_boxes(beyond, grid(10, 8), (80, 80), rng=np.random.default_rng(0)) is None


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_random_patches_are_apart_from_the_related_and_like_them_in_number(family, tmp_path):
    model = tiny_vlm(family)
    sample = tiny_sample(tmp_path, size=(96, 96), objects=objects((5, 5, 20, 20)))
    encoded = encode_random_patches(model, sample, n_draws=4)
    related = set(encoded.positions["image_related"])
    draws = [set(encoded.positions[f"image_random_{k}"]) for k in range(1, 5)]
    for draw in draws:
        assert draw and draw <= set(encoded.positions["image_other"])
        assert abs(len(draw) - len(related)) <= 0.25 * len(related)
    assert len(set(map(frozenset, draws))) > 1
    counts = count_image_patches(encoded.positions)
    assert counts["image_random"] == np.mean([len(draw) for draw in draws])
    assert counts["image_related"] == len(related)


def test_places_depend_on_the_seed_and_the_sample_alone(tmp_path):
    model = tiny_vlm()
    one = tiny_sample(tmp_path, size=(96, 96), objects=objects((5, 5, 20, 20)))
    other = tiny_sample(tmp_path, size=(96, 96), objects=one.objects, sample_id="q2")
    sets = [
        encode_random_patches(model, sample, n_draws=6, seed=seed).positions.sets
        for sample, seed in ((one, 0), (one, 0), (one, 1), (other, 0))
    ]
    drawn = [[held[f"image_random_{k}"] for k in range(1, 7)] for held in sets]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]


@pytest.mark.parametrize(
    ("boxes", "reason"), [([], "no object"), ([(0, 0, 70, 96)], "no room"), ([(0, 0, 96, 96)], "whole")]
)
def test_a_sample_without_a_control_is_skipped_for_a_reason(boxes, reason, tmp_path):
    sample = tiny_sample(tmp_path, size=(96, 96), objects=objects(*boxes))
    positions = encode_random_patches(tiny_vlm(), sample, n_draws=2).positions
    assert reason in positions.why_missing("image_random_1") and reason in positions.why_missing("image_random_2")


def test_draws_are_averaged_within_the_sample_before_they_are_compared(tmp_path):
    model = tiny_vlm()
    samples = [
        tiny_sample(tmp_path, size=(96, 96), objects=objects((5, 5, 20, 20)), sample_id=f"q{k}", seed=k)
        for k in range(2)
    ]
    options = {"window": 2, "encoder": encode_random_patches, "progress": False}
    frame = knockout_sweep(model, samples, control_flows(3), **options).frame
    merged = merge_draws(frame)
    assert set(merged.flow) == {f"{k} image patches -> Question" for k in ("Related", "Other", "Random")}
    assert len(merged) == 2 * 3 * model.n_layers and list(merged.columns) == list(frame.columns)
    at = merged[(merged.source == "image_random") & (merged.sample_id == "q1") & (merged.layer == 1)]
    draws = frame[frame.source.str.startswith("image_random") & (frame.sample_id == "q1") & (frame.layer == 1)]
    assert at.rel_change_pct.item() == pytest.approx(draws.rel_change_pct.mean())
    assert at.p_base.item() == draws.p_base.iloc[0]
    table = paired_difference(
        merged, "Related image patches -> Question", "Random image patches -> Question", n_flips=99
    )
    assert (table.n == 2).all()


def test_draws_that_disagree_on_the_answer_are_one_row_of_the_share_that_keep_it(tmp_path):
    sample = tiny_sample(tmp_path, size=(96, 96), objects=objects((5, 5, 20, 20)))
    options = {"window": "all", "encoder": encode_random_patches, "progress": False}
    frame = knockout_sweep(tiny_vlm(), [sample], control_flows(4), **options).frame
    draws = frame.source.str.startswith("image_random")
    frame.loc[draws, "correct_pct"] = [100.0, 0.0, 0.0, 0.0]
    merged = merge_draws(frame)
    assert len(merged) == 3 and merged[merged.source == "image_random"].correct_pct.tolist() == [25.0]


def test_a_frame_without_draws_is_left_as_it_is(tmp_path):
    frame = knockout_sweep(tiny_vlm(), [tiny_sample(tmp_path)], control_flows(0), window=2, progress=False).frame
    pd.testing.assert_frame_equal(merge_draws(frame), frame)
    assert np.isnan(count_image_patches(PositionSets(n_tokens=2, sets={"image": (0,)}))["image_random"])


def test_the_picture_on_disk_is_left_alone(tmp_path):
    sample = tiny_sample(tmp_path, size=(96, 96), objects=objects((5, 5, 20, 20)))
    before = np.array(Image.open(sample.image))
    encode_random_patches(tiny_vlm(), sample)
    assert (np.array(Image.open(sample.image)) == before).all()
