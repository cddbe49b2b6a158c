"""Take a model's finished results to assets/results/, in small files that notebooks load in place of hours of work.

    python -m workflow.commit_results llava-smollm2                     # from outputs/llava-smollm2
    python -m workflow.commit_results llava-smollm2 --outputs DIR       # from DIR/llava-smollm2

Each file holds what `measure_in_parts` stored, numbers in four bytes, and the manifest of the run that made it; the
answers by which samples were chosen come along. Whoever loads one measures three of its samples anew.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mmflow_utils.data.sample import Sample
from mmflow_utils.experiments.curation import ask_questions, curate, read_questions
from mmflow_utils.params import ROOT, Params, outputs_folder
from mmflow_utils.results.committed import FOLDER
from mmflow_utils.results.frames import differences, manifest, pack, read_frame, read_manifest, write_whole
from mmflow_utils.results.record import Result
from mmflow_utils.results.version import VERSIONS, describe_call

__all__ = ["commit_results"]

Found = tuple[str, Result]
LIMIT_MB = 25.0  # of all models together
# By a notebook that shows captions in place of the picture, or asks about pairs of pictures.
ASKED_OTHERWISE = ("prompt", "data_sha256", "questions", "scene_graphs", "images")


def commit_results(params: Params, folder: Path, to: Path = FOLDER) -> list[Path]:
    """Store a model's finished results compactly in `to`/<model>/, and return the files.

    Args:
        params: the model's parameters, with which its notebooks ran.
        folder: what these stored, outputs/<model>/; other models' folders lie beside it.
        to: the folder of all models' results.

    Raises:
        ValueError: there is nothing to take, or more than what the project may carry.
    """
    files = []
    for name, result in [*_measured(params, folder), *_asked(params, folder / "samples")]:
        files.append(to / params.model / f"{name}.parquet")
        halves = dict.fromkeys(result.frame.select_dtypes("float64"), "float32")
        write_whole(files[-1], pack(result.frame.astype(halves), result.manifest))
    size = sum(file.stat().st_size for file in to.glob("*/*.parquet")) / 1e6
    if not files or size > LIMIT_MB:
        raise ValueError(f"Expected results of {params.model} in {folder}, {LIMIT_MB:g} MB in all, got {size:.1f} MB.")
    return files


def _measured(params: Params, folder: Path) -> Iterator[Found]:
    """Give what was measured in parts with these parameters, of each name the latest run.

    What notebooks made of it is made anew from it.
    A notebook about another model may have measured this one, too, to show it beside: it stores that with its own.
    """
    now = manifest(params)["depends_on"]
    now = {name: value for name, value in now.items() if name not in ASKED_OTHERWISE}
    rounds = [file for file in folder.glob("*/*.parquet") if file.stem.startswith(file.parent.name)]  # `ask_in_parts`
    found: dict[str, Path] = {}
    files = [*folder.parent.glob("*/*.parquet"), *rounds]
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, file)):
        made_from = read_manifest(file)
        run = made_from["depends_on"]
        if "experiment" not in run or run.get("model") != params.model:
            continue
        current = now | {"version": VERSIONS.get(run["experiment"], run.get("version"))}
        shared = {"depends_on": {name: value for name, value in current.items() if name in run}}
        if differ := differences(made_from, shared):
            print(f"{file.name} is left out: {'; '.join(differ)}.")
        else:
            found[file.name.split(".")[0]] = file
    for name, file in sorted(found.items()):
        yield name, Result.of(*read_frame(file))


def _asked(params: Params, folder: Path) -> Iterator[Found]:
    """Give the answers of each round in which samples were chosen, as `load_samples` asks for them."""
    if missing := [task for task in params.tasks if not (folder / f"{task}_asked.parquet").is_file()]:
        print(f"The choice of samples is left out: not made yet for {', '.join(missing)}.")
        return
    records = [read_frame(folder / f"{task}_asked.parquet")[0] for task in params.tasks]
    said = pd.concat(records).set_index("sample_id", drop=False)
    rounds: list[Found] = []

    def answer(_: Any, some: Sequence[Sample]) -> pd.DataFrame:
        rows = said.loc[[sample.sample_id for sample in some]].reset_index(drop=True)
        whole = manifest(params)
        more = {"without_picture": True} if params.needs_picture else {}
        whole["depends_on"] |= describe_call(ask_questions, some, more)
        rounds.append((f"asked_{len(rounds)}", Result(rows).with_manifest(whole)))
        return rows

    questions, _ = read_questions(params, tasks=params.tasks)
    curate(None, questions, tasks=params.tasks, n_samples=params.n_samples, seed=params.seed, ask=answer)
    yield from rounds


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workflow.commit_results", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="the name of a file in params/")
    parser.add_argument("--outputs", type=Path, default=outputs_folder(), help="the folder with the models' results")
    given = parser.parse_args(arguments)
    try:
        params = Params.from_yaml(ROOT / "params" / f"{given.model}.yaml")
        files = commit_results(params, given.outputs / given.model)
    except ValueError as error:
        print(f"mmflow: {error}", file=sys.stderr)
        return 1
    for file in files:
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
