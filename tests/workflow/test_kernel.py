"""The kernel of a run: this interpreter whatever is installed elsewhere, and no need of a home."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mmflow_utils.params import ROOT

pytestmark = pytest.mark.notebook

RUN = """
import sys
from pathlib import Path
from workflow import run_notebook
run_notebook.NOTEBOOKS = Path(sys.argv[1]).parent
sys.exit(run_notebook.main(sys.argv[1:]))
"""
WHERE = "import sys, os, matplotlib; print(sys.executable, matplotlib.get_cachedir(), matplotlib.get_configdir())"


@pytest.fixture
def run(tmp_path):
    """Run a notebook that says where it runs, in another process; a call takes that process's environment."""
    parameters = new_code_cell('model: str = "mini"  # which', metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=[parameters, new_code_cell(WHERE)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "02_flow.ipynb")
    (tmp_path / "tiny.yaml").write_text(f"model: mini\noutputs: {tmp_path}/out\n")

    def run(**environment):
        given = [sys.executable, "-c", RUN, str(tmp_path / "02_flow.ipynb"), str(tmp_path / "tiny.yaml")]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON", "MPL"))}
        kept = {} if "LC_ALL" in environment else kept  # as `env -i`
        done = subprocess.run(given, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        executed = nbformat.read(tmp_path / "out" / "mini" / "02_flow.ipynb", as_version=4)
        return executed.cells[-1].outputs[0].text.split(), done.stderr

    return run


@pytest.mark.parametrize("places", [("JUPYTER_PATH", "JUPYTER_DATA_DIR"), ("JUPYTER_PATH", "HOME")])
def test_another_kernel_of_the_same_name_is_not_started(run, tmp_path, places):
    for place in places:
        data = tmp_path / place / (".local/share/jupyter" if place == "HOME" else "")
        (data / "kernels" / "python3").mkdir(parents=True)
        other = {"argv": ["/bin/false", "{connection_file}"], "display_name": "Another", "language": "python"}
        (data / "kernels" / "python3" / "kernel.json").write_text(json.dumps(other))
    (executable, *_), _ = run(**{place: str(tmp_path / place) for place in places})
    assert executable == sys.executable


def test_without_a_home_caches_lie_in_the_project(run):
    (_, *places), said = run(HOME="/dev/null/home")
    assert places == [str(ROOT / ".cache" / "mplconfigdir")] * 2
    assert "not a writable" not in said and "temporary cache" not in said


def test_next_to_no_environment_is_enough_and_nobodys_startup_files_run(run, tmp_path):
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("import sys; sys.executable = 'another'")
    (executable, *_), _ = run(LC_ALL="C", TMPDIR="/no/such/folder", MPLBACKEND="TkAgg", IPYTHONDIR=str(tmp_path))
    assert executable == sys.executable
