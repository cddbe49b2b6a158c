"""Parameters as readers give them: papermill's options on a real notebook, cut after its setup, and by hand."""

import ast

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell
from papermill.cli import papermill

from mmflow_utils.params import ROOT, Params
from workflow.graph import opens_with

pytestmark = pytest.mark.notebook


@pytest.fixture
def cut(tmp_path):
    """Copy a notebook up to the cell that validates; `line` is one that a reader adds to the parameters cell."""

    def cut(name="02_flow_to_last", line=""):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        (end,) = (n for n, cell in enumerate(notebook.cells) if "load_params(" in cell.source)
        notebook.cells = [*notebook.cells[: end + 1], new_code_cell("print(params.model_dump_json())")]
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += f"\n{line}"
        nbformat.write(notebook, tmp_path / "in.ipynb")
        return tmp_path / "in.ipynb"

    return cut


OPENED = ROOT / "params" / f"{opens_with('02_flow_to_last')}.yaml"  # what 02 studies where nothing else is asked


def run(path, *options):
    """Call papermill's own command; return the parameters that the notebook had, or else the error."""
    out = path.with_name("out.ipynb")
    words = [str(path), str(out), "--no-progress-bar", "--cwd", str(path.parent), *map(str, options)]
    called = CliRunner().invoke(papermill, words)
    if called.exception:
        return str(called.exception).strip().splitlines()[-1]
    return Params.model_validate_json(nbformat.read(out, as_version=4).cells[-1].outputs[0].text, strict=False)


def prepare(path, *options):
    """As `run`, but papermill only writes its cell; the cells run here, since a kernel takes seconds to start."""
    out = path.with_name("out.ipynb")
    assert CliRunner().invoke(papermill, [str(path), str(out), "--prepare-only", *map(str, options)]).exit_code == 0
    setup, *cells = (c.source for c in nbformat.read(out, as_version=4).cells[:-1] if c.cell_type == "code")
    imports = [node for node in ast.parse(setup).body if isinstance(node, ast.Import | ast.ImportFrom)]
    namespace = {"In": [""]}
    for cell in (ast.unparse(ast.Module(imports, [])), *cells):
        namespace["In"].append(cell)
        try:
            exec(cell, namespace)
        except ValueError as error:
            return f"ValueError: {error}"
    return namespace["params"]


def test_options_set_what_the_cell_does_not_declare(cut):
    params = run(cut(), "-p", "model", "llava-1.5-7b", "-p", "n_samples", 100)
    assert params == Params.from_yaml("params/llava-1.5-7b.yaml", n_samples=100)


def test_a_file_of_params_and_an_option_over_it(cut):
    params = run(cut(), "-f", ROOT / "params" / "mini-next.yaml", "-p", "window", 1)
    assert params == Params.from_yaml("params/mini-next.yaml", window=1)


def test_a_readers_own_file_changes_one_field(cut, tmp_path):
    (tmp_path / "own.yaml").write_text("n_samples: 5\n")
    assert run(cut(), "-f", tmp_path / "own.yaml") == Params.from_yaml(OPENED, n_samples=5)


def test_a_readers_own_file_names_a_model_and_fields(cut, tmp_path):
    (tmp_path / "own.yaml").write_text("model: planted\nn_samples: 5\ntasks: [ChooseRel]\n")
    expected = Params.from_yaml("params/planted.yaml", n_samples=5, tasks=["ChooseRel"])
    assert run(cut(), "-f", tmp_path / "own.yaml") == expected
    assert prepare(cut(), "-p", "model", tmp_path / "own.yaml").model_dump() == expected.model_dump()


def test_a_line_added_by_hand_counts_and_an_option_wins_over_it(cut):
    path = cut(line="n_samples = 5\nwindow = 2")
    assert prepare(path).model_dump() == Params.from_yaml(OPENED, n_samples=5, window=2).model_dump()
    assert run(path, "-r", "revision", "1234567", "-p", "window", 1) == Params.from_yaml(
        OPENED, n_samples=5, window=1, revision="1234567"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("-p n_sampels 5", "Unknown parameter n_sampels = 5: did you mean n_samples?"),
        ("-f own.yaml", "Unknown parameter windw = 9: did you mean window?"),
        ("-p window inf", "Parameter window = inf: expected a valid integer"),
        ("-p tasks ChooseRel", "write -y 'tasks: [ChooseRel]'"),
        ("-p revision 1234567", "with -r revision 1234567"),
        ("-p model minni", "did you mean mini?"),
    ],
)
def test_what_is_wrong_stops_the_notebook_with_one_sentence(cut, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("windw: 9\n")
    error = prepare(cut(), *options.split())
    assert error.startswith("ValueError: ") and said in error and "\n" not in error


def test_a_kernel_stops_with_the_same_sentence(cut):
    options = ("-p", "n_sampels", 5, "-p", "window", "inf")
    assert run(cut(), *options) == prepare(cut(), *options)


def test_a_notebooks_own_parameters_beside_shared_ones(cut):
    path = cut("08_window_size")
    assert prepare(path, "-y", "windows: [1, 3]").windows == [1, 3]
    assert "windows.0" in prepare(path, "-y", "windows: [0]")
    assert "windoms = 3: did you mean windows?" in prepare(cut("08_window_size", line="windoms = 3"))
