"""Each family's picture path against independent ones: where its tokens stand, and what each of them sees."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import product
from math import ceil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUESTION, tiny_sample, tiny_vlm
from tiny_families import FAMILIES, PATCH_SIZE, TOKEN_SIZE

from mmflow_utils.data.sample import Box, SceneObject
from mmflow_utils.engine.checks import attention_pattern, check_model
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.models import adapter
from mmflow_utils.models.adapter import picture_features, text_inputs
from mmflow_utils.prompts.encoding import encode, find_image_patches
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_TO_QUESTION,
    Variant,
    variants,
)
from mmflow_utils.prompts.image_patches import locate_image_patches

pytestmark = pytest.mark.slow

NEW = tuple(FAMILIES)
LANDSCAPE, PORTRAIT, SQUARE, TINY, LARGE = (60, 28), (28, 60), (40, 40), (7, 5), (700, 500)
HUGE = (3000, 2000)
SIZES = (LANDSCAPE, PORTRAIT, SQUARE, TINY, LARGE, HUGE)
ALL = ("llava", "llava_next", *NEW)
MERGING = tuple(family for family in NEW if family != "llava_onevision")  # an image token is several patches

# By hand, from each family's own rule: rows and columns of tiles, or of image tokens, that the picture is
# stretched over. Idefics3 makes the long side two tiles of two tokens; InternVL takes the nearest shape of at
# most four tiles; Qwen rounds each side to whole tokens and keeps the area from 30 x 30 to 60 x 60 pixels;
# LLaVA-NeXT takes the canvas that leaves the picture most of its pixels, the least wasteful of several.
TWO_BY_TWO = dict.fromkeys((SQUARE, LARGE, HUGE), (2, 2))
LONG = {LANDSCAPE: (1, 2), PORTRAIT: (2, 1)}
STITCHED = ("llava_next", "llava_onevision")  # rows of all tiles, each with a newline token, after the overview
TILES = {
    "idefics3": TWO_BY_TWO | LONG | {TINY: (2, 2)},
    "smolvlm": TWO_BY_TWO | LONG | {TINY: (2, 2)},
    "internvl": TWO_BY_TWO | LONG | {TINY: (1, 1)},
    **dict.fromkeys(STITCHED, TWO_BY_TWO | LONG | {TINY: (1, 2)}),
}
QWEN = {
    LANDSCAPE: (2, 5), PORTRAIT: (5, 2), SQUARE: (3, 3), TINY: (3, 3), LARGE: (4, 5), HUGE: (4, 6),
}  # fmt: skip
GRID = {"gemma3": dict.fromkeys(SIZES, (4, 4)), "qwen2_5_vl": QWEN, "qwen3_vl": QWEN}


def cells(left, top, width, height, rows, columns):
    """Cut a rectangle, in shares of the picture, into cells in reading order."""
    w, h = width / columns, height / rows
    return [(left + c * w, top + r * h, w, h) for r, c in product(range(rows), range(columns))]


def expected_cells(family, size):
    """Give left, top, width and height of what each image token sees, in shares of the picture."""
    if family == "llava":  # the square that the picture is padded to
        (width, height), side = size, max(size)
        left, top = (side - width) // 2, (side - height) // 2
        return cells(-left / width, -top / height, side / width, side / height, 4, 4)
    if family in STITCHED:
        return cells(0, 0, 1, 1, 4, 4) + canvas_cells(*size, *TILES[family][size])
    if family in GRID:
        return cells(0, 0, 1, 1, *GRID[family][size])
    tiles = cells(0, 0, 1, 1, *TILES[family][size])
    overview = [] if len(tiles) == 1 else [(0, 0, 1, 1)]  # the whole picture comes last
    return [cell for tile in tiles + overview for cell in cells(*tile, 2, 2)]


def canvas_cells(width, height, tile_rows, tile_columns):
    """Give the cells of a stitched canvas: the picture in its middle, whole rows of padding cut off."""
    rows, columns = 4 * tile_rows, 4 * tile_columns  # of patches
    scale = min(columns * PATCH_SIZE / width, rows * PATCH_SIZE / height)
    shown = [min(ceil(width * scale), columns * PATCH_SIZE), min(ceil(height * scale), rows * PATCH_SIZE)]
    left, top = (columns * PATCH_SIZE - shown[0]) // 2, (rows * PATCH_SIZE - shown[1]) // 2
    cut = [
        max(0, (columns - int(width * rows / height)) // 2),
        max(0, (rows - int(height * columns / width)) // 2),
    ]
    w, h = PATCH_SIZE / shown[0], PATCH_SIZE / shown[1]
    kept = product(range(cut[1], rows - cut[1]), range(cut[0], columns - cut[0]))
    return [(c * w - left / shown[0], r * h - top / shown[1], w, h) for r, c in kept]


def shares(family, size, box):
    """Say how much of each image token's cell lies in a box."""
    width, height = size
    x, y, w, h = box.x / width, box.y / height, box.w / width, box.h / height
    found = []
    for left, top, across, down in expected_cells(family, size):
        over = max(0, min(left + across, x + w) - max(left, x))
        below = max(0, min(top + down, y + h) - max(top, y))
        found.append(over * below / (across * down))
    return np.array(found)


@cache
def as_trained(family):
    """Build a model that gets its pictures as such models were trained to: LLaVA-1.5's padded."""
    return tiny_vlm(family, do_pad=family == "llava")


def painted(folder, size, box, name):
    """Make a sample whose picture is white in the box and black outside."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[int(box.y) : int(box.y + box.h), int(box.x) : int(box.x + box.w)] = 255
    sample = tiny_sample(folder, sample_id=name, objects=(SceneObject(name="cup", box=box),))
    Image.fromarray(pixels).save(sample.image)
    return sample


def box_at(size, x, y, w, h):
    """Give a box of whole pixels, from shares of the picture."""
    width, height = size
    sides = (x * width, y * height, max(1, w * width), max(1, h * height))
    return Box(**dict(zip("xywh", (float(int(side)) for side in sides), strict=True)))


@pytest.mark.parametrize("family", NEW)
def test_the_adapter_passes_its_own_checks(family, tmp_path):
    model = tiny_vlm(family, n_kv_heads=2)
    checks = check_model(model, encode(model, tiny_sample(tmp_path)))
    assert checks["passed"].all(), checks.to_string()
    assert model.hf.config.model_type == family in adapter.FAMILIES


@pytest.mark.parametrize("family", NEW)
def test_each_name_stands_for_its_words(family, tmp_path):
    encoded = encode(tiny_vlm(family), tiny_sample(tmp_path))

    def spelled(name):
        return "".join(encoded.tokens[p] for p in encoded.positions[name]).strip()

    assert spelled("question") == QUESTION
    assert [spelled(name) for name in ("option_true", "option_false", "objects")] == [
        "left",
        "right",
        "cup ball",
    ]
    assert encoded.positions["last"] == (encoded.inputs["input_ids"].shape[1] - 1,)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_image_tokens_are_where_the_picture_enters_and_as_many_as_it_has_cells(family, size, tmp_path):
    model = as_trained(family)
    encoded = encode(model, painted(tmp_path, size, box_at(size, 0.2, 0.2, 0.5, 0.5), "q"))
    entered = text_inputs(model, encoded.inputs)[0]["inputs_embeds"][0]
    words = model.text.get_input_embeddings()(encoded.inputs["input_ids"])[0]
    differ = (entered != words).any(-1).nonzero().flatten().tolist()
    assert differ == sorted(encoded.positions["image"] + encoded.positions.get("image_newline"))
    assert len(encoded.positions["image"]) == len(expected_cells(family, size))
    assert ("image_newline" in encoded.positions) == (family in STITCHED)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_boxes_reach_the_image_tokens_whose_cell_they_overlap(family, size, tmp_path):
    model = as_trained(family)
    places = [(0.1, 0.15, 0.2, 0.3), (0.55, 0.3, 0.4, 0.2), (0.3, 0.72, 0.1, 0.25)]
    for where in places[:1] if size == HUGE else places:  # which takes its time
        box = box_at(size, *where)
        spans = encode(model, painted(tmp_path, size, box, "q")).positions
        share, related = shares(family, size, box), np.isin(spans["image"], spans["image_related"])
        clear = (share > 0.005) | (share < 1e-9)  # a sliver may be rounded away with the color
        assert related.any() and (related == (share > 1e-9))[clear].all()


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("size", SIZES)
def test_the_patches_means_are_the_boxs_share_of_them(family, size, tmp_path):
    """Not the drawing's way: the picture as the model gets it, with the processor's own filter and norm."""
    model, box = as_trained(family), box_at(size, 0.2, 0.1, 0.45, 0.6)
    if size == TINY:  # the filter would spread a pixel over a token's width
        model = deepcopy(model)
        model.processor.image_processor.resample = Image.Resampling.NEAREST
    boxes = (box, box_at(size, 0, 0, 1, 1), replace(box, w=0.0))
    pictures = [painted(tmp_path, size, one, f"q{n}") for n, one in enumerate(boxes)]
    inputs = [encode(model, picture).inputs for picture in pictures]
    boxed, white, black = (model.tiles(one)[:, 0] for one in inputs)
    shade = ((boxed - black) / (white - black)).nan_to_num(0)  # padding is of one color in both
    side = TOKEN_SIZE if family in MERGING else PATCH_SIZE
    means = shade.unfold(1, side, side).unfold(2, side, side).mean((-1, -2)).flatten(1)
    means = model.in_token_order(means[:, :, None], inputs[0])[:, 0]
    means = means[~means.isnan()]  # newlines
    atol = 0.2 if size == TINY else 0.1
    np.testing.assert_allclose(means, shares(family, size, box), atol=atol)
    with pytest.raises(AssertionError):  # and a box moved by a token's width is told apart
        moved = replace(box, x=box.x + size[0] / 4)
        np.testing.assert_allclose(means, shares(family, size, moved), atol=atol)


def blinkered(model):
    """Take the vision tower's attention away, so that each of its patches sees itself alone."""
    for name, module in model.hf.named_modules():
        in_decoder = "language_model" in name or "text_model.layers" in name
        if type(module).__name__.endswith("Attention") and not in_decoder:
            for weight in module.parameters():
                weight.zero_()
    return model


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, LARGE])
def test_tower_and_projector_carry_the_boxs_pixels_to_the_related_tokens_and_no_others(family, size, tmp_path):
    """The library's own patches, windows, merging and shuffling bear out the order that we take them in."""
    model, box = blinkered(deepcopy(as_trained(family))), box_at(size, 0.62, 0.12, 0.3, 0.3)
    model.processor.image_processor.resample = Image.Resampling.BOX  # the others spread beyond the box
    with_box, without = (painted(tmp_path, size, one, f"q{one.w}") for one in (box, replace(box, w=0.0)))
    encoded = encode(model, with_box)
    entered = [text_inputs(model, one.inputs)[0]["inputs_embeds"][0] for one in (encoded, encode(model, without))]
    changed = ((entered[0] - entered[1]).abs().amax(-1) > 1e-4).nonzero().flatten().tolist()
    assert changed == list(encoded.positions["image_related"])
    assert 0 < len(changed) < len(encoded.positions["image"])


@pytest.mark.parametrize("family", NEW)
def test_any_boxes_can_be_looked_up_later_and_padding_is_a_parameter(family, tmp_path):
    sample = tiny_sample(tmp_path, size=LANDSCAPE)
    for do_pad in (False, True):
        model = tiny_vlm(family, do_pad=do_pad)
        encoded = encode(model, sample)
        boxes = [thing.box for thing in sample.objects]
        assert find_image_patches(model, encoded, boxes) == encoded.positions["image_related"]
        everywhere = find_image_patches(model, encoded, [box_at(LANDSCAPE, 0, 0, 1, 1)])
        # Processors with tiles see to proportions themselves; with the others a square has black bands.
        assert (len(everywhere) < len(encoded.positions["image"])) == (do_pad and not model.has_tiles)


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, TINY, LARGE])
def test_each_image_token_is_located_in_the_stored_picture(family, size, tmp_path):
    model = as_trained(family)
    found = locate_image_patches(model, encode(model, tiny_sample(tmp_path, size=size)))
    cells = np.array(expected_cells(family, size))
    begin, end = cells[:, :2].clip(0, 1), (cells[:, :2] + cells[:, 2:]).clip(0, 1)  # beyond it is padding
    cells = np.hstack([begin, end - begin]) * np.array(size * 2)
    np.testing.assert_allclose(found[["x", "y", "w", "h"]], cells, atol=max(0.2, 0.02 * max(size)))
    n_whole = 16 if family in STITCHED else 4 if model.has_tiles else len(cells)  # tokens of the overview
    views = [1] * (len(cells) - n_whole) + [0] * n_whole
    assert found["view"].tolist() == (views[::-1] if family in STITCHED else views)


@pytest.mark.parametrize("family", NEW)
def test_an_answer_that_is_appended_goes_on_as_the_model_itself_would(family, tmp_path):
    """Positions in three dimensions, token types and masks grow with it as they do in generation."""
    model, sample = tiny_vlm(family), tiny_sample(tmp_path)
    encoded = encode(model, sample)
    inputs = encoded.inputs | {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    said = model.hf.generate(**inputs)[0, encoded.positions.n_tokens :].tolist()
    for n in range(len(said)):
        longer = encode(model, sample, answer_prefix=said[:n])
        assert int(run_reference(model, longer, []).base.argmax()) == said[n]
    assert len(said) == 4 and longer.positions.last == encoded.positions.last + 3


@pytest.mark.parametrize("family", NEW)
def test_the_overview_is_the_tile_that_shows_the_whole_picture(family, tmp_path):
    model = as_trained(family)
    corner = encode(model, painted(tmp_path, SQUARE, box_at(SQUARE, 0, 0, 0.5, 0.5), "q"))
    tiles = model.tiles(corner.inputs)
    lit = (tiles[model.overview_tile, 0] > 0).float().mean()
    assert len(tiles) == (5 if model.has_tiles else 1) and 0.2 < lit < 0.3


def test_tokens_that_reach_across_the_pictures_edge_keep_their_own_words(tmp_path):
    """Gemma writes blank lines about its picture, and its tokenizer has tokens of several line ends."""
    model = tiny_vlm("gemma3", prompt="USER:\n<image>\n{question} ASSISTANT:")
    tokenizer = deepcopy(model.tokenizer)
    tokenizer.add_tokens(["\n\n\n"])
    processor = deepcopy(model.processor)
    processor.tokenizer = tokenizer
    plain = encode(model, tiny_sample(tmp_path))
    joined = encode(replace(model, processor=processor, tokenizer=tokenizer), tiny_sample(tmp_path))
    assert joined.positions.n_tokens == plain.positions.n_tokens - 4  # before and after: three line ends are one token
    assert len(joined.positions["image"]) == len(plain.positions["image"])
    assert "".join(joined.tokens[p] for p in joined.positions["question"]).strip() == QUESTION
    around = [
        joined.tokens[joined.positions["image"][0] - 2],
        joined.tokens[joined.positions["image"][-1] + 2],
    ]
    assert around == ["\n", "\n"]


@pytest.mark.parametrize("family", MERGING)
def test_norms_of_patches_are_refused_where_a_token_joins_several(family, tmp_path):
    model = tiny_vlm(family)
    with pytest.raises(ValueError, match="joins 2 x 2"):
        picture_features(model, encode(model, tiny_sample(tmp_path)).inputs)


def gemma(folder):
    model = tiny_vlm("gemma3", n_kv_heads=2)
    return model, encode(model, tiny_sample(folder))


def assert_same(run, plain):
    for one, other in ((run.base, plain.base), (run.variants, plain.variants)):
        torch.testing.assert_close(one.softmax(-1), other.softmax(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(run.resid_post, plain.resid_post, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("intervention", ["mask", "zero_value", "mean_value", "mlp_output"])
def test_the_sweep_is_exact_over_sliding_windows_and_an_image_that_sees_itself_whole(intervention, tmp_path):
    model, encoded = gemma(tmp_path)
    flows = FLOW_TO_LAST + IMAGE_TO_QUESTION + IMAGE_PATCHES_TO_QUESTION
    some = variants(encoded.positions, flows, window=3, n_layers=model.n_layers, intervention=intervention)
    # Before the image too: then its tokens, which see one another, are computed again.
    source = () if intervention == "mlp_output" else (0, 1)
    some += [Variant(layers=range(1, 3), target=(1, 2), source=source, intervention=intervention)]
    read = [encoded.positions["question"][0], encoded.positions.last]
    run = run_sweep(model, encoded, some, read=read)
    assert_same(run, run_reference(model, encoded, some, read=read))
    assert (run.variants.softmax(-1) - run.base.softmax(-1)).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_random_edits_about_the_image_give_the_reference_numbers(seed, tmp_path):
    model, encoded = gemma(tmp_path)
    rng, n_tokens = np.random.default_rng(seed), encoded.positions.n_tokens
    words = sorted({*range(n_tokens)} - {*encoded.positions["image"]})

    def some_of(positions):
        return tuple(sorted(rng.choice(positions, rng.integers(1, len(positions)), replace=False).tolist()))

    def edit():
        start = int(rng.integers(model.n_layers))
        layers = range(start, int(rng.integers(start, model.n_layers)) + 1)
        intervention = str(rng.choice(["mask", "zero_value", "mean_value"]))
        target, source = some_of(words), some_of(range(n_tokens))
        return Variant(layers=layers, target=target, source=source, intervention=intervention)

    some, read = [edit() for _ in range(5)], list(some_of(words))
    assert_same(run_sweep(model, encoded, some, read=read), run_reference(model, encoded, some, read=read))


def test_the_image_does_see_itself_whole_and_windows_do_slide(tmp_path):
    model, encoded = gemma(tmp_path)
    image = list(encoded.positions["image"])
    sliding, full = (attention_pattern(model, encoded, layer) for layer in (0, 1))
    assert sliding[:, image[0], image[-1]].min() > 0 and full[:, image[0], image[-1]].min() > 0
    assert full[:, encoded.positions.last, 0].min() > 0 and not sliding[:, encoded.positions.last, 0].any()


@pytest.mark.parametrize("place", [0, 7, -1])
def test_rows_that_depend_on_later_ones_are_refused(place, tmp_path):
    model, encoded = gemma(tmp_path)
    inside = encoded.positions["image"][place]
    edit = Variant(layers=range(0, 2), target=(inside, encoded.positions.last), source=(0,))
    with pytest.raises(ValueError, match=f"Position {inside} .*set method to reference"):
        run_sweep(model, encoded, [edit])
    with pytest.raises(ValueError, match="set method to reference"):
        run_sweep(model, encoded, [], read=inside)
    assert torch.isfinite(run_reference(model, encoded, [edit]).variants).all()
