"""What is taken out of an executed notebook: figures as vector files, for papers and slides, and finished widgets.

A kernel that is started with `vector_arguments` shows each figure twice, as PNG and in the vector format;
`take_vectors` moves the latter from the notebook into files.
"""

from base64 import b64decode
from collections.abc import Iterable
from pathlib import Path

from nbformat import NotebookNode

VECTORS = {"svg": "image/svg+xml", "pdf": "application/pdf"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def vector_arguments(kind: str) -> list[str]:
    """Give the kernel's command line arguments that let each figure come as `svg` or `pdf` too."""
    return [f"--InlineBackend.figure_formats={{'png', {kind!r}}}"]


def take_vectors(executed: NotebookNode, kind: str, folder: Path, name: str) -> list[Path]:
    """Move a notebook's vector figures to `<folder>/<name>-1.svg` and so on, in the order of the page.

    Args:
        executed: run in a kernel with `vector_arguments(kind)`; it keeps the PNGs alone.
        kind: `svg` or `pdf`.
        folder: made where it isn't there; earlier files of this name and kind are replaced.
        name: the notebook's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}-*.{kind}"):
        old.unlink()
    shown = [output.data for cell in executed.cells for output in cell.get("outputs", ()) if "data" in output]
    files = []
    for data in shown:
        if figure := data.pop(VECTORS[kind], None):
            files.append(folder / f"{name}-{len(files) + 1}.{kind}")
            files[-1].write_bytes(b64decode(figure) if kind == "pdf" else figure.encode())
    return files


def without_widgets(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Leave out progress bars and the explorer, which without a kernel are a line of text that means nothing."""
    return [output for output in outputs if WIDGET not in output.get("data", {})]
