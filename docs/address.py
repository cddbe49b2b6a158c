"""The repository's address, as pyproject.toml alone states it, and what opens its notebooks in a browser.

binder("notebooks/00_tour.ipynb"), colab("notebooks/00_tour.ipynb")
"""

import tomllib
from urllib.parse import quote

from mmflow_utils.params import ROOT

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
NAME = REPOSITORY.removeprefix("https://github.com/")  # owner/name
BRANCH = "main"


def binder(path: str) -> str:
    """Return the address that opens a file of the repository in JupyterLab on mybinder.org."""
    return f"https://mybinder.org/v2/gh/{NAME}/{BRANCH}?labpath={quote(path, safe='')}"


def colab(path: str) -> str:
    """Return the address that opens a notebook of the repository in Google Colab."""
    return f"https://colab.research.google.com/github/{NAME}/blob/{BRANCH}/{path}"


def first_cell() -> str:
    """Return what Colab has to be told first: it opens a notebook alone, without the repository that it belongs to.

    The package without its extra for notebooks, which would replace the IPython and the kernel that Colab itself runs.
    """
    folder = NAME.rpartition("/")[2]
    return f"!git clone -q --depth 1 {REPOSITORY}\n%cd {folder}\n%pip install -q -e . pooch psutil"
