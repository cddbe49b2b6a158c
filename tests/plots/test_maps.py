"""Maps over layers in several panels: one scale about zero, rows as they come, numbers in the cells that matter."""

import pandas as pd
import pytest

from mmflow_utils.plots.maps import plot_maps


def summary():
    cells = [("B", 0, 80.0), ("B", 1, -3.0), ("A", 0, 10.0), ("A", 1, -40.0)]
    rows = pd.DataFrame(cells, columns=["positions", "layer", "mean"])
    return pd.concat([rows.assign(task="T"), rows[rows.positions == "B"].assign(task="U", mean=8.0)])


def test_panels_share_a_scale_about_zero_and_rows_stand_as_they_come():
    figure = plot_maps(summary(), row="positions", label="Recovery (%)", title="Where")
    first, second, bar = figure.axes
    meshes = [axis.collections[0] for axis in (first, second)]
    assert {mesh.get_clim() for mesh in meshes} == {(-80.0, 80.0)}
    assert [text.get_text() for text in first.get_yticklabels()] == ["B", "A"]
    assert [text.get_text() for text in first.texts if text.get_text()] == ["80", "10", "−40"]
    assert second.get_title("left") or second.get_title() == "U"
    assert not second.get_yticklabels() and meshes[1].get_array().count() == 2  # of A nothing was measured
    assert bar.get_ylabel() == "Recovery (%)" and first.get_xlabel() == "Layer"


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="expected the columns mean"):
        plot_maps(summary().drop(columns="mean"), row="positions", label="%")
