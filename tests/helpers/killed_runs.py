"""A process whose children compute in parts, to be killed or to run side by side (see test_parts).

It imports once and forks: a child begins at once, and a SIGKILL hits it in the middle of its work. Or it
starts a notebook that computes the same, through papermill, alone or as a step of Snakemake.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import pandas as pd
import pyarrow as pa

from mmflow_utils.data.sample import Sample
from mmflow_utils.params import Params
from mmflow_utils.results.record import Result
from mmflow_utils.results.resume import measure_in_parts

PARAMS = Params(model="tiny", window=3)


def make_sample(name):
    text = dict.fromkeys(("image_id", "question", "answer", "structural", "semantic", "detailed"), "")
    return Sample(sample_id=name, image=Path(), task=None, **text)


SAMPLES = [make_sample(f"q{n:03}") for n in range(400)]


def measure(model, samples, *, window=1, n_check=0, progress=False):
    """Return rows that follow from the samples' ids and the window, as a real experiment does."""
    rows = []
    for sample in samples:
        number = int(sample.sample_id[1:])
        for layer in range(number % 3):
            p = 1 / (7 * number + layer + 1) / window
            rows.append({"sample_id": sample.sample_id, "layer": layer, "p": p})
    frame = pd.DataFrame(rows, columns=["sample_id", "layer", "p"])
    skipped = [{"sample_id": s.sample_id, "reason": "a third"} for s in samples if int(s.sample_id[1:]) % 3 == 0]
    return Result(frame, skipped, max((float(s.sample_id[1:]) for s in samples), default=None))


def measure_slowly(model, samples, *, log, window=1, progress=False):
    """Take 2 ms a sample, and note each one as it begins."""
    with open(log, "a", buffering=1) as lines:
        for sample in samples:
            lines.write(f"{sample.sample_id}\n")
            time.sleep(0.002)
    return measure(model, samples, window=window)


def compute(folder, *, shard=None, **arguments):
    """Compute slowly in parts, and leave the result in the folder."""
    params, path = PARAMS.model_copy(update={"shard": shard}), folder / "flow.parquet"
    options = {"version": 1, "part_size": 8, "progress": False, "log": str(folder / "measured.log")}
    return measure_in_parts(measure_slowly, None, SAMPLES, path, params, **options, **arguments)


def start(folder, **options):
    """Fork a child that computes in parts."""
    if child := os.fork():
        return child
    try:
        compute(folder, **options)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def start_window(folder, window):
    """Fork a child that computes with a window of its own, and ends well if it gets just that frame."""
    if child := os.fork():
        return child
    os._exit(not compute(folder, window=window).frame.equals(measure(None, SAMPLES, window=window).frame))


def start_notebook(folder, kind):
    """Start papermill, or Snakemake that starts it, in a session of its own."""
    cells = ["import killed_runs", "killed_runs.compute_in_kernel()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, folder / "flow.ipynb")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    with open(folder / "said.log", "ab") as said:
        return start_snakemake(folder, said) if kind == "snakemake" else start_papermill(folder, said)


def start_snakemake(folder, said):
    papermill = [sys.executable, "-m", "papermill", "flow.ipynb", "running.ipynb", "-k", "python3", "--no-progress-bar"]
    shell = f"{shlex.join(papermill)} && mv running.ipynb done.ipynb"
    (folder / "Snakefile").write_text(f"rule:\n    output: 'done.ipynb'\n    shell: {shell!r}\n")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete", "--nolock"]
    return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True).pid


def start_papermill(folder, said):
    """Fork a child that has imported papermill: that alone takes two seconds."""
    import papermill

    if child := os.fork():
        return child
    try:
        os.setsid()
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        papermill.execute_notebook("flow.ipynb", "running.ipynb", kernel_name="python3", progress_bar=False)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def compute_in_kernel():
    """Compute in the working folder, and say first who does."""
    Path("kernel").write_text(str(os.getpid()))
    return compute(Path.cwd())


def kill(folder, kind, child, moment):
    """Kill a child with SIGKILL: the whole of it, or only the kernel that works for it."""
    if kind == "fork":
        os.kill(child, signal.SIGKILL)
    elif kind != "kernel":
        os.killpg(child, signal.SIGKILL)
        time.sleep(moment.uniform(0, 0.1))  # the kernel lives on until it misses its parent
    if kind != "fork":
        with suppress(ProcessLookupError):
            os.kill(int((folder / "kernel").read_text()), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] != 0, "the run ended well"


def kill_often(folder, kinds):
    """Kill a run at random moments and resume it, each time in one of these ways; then let it end."""
    log, moment = folder / "measured.log", random.Random(0)
    log.touch()

    def begin(kind):
        return start(folder) if kind == "fork" else start_notebook(folder, kind)

    for kind in kinds:
        goal = log.stat().st_size + 5 * moment.randrange(1, 19)
        child = begin(kind)
        while log.stat().st_size < goal:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.0005)
        time.sleep(moment.uniform(0, 0.02))
        kill(folder, kind, child, moment)
    return [os.waitpid(begin(kinds[-1]), 0)[1]]


def run_together(folder, shards):
    """Run children at once, one for each shard, or without shard where it is None."""
    children = [start(folder, shard=shard) for shard in shards]
    return [os.waitpid(child, 0)[1] for child in children]


def run_windows(folder, windows):
    """Run children at once that would store different results under one name."""
    children = [start_window(folder, window) for window in windows]
    return [os.waitpid(child, 0)[1] for child in children]


if __name__ == "__main__":
    pa.set_cpu_count(1)
    job, folder, given = sys.argv[1:]
    run = {"kill": kill_often, "together": run_together, "windows": run_windows}[job]
    sys.exit(any(run(Path(folder), json.loads(given))))
