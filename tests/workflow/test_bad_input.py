"""Bad input that no single module's tests hold: odd pictures and text; what may not lead or reach out."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import PROMPT, tiny_sample, tiny_vlm

from mmflow_utils.analysis.collect import read_results
from mmflow_utils.data.sample import SceneObject, load_image
from mmflow_utils.experiments.curation import ask_questions
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.experiments.lens import logit_lens
from mmflow_utils.params import Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST
from mmflow_utils.results.frames import manifest, save_frame

# Pictures


@pytest.fixture
def stored(tmp_path):
    """Store a picture as a sample's and load it again."""

    def stored(picture, ending="png", **options):
        file = tmp_path / f"23.{ending}"
        picture.save(file, **options)
        return load_image(tiny_sample(tmp_path, size=(8, 8), image=file))

    return stored


def test_cmyk_is_converted(stored):
    loaded = stored(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", quality=100)
    assert loaded.mode == "RGB" and np.allclose(loaded.getpixel((4, 4)), (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_and_not_clipped_to_white(stored, kind):
    gray = np.array([[0, 128, 257, 32768, 65407, 65535]], dtype=kind)
    loaded = np.asarray(stored(Image.fromarray(gray), "tiff"))
    assert loaded.tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255, 255)]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(stored, mode):
    with pytest.raises(ValueError, match=r"sample q1: picture .*23.tiff .* known range; store it with 8 bits"):
        stored(Image.new(mode, (8, 8), 3000), "tiff")


def test_an_animated_picture_shows_its_first_frame(stored):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    for ending in ("gif", "png"):
        loaded = stored(first, ending, save_all=True, append_images=[second])
        assert loaded.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "ending", "options"),
    [
        ("P", "png", {}), ("LA", "png", {}), ("1", "png", {}), ("YCbCr", "jpg", {}), ("RGB", "avif", {}),
        ("RGB", "jpg", {"format": "PNG"}),  # its ending lies
        ("RGB", "webp", {"save_all": True}), ("RGB", "mpo", {"save_all": True}),  # of several pictures the first
    ],
)  # fmt: skip
def test_pictures_of_every_kind_are_read(stored, mode, ending, options):
    first, second = (Image.new("RGB", (8, 8), color).convert(mode) for color in ("white", "black"))
    options = options | ({"append_images": [second]} if "save_all" in options else {})
    assert min(stored(first, ending, **options).getpixel((4, 4))) > 250


@pytest.mark.parametrize(
    "held", [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", b"<!DOCTYPE html>", b""]
)
def test_what_only_bears_a_pictures_name_is_refused(tmp_path, held):
    (tmp_path / "23.jpg").write_bytes(held)
    with pytest.raises(ValueError, match="sample q1: picture .*23.jpg is broken .*; fetch it again"):
        load_image(tiny_sample(tmp_path, image=tmp_path / "23.jpg"))


@pytest.mark.parametrize(("mode", "clear"), [("P", 0), ("RGB", (9, 9, 9)), ("L", 9)])
def test_what_is_clear_is_white_and_not_the_color_below(stored, mode, clear):
    picture = Image.new(mode, (8, 8), clear)
    assert stored(picture, transparency=clear).getpixel((4, 4)) == (255, 255, 255)
    assert stored(picture).getpixel((4, 4)) != (255, 255, 255)


def test_an_exif_rotation_is_left_alone_as_boxes_refer_to_stored_pixels(stored, tmp_path):
    picture = Image.new("RGB", (8, 16), "blue")
    picture.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by a quarter
    loaded = stored(picture, exif=exif)
    assert loaded.size == (8, 16) and loaded.getpixel((4, 2)) == (255, 0, 0)


@pytest.mark.parametrize("share", [1.5, 2.5])  # Pillow alone warns up to twice its limit
def test_a_decompression_bomb_is_refused_before_it_unpacks(stored, monkeypatch, share):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert stored(Image.new("RGB", (10, 100))).size == (10, 100)
    said = r"sample q1: picture .*23.png unpacks to more than 1,000 pixels, .*; replace it by a smaller one"
    with pytest.raises(ValueError, match=said):
        stored(Image.new("1", (10, int(100 * share))))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_a_picture_of_one_pixel_is_a_picture(tmp_path, family, size):
    file = tmp_path / "dot.png"
    Image.new("RGB", size, "red").save(file)
    model = tiny_vlm(family)
    encoded = encode(model, tiny_sample(tmp_path, image=file, objects=()))
    assert len(encoded.positions["image"]) >= 16
    assert model.hf(**encoded.inputs).logits.isfinite().all()


# Parameters


@pytest.mark.parametrize("name", ["..", ".", "../mini", "a/b", "/mini", "", "mini\n", ".hidden", "a\\b"])
def test_a_models_name_stays_in_outputs(name):
    with pytest.raises(ValueError, match="Parameter model = "):
        Params(model=name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"window: 3\nwindow: 9\n", "gives window more than once: keep one line"),
        (b"1: 2\n", "should hold lines of the form name: value"),
        (b"seed: \xff\n", "is not valid YAML"),
        (b"seed: 2026-02-30\n", "is not valid YAML"),
        (b"seed: !!bool x\n", "is not valid YAML"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (b"seed: &a [1]\nwindow: *a\n", r"should .* but holds references \(\*\)"),
    ],
)
def test_a_file_that_is_no_list_of_parameters_is_named(tmp_path, content, said):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"p.yaml {said}") as caught:
        Params.from_yaml(tmp_path / "p.yaml")
    assert "\n" not in str(caught.value)


def test_references_that_multiply_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    (tmp_path / "p.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="p.yaml should hold lines"):
        Params.from_yaml(tmp_path / "p.yaml")


# Text


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(
    "question",
    [
        "Is the \U0001f408 to the left of the \U0001f469\u200d\U0001f467 cup or to the right?",
        "\u05d4\u05d0\u05dd the cup \u05dc\u05d9\u05de\u05d9\u05df left or right \u202e\u05d0\u05d5?",
        "Is the cafe\u0301 cup to the left \u2014 or to the right?",
        "Is the cup\tleft\r\nor right?",
    ],
)
def test_words_are_found_beside_emoji_and_text_from_right_to_left(tmp_path, family, question):
    model = tiny_vlm(family)
    encoded = encode(model, tiny_sample(tmp_path, question=question, objects=(SceneObject(name="cup"),)))
    for name, word in (("option_true", "left"), ("option_false", "right"), ("objects", "cup")):
        assert "".join(encoded.tokens[p] for p in encoded.positions[name]).strip() == word
    assert encoded.prompt == PROMPT.replace("{question}", question)


def test_a_question_longer_than_the_context_is_refused(tmp_path):
    model, long = tiny_vlm(), "Is it left or right? " * 200
    with pytest.raises(ValueError, match=r"Sample q1: its prompt has \d+ tokens, but tiny-llava takes 512: short"):
        encode(model, tiny_sample(tmp_path, question=long))
    n_tokens = encode(model, sample := tiny_sample(tmp_path)).positions.n_tokens
    encode(model, sample, answer_prefix=[5] * (512 - n_tokens))
    with pytest.raises(ValueError, match="has 513 tokens"):
        encode(model, sample, answer_prefix=[5] * (513 - n_tokens))


# Models


def test_a_window_wider_than_the_model_is_all_of_its_layers(tmp_path):
    model, sample = tiny_vlm(n_layers=2), tiny_sample(tmp_path)
    wide, whole = (
        knockout_sweep(model, [sample], FLOW_TO_LAST, window=window, progress=False).frame for window in (9, 4)
    )
    assert set(wide.n_layers_blocked) == {2} and sorted(set(wide.layer)) == [0, 1]
    assert np.allclose(wide.p_knockout, whole.p_knockout, atol=1e-6)


@pytest.mark.parametrize("method", ["sweep", "reference"])
def test_logits_that_are_no_numbers_stop_every_measurement(tmp_path, method):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    with torch.no_grad():
        model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    said = "Sample q1: the model's logits hold NaN, no numbers: set dtype to"
    with pytest.raises(ValueError, match=said):
        knockout_sweep(model, [sample], FLOW_TO_LAST, window=1, method=method, n_check=0, progress=False)
    with pytest.raises(ValueError, match=said):
        logit_lens(model, [sample], progress=False)
    asked = ask_questions(model, [sample], progress=False).iloc[0]
    assert pd.isna(asked.prediction) and not asked.correct and re.match(said, asked.reason)


# Results of different runs


def store(folder, name, params):
    frame = pd.DataFrame({"sample_id": ["q"], "layer": [0]})
    return save_frame(frame, folder / "m" / f"{name}.parquet", manifest(params))


def test_results_of_different_runs_are_not_compared(tmp_path):
    store(tmp_path, "flow_to_last", Params(window=3))
    store(tmp_path, "logit_lens", Params(window=3, n_boot=500))
    assert set(read_results(tmp_path)) == {"flow_to_last", "logit_lens"}
    store(tmp_path, "image_to_question", Params(window=5))
    said = r"m/image_to_question.parquet and flow_to_last.parquet are of different runs \(window was 3, now 5\)"
    with pytest.raises(ValueError, match=f"{said}: run the notebooks 02 and 03 again"):
        read_results(tmp_path)
