"""The pages that are made from the code say what the code says."""

import re

import pytest
from cells import NOTEBOOKS, declared, parameters_cell, read
from pydantic import Field

from docs import reference
from docs.reference import FOLDERS, PACKAGE, ROOMS, files_of, imports
from mmflow_utils.params import ROOT, Params


def rows(page: str) -> list[list[str]]:
    """Cells of all tables of a page."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_page_is_what_the_code_gives(name):
    stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert stored == reference.PAGES[name](), f"docs/{name} is stale: run `python -m docs.reference`"


def test_each_shared_parameter_has_a_row_with_its_default_and_meaning():
    found = {cells[0].strip("`"): cells[1:] for cells in rows(reference.parameters()) if len(cells) == 5}
    for name, field in Params.model_fields.items():
        kind, default, _, meaning = found[name]
        assert meaning.replace("\\<", "<") == field.description
        assert (default == "`null`") == (field.default is None) <= kind.endswith("or null")
    assert found["seed"][1:3] == ["`0`", "0 to 4,294,967,295"] and found["do_pad"][1] == "`true`"
    assert found["method"][2] == "sweep, reference" and found["window"][2] == "1 to 1,000"


def test_a_field_that_the_page_lacks_makes_it_stale(monkeypatch):
    class More(Params):
        color: str = Field("red", description="of everything")

    stored = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    monkeypatch.setattr(reference, "Params", More)
    page = reference.parameters()
    assert "| `color` | text | `red` |  | of everything |" in page and page != stored


def test_each_notebooks_own_parameters_have_their_comment():
    found = {(cells[0], cells[1].strip("`")): cells[4] for cells in rows(reference.parameters()) if len(cells) == 5}
    for path in NOTEBOOKS:
        for name in set(declared(parameters_cell(read(path)))) - set(Params.model_fields):
            (line,) = re.findall(rf"^{name}:.*", parameters_cell(read(path)).source, re.M)
            assert found[path.stem, name].replace("\\<", "<") == line.partition("  # ")[2] != ""


def drawing(page: str) -> list[str]:
    """Return the lines of the drawing that shows who imports whom."""
    return re.search(r"```text\n(.*?)\n```", page, re.S)[1].splitlines()[1:]


def test_the_map_shows_every_room_and_file_and_each_import_once():
    page = reference.package_map()
    drawn = drawing(page)
    assert [line.split()[1] for line in drawn] == list(ROOMS)
    crosses = {(line.split()[1], ROOMS[n]) for line in drawn for n, mark in enumerate(line.split()[2:]) if mark == "x"}
    made = {(room, used.split(".")[1]) for room in ROOMS for file in files_of(PACKAGE / room) for used in imports(file)}
    assert crosses == {(room, used) for room, used in made if room != used}
    names = [cells[1].strip("*") for cells in rows(page)]
    files = [file for folder in ("mmflow_utils", *FOLDERS) for file in (ROOT / folder).rglob("*.py")]
    paths = [file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT).with_suffix("") for file in files]
    expected = {str(path).removesuffix("/__init__") for path in paths} - {"__init__"}
    assert len(names) == len(set(names)) and set(names) - {"room", "folder", "---"} == expected


def test_crosses_lie_left_of_the_diagonal():
    assert [len(line.split()[2:]) for line in drawing(reference.package_map())] == list(range(len(ROOMS)))


def test_an_import_that_is_new_changes_the_map(monkeypatch):
    new = ["mmflow_utils.params"]
    monkeypatch.setattr(reference, "imports", lambda file: new if file.stem == "flows" else [])
    assert "\n 4 prompts      ·  x  ·\n" in reference.package_map()


def test_the_tests_that_pages_name_exist():
    said = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", said))
    text = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")}
    assert len(named) > 50
    assert [name for name in named if f"\ndef {name[1] or 'test_'}" not in text.get(name[0], "")] == []
