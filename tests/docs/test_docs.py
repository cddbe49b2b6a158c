"""The pages that are made from the code say what the code says."""

import importlib.util
import re

import pytest
from test_environment import FILES, _imports, _module
from test_notebooks import NOTEBOOKS, declared, parameters_cell, read

import mmflow_utils
from mmflow_utils.params import ROOT, Params

SPEC = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)


def rows(page: str) -> list[list[str]]:
    """Cells of all tables of a page."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("name", make.PAGES)
def test_the_page_is_what_the_code_gives(name):
    stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert stored == make.PAGES[name](), f"docs/{name} is stale: run `python docs/make.py`"


def test_each_shared_parameter_has_a_row_with_its_default_and_meaning():
    found = {cells[0].strip("`"): cells[1:] for cells in rows(make.parameters()) if len(cells) == 5}
    for name, field in Params.model_fields.items():
        kind, default, _, meaning = found[name]
        assert meaning.replace("\\<", "<") == field.description
        assert (default == "`null`") == (field.default is None) <= kind.endswith("or null")
    assert found["seed"][1:3] == ["`0`", "0 to 4,294,967,295"] and found["do_pad"][1] == "`true`"
    assert found["method"][2] == "sweep, reference" and found["window"][2] == "1 to 1,000"


def test_a_field_that_the_page_lacks_makes_it_stale(monkeypatch):
    class More(Params):
        color: str = mmflow_utils.params.Field("red", description="of everything")

    stored = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    monkeypatch.setattr(make, "Params", More)
    page = make.parameters()
    assert "| `color` | text | `red` |  | of everything |" in page and page != stored


def test_each_notebooks_own_parameters_have_their_comment():
    found = {(cells[0], cells[1].strip("`")): cells[4] for cells in rows(make.parameters()) if len(cells) == 5}
    for path in NOTEBOOKS:
        for name in set(declared(parameters_cell(read(path)))) - set(Params.model_fields):
            (line,) = re.findall(rf"^{name}:.*", parameters_cell(read(path)).source, re.M)
            assert found[path.stem, name].replace("\\<", "<") == line.partition("  # ")[2] != ""


def test_the_map_shows_every_module_and_each_import_once():
    page = make.package_map()
    drawn = re.search(r"```text\n(.*?)\n```", page, re.S)[1].splitlines()[1:]
    modules = mmflow_utils.MODULES
    assert [line.split()[1] for line in drawn] == list(modules)
    crosses = {
        (line.split()[1], modules[n]) for line in drawn for n, mark in enumerate(line.split()[2:]) if mark == "x"
    }
    made = {(_module(file), name) for file in FILES for name in _imports(file)}
    assert crosses == {(a, b) for a, b in made if a != b and a in modules}
    for file in (file for file in FILES if _module(file) in modules):
        name = str(file.relative_to(ROOT / "mmflow_utils").with_suffix("")).removesuffix("/__init__")
        assert f" {name} |" in page.replace("**", "")


def test_crosses_lie_left_of_the_diagonal():
    drawn = re.search(r"```text\n(.*?)\n```", make.package_map(), re.S)[1].splitlines()[1:]
    assert [len(line.split()[2:]) for line in drawn] == list(range(len(drawn)))


def test_an_import_that_is_new_changes_the_map(monkeypatch):
    monkeypatch.setattr(make, "imports", lambda file: ["params"] if file.stem == "flows" else [])
    assert "\n 3 flows      x  ·\n" in make.package_map()
