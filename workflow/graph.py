"""The one description of the notebooks' graph: who reads whom, for which models each is, what is measured in parts.

Makefile, Snakefile, the report and the tests ask here. Notebooks are found by their names, so a new one is part of
the batch at once. What is said of a model follows from its file in `params/`, never from its name.

    python -m workflow.graph                    # mini's notebooks, each after those it reads
    python -m workflow.graph planted            # those of another model, and why others are left out
    python -m workflow.graph mini --stages      # a line for each set that can run at once
    python -m workflow.graph --all              # every notebook, as it opens
"""

import argparse
import ast
import json
import os
import sys
from collections.abc import Iterable
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]

SAMPLES = "01"  # curates the samples that the others read
UNIMODAL = "11"  # sets a multimodal model beside its language model
FACTUAL = "12"  # asks questions without options
COMPARISON = "14"  # sets all models side by side
ORIGINS = "18"  # sets models of this project side by side, by how they came about
TRAINING = "9"  # from 90 on: how a model of this project was trained
AROUND = "91"  # around a language model that was there before
# The model that notebooks which show a finding open with, chosen in 18 by its rule; the others open with mini.
SUBJECT = "llava-smollm2"
OF_SUBJECT = ("00", "02", "03", "04", "05", "06", "08", "10", "12", "13", "14", "17")
# Whose results a notebook reads, beside the samples.
RESULTS = {
    UNIMODAL: ("02", "03"),
    FACTUAL: ("02", "03"),
    COMPARISON: ("02", "03", "04", "05", "06", "07", "16", "17"),
}
# What notebooks are given for a model that sees photographs: the facts that 12 asks for, where `make data` puts them
# (its own cell has drawn ones), and as many answers as it takes to show that nothing differs by 5 points.
FOR_PHOTOGRAPHS: dict[str, dict[str, Any]] = {
    "07": {"n_asked": 100},
    "09": {"n_long": 100},
    FACTUAL: {
        "okvqa_questions": "data/okvqa/OpenEnded_mscoco_val2014_questions.json",
        "okvqa_annotations": "data/okvqa/mscoco_val2014_annotations.json",
        "aokvqa_questions": "data/aokvqa/aokvqa_v1p0_val.json",
        "coco_images": [
            "data/coco/val2014/COCO_{data_subtype}_{image_id:012d}.jpg",
            "data/coco/val2017/{image_id:012d}.jpg",
        ],
    },
}
PARTS = "_in_parts("  # ends the name of what a notebook calls that measures in parts
SHOWN = ("02", "03", COMPARISON, "17")  # whose main figures the report opens with


def names() -> list[str]:
    """Name all notebooks, in the order of their numbers."""
    return sorted(file.stem for file in (ROOT / "notebooks").glob("[0-9]*.ipynb"))


def in_parts(name: str) -> bool:
    """Tell whether a notebook measures in parts, so that several runs can share its samples."""
    return PARTS in _text(name)


def reads(name: str) -> list[str]:
    """Name the notebooks whose results a notebook reads."""
    numbers = RESULTS.get(name[:2], ())
    if "load_samples(" in _text(name) and not name.startswith(SAMPLES):
        numbers = (SAMPLES, *numbers)
    return [other for other in names() if other.startswith(tuple(numbers))] if numbers else []


def stages(some: list[str]) -> list[list[str]]:
    """Put notebooks in sets, one after the other: those of a set can run at once, and read only earlier ones."""
    sorter = TopologicalSorter({name: [other for other in reads(name) if other in some] for name in some})
    sorter.prepare()
    sets = []
    while ready := sorted(sorter.get_ready()):
        sets.append(ready)
        sorter.done(*ready)
    return sets


def notebooks_of(model: str) -> list[str]:
    """Name the notebooks of a model's batch, each after those that it reads.

    Raises:
        ValueError: There is no such file in `params/`, or it holds no parameters.
    """
    left = left_out(model)
    return [name for stage in stages([name for name in names() if name not in left]) for name in stage]


def left_out(model: str) -> dict[str, str]:
    """Say of each notebook that is not in a model's batch why it isn't.

    Raises:
        ValueError: There is no such file in `params/`, or it holds no parameters.
    """
    params = read_params(model)
    reasons = {name: _why_not(name, model, params) for name in names()}
    return {name: why for name, why in reasons.items() if why}


def describe_left_out(model: str, but: Iterable[str] = ()) -> list[str]:
    """Say in a sentence for each reason which notebooks are not in a model's batch; `but` are passed over."""
    left = {name: why for name, why in left_out(model).items() if name not in but}
    return [
        f"Not run for {model}: {', '.join(name for name in left if left[name] == why)}, since {why}."
        for why in dict.fromkeys(left.values())
    ]


def _why_not(name: str, model: str, params: dict) -> str:
    """Give the reason why a model can't be asked what a notebook asks; nothing where it can."""
    reads_text = "{caption}" in params.get("prompt", "")
    if reads_text and not name.startswith((SAMPLES, UNIMODAL)):
        return "it reads text alone, and there is no picture to follow"
    if name.startswith(UNIMODAL):
        pairs = own_parameter(name, "llms")
        if model not in (pairs.values() if reads_text else pairs):
            return "the notebook's llms pair it with no other model"
        if not reads_text and not checkpoint_of(read_params(pairs[model])).is_dir():
            return f"the weights of {pairs[model]} lie in no folder here; that model's own batch has the notebook"
    if name.startswith(FACTUAL) and all(task.startswith("Choose") for task in params.get("tasks", [""])):
        return "all its tasks offer options to choose from, and factual questions offer none"
    if missing := [path for path in _paths(given_by_batch(name, params)) if not (ROOT / path).exists()]:
        return f'there is no {missing[0]}: make data DATA="okvqa aokvqa", or run it by hand (docs/data.md)'
    if name.startswith(ORIGINS) and model not in own_parameter(name, "models"):
        return "the notebook's models don't list it"
    if name.startswith(TRAINING):
        record = checkpoint_of(params) / "training.json"
        if not record.is_file():
            return "there is no training.json beside its weights, so it wasn't trained here"
        if ("shown" in json.loads(record.read_text(encoding="utf-8"))["recipe"]) != name.startswith(AROUND):
            return "it was trained by the recipe that the other notebook of training tells"
    return ""


def given_by_batch(name: str, params: dict) -> dict[str, Any]:
    """Return what a batch sets of a notebook's own parameters, which suit a model that sees drawings."""
    is_drawn = str(params.get("questions", "assets/")).startswith("assets/")
    return {} if is_drawn else FOR_PHOTOGRAPHS.get(name[:2], {})


def _paths(given: dict[str, Any]) -> list[str]:
    """Return the files, and the folders of pictures, that parameters name."""
    files = [value for value in given.values() if isinstance(value, str)]
    return files + [pattern.rpartition("/")[0] for pattern in given.get("coco_images", [])]


@cache
def read_params(model: str) -> dict:
    """Read a model's file in `params/`, without judging the values.

    Raises:
        ValueError: There is no such file, it holds no parameters, or those of a model of another name.
    """
    file = ROOT / "params" / f"{model}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise ValueError(f"There is no params/{model}.yaml; the models are {known}.")
    try:
        params = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"params/{model}.yaml is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise ValueError(f"params/{model}.yaml should hold lines of the form name: value, but holds {params!r:.60}.")
    if (named := params.get("model")) != model:
        said = f"gives model: {named!r:.80}: name the model as its file is named, model: {model}."
        raise ValueError(f"params/{model}.yaml {said}")
    return params


def checkpoint_of(params: dict) -> Path:
    """Name the folder of a model's weights; there is none where they come from the hub."""
    return ROOT / _expand(params.get("checkpoint", ""))


def folder_of(model: str) -> Path:
    """Name the folder of a model's executed notebooks and results, relative to the project where it is in it."""
    outputs = read_params(model).get("outputs", "outputs")
    return Path(_expand(os.environ.get("MMFLOW_OUTPUTS") or outputs if outputs == "outputs" else outputs)) / model


def _expand(path: str) -> str:
    """Fill in `~` and `$HOME`, as the parameters' own paths are."""
    return os.path.expanduser(os.path.expandvars(path))


@cache
def _text(name: str) -> str:
    return (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")


def opens_with(name: str) -> str:
    """Name the model that a notebook studies when it is opened by hand."""
    return own_parameter(name, "model")


def own_parameter(name: str, parameter: str) -> Any:
    """Read what a notebook's `parameters` cell sets a parameter to; an empty dict where it isn't there."""
    for cell in json.loads(_text(name))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.AnnAssign) and node.target.id == parameter:
                    return ast.literal_eval(node.value)
    return {}


def main(arguments: list[str] | None = None) -> int:
    """List a model's notebooks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workflow.graph", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="mini", help="the name of a file in params/")
    parser.add_argument("--stages", action="store_true", help="a line for each set that can run at once")
    parser.add_argument("--all", action="store_true", help="every notebook, whatever model it opens with")
    given = parser.parse_args(arguments)
    try:
        batch, left = notebooks_of(given.model), describe_left_out(given.model)
        if given.all:
            batch, left = [name for stage in stages(names()) for name in stage], []
    except ValueError as error:
        print(f"mmflow: {error}", file=sys.stderr)
        return 1
    for stage in stages(batch) if given.stages else [[name] for name in batch]:
        print(*(f"notebooks/{name}.ipynb" for name in stage))
    for sentence in left:
        print(f"mmflow: {sentence}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
