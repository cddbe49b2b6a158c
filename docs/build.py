"""Render the executed notebooks of every model, and docs/, as one offline site.

    python -m docs.build [--outputs DIR] [--docs DIR] [--no-committed]

Reads outputs/<model>/*.ipynb and docs/*.md, and writes outputs/site/. The notebooks that come with the project show its
most telling model; where that wasn't run here, they are pages, too.
"""

import argparse
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from docs.pages import COMMITTED, write_page
from docs.start import FAILED, write_start_page
from mmflow_utils.params import ROOT, Params, outputs_folder
from mmflow_utils.results.committed import FOLDER
from workflow.graph import SUBJECT, names, opens_with


def executed_notebooks(outputs: Path) -> dict[str, list[Path]]:
    """Return what ran: model -> its notebooks in their order; the model that notebooks study by default comes first."""
    found: dict[str, list[Path]] = {}
    first = Params().model
    for notebook in sorted(outputs.glob("*/[0-9]*.ipynb"), key=lambda path: (path.parent.name != first, path)):
        if not notebook.name.endswith(FAILED):
            found.setdefault(notebook.parent.name, []).append(notebook)
    return found


def lay_out_committed(outputs: Path) -> list[Path]:
    """Lay out the subject's notebooks as a run would have left them, with the results that come with the project."""
    folder = outputs / COMMITTED / SUBJECT
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in (FOLDER / SUBJECT).glob("*.parquet"):
        shutil.copy(file, folder)
    subjects = [ROOT / "notebooks" / f"{name}.ipynb" for name in names() if opens_with(name) == SUBJECT]
    return [Path(shutil.copy2(notebook, folder)) for notebook in subjects]


def main(arguments: list[str] | None = None) -> int:
    """Build the site and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.build", description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", type=Path, default=outputs_folder(), help="the folder with the models")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder with the other pages")
    shown = "show the notebooks as they come with the project, where their model wasn't run (default)"
    parser.add_argument("--committed", action=argparse.BooleanOptionalAction, default=True, help=shown)
    given = parser.parse_args(arguments)
    outputs = given.outputs.resolve()
    pages, site = outputs / ".pages", outputs / "site"  # what Sphinx reads and writes: each time anew
    for folder in (pages, site):
        shutil.rmtree(folder, ignore_errors=True)
    for copy in sorted(outputs.glob(f"*/*{FAILED}")):
        print(f"Failed: {copy}, which holds what ran and the error.", file=sys.stderr)
        print(
            f"  Go on with `make report MODEL={copy.parent.name}`; what succeeded is not run again.",
            file=sys.stderr,
        )
    models = executed_notebooks(outputs)
    if not models:
        print(f"There is no executed notebook in {outputs.name}/, so there is no report.", file=sys.stderr)
        return 1
    if given.committed and SUBJECT not in models:
        models[SUBJECT] = lay_out_committed(outputs)
    for model, notebooks in models.items():
        for notebook in notebooks:
            write_page(notebook, pages / model / notebook.name)
    write_start_page(pages, models, given.docs)
    here = str(Path(__file__).parent)
    code = sphinx(["-q", "-j", "auto", "-b", "html", "-c", here, "-d", f"{pages}/.cache", str(pages), str(site)])
    if code == 0:
        print(f"The report of {', '.join(models)} lies at {site / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
