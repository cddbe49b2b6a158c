"""A notebook's figures as vector files: drawn by a real kernel, taken out of the executed copy."""

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mmflow_utils.execute import QUIET_KERNEL
from mmflow_utils.params import ROOT
from mmflow_utils.plots.files import VECTORS, take_vectors, vector_arguments

DRAW = """import mmflow_utils as mm, pandas as pd
mm.set_style()
frame = pd.DataFrame({"flow": "Image -> Last", "layer": range(3), "rel_change_pct": [-1.0, -50.0, 2.0]})"""


@pytest.fixture(scope="module", params=VECTORS)
def run(request, tmp_path_factory):
    """A notebook of two figures and no picture else, executed with a vector format."""
    folder = tmp_path_factory.mktemp("run")
    cells = [DRAW, "mm.plot_map(frame, title='One')", "print('no figure')", "mm.plot_map(frame, title='Two')"]
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), folder / "a.ipynb")
    papermill.execute_notebook(
        folder / "a.ipynb",
        folder / "b.ipynb",
        kernel_name="python3",
        cwd=ROOT,
        progress_bar=False,
        config=QUIET_KERNEL,
        extra_arguments=vector_arguments(request.param),
    )
    return request.param, nbformat.read(folder / "b.ipynb", as_version=4), folder


def test_each_figure_is_a_file_in_the_pages_order_and_the_page_keeps_its_png(run):
    kind, executed, folder = run
    stale = folder / "figures" / f"02_flow-9.{kind}"
    stale.parent.mkdir()
    stale.touch()
    files = take_vectors(executed, kind, folder / "figures", "02_flow")
    assert [file.name for file in files] == [f"02_flow-1.{kind}", f"02_flow-2.{kind}"]
    assert sorted(files) == sorted(stale.parent.iterdir())
    begins = {"svg": b"<?xml", "pdf": b"%PDF"}[kind]
    assert all(file.read_bytes().startswith(begins) and file.stat().st_size > 3000 for file in files)
    if kind == "svg":
        # Text is drawn as paths; matplotlib names each in a comment.
        assert b"<!-- One -->" in files[0].read_bytes() and b"<!-- Two -->" in files[1].read_bytes()
        assert b"<image" not in files[0].read_bytes()
    shown = [output.data for cell in executed.cells for output in cell.outputs if "data" in output]
    assert [set(data) for data in shown] == [{"image/png", "text/plain"}] * 2
    assert take_vectors(executed, kind, folder / "figures", "02_flow") == []  # it holds no more
