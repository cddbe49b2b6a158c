"""Every notebook runs on the model with tiles, too; with few samples, since the numbers don't count here."""

import nbformat
import pytest

from mmflow_utils.params import ROOT
from workflow.run_notebook import run_notebook

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
FEW = {"tasks": ["ChooseAttr", "QueryAttr"], "n_samples": 2, "n_boot": 100}
FEW_OF_ITS_OWN = {
    "01_dataset_curation": {"n_per_group": 2},
    "07_efficiency_study": {"n_asked": 1, "depth_step": 6, "n_new": 2, "n_rounds": 1},
    "09_last_subword": {"n_long": 2},
    "11_unimodal_llm": {"n_asked": 2},
    "12_factual_tasks": {"n_asked": 6},
    "15_sweep_speed": {"bench_layers": [4], "bench_image_tokens": [64], "bench_rounds": 1},
    "90_train_miniature": {"n_questions": 2},
}
BEFORE = {"14_compare_models": ["02_flow_to_last"]}  # what it reads


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_mini_next(name, tmp_path):
    for one in (*BEFORE.get(name, ()), name):
        overrides = FEW | FEW_OF_ITS_OWN.get(one, {}) | {"outputs": str(tmp_path)}
        copy = run_notebook(one, "mini-next", overrides, progress=False)
    executed = nbformat.read(copy, as_version=4)
    assert executed.cells[0].source.splitlines()[0].endswith("mini-next")
    said = [o.text for cell in executed.cells for o in cell.get("outputs", []) if o.output_type == "stream"]
    assert said
