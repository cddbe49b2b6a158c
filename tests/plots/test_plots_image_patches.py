"""The patches drawn are the patches given, in their set's color; every norm is in the histogram."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from mmflow_utils.plots.image_patches import plot_image_patches, plot_norms
from mmflow_utils.plots.style import set_color

PICTURE = np.zeros((20, 40, 3), dtype=np.uint8)


def table(view=0):
    rows = [(0, 0, 10, 10, "image_related"), (10, 0, 10, 10, "image_other"), (20, 0, 10, 10, None)]
    rows.append((0, 0, 0, 0, "image_other"))  # in the padding
    return pd.DataFrame(rows, columns=["x", "y", "w", "h", "set"]).assign(view=view, position=range(4))


def test_a_patch_is_drawn_where_it_lies_in_the_color_of_its_set():
    (axis,) = plot_image_patches(PICTURE, table(), title="a title").axes
    drawn = {c.get_label(): c for c in axis.collections}
    assert set(drawn) == {"image_related", "image_other", "in no set"}
    for name in ("image_related", "image_other"):
        assert tuple(drawn[name].get_facecolor()[0][:3]) == pytest.approx(to_rgb(set_color(name)))
        assert len(drawn[name].get_paths()) == 1
    assert drawn["image_other"].get_paths()[0].get_extents().bounds == (9.5, -0.5, 10, 10)
    assert len(drawn["in no set"].get_facecolor()) == 0


def test_with_weights_patches_are_shaded_on_one_scale_over_a_gray_picture():
    colored = np.full((20, 40, 3), (200, 0, 100), dtype=np.uint8)
    strong, weak = (table().assign(weight=[most, most / 2, 0.0, 0.0]) for most in (8.0, 4.0))
    figure = plot_image_patches(colored, {"strong": strong, "weak": weak})
    first, second, bar = figure.axes
    assert set(first.images[0].get_array().reshape(-1, 3).std(-1)) == {0}
    shade = {
        (axis.get_title("left"), c.get_label()): c.get_facecolor()[0]
        for axis in (first, second)
        for c in axis.collections
    }
    assert shade["strong", "image_other"] == pytest.approx(shade["weak", "image_related"])
    assert shade["strong", "image_related"] != pytest.approx(shade["weak", "image_related"])
    (edge,) = first.collections[1].get_edgecolor()
    assert first.collections[1].get_label() == "image_related" and edge[:3] == pytest.approx(
        to_rgb(set_color("image_related"))
    )
    assert bar.get_ylim() == (0, 8) and "(%, square-root scale)" in bar.get_ylabel()


def test_tiles_and_named_tables_have_panels_of_their_own():
    two = pd.concat([table(0), table(1)])
    figure = plot_image_patches(PICTURE, {"boxes": two, "control": table()}, columns=2)
    titles = [axis.get_title("left") for axis in figure.axes if axis.get_title("left")]
    assert titles == ["boxes · Whole picture", "boxes · Tiles", "control"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Related image patches", "Other image patches"]


def test_boxes_are_outlined_in_every_panel_and_an_absent_one_in_none():
    things = [SimpleNamespace(box=SimpleNamespace(x=3, y=4, w=5, h=6)), SimpleNamespace(box=None)]
    figure = plot_image_patches(PICTURE, {"a": table(), "b": table()}, objects=iter(things))
    for axis in figure.axes:
        assert [patch.get_bbox().bounds for patch in axis.patches] == [(2.5, 3.5, 5, 6)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_pictures_keep_their_shape_and_fill_their_panels(n):
    figure = plot_image_patches(PICTURE, {str(k): table() for k in range(n)}, columns=2, title="t")
    figure.canvas.draw()
    for axis in figure.axes[:n]:
        given, used = axis.get_position(original=True), axis.get_position()
        assert (used.width, used.height) == pytest.approx((given.width, given.height), rel=0.02)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="view"):
        plot_image_patches(PICTURE, table().drop(columns="view"))
    with pytest.raises(ValueError, match="none"):
        plot_norms(pd.Series(dtype=float), threshold=1.0)


@pytest.mark.parametrize("threshold", [5.0, 9.99, 57.0])
def test_every_norm_is_counted_once_on_its_side_of_the_threshold(threshold):
    norms = pd.Series(np.random.default_rng(0).uniform(1, 10, 500))
    (axis,) = plot_norms(norms, threshold=threshold).axes
    bars = [bar for bar in axis.patches if bar.get_height() > 0]
    assert sum(bar.get_height() for bar in bars) == 500
    above = sum(bar.get_height() for bar in bars if bar.get_x() >= threshold - 1e-9)
    assert above == (norms > threshold).sum()
    axis.figure.canvas.draw()
    assert {"1", "10"} <= {label.get_text() for label in axis.get_yticklabels()}
    assert f"threshold {threshold:.1f}" in axis.get_legend_handles_labels()[1]


def test_norms_that_are_all_alike_are_drawn():
    plot_norms(pd.Series([3.0, 3.0]), threshold=3.0)
