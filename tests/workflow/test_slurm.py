"""The batch on a real Slurm: real notebooks, each run a job with a GPU, and the numbers of a run without.

`slurm.sh` brings a Slurm of one node up and down; where there can't be one, these are skipped and say why.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from mmflow_utils.params import ROOT

SLURM = Path(__file__).parents[1] / "helpers" / "slurm.sh"
NO_SLURM = 77  # its exit code where there can't be a Slurm
# Enough samples for two parts of sixteen, and little else.
SMALL = {"model": "small", "tasks": "[ChooseAttr, QueryAttr]", "n_samples": "9", "n_boot": "100"}
# Of 01 and 02: the cells that choose samples and measure one frame of them; 02 alone computes in parts then.
CELLS = ("import ", "model: str", "params = ", "every, ", "shown, ", "vlm = ", "samples = ", "result = ")
FAILS = ("bench_rounds: int = 2", "bench_rounds: int = None")  # of 15: what can't be run
JOBS = {  # Slurm's comment -> how the job ends
    "rule_notebook_wildcards_01_dataset_curation": "COMPLETED",
    "rule_shard_wildcards_02_flow_to_last_1_2": "COMPLETED",
    "rule_shard_wildcards_02_flow_to_last_2_2": "COMPLETED",
    "rule_notebook_wildcards_02_flow_to_last": "COMPLETED",
    "rule_notebook_wildcards_15_sweep_speed": "FAILED",
}
# No waiting where all is on one disk, no second try for what can't succeed.
IN_HASTE = ["--slurm-init-seconds-before-status-checks=1", "--latency-wait=5", "--retries=0"]
# One run without Slurm beside the batch, and then a list of Slurm's jobs.
BESIDE_A_RUN_ALONE = """
"$1" -IS workflow/warm.py -m workflow.run_notebook 02_flow_to_last small -p outputs alone &
"$@"; status=$?; scontrol --oneliner show jobs >jobs; wait; exit $status
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project with three notebooks, and a model file for few samples of `mini`."""
    tmp_path /= "my project's größe"  # each of these must be quoted
    for folder in ("mmflow_utils", "workflow"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for folder in ("notebooks", "params"):
        (tmp_path / folder).mkdir()
    for name in ("01_dataset_curation", "02_flow_to_last"):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        notebook.cells = [cell for cell in notebook.cells if cell.source.startswith(CELLS)]
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    text = (ROOT / "notebooks" / "15_sweep_speed.ipynb").read_text()
    assert text.count(FAILS[0]) == 1
    (tmp_path / "notebooks" / "15_sweep_speed.ipynb").write_text(text.replace(*FAILS))
    text = (ROOT / "params" / "mini.yaml").read_text()
    for name, value in SMALL.items():
        text, n = re.subn(rf"^{name}:.*$", f"{name}: {value}", text, flags=re.M)
        assert n == 1
    (tmp_path / "params" / "small.yaml").write_text(text)
    return tmp_path


@pytest.mark.slurm
def test_a_batch_in_shards_on_slurm_gives_the_frame_of_one_run_without_and_names_what_failed(project):
    python = project / ".venv" / "bin" / "python"
    snakemake = (python, "-m", "snakemake", "--profile", "workflow/profiles/slurm", *IN_HASTE)
    # Served, so that jobs need not import anew, which on a cluster each does.
    served = (python, "workflow/warm.py", "serve", SLURM, "bash", "-c", BESIDE_A_RUN_ALONE, "-")
    here = {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"cwd": project, "env": os.environ | here, "capture_output": True, "text": True, "timeout": 1800}
    batch = subprocess.run([*served, *snakemake, "--config", "model=small", "shards=2"], **options)
    said = batch.stderr
    if batch.returncode == NO_SLURM:
        pytest.skip(said.splitlines()[-1])

    # Slurm ran them all, each with a GPU, and where one failed the others went on.
    jobs = {}
    for line in (project / "jobs").read_text().splitlines():
        job = dict(re.findall(r"(\w+)=(\S*)", line))
        assert job["TresPerJob"] == "gres:gpu:1", line
        jobs[job["Comment"]] = job["JobState"]
    assert jobs == JOBS, said

    # To the last digit: what two shards measured and a third run joined is what one run measured.
    joined, whole = (
        pd.read_parquet(project / outputs / "small" / "flow_to_last.parquet") for outputs in ("outputs", "alone")
    )
    assert whole.sample_id.nunique() > 16, "all samples were in one part: only one shard had work"
    pd.testing.assert_frame_equal(joined, whole, check_exact=True)
    assert not joined.equals(whole.assign(p_knockout=whole.p_knockout + 2**-50))

    # The failure is named, with the job's log and its half-run copy.
    assert batch.returncode == 1
    assert "4 of 6 steps (67%) done" in said
    here = project / "outputs" / "small"
    (log,) = re.findall(r"^    log: (\S+), .* \(check", said, re.M)
    assert project / log == here / "logs" / "15_sweep_speed.log"
    assert "mmflow: 15_sweep_speed failed for small: ValueError: Parameter bench_rounds" in (project / log).read_text()
    assert "Half-run copies: outputs/small/15_sweep_speed.failed.ipynb. " in said
    assert {path.stem for path in here.glob("[01]*.ipynb")} == {
        "01_dataset_curation", "02_flow_to_last", "15_sweep_speed.failed"
    }  # fmt: skip
    errors = [
        output.ename
        for cell in nbformat.read(here / "15_sweep_speed.failed.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert errors == ["ValueError"]


def test_where_there_is_no_slurm_the_script_says_what_is_missing(tmp_path):
    for tool in ("bash", "paste"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [tmp_path / "bash", SLURM, "true"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == NO_SLURM
    (said,) = done.stderr.splitlines()
    assert said.startswith("There is no Slurm to test with: munged slurmctld slurmd srun not found")
