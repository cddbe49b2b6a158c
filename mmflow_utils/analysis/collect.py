"""All stored results in one form: what each sample loses at each layer, along named lines."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from mmflow_utils.analysis.stats import need_columns
from mmflow_utils.params import Params
from mmflow_utils.results.frames import differences, list_frames, read_frame, read_manifest

WRITTEN_BY = {
    "flow_to_last": "02",
    "image_to_question": "03",
    "image_patch_knockout": "04",
    "logit_lens": "05",
    "module_knockout": "06",
    "efficiency_removed": "07",
    "patching": "17",
}
"""The results that are read, and the number of the notebook that writes each."""

REMOVED = "No image in the last layers"  # the paper's way to save work, among its rivals in App. F
CASES = {"Noncapitalized answer": 1, "Capitalized answer": -1}
LEAD = "Lower case over capitals"  # how much likelier the lens finds the answer in lower case
HELD = "Held by "  # a position set: how much of another picture's answer comes with that picture's states there
# What the results of one model must have in common to be compared: the rest is each notebook's own.
IN_COMMON = {*Params.model_fields, "weights_sha256", "data_sha256"}
COLUMNS = ("model", "task", "sample_id", "image_id", "line", "layer", "n_layers", "window", "effect")


def read_results(
    outputs: str | Path, *others: str | Path, names: Mapping[str, str] = WRITTEN_BY
) -> dict[str, pd.DataFrame]:
    """Read what notebooks stored: name -> rows of all models, with a column `model`.

    What a model hasn't stored is not in the result. Where a notebook was run with several settings, what it
    measured or loaded last is read, which is said.

    Args:
        outputs: the folder with a folder for each model.
        others: such folders for what a model lacks in the earlier ones; of another run than those, it isn't taken.
        names: the results to read, and the number of the notebook that writes each.

    Raises:
        ValueError: a file is damaged, or of a run with other parameters, weights or data than the model's
            other files; names it.
    """
    models: dict[str, dict[str, list[Path]]] = {}
    for folder in (path for place in (outputs, *others) for path in sorted(Path(place).glob("*"))):
        mine = models.setdefault(folder.name, {})
        known = next((_run_of(files[0]) for files in mine.values()), None)
        stored = {name: list_frames(folder / f"{name}.parquet") for name in names if name not in mine}
        mine |= {n: some for n, some in stored.items() if some and not (known and differences(known, _run_of(some[0])))}
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in names}
    for model, stored in sorted(models.items()):
        latest = {name: files[0] for name, files in stored.items()}
        _hold_together(latest, names)
        for name, file in latest.items():
            if len(stored[name]) > 1:
                print(f"{model} has {len(stored[name])} runs of {name}: {file.name} is the latest, and read.")
            found[name].append(read_frame(file)[0].assign(model=model))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items() if frames}


def _hold_together(files: Mapping[str, Path], names: Mapping[str, str]) -> None:
    """Refuse results that would be compared although they are of different runs."""
    for name, file in files.items():
        first = next(iter(files))
        if differ := differences(_run_of(files[first]), _run_of(file)):
            raise ValueError(
                f"{file} and {files[first].name} are of different runs ({'; '.join(differ)}): run the notebooks "
                f"{names[first]} and {names[name]} again with the same parameters."
            )


def _run_of(file: Path) -> dict[str, dict]:
    """Return what a model's results have in common."""
    depends_on = read_manifest(file).get("depends_on", {})
    return {"depends_on": {key: depends_on[key] for key in depends_on if key in IN_COMMON}}


def collect_effects(results: Mapping[str, pd.DataFrame], *, protocol: str = "corrected") -> pd.DataFrame:
    """Bring all results to one form, in which a larger number is always more.

    Args:
        results: from `read_results`, or some of it.
        protocol: which of the two lenses is read (`logit_lens`).

    Returns:
        One row per model, sample, line and layer. `line` is a flow, a module, or a word that the lens
        follows; `effect` is the loss of the answer's probability in % of what it was (flows), the loss of
        the question's words in percentage points of Jaccard similarity (modules), the word's probability in %, or
        how much likelier lower case is than capitals (lens), what comes of another picture's answer with its states
        in % (patching), or the loss of accuracy in percentage points (image tokens removed from `layer` on); `window`
        is in layers, NaN for the lens and the removal. The control of random image patches is left out: the paper
        claims nothing about it.

    Raises:
        ValueError: an unknown result, or one that lacks a column.
    """
    if unknown := set(results) - set(WRITTEN_BY):
        raise ValueError(f"results must be among {', '.join(WRITTEN_BY)}, got {', '.join(sorted(unknown))}")
    parts = [pd.DataFrame(columns=list(COLUMNS))]
    for name, frame in results.items():
        part = _lines_of(name, frame, protocol)
        if "n_layers" not in part:
            part = part.assign(n_layers=part.groupby("model")["layer"].transform("max") + 1)
        need_columns(part, [column for column in COLUMNS if column != "window"])
        parts.append(part.reindex(columns=list(COLUMNS)))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _lines_of(name: str, frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    if name == "logit_lens":
        need_columns(frame, ["word", "protocol", "probability"])
        mine = frame[frame["protocol"] == protocol]
        mine = mine.assign(line=mine["word"], effect=100 * mine["probability"])
        signed = mine.assign(effect=mine["effect"] * mine["word"].map(CASES).astype(float)).dropna(subset="effect")
        keys = ["model", "task", "sample_id", "image_id", "layer"]
        lead = signed.groupby(keys, dropna=False)["effect"].agg(["sum", "size"]).query("size == 2")["sum"]
        return pd.concat([mine, lead.rename("effect").reset_index().assign(line=LEAD)], ignore_index=True)
    if name == "module_knockout":
        need_columns(frame, ["knockout", "jaccard"])
        return frame.assign(line=frame["knockout"], effect=100 * (1 - frame["jaccard"]))
    if name == "patching":
        need_columns(frame, ["positions", "recovery_pct"])
        mine = frame[frame["positions"].isin(["Image", "Question", "Last"])]
        return mine.assign(line=HELD + mine["positions"], effect=mine["recovery_pct"].clip(upper=100))
    if name == "efficiency_removed":
        keys = ["model", "task", "sample_id"]
        need_columns(frame, [*keys, "way", "n_layers_without", "from_layer", "correct_pct"])
        mine = frame[frame["way"] == REMOVED]
        intact, removed = mine[mine["n_layers_without"] == 0], mine[mine["n_layers_without"] > 0]
        both = removed.merge(intact[[*keys, "correct_pct"]], on=keys, suffixes=("", "_intact"))
        n_layers, lost = both["from_layer"] + both["n_layers_without"], both["correct_pct_intact"] - both["correct_pct"]
        return both.assign(line=REMOVED, layer=both["from_layer"], n_layers=n_layers, effect=lost)
    need_columns(frame, ["flow", "source", "rel_change_pct"])
    mine = frame[~frame["source"].str.startswith("image_random")]
    return mine.assign(line=mine["flow"], effect=-mine["rel_change_pct"])
