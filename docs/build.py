"""Render the executed notebooks of every model, and docs/, as one offline site.

    python -m docs.build [--outputs DIR] [--docs DIR] [--no-committed]

Reads outputs/<model>/*.ipynb (or the folder that a model's file names) and docs/*.md, and writes outputs/site/. The
notebooks that come with the project show its most telling model; where that wasn't run here, they are pages, too.
"""

import argparse
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as sphinx

from docs.pages import COMMITTED, write_page
from docs.start import FAILED, write_start_page
from mmflow_utils.params import ROOT, Params, outputs_folder
from mmflow_utils.results.committed import FOLDER
from workflow.graph import SUBJECT, folder_of, names, opens_with


def folders_of_models(outputs: Path, *, own: bool) -> list[Path]:
    """List the folders that models ran in: those in `outputs` and, with `own`, those that the models' files name."""
    folders = {folder.name: folder for folder in outputs.glob("*") if folder.is_dir()}
    for file in (ROOT / "params").glob("*.yaml") if own else ():
        with suppress(ValueError, TypeError):  # what isn't valid has run nothing
            if (folder := ROOT / folder_of(file.stem)).is_dir():
                folders[file.stem] = folder
    return list(folders.values())


def executed_notebooks(folders: list[Path]) -> dict[str, list[Path]]:
    """Return what ran: model -> its notebooks in their order; the model that notebooks study by default comes first."""
    found: dict[str, list[Path]] = {}
    first = Params().model
    for folder in sorted(folders, key=lambda folder: (folder.name != first, folder.name)):
        for notebook in sorted(folder.glob("[0-9]*.ipynb")):
            if not notebook.name.endswith(FAILED) and can_be_read(notebook):
                found.setdefault(folder.name, []).append(notebook)
    return found


def can_be_read(notebook: Path) -> bool:
    """Tell whether a file holds a notebook; of one that was cut short, say what to do."""
    try:
        nbformat.read(notebook, as_version=4)
    except (ValueError, AttributeError, OSError, nbformat.ValidationError) as error:
        print(f"Failed: {notebook}, which can't be read ({str(error).splitlines()[0]:.80}).", file=sys.stderr)
        print(f"  Delete it and repeat `make report MODEL={notebook.parent.name}`.", file=sys.stderr)
        return False
    return True


def lay_out_committed(place: Path) -> list[Path]:
    """Lay out the subject's notebooks as a run would have left them, with the results that come with the project."""
    folder = place / COMMITTED / SUBJECT
    folder.mkdir(parents=True)
    for file in (FOLDER / SUBJECT).glob("*.parquet"):
        shutil.copy(file, folder)
    subjects = [ROOT / "notebooks" / f"{name}.ipynb" for name in names() if opens_with(name) == SUBJECT]
    return [Path(shutil.copy2(notebook, folder)) for notebook in subjects]


def build_site(models: dict[str, list[Path]], docs: Path, place: Path) -> int:
    """Build `place`/site from what ran, and return Sphinx's exit code."""
    pages = place / "pages"
    for model, notebooks in models.items():
        for notebook in notebooks:
            write_page(notebook, pages / model / notebook.name)
    write_start_page(pages, models, docs)
    here = str(Path(__file__).parent)
    return sphinx(["-q", "-j", "auto", "-b", "html", "-c", here, "-d", f"{pages}/.cache", str(pages), f"{place}/site"])


def put_in_place(built: Path, site: Path) -> None:
    """Let a finished site take the place of the one before, which is kept until then and goes aside in one step."""
    with suppress(FileNotFoundError):
        site.rename(built.with_name("before"))
    built.rename(site)


def main(arguments: list[str] | None = None) -> int:
    """Build the site and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m docs.build", description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", type=Path, help="the folder with the models; by default all that their files name")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder with the other pages")
    shown = "show the notebooks as they come with the project, where their model wasn't run (default)"
    parser.add_argument("--committed", action=argparse.BooleanOptionalAction, default=True, help=shown)
    given = parser.parse_args(arguments)
    outputs = (given.outputs or outputs_folder()).resolve()
    folders = folders_of_models(outputs, own=given.outputs is None)
    for copy in sorted(copy for folder in folders for copy in folder.glob(f"*{FAILED}")):
        print(f"Failed: {copy}, which holds what ran and the error.", file=sys.stderr)
        print(
            f"  Go on with `make report MODEL={copy.parent.name}`; what succeeded is not run again.",
            file=sys.stderr,
        )
    models = executed_notebooks(folders)
    if not models:
        print(f"There is no executed notebook in {outputs.name}/, so there is no report.", file=sys.stderr)
        return 1
    outputs.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that two builds at once do no harm, and what fails leaves the site of before.
    with tempfile.TemporaryDirectory(prefix=".site.", dir=outputs) as place:
        if given.committed and SUBJECT not in models:
            models[SUBJECT] = lay_out_committed(Path(place))
        code = build_site(models, given.docs, Path(place))
        if code == 0:
            put_in_place(Path(place) / "site", outputs / "site")
            print(f"The report of {', '.join(models)} lies at {outputs / 'site' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
