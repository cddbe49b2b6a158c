"""What the rows of a measurement depend on beside the parameters: samples, code, packages, the call itself.

A reader stops a sweep, changes its flows and runs it again: parts of the two must not be mixed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mmflow_utils.data.sample import Sample
from mmflow_utils.prompts.flows import Flow
from mmflow_utils.results.frames import sha256

__all__ = ["describe_measure"]

PACKAGE = Path(__file__).parents[1]
# What only stores, summarizes or shows: a change there changes no row, and costs no part.
NOT_OF_A_ROW = frozenset(
    {"__init__", "stats", "findings", "plots", "stages", "store", "parts", "miniature", "explorer", "execute"}
)


def describe_measure(measure: Callable, manifest: Mapping[str, Any], samples: Iterable[Sample]) -> dict[str, Any]:
    """Give what `depends_on` must also hold: digests of the samples, of `measure` and of our code.

    Of a sample is seen all that it holds and its picture, not where the picture lies.

    Of `measure` is seen: its code and that of functions beside it (in the same notebook), and the plain
    values that they name or hold: numbers, texts, flows, arrays, and lists of these. An object counts by its
    type alone.
    """
    home = getattr(getattr(measure, "func", measure), "__module__", None)
    return {
        "samples": _digest([_see(sample) for sample in samples]),
        "measure": _digest(_look(measure, home, [])),
        "code": _code(),
        "packages": manifest.get("made_by", {}).get("packages"),
    }


def _see(sample: Sample) -> list[Any]:
    fields = [value for name, value in vars(sample).items() if name != "image"]
    return [*fields, sha256(sample.image) if sample.image.is_file() else None]


@cache
def _code() -> str:
    files = [file.relative_to(PACKAGE) for file in sorted(PACKAGE.rglob("*.py"))]
    return sha256(*(PACKAGE / file for file in files if file.parts[0].removesuffix(".py") not in NOT_OF_A_ROW))


def _look(value: Any, home: str | None, seen: list[FunctionType]) -> Any:
    if isinstance(value, partial):
        return [_look(item, home, seen) for item in (value.func, value.args, value.keywords)]
    if isinstance(value, FunctionType):
        return _look_into(value, home, seen)
    if isinstance(value, tuple | list):
        return [_look(item, home, seen) for item in value]
    if isinstance(value, dict):
        return [[str(key), _look(item, home, seen)] for key, item in value.items()]
    return _plain(value)


def _look_into(function: FunctionType, home: str | None, seen: list[FunctionType]) -> list[Any]:
    """Describe a function by what it does and what it holds."""
    if function in seen:
        return [function.__qualname__]
    seen.append(function)
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    held += [function.__defaults__, function.__kwdefaults__]
    # One from elsewhere is known by its name: `_code` and the packages' versions look after the rest.
    does = [function.__module__, function.__qualname__]
    if function.__module__ == home:
        does, names = _read(function.__code__)
        held += [function.__globals__[name] for name in names if name in function.__globals__]
    return [does, [_look(item, home, seen) for item in held]]


def _read(code: CodeType) -> tuple[list[Any], list[str]]:
    """Give all that a piece of code does, inner functions included, and all names in it."""
    does, names = [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars], list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner, inner_names = _read(constant)
            does.append(inner)
            names += inner_names
        else:
            # A set has another order in each process.
            does.append(_plain(constant) if isinstance(constant, frozenset) else repr(constant))
    return does, names


def _plain(value: Any) -> Any:
    """Give a value as JSON can hold it, the same in every process; an object by its type."""
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Flow | Path):
        return str(value) if isinstance(value, Path) else [value.source, value.target]
    if isinstance(value, set | frozenset | range):
        return sorted(map(repr, value))
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=repr).encode()).hexdigest()
