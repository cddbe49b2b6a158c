"""Every committed notebook: run from top to bottom, outputs to compare, parameters to set, no traces."""

import ast
import re

import nbformat
import pytest
from cells import NOTEBOOKS, code_cells, declared, parameters_cell, read

from mmflow_utils.params import Params
from mmflow_utils.results.version import VERSIONS
from workflow.cell_outputs import without_widgets
from workflow.graph import opens_with
from workflow.run_notebook import find_problems

LONGEST_CELL = 25
LONGEST_PARAMETERS_CELL = 8
TRACES = re.compile(r"/(?:home|root|Users|tmp|mnt|opt)/[\w.]|\d{4}-\d\d-\d\dT\d\d:\d\d|ipykernel_\d")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks_and_their_names_order_them():
    assert NOTEBOOKS
    assert [path.name for path in NOTEBOOKS if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)] == []


@every_notebook
def test_it_ran_from_top_to_bottom_without_an_error(path):
    notebook = read(path)
    assert find_problems(notebook) == []
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_it_has_outputs_and_a_picture(path):
    outputs = [cell.outputs for cell in code_cells(read(path))]
    assert sum(map(bool, outputs)) >= len(outputs) // 2
    assert any("image/png" in output.get("data", {}) for cell in outputs for output in cell)


@every_notebook
def test_nothing_went_to_stderr(path):
    streams = [output for cell in code_cells(read(path)) for output in cell.outputs if output.output_type == "stream"]
    assert [stream.text for stream in streams if stream.name == "stderr"] == []


@every_notebook
def test_no_progress_bar_stays_that_stands_at_nothing(path):
    assert all(without_widgets(cell.outputs) == cell.outputs for cell in code_cells(read(path)))


@every_notebook
def test_it_tells_nothing_of_the_machine_that_ran_it(path):
    notebook = read(path)
    metadata = [notebook.metadata, *(cell.metadata for cell in notebook.cells)]
    assert [kept for kept in metadata if {"papermill", "execution", "widgets"} & set(kept)] == []
    # Pictures are base64, where anything may be spelled by chance.
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    assert TRACES.findall(nbformat.writes(notebook)) == []
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_it_declares_its_model_and_what_it_alone_has(path):
    notebook = read(path)
    cell = parameters_cell(notebook)
    (model, kind_and_value), *own = declared(cell).items()
    assert (model, kind_and_value) == ("model", ("str", opens_with(path.stem)))
    assert {name for name, _ in own} & set(Params.model_fields) == set()
    assert [name for name, (kind, _) in own if kind is None] == []
    lines = cell.source.splitlines()
    assert len(lines) <= LONGEST_PARAMETERS_CELL
    assert [line for line in lines if "  # " not in line] == []
    assert "load_params(globals()" in code_cells(notebook)[code_cells(notebook).index(cell) + 1].source


@every_notebook
def test_its_text_explains_what_it_alone_has_and_where_the_rest_is_listed(path):
    notebook = read(path)
    cell = parameters_cell(notebook)
    text = notebook.cells[notebook.cells.index(cell) - 1].source
    assert text.startswith("## Parameters") and "`docs/parameters.md`" in text
    assert [name for name in declared(cell) if f"`{name}`" not in text] == []


@every_notebook
def test_it_opens_with_one_title_and_its_cells_are_short(path):
    notebook = read(path)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert notebook.cells[0].source.startswith("# ")
    assert sum(len(re.findall(r"^# ", text, re.M)) for text in prose) == 1
    cells = [cell for cell in code_cells(notebook) if cell != parameters_cell(notebook)]
    long = {cell.source.splitlines()[0]: len(cell.source.splitlines()) for cell in cells}
    assert {first: n for first, n in long.items() if n > LONGEST_CELL} == {}


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem < "9"], ids=lambda path: path.stem)
def test_what_is_measured_on_many_samples_goes_part_by_part(path):
    for cell in code_cells(read(path)):
        for call in ast.walk(ast.parse(cell.source)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in VERSIONS:
                assert isinstance(call.args[1], ast.List | ast.Subscript), ast.unparse(call)  # a sample or some
