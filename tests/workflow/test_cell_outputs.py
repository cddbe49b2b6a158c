"""A notebook's figures as vector files: drawn by a real kernel, taken out of the executed copy."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from workflow import run_notebook as execute
from workflow.cell_outputs import VECTORS

DECLARED = 'model: str = "mini"'
DRAW = """import mmflow_utils as mm, pandas as pd
mm.set_style()
frame = pd.DataFrame({"flow": "Image -> Last", "layer": range(3), "rel_change_pct": [-1.0, -50.0, 2.0]})"""
CELLS = (DRAW, "mm.plot_map(frame, title='One')", "print('no figure')", "mm.plot_map(frame, title='Two')")


@pytest.mark.notebook
@pytest.mark.parametrize("kind", VECTORS)
def test_each_figure_is_a_file_in_the_pages_order_and_the_page_keeps_its_png(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    (tmp_path / "tiny.yaml").write_text(f"model: mini\noutputs: {tmp_path}/out\n")
    parameters = new_code_cell(DECLARED, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=[parameters, *map(new_code_cell, CELLS)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "02_flow.ipynb")
    stale = tmp_path / "out" / "mini" / "figures" / f"02_flow-9.{kind}"
    stale.parent.mkdir(parents=True)
    stale.touch()

    given = [str(tmp_path / "02_flow.ipynb"), str(tmp_path / "tiny.yaml")]
    assert execute.main([*given, "--figures", kind]) == 0
    files = sorted(stale.parent.iterdir())
    assert [file.name for file in files] == [f"02_flow-1.{kind}", f"02_flow-2.{kind}"]
    one, two = (file.read_bytes() for file in files)
    assert one.startswith({"svg": b"<?xml", "pdf": b"%PDF"}[kind]) and two != one
    if kind == "svg":
        # Text is drawn as paths, and matplotlib names it in a comment; nothing is a picture of pixels.
        assert b"<!-- One -->" in one and b"<!-- Two -->" in two and b"<image" not in one
    executed = nbformat.read(tmp_path / "out" / "mini" / "02_flow.ipynb", as_version=4)
    shown = [out.data for cell in executed.cells for out in cell.get("outputs", ()) if "data" in out]
    assert [set(data) for data in shown] == [{"image/png", "text/plain"}] * 2


def test_another_kind_is_refused(capsys):
    with pytest.raises(SystemExit):
        execute.main(["02_flow_to_last", "--figures", "bmp"])
    assert "choose from svg, pdf" in capsys.readouterr().err.replace("'", "")
