"""Results that come with the project: hours of a larger model in small files, each held against the model first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmflow_utils.data.sample import Sample
from mmflow_utils.params import ROOT, Params
from mmflow_utils.results.frames import find_frame, pack, read_frame, unpack
from mmflow_utils.results.record import Result

FOLDER = ROOT / "assets" / "results"
N_ANEW, TOLERANCE = 3, 1e-4  # samples that are measured again; how far their probabilities may be off
BY_LAYER = {"knockout_sweep": ("layers", "layer", "p_knockout"), "patch_sweep": ("layers", "layer", "p_patched")}
BY_LAYER |= dict.fromkeys(("module_knockout", "question_semantics"), ("layers", "layer", "jaccard"))
BY_LAYER |= {"prune_sweep": ("removed", "n_layers_without", "same_pct")}
"""Experiments that can be asked for some layers alone: by which argument, where they stand, what is measured there."""
N_PLAIN = 3  # edits of such a sample that are measured, each in a full forward pass
# What makes a result: what a notebook has of its own comes in through samples and arguments.
DEPENDS_ON = {*Params.model_fields, "weights_sha256", "settings_sha256", "data_sha256"}
DEPENDS_ON |= {"experiment", "version", "samples", "arguments"}
ROUNDED = {"rank", "top_token"}  # words far down a list, or as likely as the next one, change places


def find_result(path: Path, whole: Mapping[str, Any]) -> tuple[Path, Result] | None:
    """Return the file and the result of this very run under a name; None where there is none, or it is damaged."""
    try:
        file = find_frame(path, whole)
        return file, Result.of(*read_frame(file))
    except ValueError:
        return None


def take_committed(
    path: Path,
    whole: Mapping[str, Any],
    samples: Sequence[Sample],
    measure: Callable[..., Result],
    flows: Any = None,
) -> Result | None:
    """Return the result of this very run that comes with the project; None where there is none.

    Its first samples are measured anew before it is believed: where an experiment edits the model layer by layer,
    in the layers that change each sample most, by full forward passes, which leave nothing of the sweep to trust.

    Args:
        path: where the result would go; its name is that of the committed one.
        whole: the run's manifest.
        samples: of the run.
        measure: measures some samples; takes the experiment's options.
        flows: what the experiment blocks, so that of many flows some are taken in turns, or (); with None each
            sample is measured whole.

    Raises:
        ValueError: they differ from what is stored.
    """
    run = {**whole, "depends_on": {key: value for key, value in whole["depends_on"].items() if key in DEPENDS_ON}}
    if not (found := find_result(FOLDER / run["depends_on"].get("model", "") / path.name, run)):
        return None
    file, result = found
    for sample, stored, narrow in _some_rows(result.frame, samples[:N_ANEW], whole, flows):
        anew, _ = unpack(pack(measure([sample], **narrow).frame, whole))  # from a file lists come as arrays
        if problem := _problem(stored, anew):
            raise ValueError(
                f"{file.relative_to(ROOT)} is not what this machine measures: of sample {sample.sample_id}, {problem}. "
                "FRESH=1 measures all anew."
            )
    print(
        f"{path.stem} comes with the project; {len(samples[:N_ANEW])} samples measured anew gave the same within "
        f"{TOLERANCE:g}. FRESH=1 measures all."
    )
    return result


def _some_rows(
    frame: pd.DataFrame, samples: Sequence[Sample], whole: Mapping[str, Any], flows: Any
) -> Iterator[tuple[Sample, pd.DataFrame, dict[str, Any]]]:
    """Choose for each sample the rows that are measured anew, and what is asked of the experiment for them."""
    asks = None if flows is None else BY_LAYER.get(whole["depends_on"]["experiment"])
    for turn, sample in enumerate(samples):
        rows, narrow = frame[frame["sample_id"] == sample.sample_id], {}
        if asks and isinstance(flows, Sequence) and len(flows) > N_PLAIN:
            every = -(-len(flows) // N_PLAIN)
            narrow["flows"] = flows[turn % every :: every]
            rows = rows[rows["flow"].isin([str(flow) for flow in narrow["flows"]])]
        if asks and len(rows):
            argument, column, value = asks
            lowest = rows.groupby(column)[value].agg(["min", "size"])
            n = max(1, N_PLAIN // int(lowest["size"].max()))
            narrow[argument] = chosen = sorted(map(int, lowest["min"].nsmallest(n, keep="last").index))
            narrow |= {"method": "reference"} if argument == "layers" else {}
            rows = rows[rows[column].isin([*chosen, 0] if argument == "removed" else chosen)]  # 0 comes along unasked
        yield sample, rows.reset_index(drop=True), narrow


def _problem(stored: pd.DataFrame, anew: pd.DataFrame) -> str | None:
    """Say how rows differ: probabilities by more than the tolerance, words left by more than one, labels at all."""
    if len(stored) != len(anew):
        return f"{len(anew)} rows instead of {len(stored)}"
    compared = stored.columns.intersection(anew.columns).difference(ROUNDED)
    for name in compared if len(stored) else ():  # nothing was measured of a sample that lacks what is blocked
        old, new = stored[name], anew[name]
        if name in ("p", "probability", "jaccard") or name.startswith("p_"):
            # A list of ten words ends with some that are equally likely.
            tolerance = 0.05 if name == "jaccard" else TOLERANCE
            if not np.allclose(old, new, rtol=0, atol=tolerance, equal_nan=True):
                return f"{name} differs by {(old - new).abs().max():.1e}"
        elif not pd.api.types.is_float_dtype(old):
            was, now = (column.astype(object).where(column.notna(), None) for column in (old, new))  # None, or NaN
            if [*map(str, was)] != [*map(str, now)]:
                return f"{name} differs"
    return None
