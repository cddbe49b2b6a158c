"""An experiment's rows change only together with its version, so that what is stored is what a run would give."""

import expected_frames
import pytest
from expected_frames import CALLS, COMMAND, WORDS, find_changes, kept, measure

from mmflow_utils.results.version import VERSIONS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", VERSIONS)
def test_rows_change_only_with_the_version(name, tmp_path):
    expected, version = kept(name)
    assert version == VERSIONS[name], f"{name} has version {VERSIONS[name]} now: run {COMMAND}"
    changed = find_changes(measure(name, tmp_path), expected)
    assert not changed, (
        f"The rows of {name} changed in {', '.join(changed)}: raise its version in mmflow_utils/results/version.py, "
        f"so that stored results are measured anew, then run {COMMAND}"
    )


def test_every_experiment_has_rows_that_say_something():
    assert CALLS.keys() == VERSIONS.keys()
    for name in VERSIONS:
        frame, _ = kept(name)
        numbers = frame[[WORDS[name]]] if name in WORDS else frame.select_dtypes("float")
        assert len(frame) >= 4 and (numbers.nunique() > 1).any(), name


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.assign(p_knockout=frame.p_knockout + 1e-4),
        lambda frame: frame.assign(layer=frame.layer + 1),
        lambda frame: frame.assign(logit_diff_base=float("nan")),
        lambda frame: frame.rename(columns={"task": "kind"}),
        lambda frame: frame[1:],
    ],
    ids=["a number", "a label", "a missing value", "a column", "a row"],
)
def test_a_change_is_found_and_rounding_is_none(change):
    frame, _ = kept("knockout_sweep")
    assert find_changes(change(frame), frame)
    assert not find_changes(frame.assign(p_knockout=frame.p_knockout * (1 + 1e-7)), frame)


def test_what_is_kept_is_replaced_only_for_a_raised_version(tmp_path, monkeypatch):
    monkeypatch.setattr(expected_frames, "FOLDER", tmp_path)
    versions = {"picture_sweep": 1}
    monkeypatch.setattr(expected_frames, "VERSIONS", versions)
    expected_frames.keep_raised()
    first = kept("picture_sweep")[0]
    monkeypatch.setattr(expected_frames, "measure", lambda name, pictures: first.assign(work_pct=0.0))
    expected_frames.keep_raised()
    assert kept("picture_sweep")[0].equals(first)
    versions["picture_sweep"] = 2
    expected_frames.keep_raised()
    assert kept("picture_sweep")[1] == 2 and (kept("picture_sweep")[0].work_pct == 0).all()
