"""Trace where information flows in vision-language models.

`import mmflow_utils as mm` is cheap: a public name is imported when it is first used, so a script
that only draws figures never loads torch.

>>> import mmflow_utils as mm
>>> mm.Params().model
'mini'
"""

import ast
import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

# From the ground up: a module imports only from modules to its left (tests/test_environment.py).
# fmt: off
MODULES = (
    "params", "positions", "flows", "samples", "stats", "findings", "plots", "store", "download", "stages",
    "parts", "models", "encode", "patches", "sinks", "reference", "sweep", "pruning", "knockout", "lens",
    "modules", "subwords", "curation", "miniature", "explorer", "execute",
)
# fmt: on


@cache
def _exports() -> dict[str, str]:
    """Map each public name to the module whose `__all__` lists it, without importing the module."""
    found = {}
    for module in MODULES:
        here = Path(__file__).parent / module
        file = here / "__init__.py" if here.is_dir() else here.with_suffix(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= dict.fromkeys(ast.literal_eval(node.value), module)
    return found


def __getattr__(name: str):
    if name in _exports():
        return getattr(importlib.import_module(f"{__name__}.{_exports()[name]}"), name)
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_exports(), *MODULES})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing a submodule binds it here; where it shares its name with a public function
        # (encode.encode), the function is meant, whatever was imported first.
        if isinstance(value, ModuleType) and name in _exports():
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
