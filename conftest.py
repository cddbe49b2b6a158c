"""Shared by all tests. None may reach the network, and one thread keeps numbers and times steady."""

import ast
import gc
import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from beartype import BeartypeConf
from beartype.claw import beartype_packages
from jaxtyping import _import_hook


class OuterFunctions(_import_hook.JaxtypingTransformer):
    """Checks functions and methods, and none inside a function: it would be compiled anew with every call of that."""

    def visit(self, node):
        inside = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        return node if inside else super().visit(node)


def check_types(*packages):
    """Check annotations while tests run: of shapes where a module names some, else of plain types, which is quicker."""
    here = Path(__file__).parent
    files = [
        file
        for package in packages
        for file in (here / package).rglob("*.py")
        if "from jaxtyping" in file.read_text("utf-8")
    ]
    shapes = [".".join(file.relative_to(here).with_suffix("").parts) for file in files]
    beartype_packages(packages, conf=BeartypeConf(claw_is_pep526=False))
    _import_hook.JaxtypingTransformer = OuterFunctions
    _import_hook.install_import_hook(shapes, "beartype.beartype")  # asked first, since it was installed last


check_types("mmflow_utils", "miniature")
SLOW = {"slow", "browser", "notebook"}
LONGEST = {"test_slurm.py", "test_rounding.py", "test_every_notebook.py"}
LIBRARIES = ("pydantic", "accelerate", "seaborn", "transformers.models.llava.modeling_llava")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    """Import libraries first: jaxtyping compiles anew what a module that it checks is the first to import."""
    runs_here = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if runs_here and not config.getoption("nbval", False):  # notebooks have kernels
        for name in LIBRARIES:
            import_module(name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Modules and tests stay to the end: the garbage collector need not look through them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest and end with quick ones, so that no worker idles."""
    items.sort(key=lambda item: (item.path.name not in LONGEST, not SLOW & set(item.keywords)))
    for item in items:
        if item.path.suffix == ".ipynb":
            _prepare_cell(item)


def _prepare_cell(item):
    """Let a tied decimal tip, compare no progress bars, and skip cells whose model can't be had here, saying why."""
    from ties import Said

    from workflow.cell_outputs import without_widgets

    def sanitize(output, original=item.sanitize):
        return Said(original(output)) if isinstance(output, str) else output

    def compare(made, committed, *more, original=item.compare_outputs):
        return original(without_widgets(made), without_widgets(committed), *more)

    item.sanitize, item.compare_outputs = sanitize, compare
    if reason := _lacking(item.path.stem):
        item.add_marker(pytest.mark.skip(reason=reason))


@cache
def _lacking(notebook: str) -> str:
    from workflow.graph import opens_with, read_params

    try:
        if language_model := read_params(opens_with(notebook)).get("language_model"):
            import transformers.models.auto.tokenization_auto  # noqa: F401 (first, as in pytest_configure)

            from mmflow_utils.models.sources import find_checkpoint

            find_checkpoint(language_model)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def what_examples_know(request, doctest_namespace):
    """Give the examples in docstrings the names that they don't define, and a folder of their own to write to."""
    if not isinstance(request.node, pytest.DoctestItem):
        return
    words = set(re.findall(r"\w+", " ".join(example.source for example in request.node.dtest.examples)))
    tmp_path = request.getfixturevalue("tmp_path")
    request.getfixturevalue("monkeypatch").chdir(tmp_path)
    doctest_namespace |= _libraries() | {"folder": tmp_path}
    for names in (_miniature, _scene):
        if words & set(names.__doc__.split()):
            doctest_namespace |= names()


@pytest.fixture(scope="module")
def small_slices():
    """Let the short prompts of tests take several slices of a layer, as long ones do."""
    from mmflow_utils.engine import packed_pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_pass, "ENOUGH_ROWS", 1)
        yield


@cache
def _libraries():
    import numpy as np
    import pandas as pd
    import torch

    return {"np": np, "pd": pd, "torch": torch, "Path": Path}


@cache
def _miniature():
    """model params sample samples"""
    import mmflow_utils as mm

    params = mm.Params()
    samples = mm.read_questions(params, tasks=["ChooseAttr"])[0][:4]
    return {"mm": mm, "params": params, "model": mm.load_model(params), "samples": samples, "sample": samples[0]}


@cache
def _scene():
    """scene"""
    from miniature.world import sample_scene

    return {"scene": sample_scene(_libraries()["np"].random.default_rng(0))}
