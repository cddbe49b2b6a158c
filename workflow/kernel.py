"""The kernel that runs notebooks: this environment's interpreter, which keeps its caches in the project."""

import os
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

from mmflow_utils.params import ROOT

# Each has the settings and caches of a person, which a batch must not depend on: the home may be missing or read-only.
IN_THE_PROJECT = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")


class OwnKernel(AsyncKernelManager):
    """Start `python3` with this interpreter, whatever kernels are installed elsewhere under that name."""

    @default("kernel_spec_manager")
    def _look_here(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[str(ROOT / "workflow" / "jupyter" / "kernels")])

    @default("transport_encryption")
    def _without_a_notice(self) -> str:
        return "auto"  # else every start prints one about TCP


def keep_caches_here() -> None:
    """Let Jupyter, IPython and matplotlib keep what they keep in `.cache/`, unless the environment names a place."""
    os.environ["IPYTHONDIR"] = str(ROOT / ".cache" / "ipythondir")  # startup files elsewhere would run in notebooks
    for name in IN_THE_PROJECT:
        os.environ.setdefault(name, str(ROOT / ".cache" / name.lower()))
    home = Path(os.path.expanduser("~/.cache"))
    if not os.access(next(path for path in (home, *home.parents) if path.is_dir()), os.W_OK):
        os.environ.setdefault("XDG_CACHE_HOME", str(ROOT / ".cache"))  # weights from the hub among others
