"""The house keeps its order: rooms that import only lower ones, small files, a small public face."""

import ast
import gc
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from inspect import signature

import pytest
from locked import LOCK
from packaging.utils import canonicalize_name

import mmflow_utils
from docs.reference import FOLDERS, PACKAGE, ROOMS, files_of, imports
from mmflow_utils.params import ROOT

FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
LONGEST_FILE = 350  # lines
LARGEST_PACKAGE = 10880
MOST_NAMES = 60
SLOW_TO_IMPORT = {"peft"}  # and few models need it: imported where it is used
LIGHT = ("data", "params", "results", "analysis", "plots")  # figures are drawn again without torch


def n_lines(file):
    return len(file.read_text(encoding="utf-8").splitlines())


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_order_names_every_room():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} == set(ROOMS) and len(ROOMS) == len(set(ROOMS))


@every_file
def test_imports_run_only_downwards(file):
    room = module_of(file).split(".")[1:2]
    allowed = ROOMS[: ROOMS.index(*room) + 1] if room else ()
    assert [module for module in imports(file) if module.split(".")[1] not in allowed] == []


def test_no_file_imports_itself_round_a_circle():
    graph = {module_of(file): set(imports(file)) for file in FILES}
    assert list(TopologicalSorter(graph).static_order())
    assert graph["mmflow_utils.analysis.collect"] >= {"mmflow_utils.params", "mmflow_utils.results.frames"}


def test_the_look_at_imports_sees_them_in_every_form(tmp_path):
    (tmp_path / "x.py").write_text(
        "import mmflow_utils.data.gqa\nfrom mmflow_utils import params\nfrom mmflow_utils.prompts import flows\n"
        "def f():\n    from mmflow_utils.prompts.flows import Flow\n"
    )
    flows = "mmflow_utils.prompts.flows"
    assert list(imports(tmp_path / "x.py")) == ["mmflow_utils.data.gqa", "mmflow_utils.params", flows, flows]


@every_file
def test_imports_are_absolute_and_stand_at_the_top(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.Import | ast.ImportFrom
    first_other = next((i for i, node in enumerate(tree.body) if not isinstance(node, kinds | ast.Expr)), None)
    top = tree.body[:first_other]
    assert [ast.unparse(node) for node in top if isinstance(node, ast.ImportFrom) and node.level] == []
    later = [node for node in ast.walk(tree) if isinstance(node, kinds) and node not in top]
    # A package that the lock doesn't hold is an option, and may be imported where it is used, as a slow one may.
    assert [ast.unparse(node) for node in later if not is_optional(node)] == []


def is_optional(node):
    name = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
    ours = sys.stdlib_module_names | {"mmflow_utils"}
    return name in SLOW_TO_IMPORT or (name not in ours and canonicalize_name(name) not in LOCK)


def test_files_and_package_stay_small():
    files = [*FILES, *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    assert {str(file.relative_to(ROOT)): n for file in files if (n := n_lines(file)) > LONGEST_FILE} == {}
    assert sum(map(n_lines, FILES)) <= LARGEST_PACKAGE


def test_the_public_face_is_small_and_each_name_is_what_its_room_says():
    names = set(mmflow_utils.__all__)
    assert 40 < len(names) <= MOST_NAMES
    for name in names:
        assert getattr(mmflow_utils, name) is not None


def test_no_module_shares_its_name_with_a_public_name():
    modules = {part for file in FILES for part in module_of(file).split(".")}
    assert modules & set(mmflow_utils.__all__) == set()


def test_what_needs_no_model_loads_no_torch():
    light = [module_of(file) for room in LIGHT for file in files_of(PACKAGE / room)]
    code = f"import importlib, sys\nfor name in {light}:\n    importlib.import_module(name)\n"
    code += "    assert 'torch' not in sys.modules, name"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="knockout_swep"):
        mmflow_utils.knockout_swep  # noqa: B018


@pytest.mark.parametrize("is_on", [True, False])
def test_an_import_leaves_the_garbage_collector_as_it_was(monkeypatch, is_on):
    (gc.enable if is_on else gc.disable)()
    gc.unfreeze()  # what earlier tests left could die meanwhile, and be counted no more
    try:
        mmflow_utils.__getattr__("Params")
        with pytest.raises(AttributeError):
            mmflow_utils.__getattr__("Parms")
        assert gc.isenabled() == is_on and gc.get_freeze_count() == 0
        # What comes with torch is never looked through again.
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.delitem(sys.modules, "torch")
        monkeypatch.setattr(mmflow_utils, "_import", lambda name: sys.modules.setdefault("torch", [[name]]))
        mmflow_utils.__getattr__("load_model")
        assert gc.isenabled() == is_on and gc.get_freeze_count() > 0
    finally:
        gc.freeze()
        gc.enable()


def test_no_test_imports_a_test():
    tests = {file.stem for file in TESTS if file.name.startswith("test_")}
    found = {}
    for file in TESTS:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if shared := tests & {part for name in names if name for part in name.split(".")}:
                found[file.name] = shared
    assert found == {}


IN_EACH_ROOM = (
    "data.sample.is_correct", "params.read_yaml", "models.adapter.compute_device", "prompts.encoding.encode",
    "engine.closeness.rounding", "results.frames.load_frame", "experiments.curation.as_text", "analysis.stats.holm",
    "plots.style.set_color", "explorer.Explorer",
)  # fmt: skip


@pytest.mark.parametrize("name", IN_EACH_ROOM)
def test_types_are_checked_while_the_tests_run(name):
    module, _, function = name.rpartition(".")
    function = getattr(import_module(f"mmflow_utils.{module}"), function)
    required = [p for p in signature(function).parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    with pytest.raises(Exception) as refused:  # noqa: B017 (of either checker)
        function(*[object()] * len(required))
    assert type(refused.value).__module__.split(".")[0] in ("beartype", "jaxtyping")


@every_file
def test_no_function_inside_another_names_a_shape(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = [node for outer in functions for node in ast.walk(outer) if node in functions and node is not outer]
    said = [ast.unparse(part) for one in inner for part in (one.args, one.returns) if part]
    assert [part for part in said if "Tensor, '" in part or "ndarray, '" in part] == []  # nobody would check it


def test_types_are_checked_in_every_room():
    assert tuple(name.split(".")[0] for name in IN_EACH_ROOM) == ROOMS
