"""What the rows of a measurement depend on beside the parameters: the experiment's version, its samples, the call.

A reader stops a sweep, changes its flows and runs it again: parts of the two must not be mixed. And a corrected
docstring must not cost the hours of a run: an experiment's code counts by a version that is raised by hand.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

from mmflow_utils.data.sample import Sample
from mmflow_utils.results.frames import sha256

VERSIONS = {
    "ask_questions": 1,
    "answer_subwords": 1,
    "head_screen": 1,
    "head_sweep": 1,
    "keep_flows": 1,
    "knockout_sweep": 1,
    "logit_lens": 2,
    "module_knockout": 1,
    "question_semantics": 1,
    "prune_sweep": 1,
    "picture_sweep": 1,
    "patch_sweep": 1,
}
"""Raise an experiment's version when its rows change, in its own code or in what it calls. A test holds small
frames against it; `python tests/helpers/expected_frames.py` then writes those of the new version."""


def describe_call(
    measure: Callable, samples: Iterable[Sample], arguments: Mapping[str, Any], *, version: int | None = None
) -> dict[str, Any]:
    """Return what `depends_on` must also hold: the experiment and its version, the samples, the arguments.

    Of a sample is seen all that it holds and its picture, not where the picture lies. Arguments are plain values:
    numbers, texts, flows, arrays, lists and dicts of these, functions of a module, and `partial` of such functions;
    what can't be told from another by its value is a ValueError, as is an experiment that neither `VERSIONS` nor
    `version` gives a version.
    """
    name = measure.__name__
    version = VERSIONS.get(name) if version is None else version
    if version is None:
        raise ValueError(f"{name} has no version: pass version=1 along, and raise it whenever its rows would change.")
    return {
        "experiment": name,
        "version": version,
        "samples": hashlib.sha256(json.dumps([_see(sample) for sample in samples]).encode()).hexdigest(),
        "arguments": {key: _plain(key, value) for key, value in sorted(arguments.items())},
    }


def _see(sample: Sample) -> dict[str, Any]:
    """Describe a sample by what was said of it, so that a field which a later version adds changes nothing."""
    said = {f.name: value for f in fields(sample) if (value := getattr(sample, f.name)) not in (None, ())}
    said = {name: _plain(name, value) for name, value in said.items() if not isinstance(value, Path)}
    beside = {"other_image": sha256(sample.other_image)} if sample.other_image else {}
    return said | {"image": sha256(sample.image) if sample.image.is_file() else None} | beside


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON can hold it, the same in every process."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sample):
        return _see(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(name, asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, tuple | list | range):
        return [_plain(name, item) for item in value]
    if isinstance(value, partial):
        return _plain(name, [value.func, value.args, value.keywords])
    if isinstance(value, FunctionType) and "<" not in value.__qualname__ and value.__module__ != "__main__":
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(
        f"Expected numbers, texts, flows or a module's function for {name}, which tell one run from another, got "
        f"{value!r:.60}: pass plain values, or functools.partial of a function that a module defines."
    )
