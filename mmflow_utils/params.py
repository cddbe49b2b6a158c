"""The parameters that all notebooks share: one validated schema for YAML, papermill and hand.

A run's parameters come from the notebook's `parameters` cell, a file in `params/` (`-f`) and single
overrides (`-p`). All of them end here, where an unknown name, a wrong type or a value out of range
stops the run with one sentence.

>>> Params(window=9).window
9
>>> Params(windw=9)
Traceback (most recent call last):
ValueError: Unknown parameter windw = 9: did you mean window?
"""

import ast
import os
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic import StringConstraints as Text

from mmflow_utils.data.tasks import TASKS, check_task

__all__ = ["OUTPUTS", "ROOT", "Params", "unknown_parameters"]

ROOT = Path(__file__).resolve().parents[1]
# Where results go by default: outputs/, or what the environment says (a scratch disk; a test's own folder).
OUTPUTS = ROOT / os.environ.get("MMFLOW_OUTPUTS", "outputs")

Task = Annotated[str, AfterValidator(check_task)]
QUESTION_PROMPT = "USER: <image>\n{question} \nAnswer the question using a single word or phrase. ASSISTANT:"


def _unique(tasks: list[Task]) -> list[Task]:
    if len(set(tasks)) < len(tasks):
        raise ValueError("expected each task once")
    return tasks


def _complete(prompt: str) -> str:
    if prompt.count("{question}") != 1 or prompt.count("<image>") + prompt.count("{caption}") != 1:
        raise ValueError("expected {question} once, and once <image> or, for a text-only model, {caption}")
    return prompt


class Params(BaseModel):
    """Hold one run's parameters; every notebook declares each field in its `parameters` cell.

    Paths are relative to the project's root (`ROOT`), never to the working directory.

    Raises:
        ValueError: One sentence that names the parameter, its value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Annotated[str, Text(pattern=r"^\w[\w.-]*$")] = Field(
        "mini", description="the name of the model and of its folder in outputs/"
    )
    checkpoint: str = Field("assets/mini", description="a folder with the weights, or a name on the Hugging Face hub")
    revision: str | None = Field(None, description="a commit or tag of the checkpoint on the hub")
    prompt: Annotated[str, AfterValidator(_complete)] = Field(
        QUESTION_PROMPT, description="the model's own template, with {question} and <image> or {caption}"
    )
    do_pad: bool = Field(True, description="pad pictures to a square, as LLaVA-1.5 was trained")
    dtype: Literal["float32", "bfloat16", "float16", "int8", "nf4"] = Field(
        "float32", description="of weights and activations; int8 and nf4 quantize the decoder's weights"
    )
    device: Annotated[str, Text(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        "auto", description="auto, cpu, mps, cuda or cuda:N"
    )
    device_map: str | None = Field(None, description="auto spreads the layers over several devices")
    questions: str = Field(
        "assets/miniature/val_balanced_questions.json",
        description="GQA's file of questions, or a folder of the authors' CSV files",
    )
    scene_graphs: str = Field("assets/miniature/val_sceneGraphs.json", description="GQA's file of scene graphs")
    images: str = Field("assets/miniature/images", description="the folder of GQA's pictures")
    tasks: Annotated[list[Task], AfterValidator(_unique)] = Field(
        list(TASKS), min_length=1, description="the paper's six tasks or some of them"
    )
    n_samples: int = Field(24, ge=1, le=100_000, description="correctly answered samples in each task")
    window: int = Field(3, ge=1, le=1000, description="layers knocked out together, around each layer")
    intervention: Literal["mask", "zero_value", "mean_value"] = Field(
        "mask", description="what is done at a flow's edges: masked, or their values zeroed or averaged"
    )
    method: Literal["sweep", "reference"] = Field("sweep", description="the fast way, or the plain slow one")
    protocol: Literal["corrected", "paper"] = Field(
        "corrected", description="paper keeps what we hold for slips of the paper's code"
    )
    n_boot: int = Field(1000, ge=100, le=1_000_000, description="bootstrap resamples for each interval")
    seed: int = Field(0, ge=0, lt=2**32, description="of the sampling and the bootstrap")
    outputs: str = Field(
        "outputs",
        description="the folder that receives results; the default follows MMFLOW_OUTPUTS, if that is set",
    )
    shard: Annotated[str, Text(pattern=r"^[1-9]\d*/[1-9]\d*$")] | None = Field(
        None, description="2/8 measures only the second of eight shares; a run without it joins them"
    )

    def __init__(self, **values: Any):
        """Validate `values`; what is missing takes its default."""
        unknown = unknown_parameters(values, type(self).model_fields)
        if unknown:
            raise ValueError("; ".join(unknown))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_one_sentence(error, type(self))) from None

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Params":
        """Read a file of `params/`; `overrides` win over what it says."""
        return cls(**read_yaml(path) | overrides)

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> "Params":
        """Validate a notebook's parameters, in the cell that follows the `parameters` cell.

        The `parameters` cell declares every field as `name: type = literal  # meaning`; those that
        may be None as `name: str = None`, since papermill can't read a union, and would warn of it.
        `extra` declares what this notebook has beyond the shared parameters, name -> type, and the
        result holds them too: `params = mm.Params.from_notebook(globals(), {"windows": list[int]})`.

        papermill sets names that nobody declared with no more than a warning. It does so in a cell
        of its own, right after the `parameters` cell, and IPython keeps the text of the cells that
        ran (`In`). So the cells of nothing but assignments that ran just before this one are
        looked through for names that are not parameters.
        """
        schema = create_model(cls.__name__, __base__=cls, **{name: (kind, ...) for name, kind in (extra or {}).items()})
        assigned = _assigned_before_this_cell(list(namespace.get("In", [])))
        unknown = unknown_parameters(assigned, schema.model_fields)
        if unknown:
            raise ValueError("; ".join(unknown))
        return schema(**{name: namespace[name] for name in schema.model_fields if name in namespace})

    def path(self, field: str) -> Path:
        """Give the absolute path that a path parameter means: `params.path("images")`."""
        return OUTPUTS if field == "outputs" and self.outputs == "outputs" else ROOT / getattr(self, field)

    @property
    def folder(self) -> Path:
        """The folder of this model's results and executed notebooks."""
        return self.path("outputs") / self.model


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a parameter file as papermill does, without judging the values.

    Raises:
        ValueError: A file that is missing, no YAML, or not of the form name: value; a name that stands twice,
            of which YAML would take the last, or a reference, which can stand for more than memory holds.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "params").glob("*.yaml")))
        raise ValueError(f"There is no parameter file {path}; params/ holds {known}.")
    try:
        text = path.read_text(encoding="utf-8")
        values, lines = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
        refers = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:  # !!bool x
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if refers or not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        held = "references (*)" if refers else f"{values!r:.60}"
        raise ValueError(f"{path} should hold lines of the form name: value, but holds {held}.")
    names = [name.value for name, _ in lines.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} gives {', '.join(twice)} more than once: keep one line for each parameter.")
    return values


def unknown_parameters(names: Mapping[str, Any], allowed: Iterable[str]) -> list[str]:
    """Say for each name that is not `allowed` which one was probably meant."""
    allowed = list(allowed)
    said = []
    for name in (name for name in names if name not in allowed):
        near = get_close_matches(str(name), allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the parameters are {', '.join(allowed)}."
        said.append(f"Unknown parameter {name} = {names[name]!r:.60}: {hint}")
    return said


def _one_sentence(error: ValidationError, schema: type[Params]) -> str:
    """Turn pydantic's report into one clause for each wrong parameter."""
    said = {}
    for problem in error.errors():
        name, value = str(problem["loc"][0]), problem["input"]
        if problem["type"] == "missing":
            said[name] = f"Parameter {name} is missing: give it a value in the parameters cell"
            continue
        message = problem["msg"].removeprefix("Value error, ")
        message = message.replace("Input should be", "expected").replace("String should", "should")
        inside = f" (in {'.'.join(map(str, problem['loc']))})" if len(problem["loc"]) > 1 else ""
        hint = schema.model_fields[name].description
        clause = f"Parameter {name} = {value!r:.80}{inside}: {message}" + (f" ({hint})" if hint else "")
        if isinstance(value, str) and "valid number" in message and "e" in value:
            clause += f"; YAML reads {value} as text, write the number with a point, as in 1.0e-4"
        said.setdefault(name, clause)
    return "; ".join(said.values())


def _assigned_before_this_cell(cells: list[str]) -> dict[str, Any]:
    """Collect name -> value from the cells of plain assignments that ran just before the last one."""
    found: dict[str, Any] = {}
    for cell in reversed(cells[:-1]):
        values = plain_assignments(cell)
        if values is None:
            break
        found = values | found
    return found


def plain_assignments(cell: str) -> dict[str, Any] | None:
    """Read a cell of nothing but `name = literal`; None when there is anything else in it.

    >>> plain_assignments("window: int = 9  # layers")
    {'window': 9}
    """
    values = {}
    try:
        for node in ast.parse(cell).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(target, ast.Name):
                return None
            values[target.id] = ast.literal_eval(node.value) if node.value else None
    except (SyntaxError, ValueError):
        return None
    return values
