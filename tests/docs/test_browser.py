"""Notebooks in the browser: Binder gets what the lock pins, and every button leads to the one stated address."""

import json
import re
import subprocess
import tomllib
from importlib.metadata import requires
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from locked import LOCK
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from docs.address import NAME, REPOSITORY, binder, colab, first_cell
from docs.pages import buttons, write_page
from mmflow_utils.params import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BINDER = ROOT / "binder"
CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"
IPYTHON_RUNNING = "7.34.0"  # and its kernel, 6.17.1
NUMPY_RUNNING = "2.0.2"  # the oldest numpy 2 that hosted notebooks still come with


def lines(file):
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def test_binder_installs_what_a_notebook_needs_as_the_lock_pins_it():
    index, constraint, package = lines(BINDER / "requirements.txt")
    assert index == f"--extra-index-url {TORCH_FOR_CPU}"
    flag, lock = constraint.split()
    assert (flag, (BINDER / lock).resolve()) == ("-c", ROOT / "requirements.lock")
    assert package == "-e .[notebooks]"
    wanted = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebooks"]])
    assert [need.name for need in wanted if LOCK.get(canonicalize_name(need.name)) not in need.specifier] == []


def test_binder_has_a_python_that_we_promise_and_nothing_that_repo2docker_does_not_know():
    (version,) = lines(BINDER / "runtime.txt")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version.removeprefix("python-"))
    assert {file.name for file in BINDER.iterdir()} == {"requirements.txt", "runtime.txt", "postBuild"}
    assert not (ROOT / ".binder").exists()  # it refuses both


def test_what_binder_runs_after_its_packages_is_a_script():
    script = BINDER / "postBuild"
    assert script.stat().st_mode & 0o111 and script.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", script], check=True)
    (code,) = re.findall(r"<<'END'\n(.*?)\nEND\n", script.read_text(), re.S)
    compile(code, "postBuild", "exec")


def test_the_container_sets_up_what_make_does():
    assert CONTAINER["containerEnv"]["PIP_EXTRA_INDEX_URL"] == TORCH_FOR_CPU
    (version,) = re.findall(r"python:(\d\.\d+)-", CONTAINER["image"])
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    target = CONTAINER["postCreateCommand"].removeprefix("make ")
    assert f"\n{target}: requirements.lock" in (ROOT / "Makefile").read_text()


def test_a_numpy_that_runs_already_is_left_alone():
    core = {canonicalize_name(Requirement(need).name) for need in PROJECT["dependencies"]}
    asking = {}
    for name in LOCK.keys() & (core | {"contourpy", "bottleneck", "numexpr"}):
        for need in map(Requirement, requires(name) or []):
            if need.name == "numpy" and (need.marker is None or need.marker.evaluate({"extra": ""})):
                asking[name] = need.specifier.contains(NUMPY_RUNNING)
    own = next(Requirement(need) for need in PROJECT["dependencies"] if need.startswith("numpy"))
    assert own.specifier.contains(NUMPY_RUNNING) and len(asking) > 5
    assert [name for name, allows in asking.items() if not allows] == []


def test_colabs_own_ipython_and_kernel_are_left_alone():
    """Replaced, they may crash its sessions again and again; the recipe installs the core and two packages."""
    asked = re.search(r"%pip install -q -e \. (.*)", first_cell())[1].split()
    core, found, asking = map(Requirement, [*PROJECT["dependencies"], *asked]), set(), []
    waiting = list(core)
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        if name == "ipython":
            asking.append(need.specifier.contains(IPYTHON_RUNNING))
        elif name not in found:
            found.add(name)
            waiting += map(Requirement, requires(name) or [] if name in LOCK else [])
    assert asking and all(asking) and found > set(asked)
    assert found & {"ipykernel", "jupyter-client", "jupyter-core", "tornado", "pyzmq", "prompt-toolkit"} == set()


def test_the_address_is_stated_once_and_repeated_where_it_must_be():
    tour = "notebooks/00_tour.ipynb"
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", REPOSITORY)
    for name in ("README.md", "docs/browser.md"):
        text = (ROOT / name).read_text()
        assert binder(tour) in text and colab(tour) in text
        assert set(re.findall(r"(?:/gh/|/github/|github\.com/)([\w-]+/mmflow)\b", text)) == {NAME}
    assert first_cell() in (ROOT / "docs" / "browser.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == REPOSITORY


@pytest.mark.parametrize("name", ["00_tour", "13_fine_grained_flow"])
def test_every_notebooks_page_has_its_own_buttons(name, tmp_path):
    executed = tmp_path / "mini" / f"{name}.ipynb"
    executed.parent.mkdir()
    nbformat.write(nbformat.read(ROOT / "notebooks" / executed.name, as_version=4), executed)
    write_page(executed, page := tmp_path / "page.ipynb")
    (raw,) = (cell.source for cell in nbformat.read(page, as_version=4).cells if cell.cell_type == "raw")
    assert first_cell() in raw and raw.endswith(buttons(executed.name))
    to_binder, to_colab = re.findall(r'<a href="([^"]+)">Open in', raw)
    assert (ROOT / unquote(urlsplit(to_binder).query.removeprefix("labpath="))).is_file()
    assert (ROOT / to_colab.partition("/blob/main/")[2]).is_file()


def test_a_notebook_that_the_repository_lacks_has_no_buttons():
    assert buttons("99_mine.ipynb") == ""
