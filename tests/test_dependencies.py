"""What is imported is declared, what is declared has a range, and what is installed is one closed, pinned set."""

import ast
import re
import sys
import tomllib
from importlib.metadata import metadata, packages_distributions, requires, version

import pytest
import yaml
from locked import LOCK
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mmflow_utils.params import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
OURS = {path.parent.name for path in ROOT.glob("*/__init__.py")}


def declared(*extras: str) -> dict[str, SpecifierSet]:
    """Return the range of each package that the core and some extras ask for, through extras that they name."""
    needs = map(Requirement, [*PROJECT["dependencies"], *(need for extra in extras for need in EXTRAS[extra])])
    found = {}
    for need in needs:
        found |= declared(*need.extras) if need.extras else {canonicalize_name(need.name): need.specifier}
    return found


def test_every_declared_range_allows_the_locked_version():
    assert {name: LOCK.get(name) for name, allowed in declared("dev").items() if LOCK.get(name) not in allowed} == {}


def test_make_installs_every_extra_but_the_one_for_cuda():
    assert set(declared(*EXTRAS)) - set(declared("dev")) == {"bitsandbytes"}


def test_only_torch_is_declared_exactly():
    assert [name for name, allowed in declared(*EXTRAS).items() if "==" in str(allowed)] == ["torch"]
    assert [name for name, allowed in declared(*EXTRAS).items() if not str(allowed)] == []


# The package may be installed without what runs it, so each part's imports are in the core or in its extra.
WHERE = {"mmflow_utils": [], "miniature": [], "benchmarks": [], "workflow": ["notebooks"], "docs": ["report"]}
IMPORTS_OF = packages_distributions()


@pytest.mark.parametrize("folder", [*WHERE, "tests"])
def test_what_is_imported_is_declared(folder):
    known = declared(*WHERE.get(folder, ["dev"]))
    inside = {path.stem for path in (ROOT / folder).rglob("*.py")} | OURS
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path.read_text(encoding="utf-8")) - inside - set(sys.stdlib_module_names):
            owners = {canonicalize_name(owner) for owner in IMPORTS_OF.get(name, [])}
            # A package that the lock doesn't hold is an option.
            assert owners & set(known) or not owners & set(LOCK), f"{path}: {name}"


def imported(code: str) -> set[str]:
    """Return the packages that code imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_lock_holds_nothing_but_pins():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.!]+", line)] == []
    assert LOCK["torch"] == "2.13.0"  # no +cpu: pip finds the build that the machine offers
    assert "torchvision" not in LOCK


def brought_along(need: Requirement, found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the packages that installing one brings along, itself among them, each with an extra of it or ""."""
    for asked in {(canonicalize_name(need.name), extra) for extra in ["", *need.extras]} - found:
        found.add(asked)
        for further in map(Requirement, requires(asked[0]) or []):
            if further.marker is None or further.marker.evaluate({"extra": asked[1]}):
                brought_along(further, found)
    return found


def test_the_lock_is_closed_nothing_unpinned_comes_along_and_nothing_else():
    found: set[tuple[str, str]] = set()
    for name in declared("dev"):
        brought_along(Requirement(name), found)
    needed = {name for name, _ in found if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert needed - set(LOCK) <= {"setuptools"} and set(LOCK) <= needed


def test_this_environment_is_the_locked_one():
    installed = {name: version(name).split("+")[0] for name in LOCK}
    assert installed == LOCK


def test_every_locked_package_installs_on_the_oldest_python_we_promise():
    # Debian 12 has 3.11.2, and pip refuses a package that asks for more.
    asked = {name: metadata(name)["Requires-Python"] or "" for name in LOCK}
    assert {name: wants for name, wants in asked.items() if not SpecifierSet(wants).contains("3.11.2")} == {}


def test_conda_users_get_the_same_set():
    (pip,) = (entry["pip"] for entry in CONDA if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    (python,) = (entry for entry in CONDA if str(entry).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    # Nothing else is taken from conda, where it could differ from the lock.
    assert [entry for entry in CONDA if isinstance(entry, str)] == [python, "pip"]


def test_the_workflow_on_github_runs_targets_that_exist_on_pythons_that_we_promise():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    runs = jobs["test"]["strategy"]["matrix"]["include"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert {run["target"] for run in runs} == {"test", "regression", "quick"} <= set(targets)
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(run["python"]) for run in runs)
