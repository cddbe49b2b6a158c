"""The report is built beside the one before, from the folders and the frames that are meant."""

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from docs import build, pages
from mmflow_utils.params import ROOT, Params, complete
from mmflow_utils.results.committed import FOLDER
from mmflow_utils.results.frames import manifest, save_frame
from workflow import graph
from workflow.graph import SUBJECT, names, opens_with


def executed(**injected):
    """Return a notebook that names a frame, as its run leaves it."""
    cells = [
        new_markdown_cell("# 02 · Flow"),
        new_code_cell('model: str = "mini"', metadata={"tags": ["parameters"]}),
        new_code_cell("\n".join(f"{name} = {value!r}" for name, value in injected.items())),
        new_code_cell('mm.load_frame(params.folder / "flow.parquet")'),
    ]
    cells[2].metadata["tags"] = ["injected-parameters"]
    return new_notebook(cells=cells)


@pytest.fixture
def outputs(tmp_path):
    (tmp_path / "outputs" / "mini").mkdir(parents=True)
    nbformat.write(executed(), tmp_path / "outputs" / "mini" / "02_flow.ipynb")
    return tmp_path / "outputs"


@pytest.fixture
def sphinx(monkeypatch):
    """Stand in for Sphinx: the site is a list of its pages; `code` is how it ends."""

    def sphinx(arguments):
        source, site = map(build.Path, arguments[-2:])
        site.mkdir()
        (site / "index.html").write_text(" ".join(sorted(file.parent.name for file in source.glob("*/*.ipynb"))))
        return sphinx.code

    sphinx.code = 0
    monkeypatch.setattr(build, "sphinx", sphinx)
    return sphinx


def run(outputs, *more):
    return build.main(["--outputs", str(outputs), "--docs", str(outputs / "none"), *(more or ["--no-committed"])])


def test_a_site_stays_until_the_next_is_whole(outputs, sphinx):
    (outputs / "site").mkdir()
    (outputs / "site" / "index.html").write_text("of before")
    sphinx.code = 2
    assert run(outputs) == 2 and (outputs / "site" / "index.html").read_text() == "of before"
    sphinx.code = 0
    assert run(outputs) == 0 and (outputs / "site" / "index.html").read_text() == "mini"
    assert sorted(path.name for path in outputs.iterdir()) == ["mini", "site"]


def test_where_the_subject_was_run_here_its_run_is_the_report(outputs, sphinx):
    (outputs / SUBJECT).mkdir()
    nbformat.write(executed(), outputs / SUBJECT / "02_flow.ipynb")
    assert run(outputs, "--committed") == 0
    assert (outputs / "site" / "index.html").read_text() == f"{SUBJECT} mini"  # a page each


def test_without_a_run_there_is_no_report(tmp_path, sphinx, capsys):
    assert run(tmp_path, "--committed") == 1
    assert "There is no executed notebook" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"cells": [', "", "{}", "null"])
def test_a_notebook_that_was_cut_short_is_named_and_the_others_are_shown(outputs, sphinx, capsys, content):
    (outputs / "planted").mkdir()
    for folder in ("mini", "planted"):
        (outputs / folder / "03_image.ipynb").write_text(content)
    assert run(outputs) == 0 and (outputs / "site" / "index.html").read_text() == "mini"
    said = capsys.readouterr().err
    assert f"Failed: {outputs}/planted/03_image.ipynb, which can't be read (" in said
    assert "Delete it and repeat `make report MODEL=planted`" in said


def test_models_are_found_where_their_files_put_their_results(outputs, tmp_path, monkeypatch):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "own.yaml").write_text(f"model: own\noutputs: {tmp_path}/scratch\n")
    (tmp_path / "params" / "none.yaml").write_text("model: none\noutputs: null\n")
    for module in (build, graph):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for folder in (outputs / "own", tmp_path / "scratch" / "own"):  # the first from before it was set
        folder.mkdir(parents=True)
    graph.read_params.cache_clear()
    assert sorted(build.folders_of_models(outputs, own=True)) == [outputs / "mini", tmp_path / "scratch" / "own"]
    assert sorted(build.folders_of_models(outputs, own=False)) == [outputs / "mini", outputs / "own"]
    graph.read_params.cache_clear()


def test_a_page_says_what_made_the_frames_of_its_own_run(tmp_path):
    def store(**changed):
        params = Params(**complete({"model": "mini"} | changed))
        return save_frame(pd.DataFrame({"layer": [0]}), tmp_path / "flow.parquet", manifest(params))

    def found(**injected):
        return pages.frames_of_run(executed(**injected), tmp_path)["flow"]

    own = store()
    wider, captions, facts = store(window=5), store(prompt="{caption} {question}", window=7), store(model="planted")
    assert len({own, wider, captions, facts}) == 4
    facts.unlink()
    assert found() == own and found(model="mini", window=5) == wider and found(window=7) == captions
    assert found(window=9) is None
    assert "no frame stored" in pages.manifests(executed(window=9), tmp_path)["flow"]["no manifest"]
    assert pages.manifests(executed(window=5), tmp_path)["flow"]["window"] == 5
    wider.write_bytes(b"")
    assert found(window=5) is None
    assert store(model="planted") == found(window=5)  # shown beside


def test_a_page_opens_with_its_short_answer(tmp_path):
    said = "Paper: one.\nHere (mini): A -> B <i>\n- first,\n  of two lines\n- second\nNot an item.\n"
    found = [new_output("stream", text=said)]
    cells = [new_markdown_cell("# Title\n\nOf what?"), new_markdown_cell("Text.\n\n## Findings")]
    executed = tmp_path / "mini" / "02_flow_to_last.ipynb"
    executed.parent.mkdir()
    for outputs in (found, []):  # a run that failed has printed nothing
        printing = [new_code_cell("1"), *(new_code_cell("2", outputs=outputs) for _ in range(2))]
        nbformat.write(new_notebook(cells=[*cells, *printing]), executed)
        pages.write_page(executed, tmp_path / "page.ipynb")
        opening = nbformat.read(tmp_path / "page.ipynb", as_version=4).cells[3].source
        expected = "Here (mini): A → B &lt;i&gt;\n\n- first, of two lines\n- second"
        assert opening.endswith(expected) if outputs else opening.startswith("Text.")
    items = [f"- {n}\n" for n in range(9)]
    many = new_notebook(cells=[cells[1], new_code_cell("1", outputs=[new_output("stream", text="".join(items))])])
    assert pages.short_answer(many) == ("", ["0", "1", "2", "3", "4", "and 4 more"])


def test_all_that_comes_with_the_project_is_of_its_notebooks():
    for name in (name for name in names() if opens_with(name) == SUBJECT):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        assert None not in pages.frames_of_run(notebook, FOLDER / SUBJECT).values(), name
