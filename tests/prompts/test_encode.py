"""Positions are the tokens they are called, and boxes reach the image tokens that really see them."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_SIZE, PATCH_SIZE, PROMPT, QUESTION, assert_partition, tiny_sample, tiny_vlm
from tiny_families import FAMILIES as NEW
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mmflow_utils.data.sample import Box, SceneObject
from mmflow_utils.experiments.curation import read_questions, stratified_sample
from mmflow_utils.models.adapter import text_inputs
from mmflow_utils.models.load import load_model
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import encode, find_image_patches

FAMILIES = ["llava", "llava_next"]
SIDE = IMAGE_SIZE // PATCH_SIZE


def spelled(encoded, name):
    return "".join(encoded.tokens[p] for p in encoded.positions[name]).strip()


def box_of(x, y, w, h):
    return Box(x=float(x), y=float(y), w=float(w), h=float(h))


def with_box(*box, name="cup"):
    return (SceneObject(name=name, box=box_of(*box)),)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_name_stands_for_its_words(family, tmp_path):
    encoded = encode(tiny_vlm(family), tiny_sample(tmp_path))
    assert spelled(encoded, "question") == QUESTION
    assert [spelled(encoded, name) for name in ("option_true", "option_false")] == ["left", "right"]
    assert spelled(encoded, "objects") == "cup ball"
    assert encoded.positions["last"] == (encoded.inputs["input_ids"].shape[1] - 1,)
    assert {encoded.tokens[p] for p in encoded.positions["image"]} == {"<image>"}
    text = "".join(t for p, t in enumerate(encoded.tokens) if p not in encoded.positions["image"][1:])
    assert text.replace("<image>" * (text.count("<image>") - 1), "").endswith(PROMPT[-40:])


@pytest.mark.parametrize("size", [(40, 28), (28, 40), (30, 30), (90, 20), (20, 90)])
def test_newline_positions_hold_the_newline_embedding_and_no_others_do(size, tmp_path):
    model = tiny_vlm("llava_next")
    encoded = encode(model, tiny_sample(tmp_path, size=size))
    embeddings = text_inputs(model, encoded.inputs)[0]["inputs_embeds"][0]
    is_newline = (embeddings == model.hf.model.image_newline).all(-1)
    assert tuple(is_newline.nonzero().flatten().tolist()) == encoded.positions["image_newline"]
    parts = [encoded.positions[name] for name in ("image_related", "image_other", "image_newline")]
    placeholders = (encoded.inputs["input_ids"][0] == model.image_token_id).nonzero().flatten().tolist()
    assert sorted(sum(parts, ())) == placeholders
    assert sorted(parts[0] + parts[1]) == sorted(encoded.positions["image"])


def changed_tokens(model, sample, box):
    """Paint the box over in the picture itself, and see which image tokens get other pixels."""
    before = encode(model, sample).inputs["pixel_values"]
    pixels = np.array(Image.open(sample.image))
    inside = pixels[int(box.y) : int(box.y + box.h), int(box.x) : int(box.x + box.w)]
    inside[:] = 255 - inside
    Image.fromarray(pixels).save(sample.image)
    encoded = encode(model, sample)
    change = (encoded.inputs["pixel_values"] - before).abs().reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).amax(1)
    patches = change.reshape(-1, SIDE, PATCH_SIZE, SIDE, PATCH_SIZE).amax((2, 4)).flatten(1)
    order = model.in_token_order(patches[:, :, None], encoded.inputs)[:, 0]
    image = sorted(encoded.positions["image"] + encoded.positions.get("image_newline"))
    return encoded, {p for p, value in zip(image, order.tolist(), strict=True) if value > 0}


@pytest.mark.parametrize("box", [(6, 6, 6, 6), (5, 6, 1, 1), (0, 0, 24, 1), (11, 11, 2, 2), (23, 23, 1, 1)])
def test_boxes_reach_exactly_the_patches_whose_pixels_they_cover(box, tmp_path):
    sample = tiny_sample(tmp_path, size=(IMAGE_SIZE, IMAGE_SIZE), objects=with_box(*box))
    encoded, changed = changed_tokens(tiny_vlm("llava"), sample, sample.objects[0].box)
    assert set(encoded.positions["image_related"]) == changed
    rows = {r // PATCH_SIZE for r in range(box[1], box[1] + box[3])}
    columns = {c // PATCH_SIZE for c in range(box[0], box[0] + box[2])}
    start = encoded.positions["image"][0]
    assert changed == {start + r * SIDE + c for r in rows for c in columns}


def test_boxes_reach_the_tiles_of_the_next_generation_too(tmp_path):
    sample = tiny_sample(tmp_path, size=(48, 48), objects=with_box(13, 25, 4, 10))
    encoded, changed = changed_tokens(tiny_vlm("llava_next"), sample, sample.objects[0].box)
    related, base_end = set(encoded.positions["image_related"]), encoded.positions["image"][0] + SIDE**2
    tiles = {p for p in related if p >= base_end}
    assert tiles and tiles == {p for p in changed if p >= base_end}  # tiles are not resampled here
    assert related - tiles and related <= changed  # the base image is, and its filter spreads


@pytest.mark.parametrize("do_pad", [True, False])
@pytest.mark.parametrize("size", [(48, 24), (24, 48)])
def test_padding_and_cropping_move_boxes_with_the_picture(do_pad, size, tmp_path):
    middle = box_of(size[0] / 2 - 3, size[1] / 2 - 3, 6, 6)
    sample = tiny_sample(tmp_path, size=size, objects=(SceneObject(name="cup", box=middle),))
    encoded, changed = changed_tokens(tiny_vlm("llava", do_pad=do_pad), sample, middle)
    related = {p - encoded.positions["image"][0] for p in encoded.positions["image_related"]}
    assert related == {5, 6, 9, 10}
    assert set(encoded.positions["image_related"]) <= changed


def test_a_cropped_box_is_missing_with_its_reason_and_padding_brings_it_back(tmp_path):
    sample = tiny_sample(tmp_path, size=(60, 20), objects=with_box(0, 0, 5, 20))
    positions = encode(tiny_vlm("llava", do_pad=False), sample).positions
    assert "image_related" not in positions and "outside" in positions.why_missing("image_related")
    assert "image_related" in encode(tiny_vlm("llava", do_pad=True), sample).positions


def test_the_square_is_filled_with_the_processors_mean_color(tmp_path):
    model = tiny_vlm("llava")
    pixels = encode(model, tiny_sample(tmp_path, size=(48, 24))).inputs["pixel_values"][0]
    band = pixels[:, : IMAGE_SIZE // 8]
    assert band.abs().max() < 0.02  # the mean, normalized, is 0 but for rounding to whole colors
    assert pixels[:, IMAGE_SIZE // 2].abs().max() > 0.5


@pytest.mark.parametrize("do_pad", [True, False])
def test_a_processor_that_would_pad_by_itself_follows_the_parameter_too(do_pad, tmp_path):
    plain, padding = tiny_vlm(do_pad=do_pad), tiny_vlm(do_pad=do_pad)
    padding.processor.image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_pad=True
    )
    one, other = (encode(model, tiny_sample(tmp_path, size=(48, 24))) for model in (plain, padding))
    assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
    assert one.positions == other.positions


def test_a_thin_box_in_a_large_picture_is_not_lost(tmp_path):
    sample = tiny_sample(tmp_path, size=(192, 192), objects=with_box(100, 10, 1, 90))
    assert len(encode(tiny_vlm("llava"), sample).positions["image_related"]) == 3


def test_boxes_that_say_nothing_leave_a_reason(tmp_path):
    model = tiny_vlm("llava")
    positions = encode(model, tiny_sample(tmp_path, objects=(SceneObject(name="cup"),))).positions
    assert "no object" in positions.why_missing("image_other") and "image" in positions
    positions = encode(model, tiny_sample(tmp_path, size=(30, 30), objects=with_box(0, 0, 30, 30))).positions
    assert "whole picture" in positions.why_missing("image_other")
    assert positions["image_related"] == positions["image"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_boxes_can_be_looked_up_later(family, tmp_path):
    model, sample = tiny_vlm(family), tiny_sample(tmp_path)
    encoded = encode(model, sample)
    assert find_image_patches(model, encoded, [o.box for o in sample.objects]) == encoded.positions["image_related"]
    assert find_image_patches(model, encoded, []) == ()
    beyond = box_of(-10, -10, 1000, 1000)
    assert find_image_patches(model, encoded, [beyond]) == encoded.positions["image"]


@pytest.mark.parametrize("name", ["mini", "mini-next", "planted"])
def test_every_position_of_a_trained_models_prompts_has_one_set(name):
    params = Params.from_yaml(ROOT / "params" / f"{name}.yaml")
    model, questions = load_model(params), read_questions(params, tasks=params.tasks)[0]
    for sample in stratified_sample(questions, n=1, seed=0, by=lambda sample: sample.task):
        assert_partition(encode(model, sample).positions)


@pytest.mark.parametrize("family", [*FAMILIES, *NEW, "llama"])
def test_every_position_of_a_prompt_has_one_set(family, tmp_path):
    options = {"prompt": "Picture: {caption}\n{question} ASSISTANT:"} if family == "llama" else {}
    encoded = encode(tiny_vlm(family, **options), tiny_sample(tmp_path))
    found = encoded.positions
    assert_partition(found)
    begin, end = found["question"][0], found["question"][-1]
    assert max(found["system"]) < begin and end < min(found["template"]) and max(found["template"]) < found.last
    assert found["question+template"] == found["question"] + found["template"]
    assert found["after_question"] == found["template+last"] == tuple(range(end + 1, found.n_tokens))
    said = "".join(encoded.tokens[end + 1 :]).strip()
    assert said == ("ASSISTANT:" if family == "llama" else PROMPT.partition("{question}")[2].strip())
    if "image" in found:
        first = found["image"][0]
        assert sorted(found["after_image"] + found["image"]) == list(range(first, found.n_tokens))
        assert set(found.get("image_newline")) <= set(found["after_image"])  # they would pass the picture on
    else:
        assert "no picture" in found.why_missing("after_image")


def test_answered_tokens_move_last_and_nothing_else(tmp_path):
    model, sample = tiny_vlm("llava_next"), tiny_sample(tmp_path)
    plain, longer = encode(model, sample), encode(model, sample, answer_prefix=[7, 9])
    assert longer.positions.last == plain.positions.last + 2
    assert longer.inputs["input_ids"][0, -2:].tolist() == [7, 9]
    assert longer.inputs["attention_mask"].shape == longer.inputs["input_ids"].shape
    new = {name: longer.positions[name] for name in ("last", "template", "after_image", "after_question")}
    end = plain.positions.last  # the prompt's: what is answered belongs to its template no more than to the question
    assert new["template"] == (*plain.positions["template"], end)
    for name in ("after_image", "after_question"):
        assert new[name] == (*plain.positions[name], end + 1, end + 2)
    assert longer.positions.with_(**{name: plain.positions[name] for name in new}).sets == plain.positions.sets
    written = encode(model, sample, answer_prefix=" Left Right")
    assert written.tokens[-2:] == (" Left", " Right") and written.positions["template"] == new["template"]
    assert written.positions["question"] == plain.positions["question"]


def test_a_question_full_of_braces_is_left_alone(tmp_path):
    question = "Is the {question} of {caption} 100% {0}?"
    encoded = encode(tiny_vlm(), tiny_sample(tmp_path, question=question, objects=()))
    assert spelled(encoded, "question") == question


def test_a_question_that_also_stands_in_the_prompt_is_found_where_it_was_filled_in(tmp_path):
    model = tiny_vlm(prompt="the left? <image>\n{question} Is it the left? ASSISTANT:")
    encoded = encode(model, tiny_sample(tmp_path, question="the left?", objects=()))
    assert encoded.positions["question"][0] > encoded.positions["image"][-1]
    assert encoded.positions["question"][-1] < encoded.positions.last - 5


def test_captions_take_the_place_of_the_picture_in_a_text_only_model(tmp_path):
    model = tiny_vlm("llama", prompt="Picture: {caption}\n{question} ASSISTANT:")
    encoded = encode(model, tiny_sample(tmp_path))
    assert spelled(encoded, "captions") == "A red cup stands to the left of a green ball."
    assert "no picture" in encoded.positions.why_missing("image_related")
    assert set(encoded.inputs) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="has none"):
        encode(model, tiny_sample(tmp_path, caption=None))
    with pytest.raises(ValueError, match="shows no picture"):
        find_image_patches(model, encoded, [])


def test_a_prompt_that_spells_its_own_first_token_gets_no_second_one(tmp_path):
    ids = encode(tiny_vlm(prompt="<s>" + PROMPT), tiny_sample(tmp_path)).inputs["input_ids"][0].tolist()
    assert ids.count(ids[0]) == 1


def test_floating_inputs_take_the_models_precision(tmp_path):
    inputs = encode(tiny_vlm(dtype=torch.bfloat16), tiny_sample(tmp_path)).inputs
    assert inputs["pixel_values"].dtype == torch.bfloat16 and inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("family", "prompt", "changes", "said"),
    [
        ("llava", PROMPT, {"question": "Is <image> left?"}, "holds '<image>' in its text"),
        ("llava", PROMPT, {"question": "<s> left or right of the cup?"}, "q1 holds '<s>' in its text"),
        ("llava", "<s>" + PROMPT, {"question": "Say, </s> left or right?"}, "holds '</s>' in its text.*Reword"),
        ("llama", "{caption} {question}", {"caption": "A cup.<pad>"}, "holds '<pad>' in its text"),
        ("idefics3", PROMPT, {"question": "Is it left<end_of_utterance>?"}, "holds '<end_of_utterance>' in"),
        (
            "qwen2_5_vl",
            PROMPT,
            {"question": "<|vision_start|> left?"},
            "holds '<|vision_start|>' in".replace("|", r"\|"),
        ),
        ("llava", "<image> ASSISTANT:", {}, "Expected a prompt that holds"),
        ("llama", PROMPT, {}, "reads text only"),
        ("llava", PROMPT, {"image": "nowhere.png"}, "no picture"),
    ],
)
def test_what_cannot_be_encoded_says_why(family, prompt, changes, said, tmp_path):
    if "image" in changes:
        changes = {"image": tmp_path / changes["image"]}
    with pytest.raises(ValueError, match=said):
        encode(tiny_vlm(family, prompt=prompt), tiny_sample(tmp_path, **changes))


def test_what_only_looks_like_a_special_token_is_text(tmp_path):
    question = "Is <S> or < s > of 🙂 </ s> é left?"  # no token, and characters that this tokenizer doesn't know
    encoded = encode(tiny_vlm(), tiny_sample(tmp_path, question=question, objects=()))
    assert spelled(encoded, "question") == question and 2 not in encoded.inputs["input_ids"][0]


def test_a_processor_that_cuts_the_text_differently_is_refused(tmp_path, monkeypatch):
    model = tiny_vlm()
    whole = type(model.processor).__call__

    def other(self, *, text, **kwargs):
        return whole(self, text=text.replace("USER", "U SER"), **kwargs)

    monkeypatch.setattr(type(model.processor), "__call__", other)
    with pytest.raises(ValueError, match="cut the prompt differently"):
        encode(model, tiny_sample(tmp_path))
