"""What docs/models.md says of each family's exactness is what was measured, and measuring again bears it out."""

import pandas as pd
import pytest

from benchmarks import families
from mmflow_utils.models.adapter import FAMILIES


def test_the_page_shows_what_was_measured_of_every_family():
    frame = pd.read_csv(families.RECORDED)
    assert families.TABLE.search(families.PAGE.read_text(encoding="utf-8"))[0] == families.as_table(frame)
    assert set(map(tuple, frame[["family", "kernel", "dtype"]].to_numpy())) == {
        (family, kernel, dtype) for family in FAMILIES for kernel in families.KERNELS for dtype in families.DTYPES
    }
    exact = frame[frame.dtype == "float32"]
    assert exact.sweep_plain.max() < 1e-5 < frame[frame.dtype != "float32"].sweep_float32.min()
    assert (frame.sweep_float32 <= 2 * frame.plain_float32 + 1e-5).all()


@pytest.mark.slow
def test_measuring_again_gives_differences_of_that_size():
    recorded = pd.read_csv(families.RECORDED)
    again = pd.DataFrame(families.measure_family("qwen3_vl"))
    assert again.n_knockouts.eq(64).all()
    assert (again[again.dtype == "float32"].sweep_plain < 1e-6).all()
    before = recorded[recorded.family == "qwen3_vl"].set_index(["kernel", "dtype"]).sweep_float32
    halves = again[again.dtype != "float32"].set_index(["kernel", "dtype"]).sweep_float32
    assert (halves < 5 * before[halves.index]).all() and (halves > before[halves.index] / 5).all()
