"""Bad input that no single module's tests hold: odd pictures and text; what may not lead or reach out."""

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.encode import encode
from mmflow_utils.samples import load_image

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
    grey = np.array([[0, 128, 257, 32768, 65407, 65535]], dtype=kind)
    loaded = np.asarray(stored(Image.fromarray(grey), "tiff"))
    assert loaded.tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255, 255)]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(stored, mode):
    with pytest.raises(
        ValueError, match=r"sample q1: picture .*23.tiff .* known range; store it with 8 bits"
    ):
        stored(Image.new(mode, (8, 8), 3000), "tiff")


def test_an_animated_picture_shows_its_first_frame(stored):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for ending in ("gif", "png"):
        loaded = stored(first, ending, save_all=True, append_images=[second])
        assert loaded.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(("mode", "clear"), [("P", 0), ("RGB", (9, 9, 9)), ("L", 9)])
def test_what_is_clear_is_white_and_not_the_colour_below(stored, mode, clear):
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
    assert len(encoded.spans["image"]) >= 16
    assert model.hf(**encoded.inputs).logits.isfinite().all()
