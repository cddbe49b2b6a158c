"""The committed notebooks, and what their cells hold."""

import ast

import nbformat

from mmflow_utils.params import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook):
    (cell,) = (cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    return cell


def declared(cell) -> dict:
    """Read the parameters cell: name -> (type as written, value)."""
    found = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.AnnAssign | ast.Assign), f"not a literal: {ast.unparse(node)}"
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else None
        found[target.id] = (kind, ast.literal_eval(node.value))
    return found
