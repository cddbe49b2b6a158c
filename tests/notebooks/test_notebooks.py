"""Every committed notebook: run from top to bottom, outputs to compare, parameters to set, no traces."""

import ast
import re
import typing
from types import UnionType

import nbformat
import pytest

from mmflow_utils.params import ROOT, Params
from workflow.run_notebook import find_problems

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST_CELL = 25
MOST_OWN_PARAMETERS = 8  # a parameters cell has a line for each, beside those that all notebooks share
TRACES = re.compile(r"/(?:home|root|Users|tmp|mnt|opt)/[\w.]|\d{4}-\d\d-\d\dT\d\d:\d\d|ipykernel_\d")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook):
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    return cell


def simple_name(annotation) -> str:
    """Name a field's type as a notebook writes it.

    A Literal is written as the type of its values, and `str | None` as str: papermill can't read the
    union, and would warn of an unknown parameter.
    """
    origin = typing.get_origin(annotation)
    if origin is typing.Union or isinstance(annotation, UnionType):
        return simple_name(typing.get_args(annotation)[0])
    if origin is typing.Annotated:
        return simple_name(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return type(typing.get_args(annotation)[0]).__name__
    return (origin or annotation).__name__


def declared(cell) -> dict:
    """Read the parameters cell: name -> (type as written, value)."""
    found = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign | ast.Assign), f"not a literal: {ast.unparse(node)}"
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else None
        found[target.id] = (kind, ast.literal_eval(node.value))
    return found


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
def test_it_tells_nothing_of_the_machine_that_ran_it(path):
    notebook = read(path)
    metadata = [notebook.metadata, *(cell.metadata for cell in notebook.cells)]
    assert [kept for kept in metadata if {"papermill", "execution", "widgets"} & set(kept)] == []
    # Pictures are base64, where anything may be spelt by chance.
    for cell in code_cells(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    assert TRACES.findall(nbformat.writes(notebook)) == []
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_it_declares_every_shared_parameter_with_the_default(path):
    cells = declared(parameters_cell(read(path)))
    for name, field in Params.model_fields.items():
        kind, value = cells[name]
        assert value == field.default, f"{name} is {value!r} here and {field.default!r} in the schema"
        assert kind.split("[")[0] == simple_name(field.annotation), f"{name}: {kind}"


@every_notebook
def test_its_parameters_are_annotated_explained_and_validated_next(path):
    notebook = read(path)
    cell = parameters_cell(notebook)
    assert [name for name, (kind, value) in declared(cell).items() if kind is None and value is not None] == []
    assert "from_notebook(globals()" in code_cells(notebook)[code_cells(notebook).index(cell) + 1].source
    own = set(declared(cell)) - set(Params.model_fields)
    lines = cell.source.splitlines()
    assert {line.split(":")[0] for line in lines if "#" not in line} & own == set()


@every_notebook
def test_it_opens_with_one_title_and_its_cells_are_short(path):
    notebook = read(path)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert notebook.cells[0].source.startswith("# ")
    assert sum(len(re.findall(r"^# ", text, re.M)) for text in prose) == 1
    cells = [cell for cell in code_cells(notebook) if cell != parameters_cell(notebook)]
    long = {cell.source.splitlines()[0]: len(cell.source.splitlines()) for cell in cells}
    assert {first: n for first, n in long.items() if n > LONGEST_CELL} == {}
    declared = len(parameters_cell(notebook).source.splitlines())
    assert declared <= len(Params.model_fields) + MOST_OWN_PARAMETERS


def test_the_names_of_types_are_those_a_notebook_writes():
    kinds = {name: field.annotation for name, field in Params.model_fields.items()}
    assert simple_name(kinds["tasks"]) == "list"
    assert simple_name(kinds["dtype"]) == "str"
    assert simple_name(kinds["do_pad"]) == "bool"
    assert simple_name(kinds["revision"]) == "str"
