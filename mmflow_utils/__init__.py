"""Trace where information flows in vision-language models.

`import mmflow_utils as mm` is cheap: what it offers (`__init__.pyi` lists it) is imported when it is first
used, so a script that only draws figures never loads torch. What only one notebook needs is imported from its
room: `from mmflow_utils.prompts.flows import PARTS_TO_LAST`.

>>> import mmflow_utils as mm
>>> mm.Params().model
'mini'
"""

import gc
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lazy_loader

_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Import a name's module; the garbage collector, which finds nothing there, would take a fifth of the time."""
    is_on, had_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        return _import(name)
    finally:
        if "torch" in sys.modules and not had_torch:
            gc.freeze()  # nor look at its million lasting objects later; no tensor can be among them yet
        if is_on:
            gc.enable()


try:
    __version__ = version("mmflow-utils")
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0+unknown"
