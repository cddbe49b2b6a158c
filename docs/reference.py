"""Write parameters.md from the schema and the notebooks, and map.md from the files of the project.

python -m docs.reference      # or make docs
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from mmflow_utils.params import ROOT, Params

PACKAGE = ROOT / "mmflow_utils"

MADE = "<!-- Made by `python -m docs.reference`: change the source, not this page. -->"

PARAMETERS = f"""# Parameters

{MADE}

Every notebook takes the parameters of the first table, whether its `parameters` cell declares them or not. Where
several of these set one, the last counts:

1. `params/<model>.yaml`, where `model` is a name: that of the file, which its line `model` repeats. It may also be the
   path of another `.yaml`, with fields of the first table; those that it leaves out come from the file in `params/` of
   the model that it names.
2. The notebook's `parameters` cell, with any line that you add there: `n_samples = 5`.
3. papermill's `-f FILE`, `-y YAML`, `-p NAME VALUE` and `-r NAME TEXT`. papermill warns of an unknown parameter where
   the cell doesn't declare it, and sets it all the same.

```sh
.venv/bin/papermill notebooks/02_flow_to_last.ipynb out.ipynb -p model llava-1.5-7b -p n_samples 100
.venv/bin/papermill notebooks/02_flow_to_last.ipynb out.ipynb -f params/planted.yaml -y 'tasks: [ChooseAttr]'
.venv/bin/papermill notebooks/08_window_size.ipynb out.ipynb -f my.yaml -r revision 1234567 -p scene_graphs None
```

`-f` takes a file of `params/` or one of your own, which may set a single field: the model is then the one in the
notebook's cell, and what the file leaves out is that model's. So a `checkpoint` must come with its `model`, in the same
file or by the same command, or the run stops. If that `model` is a file of `params/`, its other fields hold; under a
new name it needs `prompt`, too, and what isn't set has the default below. `-p` reads a number where it can and passes
no lists: a text of digits needs `-r`, a list `-y`, and what is null in YAML is `None`.

An unknown name, a wrong type or a value out of range stops the run with one sentence. Paths begin at the project's
root; `~` and `$HOME` are filled in.

## Shared by all notebooks

| name | type | default | allowed | meaning |
|---|---|---|---|---|"""

ALONE = """
## Of one notebook alone

Declared in the notebook's `parameters` cell, and set there, by papermill or with `-p` of `workflow.run_notebook`; a
model's file in `params/` holds none. To a model that sees photographs a batch gives more than a laptop's defaults: 100
questions in each task in 07 (`n_asked`), 100 long answers in 09 (`n_long`), and OKVQA and A-OKVQA in 12.

```sh
.venv/bin/python -m workflow.run_notebook 08_window_size llava-1.5-7b -p windows '[1, 9, 15]'
```

| notebook | name | type | default | meaning |
|---|---|---|---|---|"""

MAP = f"""# Map of the package

{MADE}

The rooms of `mmflow_utils/` from the ground up, each with its files. A room imports only rooms above it in this list.

| | room | what it holds |
|---|---|---|"""

WHO = """
## Who imports whom

A row is a room, a column the room of that number. A cross: the row's room imports the column's.
All crosses lie left of the diagonal: what a room does never depends on one further down.

```text"""

BESIDE = """
## Beside the package

| | folder | what it holds |
|---|---|---|"""

# The order of the rooms: imports run only to earlier ones.
ROOMS = ("data", "params", "models", "prompts", "engine", "results", "experiments", "analysis", "plots", "explorer")
FOLDERS = ("miniature", "benchmarks", "workflow", "docs")


def parameters() -> str:
    """Describe the parameters that all notebooks share, and those of each notebook alone."""
    lines = [PARAMETERS]
    for name, field in Params.model_json_schema()["properties"].items():
        cells = (f"`{name}`", _kind(field), _code(field.get("default")), _allowed(field))
        lines.append(_row(*cells, _text(field["description"])))
    lines.append(ALONE)
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for name, kind, default, meaning in own_parameters(notebook):
            lines.append(_row(notebook.stem, f"`{name}`", kind, _code(default), _text(meaning)))
    return "\n".join([*lines, ""])


def own_parameters(notebook: Path) -> Iterator[tuple[str, str, Any, str]]:
    """Give name, type, default and comment of what a notebook declares beyond the schema."""
    cells = nbformat.read(notebook, as_version=4).cells
    (source,) = (cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    for node in ast.parse(source).body:
        if (name := node.target.id) not in Params.model_fields:
            comment = source.splitlines()[node.end_lineno - 1][node.end_col_offset :].split("  # fmt:")[0]
            kind = ast.unparse(node.annotation)
            yield name, kind, ast.literal_eval(node.value), comment.strip().removeprefix("#").strip()


def _choices(field: dict) -> list[dict]:
    """A field that may be None is a choice of schemas: give what it may be."""
    return field.get("anyOf", [field])


def _kind(field: dict) -> str:
    names = {
        "string": "text",
        "integer": "whole number",
        "boolean": "true or false",
        "array": "list",
        "null": "null",
    }
    return " or ".join(names.get(choice["type"], choice["type"]) for choice in _choices(field))


def _allowed(field: dict) -> str:
    (field,) = (choice for choice in _choices(field) if choice["type"] != "null")
    if choices := field.get("enum") or field.get("items", {}).get("enum"):
        return ", ".join(choices)
    if "const" in field:
        return field["const"]
    if "minimum" in field:
        most = field.get("maximum", field.get("exclusiveMaximum", 1) - 1)
        return f"{field['minimum']:,} to {most:,}"
    return f"matches `{field['pattern']}`" if "pattern" in field else ""


def _code(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else value
    text = text if isinstance(text, str) else json.dumps(value)
    return "`" + text.replace("\n", "\\n") + "`"


def _text(words: str) -> str:
    """Keep `<image>` from being read as a tag."""
    return words.replace("<", "\\<")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def package_map() -> str:
    """Return the page of the rooms, each with its files, of who imports whom, and of what lies beside the package."""
    rooms = [line for n, room in enumerate(ROOMS, start=1) for line in _rows(str(n), PACKAGE / room)]
    beside = [line for folder in FOLDERS for line in _rows("", ROOT / folder)]
    return "\n".join([MAP, *rooms, WHO, *_drawing(), "```", BESIDE, *beside, ""])


def _rows(number: str, room: Path) -> list[str]:
    """Return a row for a room and one for each of its files, each with the first sentence of its docstring."""
    *files, first = sorted(files_of(room), key=lambda file: file == room / "__init__.py")
    names = [file.relative_to(room.parent).with_suffix("").as_posix().removesuffix("/__init__") for file in files]
    rows = [_row("", name, _idea(file)) for name, file in zip(names, files, strict=True)]
    return [_row(number, f"**{room.name}**", _idea(first)), *rows]


def _drawing() -> list[str]:
    wide = max(map(len, ROOMS))
    lines = [f"{'':{wide + 4}}{' '.join(f'{n:2}' for n in range(1, len(ROOMS)))}"]
    for number, room in enumerate(ROOMS, start=1):
        used = {module.split(".")[1] for file in files_of(PACKAGE / room) for module in imports(file)}
        marks = " ".join(f" {'x' if other in used else '·'}" for other in ROOMS[: number - 1])
        lines.append(f"{number:2} {room:{wide}} {marks}".rstrip())
    return lines


def imports(file: Path) -> Iterator[str]:
    """Give what a file imports of the package, anywhere in it: `mmflow_utils.data.gqa`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("mmflow_utils."))
        elif isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("mmflow_utils."):
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                path = ROOT / whole.replace(".", "/")
                yield whole if path.is_dir() or path.with_suffix(".py").is_file() else node.module


def files_of(room: Path) -> list[Path]:
    """Return the Python files of a room: its folder's, in their order, or the one file that it is."""
    return sorted(room.rglob("*.py")) if room.is_dir() else [room.with_suffix(".py")]


def _idea(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).split("\n\n")[0].replace("\n", " ")


PAGES = {"parameters.md": parameters, "map.md": package_map}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (Path(__file__).parent / name).write_text(write(), encoding="utf-8")
