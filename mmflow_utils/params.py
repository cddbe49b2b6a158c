"""The parameters that all notebooks share: one validated schema for YAML, papermill and hand.

A run's parameters come from the file of its model, `params/<model>.yaml`, and from what the notebook's
`parameters` cell or papermill (`-p`, `-y`, `-f`) say otherwise. All of them end here, where an unknown name, a
wrong type or a value out of range stops the run with one sentence.

>>> Params(window=9).window
9
>>> Params(windw=9)
Traceback (most recent call last):
ValueError: Unknown parameter windw = 9: did you mean window?
"""

import ast
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic import StringConstraints as Text

from mmflow_utils.data.tasks import TASKS, check_task

ROOT = Path(__file__).resolve().parents[1]


def project_path(path: str | Path) -> Path:
    """Return the absolute path that is meant: from the project's root, with `~` and `$HOME` filled in."""
    return ROOT / os.path.expanduser(os.path.expandvars(path))


def outputs_folder() -> Path:
    """Return where results go by default: outputs/, or what the environment says (a scratch disk; a test's own folder).

    It is asked each time: a kernel may be the fork of a process that began in another environment (workflow/warm.py).
    """
    return project_path(os.environ.get("MMFLOW_OUTPUTS") or "outputs")


Task = Annotated[str, AfterValidator(check_task), Field(json_schema_extra={"enum": list(TASKS)})]
_FLOAT = re.compile(r"float\('(-?inf|nan)'\)")  # as papermill writes what is no literal
QUESTION_PROMPT = "USER: <image>\n{question} \nAnswer the question using a single word or phrase. ASSISTANT:"


def _unique(tasks: list[Task]) -> list[Task]:
    if len(set(tasks)) < len(tasks):
        raise ValueError("expected each task once")
    return tasks


def _complete(prompt: str) -> str:
    if prompt.count("{question}") != 1 or prompt.count("<image>") + prompt.count("{caption}") != 1:
        raise ValueError("expected {question} once, and once <image> or, for a text-only model, {caption}")
    return prompt


def _share(shard: str) -> str:
    part, n = map(int, shard.split("/"))
    if part > n:
        raise ValueError(f"expected one of {n} shares, {n}/{n} at most")
    return shard


class Params(BaseModel):
    """Hold one run's parameters; `load_params` gathers them in a notebook.

    Paths are relative to the project's root (`ROOT`), never to the working directory; `~` and `$HOME` may be used.

    Raises:
        ValueError: One sentence that names the parameter, its value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Annotated[str, Text(pattern=r"^\w[\w.-]*$")] = Field(
        "mini", description="the name of the model and of its folder in outputs/"
    )
    checkpoint: str = Field("assets/mini", description="a folder, a name on the hub, .gguf or package (docs/models.md)")
    revision: str | None = Field(None, description="a commit or tag of the checkpoint on the hub")
    language_model: str | None = Field(
        None, description="where a LLaVA's language model comes from, if its checkpoint holds the rest alone"
    )
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
    device_map: Literal["auto"] | None = Field(None, description="auto spreads the layers over several devices")
    questions: str = Field(
        "assets/miniature/val_balanced_questions.json",
        description="GQA's file of questions, or a folder of the authors' CSV files",
    )
    scene_graphs: str | None = Field(
        "assets/miniature/val_sceneGraphs.json", description="GQA's file of scene graphs; without it, no boxes"
    )
    images: str = Field("assets/miniature/images", description="the folder of GQA's pictures")
    tasks: Annotated[list[Task], AfterValidator(_unique)] = Field(
        list(TASKS), min_length=1, description="the paper's six tasks or some of them"
    )
    n_samples: int = Field(24, ge=1, le=100_000, description="correctly answered samples in each task")
    needs_picture: bool = Field(
        False, description="keep only samples whose answer is lost without the picture; the paper keeps all"
    )
    window: int = Field(
        3, ge=1, le=1000, description="layers knocked out together, around each layer; the paper has 9 of 40"
    )
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
        "outputs", description="the folder that receives results; the default follows MMFLOW_OUTPUTS, if that is set"
    )
    shard: Annotated[str, Text(pattern=r"^[1-9]\d*/[1-9]\d*$"), AfterValidator(_share)] | None = Field(
        None, description="2/8 measures only the second of eight shares; a run without it joins them"
    )

    def __init__(self, **values: Any):
        """Validate `values`; what is missing takes its default."""
        if unknown := unknown_parameters(values, type(self).model_fields):
            raise ValueError("; ".join(unknown))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_one_sentence(error, type(self))) from None

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Params":
        """Return what a file says, with a path from the project's root; `overrides` win over it."""
        return cls(**read_yaml(path) | overrides)

    def path(self, field: str) -> Path:
        """Return the absolute path that a path parameter means: `params.path("images")`."""
        given = getattr(self, field)
        return outputs_folder() if field == given == "outputs" else project_path(given)

    @property
    def folder(self) -> Path:
        """The folder of this model's results and executed notebooks."""
        return self.path("outputs") / self.model


def load_params(namespace: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> Params:
    """Return a notebook's parameters, validated; called in the cell that follows the `parameters` cell.

    Where several set a parameter, the last counts: the model's file, the `parameters` cell, papermill's options
    (docs/parameters.md). These come in a cell of their own right after the `parameters` cell; a cell of nothing but
    `name = literal` that is put there by hand works alike. Both are read from the texts of the cells that ran, which
    IPython keeps (`In`): so no name goes unjudged, and what a later cell or an older version assigned is no parameter.

    Args:
        namespace: The notebook's `globals()`.
        extra: What this notebook has beyond the shared parameters, name -> type; the result holds them too.

    Raises:
        ValueError: One sentence that names each unknown or missing parameter, wrong type or value out of range.
    """
    own: dict[str, Any] = {name: (kind, ...) for name, kind in (extra or {}).items()}
    schema: type[Params] = create_model("Params", __base__=Params, **own)
    return schema(**complete(_given_in_cells(namespace, schema.model_fields)))


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given, over what the file of the `model` among it says.

    A ValueError where there is no file (and `checkpoint` and `prompt` are not given), or it can't be read.
    """
    values = dict(given)
    if str(values.get("model")).endswith(".yaml"):
        values = _read_shared(values.pop("model")) | values
    if "checkpoint" in values and "model" not in values:
        raise ValueError(f"Parameter checkpoint = {values['checkpoint']!r:.80} comes without model: give both.")
    model = values.setdefault("model", Params.model_fields["model"].default)
    known = {file.stem: file for file in (ROOT / "params").glob("*.yaml")}
    if not isinstance(model, str) or (model not in known and {"checkpoint", "prompt"} <= values.keys()):
        return values
    if model not in known:
        raise ValueError(
            f"Parameter model = {model!r:.80}: expected a file of params/, the path of another .yaml, or a new name "
            f"together with checkpoint and prompt: {_nearest(model, known, 'the files are')}"
        )
    return _read_shared(known[model]) | values


def _read_shared(path: str | Path) -> dict[str, Any]:
    """Read a model's file, which holds nothing of one notebook alone: the notebook's own cell would win over it."""
    values = read_yaml(path)
    if unknown := unknown_parameters(values, Params.model_fields):
        raise ValueError(f"{path}: {'; '.join(unknown)}")
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a parameter file as papermill does, without judging the values.

    Refused are a name that stands twice, of which YAML would take the last, and a reference, which can fill the memory.
    """
    path = project_path(path)
    if not path.is_file():
        known = [file.stem for file in (ROOT / "params").glob("*.yaml")]
        raise ValueError(f"There is no parameter file {path}: {_nearest(path.stem, known, 'params/ holds')}")
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
    if path.parent == ROOT / "params" and (named := values.get("model")) != path.stem:  # other commands go by the file
        raise ValueError(f"{path} gives model: {named!r:.80}: name the model as its file is named, model: {path.stem}.")
    return values


def unknown_parameters(names: Mapping[str, Any], allowed: Iterable[str]) -> list[str]:
    """Say for each name that is not `allowed` whose it is, or which one was probably meant."""
    allowed = list(allowed)
    return [
        f"Unknown parameter {name} = {names[name]!r:.60}: "
        f"{_owner(str(name)) or _nearest(str(name), allowed, 'the parameters are')}"
        for name in names
        if name not in allowed
    ]


def _owner(name: str) -> str:
    """Name the notebooks whose own parameter it is; nothing where it is none's."""
    declared = re.compile(rf'^ +"{re.escape(name)}: \w+ = ', re.M)
    owners = sorted(f.stem for f in (ROOT / "notebooks").glob("[0-9]*.ipynb") if declared.search(f.read_text("utf-8")))
    return f"it belongs to {', '.join(owners)} alone: set it in the parameters cell there, or by -p." if owners else ""


def _nearest(name: str, known: Iterable[str], what: str) -> str:
    near = get_close_matches(name, known := sorted(known), n=1)
    return f"did you mean {near[0]}?" if near else f"{what} {', '.join(known)}."


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
        said.setdefault(name, clause + _remedy(name, value, problem["type"]))
    return "; ".join(said.values())


def _remedy(name: str, value: Any, problem: str) -> str:
    """Tell how to write what YAML or papermill's `-p` took for something else."""
    if problem == "string_type" and isinstance(value, int | float):
        return f"; papermill's -p reads a number here: give the text as it stands, with -r {name} {value}"
    text = value if isinstance(value, str) and len(value) < 80 else ""
    if problem == "float_type" and re.fullmatch(r"[-+]?\d+e[-+]?\d+", text):
        return f"; YAML reads {text} as text, write the number with a point, as in 1.0e-4"
    if problem == "list_type" and text:
        return f"; papermill's -p passes this as text: write -y '{name}: [{text.strip('[] ')}]'"
    if problem in ("bool_type", "int_type", "float_type") and re.fullmatch(r"true|false|[-+]?\d+\.?\d*", text):
        return f"; it came as text, as papermill's -p passes it: write -y '{name}: {text}'"
    return ""


def _given_in_cells(namespace: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Collect what the last `parameters` cell that ran and the plain cells right after it assign.

    A literal counts as it stands in the text, since a later cell may use the name for something else. Where no
    such cell ran, as in a script, all that is `known` counts.
    """
    cells = list(namespace.get("In", []))[:-1]
    declare = [n for n, cell in enumerate(cells) if re.search(r"^model\s*:[^=\n]*=", cell, re.M)]
    if not declare:
        return {name: namespace[name] for name in known if name in namespace}
    first, *rest = cells[declare[-1] :]
    plain = list(takewhile(lambda cell: plain_assignments(_FLOAT.sub("0", cell)) is not None, rest))
    given: dict[str, Any] = {}
    for node in ast.parse("\n".join([first, *plain])).body:
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        computed = {name: namespace[name] for name in names if name in namespace}
        given |= plain_assignments(ast.unparse(node)) or computed
    passed = {name for cell in plain for name in plain_assignments(_FLOAT.sub("0", cell)) or ()}
    if "checkpoint" in passed and "model" not in passed:  # the cell's model is another one
        given.pop("model", None)
    return given


def plain_assignments(cell: str) -> dict[str, Any] | None:
    """Return what a cell of nothing but `name = literal` says; None when there is anything else in it.

    >>> plain_assignments("window: int = 9  # layers")
    {'window': 9}
    """
    values = {}
    try:
        for node in ast.parse(cell).body:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), value=ast.expr() as value):
                    values[name] = ast.literal_eval(value)
                case _:
                    return None
    except (SyntaxError, ValueError):
        return None
    return values
