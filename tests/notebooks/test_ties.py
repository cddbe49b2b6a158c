"""The regression of the notebooks holds every word; one decimal of a cell may tip, where rounding does that."""

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
@pytest.mark.parametrize(("digits", "same"), [(1, True), (2, False)])
def test_the_regression_of_a_notebook_compares_so(digits, same, request):
    file = IPyNbFile.from_parent(request.session, path=ROOT / "notebooks" / "04_image_patch_knockout.ipynb")
    items = list(file.collect())
    pytest_collection_modifyitems(items)
    tables = (
        (item, DECIMAL.findall(str(item.cell.outputs))) for item in items if "text/html" in str(item.cell.outputs)
    )
    cell, number = next((item, word) for item, words in tables for word in words if word[-1] in "4567")
    computed = [
        nbformat.from_dict(
            {**output, "data": {kind: text.replace(number, moved(number, digits)) for kind, text in data}}
        )
        for output in cell.cell.outputs
        if (data := output.get("data", {}).items())
    ]
    shown = [output for output in cell.cell.outputs if "data" in output]
    assert str(computed) != str(shown)
    assert cell.compare_outputs(computed, shown) == same
    assert cell.compare_outputs(shown, shown)


def moved(number, digits):
    """Move a number by some of its last digits."""
    return number[:-1] + str(int(number[-1]) + digits)
