"""Run what a notebook makes of its frames, without a model: the cells behind the measurement, on a given frame."""

import ast
import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import nbformat
import numpy as np
import pandas as pd

import mmflow_utils as mm
from mmflow_utils import params as parameters
from mmflow_utils.analysis import answers, claims, collect, flow_stages, stats  # noqa: F401 (before they are patched)
from mmflow_utils.experiments import patching
from mmflow_utils.params import ROOT, read_yaml
from mmflow_utils.plots import maps
from mmflow_utils.prompts import other_pictures
from mmflow_utils.results.record import Result

FRAMES = ROOT / "tests" / "analysis" / "frames"
MEASURES = ("measure_in_parts(", "read_results(")
# Notebooks that store one frame of several sweeps: the cell that stores it, and the frame's name.
STORED = {
    "08_window_size": ("mm.save_frame(frame", "window_size"),
    "09_last_subword": ("mm.save_frame(frame", "last_subword"),
}
# Models whose frames are stored here, and one that stands for those around SmolLM2, with the frames of mini.
GIVEN = {"18_where_routes_come_from": {"models": ["mini", "mini-next", "planted", "llava-smollm2"]}}
ASKED = {"11_unimodal_llm": "unimodal_accuracy", "12_factual_tasks": "factual_accuracy"}
SUMMARIES = (
    (stats, "summarize"),
    (stats, "paired_difference"),
    (flow_stages, "find_stages"),
    (flow_stages, "stage_layers"),
    (claims, "check_claims"),
)


read_once = cache(read_yaml)  # every run reads the same files of params/


@cache
def load(model: str, name: str) -> pd.DataFrame:
    """Return a stored frame, with the columns that follow from its probabilities."""
    parts = ("image_to_question", "flow_to_last") if name == "origins" else (name,)  # 18 measures what 03 and 02 do
    frames = [pd.read_parquet(FRAMES / model / f"{part}.parquet") for part in parts]
    return derive(pd.concat(frames, ignore_index=True))


def derive(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.assign(**{c: frame[c].astype(float) for c in frame.select_dtypes("float")})
    if "p_knockout" in frame:
        change = frame["p_knockout"] / frame["p_base"]
        frame = frame.assign(rel_change_pct=100 * (change - 1), logprob_change=np.log(change.clip(lower=1e-30)))
        frame = frame.assign(logit_diff_base=np.nan, logit_diff_change=np.nan)
    if "probability" in frame:
        frame = frame.assign(logprob=np.log(frame["probability"].clip(lower=1e-30)))
    return frame


def moved(frame: pd.DataFrame, rng: np.random.Generator, noise: float) -> pd.DataFrame:
    """Move every number that a model computed as another processor's rounding does: relative to its size."""
    computed = {"p_knockout", "probability", "norm", "recovery_pct"} & set(frame.select_dtypes("float"))
    numbers = {name: frame[name] * (1 + noise * rng.normal(size=len(frame))) for name in sorted(computed)}
    free = ("norm", "recovery_pct")
    return derive(frame.assign(**{n: v if n in free else v.clip(upper=1.0) for n, v in numbers.items()}))


@cache
def cells_of(notebook: Path) -> list[str]:
    return [c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]


@cache
def compiled(source: str) -> tuple[CodeType, CodeType | None]:
    """Return a cell's statements, and its last expression, whose value a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    shown = compile(ast.Expression(last.value), "cell", "eval") if last else None
    return compile(tree, "cell", "exec"), shown


class Run:
    """What a notebook said: the text of each cell, the tables shown, and every summary behind them."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.shown: list[pd.DataFrame] = []
        self.tables: list[pd.DataFrame] = []
        self.skipped: list[str] = []  # first lines of cells that a stub couldn't serve to their end


def run_cells(
    notebook: Path, model: str, change: Callable[[pd.DataFrame], pd.DataFrame], *, but: Sequence[str] = ()
) -> Run:
    """Run the cells of a notebook from its measurement on, on stored frames that `change` moves.

    Cells that need a model or a picture are skipped and listed; those that begin with a line of `but` are left out.
    """
    code = [source for source in cells_of(notebook) if source.partition("\n")[0] not in but]
    begin, given = STORED.get(notebook.stem, (MEASURES, None))
    begins = [begin] if given else begin
    first = next(
        i for i, source in enumerate(code) if any(name in source for name in begins) and "ask_questions" not in source
    )
    run, frames = Run(), {}

    def stored(name: str, model: str = model) -> pd.DataFrame:
        if (name, model) not in frames:
            frames[name, model] = change(load(model, name))
        return frames[name, model].copy()

    def of_its_model(path, *_):
        own = Path(path).parent.name
        return stored(Path(path).stem, own if (FRAMES / own).is_dir() else model)

    def measure(_, __, ___, path, ____, **_____):
        return Result(of_its_model(path), max_check_diff=0.0)

    def read_results(outputs, *others, names=collect.WRITTEN_BY):
        if Path(outputs) == ROOT / "assets" / "control":  # comes with the project: nobody measures it anew
            return collect.read_results(outputs)
        found = {}
        for name in names:
            files = sorted(FRAMES.glob(f"*/{name}.parquet"))
            parts = [stored(name, f.parent.name).assign(model=f.parent.name) for f in files]
            found |= {name: pd.concat(parts, ignore_index=True)} if parts else {}
        return found

    n_layers = int(pd.read_parquet(FRAMES / model / "flow_to_last.parquet", columns=["layer"]).layer.max()) + 1
    stub = SimpleNamespace(n_layers=n_layers, n_heads=4, name=model, model=model, folder=Path(model))
    reader = SimpleNamespace(**vars(stub) | {"model": f"{model}-text"})
    names: dict[str, Any] = {"In": [], "studied": [], "display": lambda *_: None}

    def needs_a_model(*_, **__):
        raise RuntimeError("this needs a model, or its data")

    fakes = {
        "measure_in_parts": measure,
        "load_frame": of_its_model,
        "read_results": read_results,
        "load_model": lambda *_: stub,
        "load_samples": lambda *_: [],
        "manifest": lambda *_, **__: {"depends_on": {}},
        "save_frame": lambda *_, **__: None,
        **dict.fromkeys(("read_questions", "ask_questions", "knockout_sweep", "logit_lens", "encode"), needs_a_model),
        **{name: lambda *_, **__: SimpleNamespace(axes=[]) for name in mm.__all__ if name.startswith("plot_")},
    }
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(patch.object(mm, name, fake, create=True))
        stack.enter_context(patch.object(other_pictures, "with_other_pictures", lambda *_: []))
        for module, name in SUMMARIES:
            stack.enter_context(_recording(module, name, run))
        stack.enter_context(patch.object(patching, "load_pairs", lambda *_: []))
        stack.enter_context(patch.object(parameters, "read_yaml", read_once))
        for name in ("plot_maps", "plot_heads"):
            stack.enter_context(patch.object(maps, name, lambda *_, **__: None))
        scratch = stack.enter_context(tempfile.TemporaryDirectory())  # for what a cell writes
        for number, source in enumerate(code):
            if number < 3:  # imports, parameters, setup
                exec(source, names)
                names |= {"model": model} | GIVEN.get(notebook.stem, {})
                if "params" in names:
                    names["params"] = names["params"].model_copy(update={"n_boot": 100, "outputs": scratch})
                continue
            if number == first:
                names |= {"boot": {"n_boot": 100, "seed": 0}, "options": {}, "is_alone": False}
                names |= {"asked": stored(ASKED[notebook.stem])} if notebook.stem in ASKED else {}
                names |= {"vlm": stub, "llm": reader, "seer": stub, "reader": reader, "samples": []}
                names |= {"exchanged": [], "studied": ["a sample"], "n_spelled": 1}
                names |= {"frame": stored(given)} if given else {}
            _run_cell(source, names, run if number >= first else Run())
    return run


@contextlib.contextmanager
def _recording(module, name: str, run: Run) -> Iterator[None]:
    """Keep every table that a function of the analysis gives, wherever it was imported to."""
    original = getattr(module, name)

    def record(*args, **options):
        table = original(*args, **options)
        run.tables.append(table)
        return table

    with patch.object(mm, name, record, create=True), patch.object(module, name, record):
        yield


def _run_cell(source: str, names: dict, run: Run) -> None:
    statements, last = compiled(source)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(statements, names)
            shown = eval(last, names) if last else None
    except Exception:
        run.skipped.append(source.splitlines()[0])
        shown = None
    run.text.append(said.getvalue())
    if isinstance(shown, pd.DataFrame):
        run.shown.append(shown)
