"""Many notebooks: the Snakefile runs each once, shards at once, and a failure stops only what depends on it.

The Snakefile and its profile are the real ones; `workflow.run_notebook` has a stand-in that notes when it ran.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from mmflow_utils.params import ROOT

pytestmark = pytest.mark.slow

IN_PARTS = "mm.measure_in_parts("
BESIDE = """beside: dict = {'mini': 'big', 'other': 'mini'}"""
RUN_NOTEBOOK = """
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
    pathlib.Path(f"gpu.{run}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    fails = run in pathlib.Path("fail").read_text().split()
    lines.write(f"{'fail' if fails else 'end'} {run}\\n")
if fails:
    print(f"mmflow: {run} failed for {model}", file=sys.stderr)
else:
    out = here / ("shards" if shard else "") / f"{run}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
sys.exit(fails)
"""
# Snakemake is imported once, and its runs and the notebooks' are forks.
FORKS = 'BY_BATCH, BY_KERNEL = ["snakemake.cli"], []'
NVIDIA_SMI = "#!/bin/sh\nprintf '0\\n1\\n'\n"  # a machine with two GPUs


def notebook(source):
    """Write a notebook of one cell, which reads samples and holds its parameters."""
    cell = {"source": f"{source}\n" if ": " in source else "", "metadata": {"tags": ["parameters"]}}
    return json.dumps({"cells": [cell], "metadata": {"says": f"mm.load_samples( {source}"}})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A project's folder, whose name needs quotes, where Snakemake is served; there is no home."""
    folder = tmp_path_factory.mktemp("batch") / "my project's größe"
    shutil.copytree(ROOT / "workflow", folder / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "workflow" / "run_notebook.py").write_text(RUN_NOTEBOOK)
    warm = folder / "workflow" / "warm.py"
    text, n = re.subn(r"^BY_BATCH = .*\nBY_KERNEL = .*$", FORKS, warm.read_text(), flags=re.M)
    assert n == 1 and warm.write_text(text)
    command = [folder / ".venv/bin/python", "workflow/warm.py", "serve", "sh", "-c", "echo $MMFLOW_WARM; read _"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
        patch.setenv("HOME", "/dev/null/home")
        server = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        patch.setenv("MMFLOW_WARM", server.stdout.readline().strip())
        yield folder
    server.communicate(timeout=60)


@pytest.fixture
def project(served):
    """A project of notebooks, two of which compute in parts."""
    folder = served
    for left in {*folder.iterdir()} - {folder / "workflow", folder / ".venv"}:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    read = {"01_dataset_curation": "", "04_tour": BESIDE, "02_flow": IN_PARTS, "03_image": IN_PARTS, "90_train": ""}
    files = {f"notebooks/{name}.ipynb": notebook(text) for name, text in read.items()}
    files |= {f"params/{model}.yaml": f"model: {model}\ncheckpoint: assets/{model}\n" for model in ("mini", "big")}
    files |= {"assets/mini/training.json": '{"recipe": {}}', "fail": "", "meet": "", "bin/nvidia-smi": NVIDIA_SMI}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    return folder


@pytest.fixture
def batch(project):
    """A call runs the project's Snakefile and gives the log of its runs."""

    def batch(*options, fail="", meet=""):
        (project / "fail").write_text(fail)
        (project / "meet").write_text(meet)
        (project / "log").write_text("")
        python = project / ".venv/bin/python"
        command = [python, "-IS", "workflow/warm.py", "-m", "snakemake", "--cores", "4", *options]
        batch.done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=600)
        batch.said = batch.done.stdout + batch.done.stderr
        return (project / "log").read_text().splitlines()

    return batch


def ended(log):
    return sorted(line.removeprefix("end ") for line in log if line.startswith("end "))


def test_without_shards_each_notebook_runs_once_and_one_gpu_serves_one_job(batch):
    log = batch("--config", "model=big", "gpu=1", "--resources", "gpu=1")
    assert batch.done.returncode == 0, batch.said
    assert ended(log) == ["01_dataset_curation", "02_flow", "03_image", "04_tour"]  # big wasn't trained here
    assert "mmflow: Not run for big: 90_train, since there is no training.json" in batch.said
    assert ended(log[:2]) == ["01_dataset_curation"]
    for begin, end in zip(log[::2], log[1::2], strict=True):
        assert begin.removeprefix("begin ") == end.removeprefix("end ")
    assert batch("--config", "model=big", "gpu=1") == []
    assert "Nothing to be done" in batch.said


def test_runs_that_share_a_machine_each_see_a_gpu_of_their_own(batch, project, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = ("--forceall", "outputs/big/02_flow.ipynb", "--config", "model=big", "shards=2")
    pair = ("02_flow.1of2", "02_flow.2of2")

    def gpus():
        return {(project / f"gpu.{run}").read_text() for run in pair}

    batch(*config, "gpu=1", "--resources", "gpu=2", meet=" ".join(pair))
    assert batch.done.returncode == 0, batch.said
    assert gpus() == {"0", "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    batch(*config, "gpu=1", "--resources", "gpu=2", meet=" ".join(pair))
    assert gpus() == {"5", "7"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    batch(*config)
    assert gpus() == {"all"}  # nobody said that there are GPUs to share


def test_a_dry_run_lists_what_would_run_and_runs_nothing(batch):
    assert batch("--config", "model=big", "--dry-run") == []
    assert batch.done.returncode == 0
    assert counted(batch.said) == {"notebook": 4}


def counted(said):
    """Read the table that a run begins with: rule -> how many of its jobs it takes."""
    return {rule: int(n) for rule, n in re.findall(r"^(notebook|shard) +(\d+)$", said, re.M)}


def test_shards_run_at_once_and_before_their_notebook_and_a_failure_stops_only_that(batch, project):
    config = ("--config", "shards=2")
    parts = ["02_flow.1of2", "02_flow.2of2", "03_image.1of2", "03_image.2of2"]
    log = batch(*config, fail="02_flow.2of2", meet=" ".join(parts))
    assert ended(log[:2]) == ["01_dataset_curation"]
    good = ["01_dataset_curation", "02_flow.1of2", *parts[2:], "03_image", "04_tour", "90_train"]
    assert ended(log) == sorted(good)
    assert log.index("begin 03_image") > max(log.index(f"end {part}") for part in parts[2:])

    # How far it is, what failed and why, and where the rest of it can be read.
    assert batch.done.returncode == 1
    assert "7 of 10 steps (70%) done" in batch.said  # all but a share, its notebook, and the end
    assert "mmflow: 02_flow.2of2 failed for mini\n" in batch.said
    (log_file,) = re.findall(r"^    log: (.*) \(check", batch.said, re.M)
    assert log_file == "outputs/mini/logs/02_flow.2of2.log"
    assert (project / log_file).read_text() == "mmflow: 02_flow.2of2 failed for mini\n"
    assert "repeat the command to go on from there" in batch.said

    assert ended(batch(*config)) == ["02_flow", "02_flow.2of2"]
    assert batch.done.returncode == 0, batch.said


def test_what_is_finished_stays_so_when_the_rest_is_shared_among_more(batch, project):
    everything = ["01_dataset_curation", "02_flow", "03_image", "04_tour", "90_train"]
    assert ended(batch()) == everything
    for left, expected in ((["04_tour", "90_train"], {"notebook": 2}), (["02_flow"], {"notebook": 1, "shard": 3})):
        for name in left:
            (project / "outputs" / "mini" / f"{name}.ipynb").unlink(missing_ok=True)
        assert len(ended(batch("--config", "shards=3"))) == sum(expected.values())
        assert counted(batch.said) == expected
    batch("--config", "shards=2", "--dry-run")
    assert counted(batch.said) == {}
    batch("--config", "shards=2", "--forceall", "--dry-run")
    assert counted(batch.said) == {"notebook": 5, "shard": 4}

    for name in ("03_image", "04_tour"):  # touched, and changed
        with (project / "notebooks" / f"{name}.ipynb").open("a") as file:
            file.write(" " * (name == "04_tour"))
    assert ended(batch()) == ["04_tour"]


def test_weights_questions_and_a_partners_parameters_count(batch, project):
    files = {"assets/big/model.safetensors": "weights", "questions.json": "{}"}
    with (project / "params" / "big.yaml").open("a") as params:
        params.write("questions: questions.json\nscene_graphs: none.json\n")
    for name, text in files.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    everything = ["01_dataset_curation", "02_flow", "03_image", "04_tour"]
    config = ("--config", "model=big")
    assert ended(batch(*config)) == everything and ended(batch()) == [*everything, "90_train"]
    for name in files:
        before = (project / name).stat()
        (project / name).write_text("others")
        batch(*config, "--dry-run")
        assert counted(batch.said) == {"notebook": len(everything)}, name
        os.utime(project / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    batch(*config, "--dry-run")
    assert counted(batch.said) == {}
    with (project / "params" / "big.yaml").open("a") as params:
        params.write("window: 5\n")
    batch("--dry-run")
    assert counted(batch.said) == {"notebook": 1}  # the one that sets the two side by side


def test_a_folder_with_braces_is_refused_in_one_sentence(batch, monkeypatch):
    monkeypatch.setenv("MMFLOW_OUTPUTS", "out{puts}")
    assert batch() == []
    assert batch.done.returncode == 1 and "has braces in its name: let outputs" in batch.said


def test_a_model_without_a_file_is_one_sentence(batch):
    assert batch("--config", "model=nope") == []
    assert batch.done.returncode == 1
    assert "There is no params/nope.yaml; the models are big, mini." in batch.said
    assert "Traceback" not in batch.said
