"""What a model's notebooks measured is stored compactly, and found by a run in a fresh copy of the project."""

from inspect import unwrap

import pandas as pd
import pytest
from killed_runs import SAMPLES, measure
from tiny import tiny_vlm

from mmflow_utils.experiments import curation
from mmflow_utils.experiments.curation import COLUMNS, load_samples
from mmflow_utils.params import Params
from mmflow_utils.results import committed
from mmflow_utils.results.frames import load_frame, save_frame
from mmflow_utils.results.resume import measure_in_parts
from workflow import commit_results as module
from workflow.commit_results import commit_results

asked = []


def ask_questions(model, samples, *, progress=True):
    """Answer two of three questions correctly."""
    asked.extend(sample.sample_id for sample in samples)
    rows = [vars(s) | {"prediction": "Red", "correct": int(s.sample_id) % 3 > 0, "reason": None} for s in samples]
    return pd.DataFrame(rows)[list(COLUMNS)]


@pytest.fixture
def params(tmp_path, monkeypatch):
    monkeypatch.setattr(curation, "ask_questions", ask_questions)
    monkeypatch.setattr(module, "curate", unwrap(module.curate))  # no model is asked, so there is none to check
    monkeypatch.setattr(committed, "FOLDER", tmp_path / "committed")
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    asked.clear()
    return Params(tasks=["ChooseAttr"], n_samples=30, outputs=str(tmp_path / "outputs"))


def run(params, n=40, **options):
    path = params.folder / "flow.parquet"
    return measure_in_parts(measure, None, SAMPLES[:n], path, params, version=1, progress=False, **options)


def test_frames_and_samples_are_found_in_a_fresh_copy(params, tmp_path, capsys):
    first, samples = run(params), load_samples(tiny_vlm(n_layers=1), params)
    save_frame(first.frame, params.folder / "made_of_it.parquet", {"depends_on": {}})
    n_asked = len(asked)
    files = commit_results(params, params.folder, tmp_path / "committed")
    rounds = [file.stem for file in files if "asked" in file.stem]
    assert [file.stem for file in files] == ["flow", *(f"asked_{n}" for n in range(len(rounds)))] and rounds
    stored = pd.read_parquet(files[0])
    assert set(map(str, stored.dtypes[["layer", "p"]])) == {"int64", "float32"}

    fresh = params.model_copy(update={"outputs": str(tmp_path / "elsewhere")})
    asked.clear()
    assert load_samples(tiny_vlm(n_layers=1), fresh) == samples
    assert n_asked > len(samples) and 0 < len(asked) <= 3 * len(rounds) < n_asked
    again = run(fresh)
    pd.testing.assert_frame_equal(again.frame, first.frame, rtol=1e-6)
    assert again.skipped == first.skipped
    assert load_frame(fresh.folder / "flow.parquet", again.manifest).equals(again.frame)


def test_what_is_of_another_run_is_left_out_and_named(params, tmp_path, capsys):
    run(params.model_copy(update={"window": 9}))
    with pytest.raises(ValueError, match=r"Expected results of mini in .*, 25 MB in all, got 0\.0 MB"):
        commit_results(params, params.folder, tmp_path / "committed")
    said = capsys.readouterr().out
    assert "flow.parquet is left out: window was 9, now 3." in said
    assert "The choice of samples is left out: not made yet for ChooseAttr." in said


def test_of_each_name_the_latest_run_is_taken(params, tmp_path):
    def taken():
        (file,) = commit_results(params, params.folder, tmp_path / "committed")
        return len(load_frame(file))

    first, few = run(params), run(params, n=4)
    assert len(few.frame) < len(first.frame)
    assert len(list(params.folder.glob("flow*.parquet"))) == 2 and taken() == len(few.frame)
    run(params)  # loaded, which makes it the latest again
    assert taken() == len(first.frame)


def test_what_an_older_version_measured_is_left_out(params, tmp_path, monkeypatch, capsys):
    run(params)
    monkeypatch.setitem(module.VERSIONS, "measure", 2)
    with pytest.raises(ValueError, match="Expected results of mini"):
        commit_results(params, params.folder, tmp_path / "committed")
    assert "flow.parquet is left out: version was 1, now 2." in capsys.readouterr().out


def test_what_another_model_was_shown_beside_is_taken_and_the_other_models_own_is_not(params, tmp_path):
    other = params.model_copy(update={"model": "other"})
    beside = measure_in_parts(
        measure, None, SAMPLES[:4], other.folder / "beside.parquet", params, version=1, progress=False
    )
    run(other)
    assert [file.stem for file in commit_results(params, params.folder, tmp_path / "committed")] == ["beside"]
    assert len(pd.read_parquet(tmp_path / "committed" / "mini" / "beside.parquet")) == len(beside.frame)


def test_all_models_together_stay_small(params, tmp_path, monkeypatch):
    run(params)
    monkeypatch.setattr(module, "LIMIT_MB", 0.001)
    with pytest.raises(ValueError, match=r"0\.001 MB in all"):
        commit_results(params, params.folder, tmp_path / "committed")
