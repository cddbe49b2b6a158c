"""Every notebook runs on the model with tiles, too; with few samples, since the numbers don't count here.

Cells run in this process, which has imported everything already; what a kernel of its own does is tested elsewhere.
"""

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from mmflow_utils.params import ROOT
from workflow.run_notebook import run_notebook

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
FEW = {"model": "mini-next", "tasks": ["ChooseAttr"], "n_samples": 1, "n_boot": 100}
FEW_OF_ITS_OWN = {
    "01_dataset_curation": {"n_per_group": 2},
    "07_efficiency_study": {"n_asked": 1, "depth_step": 6, "n_new": 2, "n_rounds": 1},
    "09_last_subword": {"n_long": 2},
    "11_unimodal_llm": {"n_asked": 2},
    "12_factual_tasks": {"n_asked": 6},
    "15_sweep_speed": {"bench_layers": [4], "bench_image_tokens": [64], "bench_rounds": 1},
    "90_train_miniature": {"n_questions": 2},
}


def run_here(name, folder):
    """Run a notebook's cells with few samples and return how many of them there were."""
    parameters = FEW | FEW_OF_ITS_OWN.get(name, {}) | {"outputs": str(folder)}
    given = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), parameters)
    cells = [cell.source for cell in given.cells if cell.cell_type == "code"]
    shell = InteractiveShell()
    for source in cells:
        shell.run_cell(source, store_history=True).raise_error()
    return len(cells)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"14_compare_models"}))
def test_it_runs_on_mini_next(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "notebooks")  # as a kernel that was started there
    assert run_here(name, tmp_path) > 3 and capsys.readouterr().out


def test_results_of_mini_next_are_compared_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    run_here("02_flow_to_last", tmp_path)
    executed = nbformat.read(
        run_notebook("14_compare_models", "mini-next", FEW | {"outputs": str(tmp_path)}, progress=False), as_version=4
    )
    assert executed.cells[0].source.splitlines()[0].endswith("mini-next")
    assert any(o.output_type == "stream" for cell in executed.cells for o in cell.get("outputs", []))
