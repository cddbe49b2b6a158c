"""Parts: nothing that was computed is lost, nothing is mixed, and the parts together are the whole."""

import errno
import json
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
from killed_runs import MADE_FROM, SAMPLES, make_sample, measure, of_window

from mmflow_utils.prompts.flows import Flow
from mmflow_utils.results import frames as store
from mmflow_utils.results.frames import load_frame, read_manifest
from mmflow_utils.results.resume import compute_in_parts
from mmflow_utils.results.version import describe_measure

FEW = SAMPLES[:10]


def equal(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert one.attrs == other.attrs
    return True


@pytest.fixture
def compute(tmp_path):
    """Compute ten samples in parts of three; `compute.asked` lists what was measured since the last call."""

    def compute(samples=FEW, made_from=MADE_FROM, **options):
        compute.asked = []

        def noting(some):
            compute.asked += [sample.sample_id for sample in some]
            if compute.stop_at in compute.asked:
                raise KeyboardInterrupt
            return measure(some)

        options = {"part_size": 3, "progress": False} | options
        return compute_in_parts(noting, samples, compute.path, made_from, **options)

    compute.path, compute.parts = tmp_path / "flow.parquet", tmp_path / "flow.parts"
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
    assert equal(compute(), measure(FEW))
    assert compute.asked == ids(*range(10))
    assert sorted(file.name for file in compute.path.parent.iterdir()) == ["flow.json", "flow.parquet"]
    assert equal(load_frame(compute.path, MADE_FROM), measure(FEW))
    assert read_manifest(compute.path)["made_by"] == {"device": "cpu", "max_check_diff": 9}


def test_an_interrupted_run_goes_on_where_it_stopped(stopped, capsys):
    assert sorted(file.name for file in stopped.parts.iterdir()) == ["00000.parquet", "00001.parquet"]
    assert not stopped.path.exists()
    assert equal(stopped(), measure(FEW))
    assert stopped.asked == ids(6, 7, 8, 9)
    assert capsys.readouterr().out == "Parts of flow: 2 were measured before.\n"
    assert not stopped.parts.exists()


def test_a_finished_run_is_loaded_until_it_is_deleted_or_damaged(compute, capsys):
    compute()
    assert equal(compute(), measure(FEW))
    assert compute.asked == []
    assert "flow.parquet is of this very run: loaded. Delete it to measure anew." in capsys.readouterr().out
    compute.path.write_bytes(compute.path.read_bytes()[:-9])
    assert equal(compute(), measure(FEW))
    assert len(compute.asked) == 10
    compute.path.unlink()
    compute()
    assert len(compute.asked) == 10


PART_SIZE = 8  # of killed_runs


def run_and_kill(folder, kinds):
    """Kill and resume in a process of its own; say what it cost, and hold it against an undisturbed run."""
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    subprocess.run([sys.executable, script, "kill", str(folder), json.dumps(kinds)], check=True, timeout=900)
    assert equal(load_frame(folder / "flow.parquet"), measure(SAMPLES))
    assert not (folder / "flow.parts").exists()
    log = Counter((folder / "measured.log").read_text().split())
    assert set(log) == {sample.sample_id for sample in SAMPLES}
    again = log.total() - len(SAMPLES)
    print(f"{len(kinds)} kills ({', '.join(dict.fromkeys(kinds))}): {again} of {len(SAMPLES)} samples twice")
    return again


def test_killed_twenty_times_nothing_is_lost(tmp_path):
    again = run_and_kill(tmp_path, ["fork"] * 20)
    assert 0 < again <= 20 * PART_SIZE  # a kill costs at most the part in work


def test_a_killed_kernel_papermill_or_snakemake_loses_nothing(tmp_path):
    kinds = ["kernel"] * 3 + ["papermill"] * 3 + ["snakemake"] * 2
    assert 0 < run_and_kill(tmp_path, kinds) <= len(kinds) * PART_SIZE
    code = [cell for cell in nbformat.read(tmp_path / "done.ipynb", as_version=4).cells]
    assert [cell.execution_count for cell in code] == [1, 2]


def test_different_runs_at_once_under_one_name_each_get_their_own(tmp_path):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    subprocess.run([sys.executable, script, "windows", str(tmp_path), "[5, 7, 5]"], check=True)
    window = read_manifest(tmp_path / "flow.parquet")["depends_on"]["window"]
    assert window in (5, 7)
    assert equal(load_frame(tmp_path / "flow.parquet"), of_window(window, measure(SAMPLES)))


@pytest.mark.parametrize("shards", [[None, None], ["1/3", "2/3", "3/3", None]])
def test_processes_that_run_at_once_do_no_harm(tmp_path, shards):
    script = Path(__file__).parents[1] / "helpers" / "killed_runs.py"
    subprocess.run([sys.executable, script, "together", str(tmp_path), json.dumps(shards)], check=True)
    assert equal(load_frame(tmp_path / "flow.parquet"), measure(SAMPLES))


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
    file = stopped.parts / "00001.parquet"
    file.write_bytes(harm(file.read_bytes()))
    assert equal(stopped(), measure(FEW))
    assert stopped.asked == ids(*range(3, 10))
    said = capsys.readouterr().out
    assert said == "Parts of flow: 1 were measured before; 1 damaged: measured again.\n"


def test_a_part_in_the_place_of_another_is_not_taken(stopped):
    (stopped.parts / "00001.parquet").write_bytes((stopped.parts / "00000.parquet").read_bytes())
    assert equal(stopped(), measure(FEW))
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
    assert sorted(file.name for file in compute.parts.iterdir()) == ["00000.parquet", "00001.parquet"]
    monkeypatch.undo()
    assert equal(compute(), measure(FEW))
    assert compute.asked == ids(*range(6, 10))


def test_a_full_disk_in_the_last_step_loses_no_part(compute, monkeypatch):
    fill_disk(monkeypatch, after=4)
    with pytest.raises(OSError, match="No space left on device"):
        compute()
    assert compute.asked == ids(*range(10))
    assert len(list(compute.parts.iterdir())) == 4
    assert not compute.path.exists()
    monkeypatch.undo()
    assert equal(compute(), measure(FEW))
    assert compute.asked == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"depends_on": {"model": "tiny", "window": 5}}, "window was 3, now 5"),
        ({"depends_on": {"model": "mini", "window": 3}}, "model was 'tiny', now 'mini'"),
        ({**MADE_FROM, "made_by": {"packages": {"torch": "9"}}}, "packages was None, now {'torch': '9'}"),
    ],
)
def test_parts_of_another_run_are_replaced_and_never_mixed_in(stopped, capsys, other, said):
    stopped(made_from=other)
    assert stopped.asked == ids(*range(10))
    assert f"Parts of flow: 2 of another run ({said}): measured again." in capsys.readouterr().out
    assert load_frame(stopped.path, other).equals(measure(FEW))


def test_other_samples_and_other_sizes_are_another_run(stopped):
    stopped(samples=FEW[1:], shard="1/1")
    assert stopped.asked == ids(*range(1, 10))
    stopped(part_size=5, shard="1/1", samples=FEW[1:])
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


def test_a_sweep_that_was_changed_is_another_run(tmp_path):
    flow, other = (Flow(source=source, target="last") for source in ("image", "question"))

    def run(measure):
        asked.clear()
        return compute_in_parts(measure, FEW, tmp_path / "f.parquet", MADE_FROM, progress=False)

    def sweep(some, flows=(), window=0):
        asked.append(len(some))
        return measure(some).assign(flows=str(flows), window=window)

    asked = []
    calls = [
        lambda some: sweep(some, (flow,), 3),
        lambda some: sweep(some, (other,), 3),
        lambda some: sweep(some, (flow, other), 3),
        lambda some: sweep(some, (flow,), 5),
        lambda some: sweep(some, flows=(flow,)),
        lambda some: sweep(some, flows=(flow,)).head(3),
        partial(sweep, flows=(flow,), window=1),
        partial(sweep, flows=(flow,), window=2),
    ]
    for call in calls:
        run(call)
        assert asked == [10]
        run(call)
        assert asked == []


def test_what_a_measure_names_is_seen_and_an_object_counts_by_its_type():
    space = {"__name__": "notebook"}
    code = "def scale(x):\n    return [f * x for f in factors if f not in {'a', 'b'}]\n"
    exec(f"{code}measure = lambda some: (model, scale(some))", space)

    def digest(**named):
        space.update(named)
        return describe_measure(space["measure"], MADE_FROM, FEW)["measure"]

    first = digest(factors=[1, 2], model=object())
    assert digest(factors=[1, 2], model=object()) == first
    assert digest(factors=np.array([1, 2])) == first
    assert digest(factors=[1, 3]) != first
    assert digest(factors=(1, 2)) == first
    exec(code.replace("f * x", "f + x"), space)
    assert digest() != first


def test_the_digest_of_a_measure_is_the_same_in_every_process(tmp_path):
    code = (
        "from mmflow_utils.parts.identity import describe_measure\n"
        "def own(x, kinds={'a', 'b', 'c'}):\n    return x in {'d', 'e', 'f'}\n"
        "print(describe_measure(lambda some: own(some), {}, []))"
    )
    said = set()
    for seed in "12":
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONHASHSEED": seed})
        said.add(ran.stdout.decode())
    assert len(said) == 1
    assert "'measure': '" in said.pop()


def test_shards_share_the_parts_and_a_run_without_puts_them_together(compute):
    there = compute(shard="2/3")
    assert compute.asked == ids(3, 4, 5)
    assert equal(there, measure(FEW[3:6]))
    assert not compute.path.exists()
    there = compute(shard="1/3")
    assert compute.asked == ids(0, 1, 2, 9)
    assert list(there.sample_id.unique()) == ids(1, 2, 4, 5)
    assert equal(compute(), measure(FEW))
    assert compute.asked == ids(6, 7, 8)


def test_a_shard_without_a_part_gives_a_frame_without_rows(compute):
    there = compute(shard="9/9")
    assert list(there) == ["sample_id", "layer", "p"]
    assert len(there) == 0


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "a/b", "1/2/3", "-1/2", "1 / 2", ""])
def test_a_bad_shard_is_one_sentence(compute, shard):
    with pytest.raises(ValueError, match=f"shard must be of the form 2/8, the second of eight, got '{shard}'"):
        compute(shard=shard)


def test_a_bad_part_size_is_one_sentence(compute):
    with pytest.raises(ValueError, match="part_size must be at least 1 sample, got 0"):
        compute(part_size=0)


def test_no_sample_is_a_frame_without_rows(compute):
    assert equal(compute(samples=[]), measure([]))


@pytest.mark.parametrize("n_check", [0, 2, 4, 99])
def test_the_first_samples_are_checked_however_the_work_is_cut(tmp_path, n_check):
    checked = []

    def checking(some, n_check):
        checked.extend(sample.sample_id for sample in some[:n_check])
        return measure(some)

    run = partial(compute_in_parts, checking, FEW, tmp_path / "flow.parquet", MADE_FROM, progress=False)
    run(part_size=3, n_check=n_check)
    assert checked == ids(*range(min(n_check, 10)))
    # What was checked less is not taken for what is checked more.
    run(n_check=n_check + 1)
    assert checked == [*ids(*range(min(n_check, 10))), *ids(*range(min(n_check + 1, 10)))]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_parts_and_shards_together_equal_one_call(tmp_path_factory, data):
    kinds = [st.none() | kind for kind in (st.integers(-5, 5), st.floats(), st.sampled_from("aü"))]
    n_rows = data.draw(st.lists(st.integers(0, 3), max_size=12), label="rows of each sample")
    table = {f"q{n}": [[data.draw(kind) for kind in kinds] for _ in range(count)] for n, count in enumerate(n_rows)}
    samples = [make_sample(name) for name in table]

    def measure(some):
        rows = [(s.sample_id, *row) for s in some for row in table[s.sample_id]]
        frame = pd.DataFrame(rows, columns=["sample_id", "count", "p", "word"])
        frame.attrs |= {"skipped": [s.sample_id for s in some if not table[s.sample_id]], "unit": "nats"}
        frame.attrs["max_check_diff"] = max((row[1] for row in rows if row[1] is not None), default=None)
        return frame

    size, n_shards = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 5))
    order = data.draw(st.permutations(range(1, n_shards + 1)))
    path = tmp_path_factory.mktemp("parts") / "flow.parquet"
    run = partial(compute_in_parts, measure, samples, path, MADE_FROM, part_size=size, progress=False)
    for k in order[: data.draw(st.integers(0, n_shards))]:
        run(shard=f"{k}/{n_shards}")
    assert equal(run(), measure(samples))


def test_numbers_in_attrs_are_joined_by_the_largest_and_contradictions_refused(tmp_path):
    def run(values, name="a"):
        left = iter(values)

        def leaving(some):
            frame = measure(some)
            frame.attrs = {name: next(left)}
            return frame

        path = tmp_path / "flow.parquet"
        path.unlink(missing_ok=True)
        return compute_in_parts(leaving, FEW[:3], path, MADE_FROM, part_size=1, progress=False).attrs[name]

    assert run([1e-7, None, 3e-7]) == 3e-7
    assert run([None, None, None]) is None
    assert run([[1], [], [2, 3]]) == [1, 2, 3]
    assert run(["nats"] * 3) == "nats"
    with pytest.raises(ValueError, match=r"attrs\['unit'\] differs between parts \('nats', …\)"):
        run(["nats", "bits", "nats"], "unit")


def test_the_bar_counts_parts_and_says_what_is_left(stopped, capsys):
    stopped(progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "flow: 4 of 4 parts" in last
    assert "to go" in last
