"""Every notebook runs on the model with tiles, too; with few samples, since the numbers don't count here.

Cells run in this process, which has imported everything already; what a kernel of its own does is tested elsewhere.
"""

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import mmflow_utils as mm
from mmflow_utils.params import ROOT
from workflow.graph import notebooks_of
from workflow.run_notebook import run_notebook

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

NAMES = notebooks_of("mini-next")  # 91, which tells another recipe, has its own tests of training
FEW = {"model": "mini-next", "tasks": ["ChooseAttr"], "n_samples": 1, "n_boot": 100}
FEW_OF_ITS_OWN = {
    "01_dataset_curation": {"n_per_group": 2},
    "02_flow_to_last": {"n_samples": 4},  # two pictures of one shape
    "07_efficiency_study": {"n_asked": 1, "depth_step": 6, "n_new": 2, "n_rounds": 1},
    "09_last_subword": {"n_long": 2},
    "11_unimodal_llm": {"n_asked": 2},
    "12_factual_tasks": {"n_asked": 6},
    "13_fine_grained_flow": {"n_samples": 2},  # one to choose layers by, one to ask
    "15_sweep_speed": {"bench_layers": [4], "bench_image_tokens": [64], "bench_rounds": 1},
    "16_heads": {"n_samples": 4, "n_exact": 1, "n_random": 2},
    "17_activation_patching": {"every": 6},
    "18_where_routes_come_from": {"models": ["mini-next", "planted"], "n_few": 1},
    "90_train_miniature": {"n_questions": 2},
}
# What a model is loaded by.
ASKS = ("model", "checkpoint", "revision", "language_model", "prompt", "do_pad", "dtype", "device", "device_map")


def load_once(params, load=mm.load_model, loaded={}):  # noqa: B006 (what is loaded stays)
    """Let notebooks share the models that they load, which none of them changes."""
    asks = tuple(str(getattr(params, name, None)) for name in ASKS)
    return loaded.get(asks) or loaded.setdefault(asks, load(params))


@pytest.fixture(autouse=True)
def in_haste(monkeypatch):
    monkeypatch.setattr(mm, "load_model", load_once)


def run_here(name, folder):
    """Run a notebook's cells with few samples and return how many of them there were."""
    parameters = FEW | FEW_OF_ITS_OWN.get(name, {}) | {"outputs": str(folder)}
    given = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), parameters)
    cells = [cell.source for cell in given.cells if cell.cell_type == "code"]
    shell = InteractiveShell()
    for source in cells:
        shell.run_cell(source, store_history=True).raise_error()
    return len(cells)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One folder, as in a batch: the notebooks share the samples that the first of them curates."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"02_flow_to_last", "14_compare_models"}))
def test_it_runs_on_mini_next(name, outputs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "notebooks")  # as a kernel that was started there
    assert run_here(name, outputs) > 3 and capsys.readouterr().out


def test_02_runs_on_mini_next_and_its_results_are_compared_without_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    assert run_here("02_flow_to_last", tmp_path) > 3
    (tmp_path / "torch.py").write_text("raise ImportError('nothing here needs a model')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    executed = nbformat.read(
        run_notebook("14_compare_models", "mini-next", FEW | {"outputs": str(tmp_path)}, progress=False), as_version=4
    )
    assert executed.cells[0].source.splitlines()[0].endswith("mini-next")
    assert any(o.output_type == "stream" for cell in executed.cells for o in cell.get("outputs", []))
