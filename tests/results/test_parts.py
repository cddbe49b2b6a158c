"""Parts: nothing that was computed is lost, nothing is mixed, and the parts together are the whole."""

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_runs import PARAMS, SAMPLES, make_sample, measure

from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import Flow
from mmflow_utils.results import frames as store
from mmflow_utils.results.frames import list_frames, load_frame, read_frame, read_manifest
from mmflow_utils.results.record import Result
from mmflow_utils.results.resume import measure_in_parts
from mmflow_utils.results.version import VERSIONS, describe_call

FEW, ROOT = SAMPLES[:10], Path(__file__).parents[2]


def whole(samples=FEW, **options):
    return measure(None, samples, **options)


def equal(one, other):
    pd.testing.assert_frame_equal(one.frame, other.frame, check_exact=True)
    assert one.skipped == other.skipped and one.max_check_diff == other.max_check_diff
    return True


def stored(path):
    """Return the latest result of a name, as it was stored."""
    return Result.of(*read_frame(list_frames(path)[0]))


@pytest.fixture
def compute(tmp_path):
    """Compute ten samples in parts of three; `compute.asked` lists what was measured since the last call."""

    def compute(samples=FEW, changes=(), **options):
        compute.asked = []

        def noting(model, some, *, window=1, progress):
            compute.asked += [sample.sample_id for sample in some]
            if compute.stop_at in compute.asked:
                raise KeyboardInterrupt
            return measure(model, some, window=window)

        options = {"part_size": 3, "progress": False, "version": 1} | options
        params = PARAMS.model_copy(update=dict(changes))
        return measure_in_parts(noting, None, samples, compute.path, params, **options)

    def parts(name="*"):
        return sorted(tmp_path.glob(f"flow.*.parts/{name}"))

    compute.path, compute.parts = tmp_path / "flow.parquet", parts
    compute.stop_at, compute.asked = None, []
    return compute


@pytest.fixture
def stopped(compute):
    """The same after a run that was interrupted in its third part."""
    compute.stop_at = "q007"
    with pytest.raises(KeyboardInterrupt):
        compute()
    compute.stop_at = None
    return compute


def ids(*numbers):
    return [f"q{number:03}" for number in numbers]


def test_an_undisturbed_run_is_one_call_and_leaves_only_the_result(compute):
    result = compute()
    assert equal(result, whole())
    assert compute.asked == ids(*range(10))
    assert sorted(file.name for file in compute.path.parent.iterdir()) == ["flow.json", "flow.parquet"]
    assert load_frame(compute.path, result.manifest).equals(whole().frame)
    assert equal(stored(compute.path), whole())
    assert read_manifest(compute.path)["made_by"]["max_check_diff"] == 9


def test_an_interrupted_run_goes_on_where_it_stopped(stopped, capsys):
    assert [file.name for file in stopped.parts()] == ["00000.parquet", "00001.parquet"]
    assert not stopped.path.exists()
    assert equal(stopped(), whole())
    assert stopped.asked == ids(6, 7, 8, 9)
    assert capsys.readouterr().out == "Parts of flow: 2 were measured before.\n"
    assert sorted(file.name for file in stopped.path.parent.iterdir()) == ["flow.json", "flow.parquet"]


def test_a_finished_run_is_loaded_until_it_is_deleted_or_damaged(compute, capsys):
    compute()
    assert equal(compute(), whole())
    assert compute.asked == []
    said = "flow.parquet matches this run; loaded from disk. FRESH=1 measures it anew.\n"
    assert capsys.readouterr().out == said
    compute.path.write_bytes(compute.path.read_bytes()[:-9])
    assert equal(compute(), whole())
    assert len(compute.asked) == 10
    compute.path.unlink()
    compute()
    assert len(compute.asked) == 10


PART_SIZE = 8  # of killed_runs


def run_and_kill(folder, kinds):
    """Kill and resume in a process of its own; say what it cost, and hold it against an undisturbed run."""
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    subprocess.run([sys.executable, script, "kill", str(folder), json.dumps(kinds)], check=True, timeout=900)
    assert equal(stored(folder / "flow.parquet"), whole(SAMPLES))
    assert not list(folder.glob("*.parts"))
    log = Counter((folder / "measured.log").read_text().split())
    assert set(log) == {sample.sample_id for sample in SAMPLES}
    again = log.total() - len(SAMPLES)
    print(f"{len(kinds)} kills ({', '.join(dict.fromkeys(kinds))}): {again} of {len(SAMPLES)} samples twice")
    return again


@pytest.mark.slow
def test_killed_twenty_times_nothing_is_lost(tmp_path):
    again = run_and_kill(tmp_path, ["fork"] * 20)
    assert 0 < again <= 20 * PART_SIZE  # a kill costs at most the part in work


@pytest.mark.slow
def test_a_killed_kernel_papermill_or_snakemake_loses_nothing(tmp_path):
    kinds = ["kernel"] * 3 + ["papermill"] * 3 + ["snakemake"] * 2
    assert 0 < run_and_kill(tmp_path, kinds) <= len(kinds) * PART_SIZE
    code = [cell for cell in nbformat.read(tmp_path / "done.ipynb", as_version=4).cells]
    assert [cell.execution_count for cell in code] == [1, 2]


@pytest.mark.slow
def test_different_runs_at_once_under_one_name_each_get_their_own(tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    subprocess.run([sys.executable, script, "windows", str(tmp_path), "[5, 7, 5]"], check=True)
    found = [Result.of(*read_frame(file)) for file in list_frames(tmp_path / "flow.parquet")]
    windows = [result.manifest["depends_on"]["arguments"]["window"] for result in found]
    assert sorted(windows) == [5, 7]
    assert all(equal(result, whole(SAMPLES, window=window)) for result, window in zip(found, windows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [[None, None], ["1/3", "2/3", "3/3", None]])
def test_processes_that_run_at_once_do_no_harm(tmp_path, shards):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    subprocess.run([sys.executable, script, "together", str(tmp_path), json.dumps(shards)], check=True)
    assert [file.name for file in list_frames(tmp_path / "flow.parquet")] == ["flow.parquet"]
    assert equal(stored(tmp_path / "flow.parquet"), whole(SAMPLES))


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-1],
        lambda content: content[:200],
        lambda content: b"",
        lambda content: content[:300] + bytes([content[300] ^ 8]) + content[301:],
        lambda content: content.replace(b'"window": 3', b'"window": 4'),
    ],
    ids=["cut by a byte", "cut short", "emptied", "one bit flipped", "manifest edited"],
)
def test_a_damaged_part_is_found_and_measured_again(stopped, capsys, harm):
    (file,) = stopped.parts("00001.parquet")
    file.write_bytes(harm(file.read_bytes()))
    assert equal(stopped(), whole())
    assert stopped.asked == ids(*range(3, 10))
    said = capsys.readouterr().out
    assert said == "Parts of flow: 1 were measured before; 1 damaged or of other samples: measured again.\n"


def test_a_part_in_the_place_of_another_is_not_taken(stopped):
    first, second = stopped.parts()
    second.write_bytes(first.read_bytes())
    assert equal(stopped(), whole())
    assert stopped.asked == ids(*range(3, 10))


def fill_disk(monkeypatch, after):
    """Let a number of files be written, and then no more."""
    left, fsync = iter(range(after)), store.os.fsync

    def write(handle):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(store.os, "fsync", write)


def test_a_full_disk_leaves_what_was_there(compute, monkeypatch):
    fill_disk(monkeypatch, after=2)
    with pytest.raises(OSError, match="No space left on device"):
        compute()
    assert [file.name for file in compute.parts()] == ["00000.parquet", "00001.parquet"]
    monkeypatch.undo()
    assert equal(compute(), whole())
    assert compute.asked == ids(*range(6, 10))


def test_a_full_disk_in_the_last_step_loses_no_part(compute, monkeypatch):
    fill_disk(monkeypatch, after=4)
    with pytest.raises(OSError, match="No space left on device"):
        compute()
    assert compute.asked == ids(*range(10))
    assert len(compute.parts()) == 4
    assert not compute.path.exists()
    monkeypatch.undo()
    assert equal(compute(), whole())
    assert compute.asked == []


def test_parts_of_another_run_are_kept_and_never_mixed_in(stopped):
    stopped(changes={"window": 5})
    assert stopped.asked == ids(*range(10))
    assert equal(stopped(), whole())
    assert stopped.asked == ids(6, 7, 8, 9)


CHANGES = [
    ({"changes": {"model": "mini"}}, "model was 'tiny', now 'mini'"),
    ({"changes": {"window": 5}, "window": 5}, "window was 3, now 5; window was None, now 5"),
    ({"version": 2}, "version was 1, now 2"),
    ({"window": 1}, "window was None, now 1"),
]


@pytest.mark.parametrize(("change", "differs"), CHANGES)
def test_a_finished_frame_of_another_run_is_kept_and_both_are_found(compute, capsys, change, differs):
    first = compute()
    content = compute.path.read_bytes()
    second = compute(**change)
    assert compute.asked == ids(*range(10)) and compute.path.read_bytes() == content
    (beside,) = (file for file in compute.path.parent.glob("*.parquet") if file != compute.path)
    said = capsys.readouterr().out
    assert said == (
        f"flow.parquet is of another run ({differs}) and stays, {beside.name} comes beside it (FRESH=1 replaces it).\n"
    )
    assert beside.with_suffix(".json").is_file()
    assert load_frame(compute.path, first.manifest).equals(first.frame)
    assert load_frame(compute.path, second.manifest).equals(second.frame)
    # Each is loaded when it is asked for, and is then the latest.
    for options, file in (({}, compute.path), (change, beside)):
        compute(**options)
        assert compute.asked == [] and list_frames(compute.path)[0] == file


@pytest.mark.parametrize("asked", ["parameter", "environment"])
def test_what_is_finished_is_replaced_if_the_reader_asks(compute, capsys, monkeypatch, asked):
    options = {"fresh": True} if asked == "parameter" else {}
    if asked == "environment":
        monkeypatch.setenv("FRESH", "1")
    compute(fresh=False)
    again = compute(**options)
    assert compute.asked == ids(*range(10)) and capsys.readouterr().out == ""
    compute(changes={"window": 5}, **options)
    assert "window was 3, now 5) and is replaced" in capsys.readouterr().out
    assert [file.name for file in list_frames(compute.path)] == ["flow.parquet"]
    with pytest.raises(ValueError, match="window was 5, now 3"):
        load_frame(compute.path, again.manifest)


def test_a_fresh_run_takes_the_parts_that_its_shards_left(compute):
    compute(changes={"window": 5})
    for shard in ("1/2", "2/2"):
        compute(fresh=True, changes={"shard": shard})
        assert len(compute.asked) == (6 if shard == "1/2" else 4)
    assert equal(compute(fresh=True), whole())
    assert compute.asked == []


def test_other_samples_and_other_sizes_are_another_run(stopped):
    stopped(samples=FEW[1:], changes={"shard": "1/1"})
    assert stopped.asked == ids(*range(1, 10))
    stopped(part_size=5, changes={"shard": "1/1"}, samples=FEW[1:])
    assert stopped.asked == ids(*range(1, 10))
    stopped(part_size=5, samples=FEW[1:])
    assert stopped.asked == []
    # What is finished doesn't depend on how it was cut.
    stopped(part_size=2, samples=FEW[1:])
    assert stopped.asked == []


def test_other_words_and_another_picture_are_another_run(stopped, tmp_path):
    stopped()
    reworded = [replace(FEW[0], question="Is it left?"), *FEW[1:]]
    stopped(samples=reworded)
    assert stopped.asked == ids(*range(10))
    (tmp_path / "a").mkdir()
    for folder, content in ((tmp_path, b"one"), (tmp_path / "a", b"one"), (tmp_path, b"two")):
        (folder / "picture.jpg").write_bytes(content)
        stopped(samples=[replace(FEW[0], image=folder / "picture.jpg"), *FEW[1:]])
        moved = folder != tmp_path  # the same picture in another place is the same
        assert stopped.asked == ([] if moved else ids(*range(10)))


def test_a_call_with_other_arguments_is_another_run(tmp_path):
    flow, other = (Flow(source=source, target="last") for source in ("image", "question"))
    asked = []

    def sweep(model, some, *, progress, **arguments):
        asked.append(len(some))
        return measure(model, some)

    calls = [
        {"flows": (flow,), "window": 3},
        {"flows": (other,), "window": 3},
        {"flows": (flow, other), "window": 3},
        {"flows": (flow,), "window": 5},
        {"flows": (flow,)},
        {"flows": (flow,), "encoder": encode},
        {"flows": (flow,), "encoder": partial(encode, answer_prefix=[1])},
        {"flows": (flow,), "encoder": partial(encode, answer_prefix=np.array([2]))},
    ]
    run = partial(measure_in_parts, sweep, None, FEW, tmp_path / "f.parquet", PARAMS, version=1, progress=False)
    for call in calls:
        run(**call)
        assert asked == [10]
        run(**call)
        assert asked == [10]
        asked.clear()
    assert len(list_frames(tmp_path / "f.parquet")) == len(calls)


def test_what_cannot_be_told_apart_is_refused():
    for value in (lambda sample: sample, object(), partial(encode, answer_prefix=object())):
        with pytest.raises(ValueError, match="Expected numbers, texts, flows .* for encoder, .* pass plain values"):
            describe_call(measure, FEW, {"encoder": value}, version=1)
    with pytest.raises(ValueError, match="measure has no version: pass version=1"):
        describe_call(measure, FEW, {})


def test_the_code_of_an_experiment_counts_by_its_version_alone(compute):
    compute()
    first = read_manifest(compute.path)["depends_on"]
    assert first["experiment"] == "noting" and first["version"] == 1
    assert not {"code", "packages"} & set(first)
    assert all(isinstance(version, int) and version > 0 for version in VERSIONS.values())


@pytest.mark.slow
def test_the_identity_of_a_run_is_the_same_in_every_process(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests/helpers']\n"
        "from functools import partial\n"
        "from killed_runs import PARAMS, SAMPLES\n"
        "from mmflow_utils.prompts.flows import FLOW_TO_LAST, Flow, variants\n"
        "from mmflow_utils.results.frames import identity_of, manifest\n"
        "from mmflow_utils.results.version import describe_call\n"
        "def knockout_sweep(): pass\n"
        "arguments = {'flows': FLOW_TO_LAST, 'encoder': partial(variants, a={'b': 1})}\n"
        "call = describe_call(knockout_sweep, SAMPLES, arguments)\n"
        "print(identity_of({'depends_on': manifest(PARAMS)['depends_on'] | call}))"
    )
    said = set()
    for seed in "12":
        env = os.environ | {"PYTHONHASHSEED": seed}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True, cwd=ROOT)
        said.add(ran.stdout.decode().strip())
    assert len(said) == 1 and len(said.pop()) == 8


def test_shards_share_the_parts_and_a_run_without_puts_them_together(compute):
    there = compute(changes={"shard": "2/3"})
    assert compute.asked == ids(3, 4, 5)
    assert equal(there, whole(FEW[3:6]))
    assert not compute.path.exists()
    there = compute(changes={"shard": "1/3"})
    assert compute.asked == ids(0, 1, 2, 9)
    assert list(there.frame.sample_id.unique()) == ids(1, 2, 4, 5)
    assert equal(compute(), whole())
    assert compute.asked == ids(6, 7, 8)


def test_what_is_not_shared_is_measured_by_every_shard(compute):
    assert equal(compute(changes={"shard": "2/3"}, shared=False), whole())
    assert compute.asked == ids(*range(10)) and compute.path.is_file()
    assert equal(compute(changes={"shard": "1/3"}), whole()) and compute.asked == []


def test_an_experiment_that_gives_a_bare_frame_is_kept_in_parts_too(tmp_path):
    def bare(model, some, *, progress):
        return measure(model, some).frame

    path = tmp_path / "flow.parquet"
    for samples in (FEW, []):
        result = measure_in_parts(bare, None, samples, path, PARAMS, version=1, part_size=3, progress=False)
        assert equal(result, Result(whole(samples).frame))


def test_a_shard_without_a_part_gives_a_frame_without_rows(compute):
    there = compute(changes={"shard": "9/9"})
    assert list(there.frame) == ["sample_id", "layer", "p"]
    assert len(there.frame) == 0


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "1/2/3", "-1/2", "1 / 2", ""])
def test_a_bad_shard_is_one_sentence(compute, shard):
    with pytest.raises(ValueError, match=f"shard must be of the form 2/8, the second of eight, got '{shard}'"):
        compute(changes={"shard": shard})


def test_a_bad_part_size_is_one_sentence(compute):
    with pytest.raises(ValueError, match="part_size must be at least 1 sample, got 0"):
        compute(part_size=0)


def test_no_sample_is_a_frame_without_rows(compute):
    assert equal(compute(samples=[]), whole([]))


@pytest.mark.parametrize("n_check", [0, 2, 4, 99])
def test_the_first_samples_are_checked_however_the_work_is_cut(tmp_path, n_check):
    checked = []

    def checking(model, some, *, n_check, progress):
        checked.extend(sample.sample_id for sample in some[:n_check])
        return measure(model, some)

    run = partial(measure_in_parts, checking, None, FEW, tmp_path / "flow.parquet", PARAMS, version=1, progress=False)
    run(part_size=3, n_check=n_check)
    assert checked == ids(*range(min(n_check, 10)))
    # What was checked less is not taken for what is checked more.
    run(n_check=n_check + 1)
    assert checked == [*ids(*range(min(n_check, 10))), *ids(*range(min(n_check + 1, 10)))]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_parts_and_shards_together_equal_one_call(tmp_path_factory, data):
    kinds = [st.none() | kind for kind in (st.integers(-5, 5), st.floats(), st.sampled_from("aü"))]
    n_rows = data.draw(st.lists(st.integers(0, 3), max_size=12), label="rows of each sample")
    table = {f"q{n}": [[data.draw(kind) for kind in kinds] for _ in range(count)] for n, count in enumerate(n_rows)}
    samples = [make_sample(name) for name in table]

    def measure(model, some, *, progress=False):
        rows = [(s.sample_id, *row) for s in some for row in table[s.sample_id]]
        frame = pd.DataFrame(rows, columns=["sample_id", "count", "p", "word"])
        skipped = [{"sample_id": s.sample_id, "reason": "none"} for s in some if not table[s.sample_id]]
        return Result(frame, skipped, max((float(row[1]) for row in rows if row[1] is not None), default=None))

    size, n_shards = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 5))
    order = data.draw(st.permutations(range(1, n_shards + 1)))
    path = tmp_path_factory.mktemp("parts") / "flow.parquet"
    options = {"part_size": size, "version": 1, "progress": False}
    for k in order[: data.draw(st.integers(0, n_shards))]:
        measure_in_parts(
            measure, None, samples, path, PARAMS.model_copy(update={"shard": f"{k}/{n_shards}"}), **options
        )
    assert equal(measure_in_parts(measure, None, samples, path, PARAMS, **options), measure(None, samples))


def test_results_are_joined_with_all_that_they_left_out_and_the_largest_difference():
    frame = pd.DataFrame({"layer": [0]})
    notes = [{"sample_id": name, "reason": "no options"} for name in "ab"]
    joined = Result.join([Result(frame, notes[:1], 1e-7), Result(frame), Result(frame, notes[1:], 3e-7)])
    assert joined.frame.index.tolist() == [0, 1, 2]
    assert joined.skipped == notes and joined.max_check_diff == 3e-7
    assert Result.join([Result(frame)]).max_check_diff is None


def test_the_bar_counts_parts_and_says_what_is_left(stopped, capsys):
    stopped(progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "flow: 4 of 4 parts" in last
    assert "left" in last
