"""Many notebooks: the Snakefile runs each once, shards at once, and a failure stops only what depends on it.

The Snakefile and its profile are the real ones; `workflow.run_notebook` has a stand-in that notes when it ran.
"""

import re
import shutil
import subprocess
import sys
import time

import pytest

from mmflow_utils.params import ROOT

EXECUTE = """
import os, pathlib, sys, time

name, model, *more = sys.argv[1:]
shard = more[2] if more[:2] == ["-p", "shard"] else ""
here = pathlib.Path("outputs", model)
run = name + ("." + shard.replace("/", "of") if shard else "")
log = pathlib.Path("log")
with log.open("a", buffering=1) as lines:
    lines.write(f"begin {run}\\n")
    until = time.monotonic() + 60
    for other in pathlib.Path("meet").read_text().split() if shard else []:
        while f"begin {other}\\n" not in log.read_text():
            time.sleep(0.01)
            assert time.monotonic() < until, f"{other} never began beside {run}"
    time.sleep(float(pathlib.Path("pause").read_text()))
    pathlib.Path(f"gpu.{run}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    fails = run in pathlib.Path("fail").read_text().split()
    lines.write(f"{'fail' if fails else 'end'} {run}\\n")
if not fails:
    out = here / ("shards" if shard else "") / f"{run}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
sys.exit(fails)
"""


@pytest.fixture
def batch(tmp_path):
    """A project of notebooks, two of which compute in parts; a call runs its Snakefile and gives the log."""
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    files = {f"notebooks/{name}.ipynb": "" for name in ("01_dataset_curation", "02_flow", "04_tour", "90_train")}
    files |= dict.fromkeys(("notebooks/02_flow.ipynb", "notebooks/03_image.ipynb"), "mm.compute_in_parts(")
    files |= {"params/mini.yaml": "", "params/big.yaml": "", "fail": "", "meet": "", "pause": "0"}
    files |= {"mmflow_utils/__init__.py": "", "mmflow_utils/execute.py": EXECUTE}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def batch(*options, fail="", meet=""):
        (tmp_path / "fail").write_text(fail)
        (tmp_path / "meet").write_text(meet)
        (tmp_path / "log").write_text("")
        command = [sys.executable, "-m", "snakemake", "--cores", "4", *options]
        begin = time.monotonic()
        batch.said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        batch.took_s = time.monotonic() - begin
        return (tmp_path / "log").read_text().splitlines()

    return batch


PROGRESS = re.compile(
    r"^mmflow: (\d+) of (\d+) runs done for (\w+)(?:, (\d+) failed)?(?:; estimate: (\d+) (s|min) to go)?$",
    re.M,
)


def ended(log):
    return sorted(line.removeprefix("end ") for line in log if line.startswith("end "))


def test_without_shards_each_notebook_runs_once_and_one_gpu_serves_one_job(batch):
    log = batch("--config", "model=big", "gpu=1", "--resources", "gpu=1")
    assert batch.said.returncode == 0
    assert ended(log) == ["01_dataset_curation", "02_flow", "03_image", "04_tour"]  # 90 is of mini alone
    assert ended(log[:2]) == ["01_dataset_curation"]
    for begin, end in zip(log[::2], log[1::2], strict=True):
        assert begin.removeprefix("begin ") == end.removeprefix("end ")
    assert batch("--config", "model=big", "gpu=1") == []
    assert not PROGRESS.search(batch.said.stderr)


def test_runs_that_share_a_machine_each_see_a_gpu_of_their_own(batch, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = ("--forceall", "outputs/big/02_flow.ipynb", "--config", "model=big", "shards=2")
    pair = ("02_flow.1of2", "02_flow.2of2")

    def gpus():
        return {(tmp_path / f"gpu.{run}").read_text() for run in pair}

    batch(*config, "gpu=1", "--resources", "gpu=2", meet=" ".join(pair))
    assert batch.said.returncode == 0
    assert gpus() == {"0", "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    batch(*config, "gpu=1", "--resources", "gpu=2", meet=" ".join(pair))
    assert gpus() == {"5", "7"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    batch(*config)
    assert gpus() == {"all"}  # nobody said that there are GPUs to share


def test_after_each_run_the_batch_says_how_far_it_is_and_about_how_long_it_will_take(batch, tmp_path):
    (tmp_path / "pause").write_text("1")  # second, for each run
    batch("--config", "model=big", "gpu=1", "--resources", "gpu=1")
    said = PROGRESS.findall(batch.said.stderr)
    assert [line[:4] for line in said] == [(str(n), "4", "big", "") for n in (1, 2, 3, 4)]
    for n_done, line in enumerate(said[:3], start=1):
        estimate_s = int(line[4]) * {"s": 1, "min": 60}[line[5]]
        assert 4 - n_done - 0.5 <= estimate_s <= (4 - n_done) / n_done * batch.took_s + 0.5
    assert said[3][4] == ""  # nothing is left
    assert "Select jobs" not in batch.said.stderr


def test_a_dry_run_lists_what_would_run_and_runs_nothing(batch):
    assert batch("--config", "model=big", "--dry-run") == []
    assert batch.said.returncode == 0
    assert re.search(r"^notebook +4$", batch.said.stdout + batch.said.stderr, re.M)


def test_shards_run_at_once_and_before_their_notebook_and_a_failure_stops_only_that(batch):
    config = ("--config", "shards=2")
    parts = ["02_flow.1of2", "02_flow.2of2", "03_image.1of2", "03_image.2of2"]
    log = batch(*config, fail="02_flow.2of2", meet=" ".join(parts))
    assert ended(log[:2]) == ["01_dataset_curation"]
    good = ["01_dataset_curation", "02_flow.1of2", *parts[2:], "03_image", "04_tour", "90_train"]
    assert ended(log) == sorted(good)
    assert log.index("begin 03_image") > max(log.index(f"end {part}") for part in parts[2:])
    assert batch.said.returncode == 1
    *_, last = PROGRESS.findall(batch.said.stderr)
    assert last == ("7", "9", "mini", "1", "", "")  # 02 itself can't run: nothing is left
    (said,) = re.findall(r"^mmflow: .* failed for .*$", batch.said.stderr, re.MULTILINE)
    assert said.startswith("mmflow: 02_flow.2of2 failed for mini.")
    assert "repeat the command to go on from there" in said

    assert ended(batch(*config)) == ["02_flow", "02_flow.2of2"]
    assert batch.said.returncode == 0
