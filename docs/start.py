"""Write the report's start page, a page for each model, and the pages of docs/."""

import base64
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import nbformat
import pypandoc

from docs.pages import COMMITTED, PICTURES, main_figure, short_answer, title_of
from mmflow_utils.params import ROOT
from workflow.graph import COMPARISON, SHOWN, SUBJECT, describe_left_out, read_params

FAILED = ".failed.ipynb"

HOLDS = """\
Each page is a notebook as it ran: question, method, figure, checks and findings. The findings are computed
from the page's data, and hold for the model that its title names."""


def write_start_page(pages: Path, models: dict[str, list[Path]], docs: Path) -> None:
    """Write pages/index.rst and what it leads to; `models` maps a model to its executed notebooks."""
    first, *others = models
    welcome = pypandoc.convert_text(welcome_of(ROOT / "README.md"), "rst", format="gfm")
    parts = [heading("Cross-modal information flow", "="), welcome, HOLDS, caution_about(models)]
    for model in dict.fromkeys((SUBJECT, first)):
        notebooks = models.get(model, [])
        figures = [show_figure(pages, notebook) for notebook in notebooks if notebook.name.startswith(SHOWN)]
        if any(figures):
            parts += [heading(f"What was found about {model}"), where_from(notebooks), *figures]
    parts += [heading("The path to read"), "Begin with the tour, then in the order of the numbers."]
    parts += section(models[first], "nblinkgallery")
    if compared := [path for paths in models.values() for path in paths if path.stem.startswith(COMPARISON)]:
        newest = max(compared, key=lambda path: path.stat().st_mtime)
        said = "Where each stage begins and ends in every model, and which of the paper's claims hold"
        parts += [heading("The models side by side"), f"{said}: :doc:`{address(newest)}`."]
    for model in others:
        parts += [heading(model), *section(models[model], "nblinkgallery")]
    for model, notebooks in models.items():
        write(pages / model / "index.rst", [heading(model, "="), *section(notebooks, "nbgallery")])
    contents = [f"{model}/index" for model in models]
    if names := write_docs(pages, docs):
        parts += [heading("For reference"), "\n".join(f"- :doc:`docs/{name}`" for name in names)]
        contents.append("docs/index")
    write(pages / "index.rst", [*parts, listing("toctree", contents, ":hidden:")])


def section(notebooks: list[Path], directive: str) -> list[str]:
    """List a model's notebooks: where they come from, which failed, their thumbnails, which it has not."""
    return [where_from(notebooks), failures(notebooks), gallery(notebooks, directive), absent(notebooks)]


def where_from(notebooks: list[Path]) -> str:
    """Say of pages that come with the project that they do."""
    folder = notebooks[0].parent
    said = f"These pages come with the project; ``make report MODEL={folder.name}`` makes them anew."
    return said if folder.parent.name == COMMITTED else ""


def welcome_of(readme: Path) -> str:
    """Take the README's words between its title and its first picture."""
    text = readme.read_text(encoding="utf-8")
    return text.partition("\n")[2].partition("\n![")[0].strip()


def show_figure(pages: Path, notebook: Path) -> str:
    """Show a notebook's main figure, linked to its page, above its short answer."""
    content = nbformat.read(notebook, as_version=4)
    found, (said, items) = main_figure(content), short_answer(content)
    if not found or not (said or items):
        return ""
    cell, number = found
    kind, suffix = next((kind, end) for kind, end in PICTURES.items() if kind in cell.outputs[number].data)
    picture, model = cell.outputs[number].data[kind], notebook.parent.name
    name = title_of(content, model)
    file = pages / "figures" / f"{model}_{notebook.stem}{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture.encode() if suffix == ".svg" else base64.b64decode(picture))
    listed = "".join(f"   - {plain(item)}\n" for item in items)
    return (
        f".. figure:: figures/{file.name}\n   :target: {model}/{notebook.stem}.html\n"
        f"   :alt: Main figure of {name}, {model}\n\n"
        f"   :doc:`{plain(name)} <{address(notebook)}>`: {plain(said)}\n\n{listed}"
    )


def write_docs(pages: Path, docs: Path) -> list[str]:
    """Convert docs/*.md to pages, and name them."""
    names = sorted(file.stem for file in docs.glob("*.md"))
    for name in names:
        text = pypandoc.convert_file(docs / f"{name}.md", "rst", format="gfm")
        write(pages / "docs" / f"{name}.rst", [text])
    if names:
        write(pages / "docs" / "index.rst", [heading("For reference", "="), listing("toctree", names)])
    return names


def failures(notebooks: list[Path]) -> str:
    """Warn of the notebooks of a model whose last run failed."""
    folder = notebooks[0].parent
    failed = [file.name.removesuffix(FAILED) for file in sorted(folder.glob(f"*{FAILED}"))]
    said = f"The last run failed for {', '.join(failed)}: the half-run copies lie in outputs/{folder.name}/."
    return f".. warning:: {said}\n" if failed else ""


def absent(notebooks: list[Path]) -> str:
    """Say which notebooks a model can't be asked, and why; nothing of a model without a file in params/."""
    try:
        said = describe_left_out(notebooks[0].parent.name, but=[notebook.stem for notebook in notebooks])
    except ValueError:
        return ""
    return "\n\n".join(map(plain, said))


def caution_about(models: Iterable[str]) -> str:
    """Warn of the models that are asked about drawn pictures, which come with this project."""
    drawn = []
    for model in models:
        with suppress(ValueError):  # a model without a file in params/
            if read_params(model).get("questions", "").startswith("assets/"):
                drawn.append(f"``{model}``")
    said = (
        f"What is found about {', '.join(drawn)} is no finding about the paper's models: the pictures there are drawn."
    )
    return said if drawn else ""


def gallery(notebooks: list[Path], directive: str) -> str:
    """List notebooks with their thumbnails, by titles without the model: all are of one."""
    titles = [title_of(nbformat.read(notebook, as_version=4), notebook.parent.name) for notebook in notebooks]
    return listing(directive, [f"{title} <{address(nb)}>" for title, nb in zip(titles, notebooks, strict=True)])


def address(notebook: Path) -> str:
    """Name a notebook's page."""
    return f"/{notebook.parent.name}/{notebook.stem}"


def listing(directive: str, names: list[str], *options: str) -> str:
    """Write a directive whose content is a list of pages."""
    return "\n".join([f".. {directive}::", *(f"   {o}" for o in options), "", *(f"   {n}" for n in names), ""])


def heading(text: str, under: str = "-") -> str:
    """Write a heading."""
    return f"{text}\n{under * len(text)}\n"


def plain(text: str) -> str:
    """Keep a notebook's words from being read as markup."""
    return re.sub(r"([\\`*_|<>:])", r"\\\1", text)


def write(file: Path, parts: list[str]) -> None:
    """Write a page from its parts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(part for part in parts if part), encoding="utf-8")
