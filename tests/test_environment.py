"""The package keeps its order, and offers what it says."""

import ast
import subprocess
import sys

import pytest
from locked import LOCK
from packaging.utils import canonicalize_name

import mmflow_utils
from mmflow_utils.params import ROOT

FILES = sorted((ROOT / "mmflow_utils").rglob("*.py"))


def _module(file):
    """Name the module of the list that a file belongs to; the package's own __init__ belongs to none."""
    return file.relative_to(ROOT / "mmflow_utils").parts[0].removesuffix(".py")


def _imports(file):
    """Give the modules of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("mmflow_utils."))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "mmflow_utils":
            yield from ([node.module.split(".")[1]] if "." in node.module else (name.name for name in node.names))
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"a relative import, line {node.lineno}"


def test_the_order_names_every_module():
    assert {_module(file) for file in FILES} - {"__init__"} <= set(mmflow_utils.MODULES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "mmflow_utils")))
def test_imports_go_only_downwards(file):
    order = mmflow_utils.MODULES
    module = _module(file)
    allowed = () if module == "__init__" else order[: order.index(module) + 1]
    assert [name for name in _imports(file) if name not in allowed] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "mmflow_utils")))
def test_imports_stand_at_the_top(file):
    tree = ast.parse(file.read_text())
    kinds = ast.Import | ast.ImportFrom
    first_other = next((i for i, node in enumerate(tree.body) if not isinstance(node, kinds | ast.Expr)), None)
    top = tree.body[:first_other]
    later = [node for node in ast.walk(tree) if isinstance(node, kinds) and node not in top]
    # A package that the lock doesn't hold is an option, and may be imported where it is used.
    assert [ast.unparse(node) for node in later if not _is_optional(node)] == []


def _is_optional(node):
    name = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
    return name not in sys.stdlib_module_names | {"mmflow_utils"} and canonicalize_name(name) not in LOCK


def test_the_check_of_the_order_can_fail(tmp_path):
    (tmp_path / "x.py").write_text(
        "from mmflow_utils.knockout import a\ndef f():\n    from mmflow_utils import sweep\n"
    )
    assert list(_imports(tmp_path / "x.py")) == ["knockout", "sweep"]


def test_every_public_name_is_reached_through_the_package():
    names = mmflow_utils._exports()
    assert len(names) == len(set(names)) > 50
    for name, module in names.items():
        owner = __import__(f"mmflow_utils.{module}", fromlist=[name])
        assert getattr(mmflow_utils, name) is getattr(owner, name)


def test_what_needs_no_model_loads_no_torch():
    light = mmflow_utils.MODULES[: mmflow_utils.MODULES.index("models")]
    code = f"import importlib, sys\nfor name in {light}:\n    importlib.import_module('mmflow_utils.' + name)\n"
    code += "    assert 'torch' not in sys.modules, name"
    assert "plots" in light
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_is_the_function_whatever_was_imported_first():
    code = (
        "import mmflow_utils as mm, mmflow_utils.encode; assert callable(mm.encode); "
        "from mmflow_utils.encode import encode; assert mm.encode is encode"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="knockout_swep"):
        mmflow_utils.knockout_swep  # noqa: B018
