"""A result that comes with the project is taken where it is of this very run, and never unseen."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from killed_runs import PARAMS, SAMPLES, measure

from mmflow_utils.params import Params
from mmflow_utils.prompts.flows import Flow
from mmflow_utils.results import committed
from mmflow_utils.results.frames import load_frame, read_frame, save_frame
from mmflow_utils.results.record import Result
from mmflow_utils.results.resume import measure_in_parts

FEW = SAMPLES[:10]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Measure in parts beside a committed result of the same; `run.asked` lists the calls since then."""
    monkeypatch.setattr(committed, "FOLDER", tmp_path / "assets")
    monkeypatch.setattr(committed, "ROOT", tmp_path)

    def noting(model, some, *, window=1, n_check=0, progress):
        run.asked.append((n_check, [sample.sample_id for sample in some]))
        return measure(model, some, window=window)

    def run(name="flow.parquet", samples=FEW, params=PARAMS, **options):
        run.asked = []
        path = tmp_path / "outputs" / name
        return measure_in_parts(noting, None, samples, path, params, n_check=2, version=1, progress=False, **options)

    def commit(change=lambda frame: frame):
        first = run()
        folder = tmp_path / "assets" / PARAMS.model
        save_frame(change(first.frame.copy()), folder / "flow.parquet", first.manifest)
        for file in (tmp_path / "outputs").iterdir():
            file.unlink()
        return first

    run.commit, run.folder = commit, tmp_path
    return run


def test_it_is_taken_once_three_samples_measured_anew_agree(run, capsys):
    first = run.commit()
    taken = run()
    assert run.asked == [(1, [f"q00{n}"]) for n in range(3)]  # each of them checked against plain passes, too
    assert taken.frame.equals(first.frame) and taken.skipped == first.skipped
    assert load_frame(run.folder / "outputs" / "flow.parquet", taken.manifest).equals(first.frame)
    assert "3 samples measured anew gave the same within 0.0001" in capsys.readouterr().out
    assert run().frame.equals(first.frame) and not run.asked  # now it is finished, as any other


def test_numbers_that_this_machine_does_not_find_stop_the_run(run):
    run.commit(lambda frame: frame.assign(p=frame.p + 2e-4))
    with pytest.raises(ValueError, match=r"assets/tiny/flow.parquet is not what .* p differs by 2.0e-04\. FRESH=1"):
        run()
    assert len(run(fresh=True).frame)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.assign(layer=f.layer + 1), "layer differs"),
        (lambda f: f.drop(index=0), "rows instead of"),
        (lambda f: f.assign(p=np.nan), "p differs"),
    ],
)
def test_other_rows_stop_the_run(run, change, said):
    run.commit(change)
    with pytest.raises(ValueError, match=said):
        run()


def test_rounding_is_no_difference(run):
    run.commit(lambda frame: frame.assign(p=frame.p + 5e-5))
    assert len(run().frame) and len(run.asked) == 3


@pytest.mark.parametrize("other", [{"window": 2}, {"samples": SAMPLES[1:11]}, {"fresh": True}])
def test_another_run_measures_itself(run, other):
    run.commit()
    run(**other)
    assert sum(len(ids) for _, ids in run.asked) == 10


def test_what_a_notebook_has_of_its_own_comes_in_through_samples_and_arguments(run):
    class Own(Params):
        n_asked: int = 7

    run.commit()
    run(params=Own(**PARAMS.model_dump()))
    assert len(run.asked) == 3
    run(params=Own(**PARAMS.model_dump() | {"seed": 1}))
    assert len(run.asked) == 1  # all of them, for another seed


def test_a_damaged_file_is_measured_anew(run):
    run.commit()
    file = run.folder / "assets" / PARAMS.model / "flow.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    assert len(run().frame) and sum(len(ids) for _, ids in run.asked) == 10


FLOWS = [Flow(source=f"s{n}", target="last") for n in range(8)]


def frame_of(samples, flows, layers):
    """Return rows in the order of a sweep; sample n loses most in layer n + 2."""
    rows = [
        {"sample_id": sample.sample_id, "flow": str(flow), "layer": layer, "p_knockout": float(layer != n + 2)}
        for n, sample in enumerate(samples)
        for flow in flows
        for layer in layers
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("flows", "kept"), [(FLOWS, [3, 3, 2]), (FLOWS[:3], [3, 3, 3]), (FLOWS[:1], [1, 1, 1])])
def test_of_a_sweep_the_layers_that_change_most_are_measured_and_of_many_flows_some(
    tmp_path, monkeypatch, flows, kept, capsys
):
    monkeypatch.setattr(committed, "FOLDER", tmp_path)
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    whole = {"depends_on": {"model": "tiny", "experiment": "knockout_sweep"}}
    stored = frame_of(SAMPLES[:5], flows, range(9)).astype({"p_knockout": "float32"})
    save_frame(stored, tmp_path / "tiny" / "flow.parquet", whole)
    asked = []

    def anew(some, **narrow):
        asked.append(narrow)
        every = frame_of(SAMPLES[:5], narrow.get("flows", flows), narrow["layers"])
        return Result(every[every.sample_id == some[0].sample_id])

    taken = committed.take_committed(tmp_path / "flow.parquet", whole, SAMPLES[:5], anew, flows)
    assert taken.frame.p_knockout.dtype == "float64" and len(taken.frame) == 5 * len(flows) * 9
    assert [len(one.get("flows", flows)) for one in asked] == kept
    assert all(n + 2 in one["layers"] for n, one in enumerate(asked))
    assert {len(one["layers"]) for one in asked} == {committed.N_PLAIN // len(flows) or 1}
    assert {flow for one in asked for flow in one.get("flows", flows)} == set(flows)

    def other(some, **narrow):
        found = anew(some, **narrow).frame
        return Result(found.assign(p_knockout=found.p_knockout + 2e-4))

    with pytest.raises(ValueError, match=r"sample q000, p_knockout differs by 2.0e-04"):
        committed.take_committed(tmp_path / "flow.parquet", whole, SAMPLES[:5], other, flows)


@pytest.mark.parametrize(("same", "depth"), [([100, 100, 0, 100], 6), ([100, 100, 100, 100], 9)])
def test_of_removals_the_depth_that_changes_most_is_measured_beside_the_intact_model(
    tmp_path, monkeypatch, same, depth
):
    monkeypatch.setattr(committed, "FOLDER", tmp_path)
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    whole = {"depends_on": {"model": "tiny", "experiment": "prune_sweep"}}
    rows = [
        {"sample_id": sample.sample_id, "way": way, "n_layers_without": n, "same_pct": percent, "prediction": "Cup"}
        for sample in FEW
        for n, percent in zip((0, 3, 6, 9), same, strict=True)
        for way in ("last", "random", "attention")
    ]
    stored, asked = pd.DataFrame(rows), []
    save_frame(stored, tmp_path / "tiny" / "removed.parquet", whole)

    def anew(some, *, removed, says="Cup"):
        asked.append(removed)
        mine = stored[stored.sample_id.eq(some[0].sample_id) & stored.n_layers_without.isin([0, *removed])]
        return Result(mine.assign(prediction=says))

    assert len(committed.take_committed(tmp_path / "removed.parquet", whole, FEW, anew, ()).frame) == len(stored)
    assert asked == [[depth]] * 3
    with pytest.raises(ValueError, match="prediction differs"):
        committed.take_committed(tmp_path / "removed.parquet", whole, FEW, partial(anew, says="Cat"), ())


def test_what_comes_with_the_project_is_whole():
    for file in committed.FOLDER.glob("*/*.parquet"):
        frame, manifest = read_frame(file)
        assert len(frame) and manifest["depends_on"]["model"] == file.parent.name


@pytest.mark.parametrize(("said", "agrees"), [(["▁sea", "gull"], True), (["▁sea", "gul", "l"], False)])
def test_lists_of_words_are_compared_as_a_file_gives_them_back(tmp_path, monkeypatch, said, agrees):
    monkeypatch.setattr(committed, "FOLDER", tmp_path)
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    whole = {"depends_on": {"model": "tiny", "experiment": "answer_subwords"}}
    rows = pd.DataFrame({"sample_id": [s.sample_id for s in FEW], "subwords": [["▁sea", "gull"]] * len(FEW)})
    save_frame(rows, tmp_path / "tiny" / "words.parquet", whole)

    def anew(some):
        return Result(pd.DataFrame({"sample_id": [some[0].sample_id], "subwords": [said]}))

    if agrees:
        assert len(committed.take_committed(tmp_path / "words.parquet", whole, FEW, anew).frame) == len(FEW)
    else:
        with pytest.raises(ValueError, match="subwords differs"):
            committed.take_committed(tmp_path / "words.parquet", whole, FEW, anew)
