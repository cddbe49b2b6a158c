"""The regression of the notebooks holds every word; one decimal of a cell may tip, where rounding does that."""

import json

import nbformat
import pytest
from nbval.plugin import IPyNbFile
from ties import DECIMAL, Said

from conftest import pytest_collection_modifyitems
from mmflow_utils.params import ROOT

TABLE = "    layer  change\n0   1     -37.5\n1   2       6.5"


@pytest.mark.parametrize(
    "says",
    [TABLE.replace("37.5", "37.4"), TABLE.replace("6.5", "6.6"), TABLE.replace("37.5", "37.6")],
)
def test_a_decimal_may_tip(says):
    assert Said(TABLE) == says


@pytest.mark.parametrize(
    "says",
    [
        TABLE.replace("37.5", "37.3"),  # by more than a last digit
        TABLE.replace("37.5", "37.4").replace("6.5", "6.6"),  # two of them
        TABLE.replace("-37.5", "37.5"),
        TABLE.replace("37.5", "37.45"),
        TABLE.replace("1  ", "2  ", 1),  # no decimal
        TABLE.replace("layer", "depth"),
        TABLE + " 6.5",
        TABLE.replace("    layer", "   layer"),
        "",
    ],
)
def test_nothing_else_may(says):
    assert Said(TABLE) != says


def test_a_number_said_twice_tips_twice():
    assert Said("<td>-37.5</td> in all -37.5 %") == "<td>-37.4</td> in all -37.4 %"
    assert Said("<td>-37.5</td> in all -37.5 %") != "<td>-37.4</td> in all -37.6 %"
    assert Said("−9.95 %") == "−9.96 %" and Said("9.99, then") == "10.00, then"


@pytest.mark.notebook
@pytest.mark.parametrize(("step", "same"), [(1, True), (2, False)])
def test_the_regression_of_a_notebook_compares_so(step, same, request):
    file = IPyNbFile.from_parent(request.session, path=ROOT / "notebooks" / "04_image_patch_knockout.ipynb")
    cells = list(file.collect())
    pytest_collection_modifyitems(cells)
    cell = next(
        cell for cell in cells if "text/html" in str(cell.cell.outputs) and DECIMAL.search(str(cell.cell.outputs))
    )
    said = cell.cell.outputs
    number = next(word for word in DECIMAL.findall(str(said)) if word[-1] in "01234567")
    moved = json.dumps(said, ensure_ascii=False).replace(number, number[:-1] + str(int(number[-1]) + step))
    assert cell.compare_outputs([nbformat.from_dict(output) for output in json.loads(moved)], said) == same
    assert cell.compare_outputs(said, said)
