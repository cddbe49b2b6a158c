"""Render the executed notebooks of every model in outputs/ as one offline site, outputs/site/."""

import shutil
import sys
from pathlib import Path

import nbformat
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs"
SITE = OUTPUTS / "site"
PAGES = OUTPUTS / ".pages"  # what Sphinx reads: written anew each time
FAILED = ".failed.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"

START = """\
Cross-modal information flow
============================

Where, layer by layer, does a vision-language model move what it sees into the words of a question, and
from there to its answer? Each page below is a notebook as it ran: question, method, figure, checks and
findings. A finding holds for the model that its title names.

"""


def failed_copies(model: str = "*") -> list[Path]:
    """Find the copies that failed runs left."""
    return sorted(OUTPUTS.glob(f"{model}/*{FAILED}"))


def gather_pages() -> dict[str, list[str]]:
    """Copy the executed notebooks into PAGES; return model -> names of its pages, `mini` first."""
    found: dict[str, list[str]] = {}
    for notebook in sorted(
        OUTPUTS.glob("*/[0-9]*.ipynb"), key=lambda path: (path.parent.name != "mini", path)
    ):
        if not notebook.name.endswith(FAILED):
            write_page(notebook, PAGES / notebook.parent.name / notebook.name)
            found.setdefault(notebook.parent.name, []).append(notebook.stem)
    return found


def write_page(notebook: Path, page: Path) -> None:
    """Copy a notebook without its progress bars: they are widgets, and say nothing once a run is over."""
    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    page.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(content, page)


def write_galleries(models: dict[str, list[str]]) -> None:
    """Write a page for each model with a gallery of its notebooks, and the start page with all galleries."""
    start = START
    for model, names in models.items():
        failed = [file.name.removesuffix(FAILED) for file in sorted((OUTPUTS / model).glob(f"*{FAILED}"))]
        note = (
            f".. warning:: The last run failed for {', '.join(failed)}: see outputs/{model}/.\n\n"
            if failed
            else ""
        )
        pages = "".join(f"   /{model}/{name}\n" for name in names)
        gallery = f"{note}.. nbgallery::\n\n{pages}\n"
        (PAGES / model / "index.rst").write_text(
            f"{model}\n{'=' * len(model)}\n\n{gallery}", encoding="utf-8"
        )
        start += f"{model}\n{'-' * len(model)}\n\n{gallery.replace('nbgallery', 'nblinkgallery')}"
    start += ".. toctree::\n   :hidden:\n\n" + "".join(f"   {model}/index\n" for model in models)
    (PAGES / "index.rst").write_text(start, encoding="utf-8")


def main() -> int:
    """Build the site; returns the exit code."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    models = gather_pages()
    for copy in failed_copies():
        print(f"Failed: {copy}, which holds what ran and the error.", file=sys.stderr)
        print(
            f"  Go on with `make report MODEL={copy.parent.name}`; what succeeded is not run again.",
            file=sys.stderr,
        )
    if not models:
        print("There is no executed notebook in outputs/, so there is no report.", file=sys.stderr)
        return 1
    write_galleries(models)
    code = sphinx(
        ["-q", "-b", "html", "-c", str(Path(__file__).parent), "-d", f"{PAGES}/.cache", str(PAGES), str(SITE)]
    )
    if code == 0:
        print(f"The report of {', '.join(models)} lies at {SITE / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
