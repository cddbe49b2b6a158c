"""Turn an executed notebook into a page of the report: its own title, what made it, its main figure."""

import ast
import html
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
from nbformat import NotebookNode

from docs.address import binder, colab, first_cell
from mmflow_utils.params import ROOT, Params, complete, plain_assignments
from mmflow_utils.results.frames import LATER, NOT_OF_THE_RESULT, list_frames, read_manifest
from workflow.cell_outputs import without_widgets

LINK = re.compile(r"\[([^\]]+)\]\((\w+\.ipynb)(?:#[^)]*)?\)")
COMMITTED = ".committed"  # in the outputs: notebooks as they come with the project, as if they had run here
MEASURES = ("measure_in_parts(", "save_frame(", "read_results(", "load_frame(")  # what a frame comes from
# In which frames of one run may differ: some show captions in place of the picture, or ask about pairs or facts.
ASKED_OTHERWISE = {"prompt", "questions", "scene_graphs", "images"}
MOST_ITEMS = 5  # of a short answer
PICTURES = {"image/svg+xml": ".svg", "image/png": ".png", "image/jpeg": ".jpg"}


def write_page(executed: Path, page: Path) -> None:
    """Write the page of a notebook that ran in outputs/<model>/, for nbsphinx to render.

    Widgets are left out: progress bars say nothing once a run is over, and the explorer needs a kernel; what
    the notebook draws for a reader without one, stays.
    """
    notebook = nbformat.read(executed, as_version=4)
    model = executed.parent.name
    notebook.metadata.pop("widgets", None)
    for cell in code_cells(notebook):
        cell.outputs = without_widgets(cell.outputs)
    if figure := main_figure(notebook):
        cell, number = figure
        cell.metadata["nbsphinx-thumbnail"] = {"output-index": number}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # links to notebooks that didn't run for this model are plain text
            ran = [name for name in LINK.findall(cell.source) if (executed.parent / name[1]).is_file()]
            cell.source = LINK.sub(lambda link, ran=ran: link[0] if link.groups() in ran else link[1], cell.source)
    first = notebook.cells[0]
    _, _, introduction = first.source.partition("\n")
    first.source = f"# {title_of(notebook, model)} — {model}"
    top = describe_run(notebook, executed) + buttons(executed.name)
    run = nbformat.v4.new_raw_cell(top, metadata={"raw_mimetype": "text/html"})
    notebook.cells[1:1] = [run, *map(nbformat.v4.new_markdown_cell, [introduction, *_opening(notebook)])]
    page.parent.mkdir(parents=True, exist_ok=True)
    _link_frames(notebook, executed.parent, page.parent)
    nbformat.write(notebook, page)


def _opening(notebook: NotebookNode) -> list[str]:
    """Put what was found in front, for a reader who wants the answer before its evidence."""
    sentence, items = short_answer(notebook)
    answer = "\n- ".join([f"**Short answer** (computed under [Findings](#Findings)). {sentence}\n", *items])
    return [html.escape(answer, quote=False)] if sentence or items else []


def _link_frames(notebook: NotebookNode, folder: Path, beside: Path) -> None:
    """Put the results that a notebook's code names beside its page, and a link to them below each figure of them."""
    files = {name: file for name, file in frames_of_run(notebook, folder).items() if file}
    files |= {file.name: file for file in folder.glob("*.csv") if file.name in strings_of(notebook)}
    for file in files.values():
        shutil.copy(file, beside)
    links = [f"[{name}]({quote(file.name)})" for name, file in files.items()]
    cells = code_cells(notebook) if links else []
    measured = (n for n, cell in enumerate(cells) if any(word in cell.source for word in MEASURES))
    for cell in cells[next(measured, 0) :]:  # before, there are pictures of a sample
        if any(PICTURES.keys() & output.get("data", {}).keys() for output in cell.outputs):
            said = "Download the frame" + "s" * (len(links) > 1) + ": " + ", ".join(links)
            notebook.cells.insert(notebook.cells.index(cell) + 1, nbformat.v4.new_markdown_cell(said))


def title_of(notebook: NotebookNode, model: str) -> str:
    """Name the notebook, without the model that a title may name already."""
    title = notebook.cells[0].source.split("\n")[0].removeprefix("# ")
    return title.removesuffix(f" — {model}")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """List the cells that ran."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cells_below(notebook: NotebookNode, heading: str) -> Iterator[NotebookNode]:
    """Go through the code cells of the sections whose heading begins with `heading`."""
    inside = False
    for cell in notebook.cells:
        if cell.cell_type == "code" and inside:
            yield cell
        elif cell.cell_type == "markdown":
            for line in cell.source.split("\n"):
                inside = line.startswith(f"## {heading}") if line.startswith("## ") else inside


def main_figure(notebook: NotebookNode) -> tuple[NotebookNode, int] | None:
    """Find the first picture below a heading "Figure": its cell, and which of the cell's outputs it is."""
    for cell in cells_below(notebook, "Figure"):
        for number, output in enumerate(cell.outputs):
            if PICTURES.keys() & output.get("data", {}).keys():
                return cell, number
    return None


def short_answer(notebook: NotebookNode) -> tuple[str, list[str]]:
    """Return what Findings prints first: its sentence, without the paper's, and its first items."""
    cells = cells_below(notebook, "Findings")
    printed = ("".join(part.text for part in cell.outputs if part.output_type == "stream") for cell in cells)
    answer = next(filter(None, printed), "").replace("->", "→")
    sentence, items = f"\n{answer}".split("\n- ")[0], re.findall(r"^- (.*(?:\n  .*)*)", answer, re.MULTILINE)
    _, here, ours = sentence.partition("\nHere")
    items[MOST_ITEMS:] = [f"and {len(items) - MOST_ITEMS} more"] * (len(items) > MOST_ITEMS)
    return " ".join((here + ours or sentence).split()), [" ".join(item.split()) for item in items]


def describe_run(notebook: NotebookNode, executed: Path) -> str:
    """Say in HTML which model a page is about, when and how it ran, and what made its results."""
    changed, is_committed = changed_parameters(notebook), executed.parent.parent.name == COMMITTED
    said = [f"Model <strong>{html.escape(executed.parent.name)}</strong>"]
    if when := notebook.metadata.get("papermill", {}).get("end_time"):
        said.append(f"ran on {datetime.fromisoformat(when):%d %B %Y at %H:%M} UTC")
    said += ["as it comes with the project"] if is_committed else []
    names = ", ".join(changed)
    said.append(f"other than the notebook's defaults: {html.escape(names)}" if names else "default parameters")
    rows = {"Parameters": changed} if changed else {}
    rows |= {f"Results: {frame}": made for frame, made in manifests(notebook, executed.parent).items()}
    tables = "".join(_table(title, values) for title, values in rows.items())
    folded = f"<details><summary>What made this page</summary>{tables}</details>" if rows else ""
    return f'<div class="mmflow-run"><p>{" · ".join(said)}</p>{folded}</div>'


def buttons(name: str) -> str:
    """Write in HTML the buttons that open a notebook in the browser, and what Colab must be told first."""
    if not (ROOT / "notebooks" / name).is_file():
        return ""
    path = f"notebooks/{name}"
    links = [
        f'<a href="{address}">Open in {host}</a>'
        for host, address in (("Binder", binder(path)), ("Colab", colab(path)))
    ]
    told = f"<details><summary>In Colab, run this first</summary><pre>{html.escape(first_cell())}</pre></details>"
    return f'<div class="mmflow-open">{" ".join(links)}{told}</div>'


def changed_parameters(notebook: NotebookNode) -> dict[str, Any]:
    """Collect the parameters that this run set otherwise than the notebook's own cell does."""
    default, run = _set_in_cells(notebook)
    return {name: value for name, value in run.items() if name not in default or default[name] != value}


def _set_in_cells(notebook: NotebookNode) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what the notebook's own parameters cell sets, and what its run has put below it."""
    cells = {
        tag: plain_assignments(cell.source) or {}
        for cell in code_cells(notebook)
        for tag in cell.metadata.get("tags", [])
        if tag in ("parameters", "injected-parameters")
    }
    return cells.get("parameters", {}), cells.get("injected-parameters", {})


def manifests(notebook: NotebookNode, folder: Path) -> dict[str, dict[str, Any]]:
    """Read what made the results that the notebook's code names: results -> field -> value."""
    none = {"no manifest": "no frame stored under this name is of a run with this notebook's parameters"}
    frames = frames_of_run(notebook, folder)
    return {name: _shown(read_manifest(file)) if file else none for name, file in frames.items()}


def frames_of_run(notebook: NotebookNode, folder: Path) -> dict[str, Path | None]:
    """Find the latest frame of each result that the notebook's code names which can be of its run; else None."""
    run = parameters_of(notebook)
    stored = {name: list_frames(folder / f"{name}.parquet") for name in results_named(notebook, folder)}
    return {name: next((file for file in files if _fits(file, run)), None) for name, files in stored.items()}


def parameters_of(notebook: NotebookNode) -> dict[str, Any]:
    """Collect the parameters of a run that its results depend on: of its cells, over those of the model's file."""
    default, run = _set_in_cells(notebook)
    values = default | run
    with suppress(ValueError):  # a model without a file
        values = complete(values)
    names = Params.model_fields.keys() - NOT_OF_THE_RESULT - ASKED_OTHERWISE
    return LATER | {name: value for name, value in values.items() if name in names}


def _fits(file: Path, run: Mapping[str, Any]) -> bool:
    """Tell whether a frame can be of a run: it is of another model, shown beside, or says nothing else of this one."""
    try:
        stored = LATER | read_manifest(file)["depends_on"]
    except ValueError:  # damaged
        return False
    if stored.get("model", run.get("model")) != run.get("model"):
        return True
    return all(stored[name] == run[name] for name in stored.keys() & run.keys())


def results_named(notebook: NotebookNode, folder: Path) -> list[str]:
    """Name the stored results that the notebook's code names."""
    named = {text.removesuffix(".parquet") for text in strings_of(notebook)}
    return sorted(named & {file.name.split(".")[0] for file in folder.glob("*.parquet")})


def strings_of(notebook: NotebookNode) -> set[str]:
    """Collect the strings in the notebook's code."""
    nodes = [node for cell in code_cells(notebook) for node in ast.walk(_parse(cell.source))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # a cell with a magic line
        return ast.Module([], [])


def _shown(manifest: dict[str, Any]) -> dict[str, Any]:
    """Take from a manifest what a reader wants to know of a run."""
    depends_on, made_by = manifest["depends_on"], manifest["made_by"]
    packages = ", ".join(f"{name} {number}" for name, number in made_by.get("packages", {}).items())
    return {
        "weights (SHA-256, or commit on the hub)": depends_on.get("weights_sha256"),
        "data (SHA-256)": depends_on.get("data_sha256"),
        "git commit (+: changed since)": made_by.get("git_commit"),
        "device, dtype": f"{made_by.get('device')}, {depends_on.get('dtype')}",
        "versions": f"Python {made_by.get('python')}, {packages}",
        "largest difference to the plain way": made_by.get("max_check_diff"),
        "results (SHA-256)": manifest.get("sha256"),
        **{name: value for name, value in depends_on.items() if not name.endswith("sha256")},
    }


def _table(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(_written(value))}</td></tr>"
        for name, value in values.items()
        if value is not None or title == "Parameters"
    )
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


def _written(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.1e}" if _tiny(value) else json.dumps(value)


def _tiny(value: Any) -> bool:
    return isinstance(value, float) and 0 < abs(value) < 1e-3
