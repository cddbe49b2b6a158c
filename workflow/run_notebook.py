"""Run one notebook for one model through papermill, and judge honestly whether it succeeded.

    python -m workflow.run_notebook 02_flow_to_last llava-1.5-7b -p window 5

The executed copy goes to outputs/<model>/. A run that fails leaves `<notebook>.failed.ipynb` there,
with everything up to the error and its traceback, and ends with exit code 1. A shard (`-p shard 2/8`)
ends with the last cell that computes in parts, and its copy goes to outputs/<model>/shards/.
"""

import argparse
import dis
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import CodeType
from typing import Any

import nbformat
import papermill
import yaml
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillException, PapermillExecutionError

from mmflow_utils.params import ROOT, Params, complete, plain_assignments, read_yaml, unknown_parameters
from workflow.cell_outputs import VECTORS, take_vectors, vector_arguments, without_widgets
from workflow.graph import PARTS, given_by_batch, read_params
from workflow.kernel import OwnKernel, keep_caches_here

__all__ = ["check_parameters", "find_problems", "run_notebook"]

NOTEBOOKS = ROOT / "notebooks"
KEPT_S = 24 * 3600  # so long stays what a killed run had reached
# papermill warns of each parameter that the notebook's cell doesn't declare; check_parameters knows them all.
logging.getLogger("papermill").addFilter(lambda record: "Passed unknown parameter" not in record.getMessage())


def run_notebook(
    notebook: str | Path,
    model: str | Path = "mini",
    overrides: dict[str, Any] | None = None,
    *,
    figures: str | None = None,
    timeout_s: int | None = None,
    progress: bool = True,
) -> Path:
    """Execute a notebook with a model's parameters and return the executed copy.

    Args:
        notebook: A path in notebooks/, or a name there.
        model: A path to a parameter file, or a name in params/.
        overrides: Parameters that win over the file's, and over the real data that 12 gets for a model of params/.
        figures: `svg` or `pdf` stores each figure as such a file too, in outputs/<model>/figures/.
        timeout_s: Longest time that a single cell may take, in seconds.
        progress: Show a bar of cells.

    Raises:
        ValueError: The parameters are wrong, or the notebook is not of this project; nothing was run.
        RuntimeError: The notebook failed; names the cell, the error and the half-run copy.
    """
    notebook, file = _find_ours(notebook), _find(model, "params", ".yaml")
    known = file.parent == ROOT / "params"
    given = {"model": file.stem} | given_by_batch(notebook.stem, read_params(file.stem)) if known else read_yaml(file)
    values = given | (overrides or {})
    params = check_parameters(notebook, values)
    name, folder = notebook.stem, params.folder
    if params.shard:
        name, folder = f"{name}.{params.shard.replace('/', 'of')}", folder / "shards"
    finished, failed = folder / f"{name}.ipynb", folder / f"{name}.failed.ipynb"
    running = _running_copy(folder, name)
    failed.unlink(missing_ok=True)

    source = _cut_after_the_parts(notebook, running) if params.shard else notebook
    kernel = vector_arguments(figures) if figures else []
    stopped = _execute(source, running, values, timeout_s=timeout_s, progress=progress, kernel=kernel)
    problems = find_problems(nbformat.read(running, as_version=4)) if running.exists() else []
    if stopped or problems:
        if running.exists():
            os.replace(running, failed)
        raise RuntimeError(f"{name} failed for {file.stem}: {stopped or problems[0]}\n  Half-run copy: {failed}")
    executed = nbformat.read(running, as_version=4)
    if figures:
        take_vectors(executed, figures, folder / "figures", name)
    _name_the_model(executed, params.model)
    nbformat.write(executed, running)
    os.replace(running, finished)
    return finished


def refresh_outputs(notebook: str | Path) -> Path:
    """Execute a notebook as it stands and write it back with its outputs, free of this machine's traces."""
    notebook = _find_ours(notebook)
    running = _running_copy(ROOT / "outputs", notebook.stem)
    try:
        stopped = _execute(notebook, running, {}, timeout_s=None, progress=True)
        executed = nbformat.read(running, as_version=4)
        problems = find_problems(executed)
        if stopped or problems:
            raise RuntimeError(f"{notebook.stem} failed and stays as it was: {stopped or problems[0]}")
        executed.metadata = NotebookNode(
            kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
            language_info={"name": "python"},
        )
        for cell in executed.cells:
            kept = {key: value for key, value in cell.metadata.items() if key not in ("papermill", "execution")}
            cell.metadata = NotebookNode({key: value for key, value in kept.items() if value != []})
            if cell.cell_type == "code":
                cell.outputs = without_widgets(cell.outputs)
        nbformat.write(executed, running)
        os.replace(running, notebook)
    finally:
        running.unlink(missing_ok=True)
    return notebook


def check_parameters(notebook: Path, values: dict[str, Any]) -> Params:
    """Return the shared parameters that a run with `values` has, before a kernel starts.

    They are made as `load_params` makes them in the notebook: from the model's file, the `parameters` cell, `values`.

    Raises:
        ValueError: One sentence for each unknown name, wrong type, or value out of range. What one notebook
            alone has is judged by the notebook's own validating cell.
    """
    declared: dict[str, Any] = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            declared = plain_assignments(cell.source) or {}
    if not declared:
        raise ValueError(f"{notebook.name} needs a cell tagged `parameters` that holds nothing but name = literal.")
    unknown = unknown_parameters(values, [*Params.model_fields, *declared])
    if unknown:
        raise ValueError(f"{notebook.name}: " + "; ".join(unknown))
    if "checkpoint" in values and "model" not in values:  # as load_params: the cell's model is another one
        declared.pop("model", None)
    given = {name: value for name, value in (declared | values).items() if name in Params.model_fields}
    return Params(**complete(given))


def find_problems(executed: NotebookNode) -> list[str]:
    """List what shows that a notebook did not run to its end: cells that never ran, cells with an error.

    papermill's own status can't be trusted: after a kernel's death it calls every cell completed.
    """
    problems = []
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(code, start=1):
        first_line = cell.source.strip().splitlines()[0]
        expected = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            if output.output_type == "error" and not expected:
                problems.append(f"code cell {number} ({first_line}) raised {output.ename}: {output.evalue}")
        if cell.execution_count is None:
            problems.append(f"code cell {number} ({first_line}) never ran")
    return problems


def _execute(
    source: Path,
    target: Path,
    values: dict[str, Any],
    *,
    timeout_s: int | None,
    progress: bool,
    kernel: Sequence[str] = (),
) -> str:
    """Run papermill from `source` to `target`; say what stopped it, or nothing."""
    keep_caches_here()
    bar = {"desc": source.stem.strip("."), "leave": False, "mininterval": 0.1 if sys.stderr.isatty() else 60}  # seconds
    try:
        papermill.execute_notebook(
            source,
            target,
            parameters=values,
            kernel_name="python3",
            cwd=ROOT,
            progress_bar=bar if progress else False,
            execution_timeout=timeout_s,
            kernel_manager_class=OwnKernel,
            extra_arguments=list(kernel),
        )
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        return "the kernel died; most often memory ran out: try fewer samples or a smaller dtype"
    except CellTimeoutError:
        return f"a cell took longer than {timeout_s} s: give it more with --timeout-s"
    except PapermillException as error:
        return str(error)
    return ""


def _cut_after_the_parts(notebook: Path, copy: Path) -> Path:
    """Copy a notebook up to its last cell that computes in parts, without what no such cell needs on the way.

    A share of the samples makes no figure, and with more shares than parts one may have no rows at all. The copy ends
    before a cell tagged `all-samples`, which asks by what was found in all of them.
    """
    cut = nbformat.read(notebook, as_version=4)
    cut.cells = list(takewhile(lambda cell: "all-samples" not in cell.metadata.get("tags", []), cut.cells))
    ends = [n for n, cell in enumerate(cut.cells) if PARTS in cell.source]
    if not ends:
        raise ValueError(f"{notebook.name} computes nothing in parts: run it without a shard.")
    kept: list[NotebookNode] = []
    needed: set[str] = set()
    for cell in reversed(cut.cells[ends[0] : ends[-1] + 1]):
        needs, sets = _needs_and_sets(cell.source) if cell.cell_type == "code" else (set(), set())
        if PARTS in cell.source or needed & sets:
            needed = needed - sets | needs
            kept.insert(0, cell)
    cut.cells = [*cut.cells[: ends[0]], *kept]
    nbformat.write(cut, copy)
    return copy


def _needs_and_sets(source: str) -> tuple[set[str], set[str]]:
    """Return the names that a cell reads before it sets them, and those that it sets."""
    needs, sets = set(), set()
    for step in dis.get_instructions(compile(source, "cell", "exec")):
        if step.opname == "STORE_NAME":
            sets.add(step.argval)
        elif isinstance(step.argval, CodeType):  # a function, or a comprehension
            needs |= {*step.argval.co_names} - sets
        elif step.opname == "LOAD_NAME":
            needs |= {step.argval} - sets
    return needs, sets


def _find(name: str | Path, folder: str, suffix: str) -> Path:
    """Take a path that exists, or a name in one of the project's folders."""
    path = Path(name)
    path = path.resolve() if path.suffix == suffix else ROOT / folder / f"{name}{suffix}"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / folder).glob(f"*{suffix}"))) or "nothing"
        raise ValueError(f"There is no {path}; {folder}/ holds {known}.")
    return path


def _find_ours(name: str | Path) -> Path:
    """Find a notebook of this project: one from elsewhere might do anything to the reader's machine."""
    path = _find(name, "notebooks", ".ipynb").resolve()
    if path.parent != NOTEBOOKS:
        raise ValueError(f"{path} is not in {NOTEBOOKS}: read it first, and copy it there if you trust it.")
    return path


def _running_copy(folder: Path, name: str) -> Path:
    """Name the file that papermill writes to: one for each process, so that two runs do no harm."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".{name}.*.running.ipynb"):  # by runs that were killed
        if time.time() - left.stat().st_mtime > KEPT_S:
            left.unlink(missing_ok=True)
    return folder / f".{name}.{platform.node()}-{os.getpid()}.running.ipynb"


def _read_override(name: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # 2026-02-30 is a date to YAML, and none
        raise ValueError(f"Parameter {name} = {value!r:.80} is not valid YAML: put it in quotes.") from None


def _name_the_model(executed: NotebookNode, model: str) -> None:
    """Put the model into the title, so that pages of several models can be told apart."""
    for cell in executed.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            title, *rest = cell.source.split("\n")
            cell.source = "\n".join([f"{title} — {model}", *rest])
            executed.metadata["title"] = cell.source.split("\n")[0].removeprefix("# ")
            return


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workflow.run_notebook", description=__doc__.split("\n")[0])
    parser.add_argument("notebook", help="a path in notebooks/, or a name there")
    parser.add_argument("model", nargs="?", default="mini", help="a parameter file, or a name in params/")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="override")
    parser.add_argument("--figures", choices=VECTORS, help="store each figure as such a file, too")
    parser.add_argument("--timeout-s", type=int, help="longest time for one cell, in seconds")
    parser.add_argument("--in-place", action="store_true", help="refresh the outputs in notebooks/ instead")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        if given.in_place:
            path = refresh_outputs(given.notebook)
        else:
            overrides = {name: _read_override(name, value) for name, value in given.p}
            path = run_notebook(
                given.notebook, given.model, overrides, figures=given.figures, timeout_s=given.timeout_s
            )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"mmflow: {error}", file=sys.stderr)
        return 1
    print(f"mmflow: {path.parent.name}/{path.name} is done, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
