"""Results that come with the project: hours of a larger model in small files, each held against the model first."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mmflow_utils.data.sample import Sample
from mmflow_utils.params import ROOT
from mmflow_utils.results.frames import find_frame, read_frame
from mmflow_utils.results.record import Result

FOLDER = ROOT / "assets" / "results"
N_ANEW, TOLERANCE = 3, 1e-4  # samples that are measured again; how far their probabilities may be off


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
    measure: Callable[[Sequence[Sample]], Result],
) -> Result | None:
    """Return the result of this very run that comes with the project; None where there is none.

    Its first samples are measured anew before it is believed.

    Raises:
        ValueError: they differ from what is stored.
    """
    if not (found := find_result(FOLDER / whole["depends_on"].get("model", "") / path.name, whole)):
        return None
    (file, result), some = found, samples[:N_ANEW]
    anew = measure(some)
    if problem := _problem(result.frame, anew.frame, [sample.sample_id for sample in some]):
        raise ValueError(
            f"{file.relative_to(ROOT)} is not what this machine measures: of {len(some)} samples, {problem}. "
            "FRESH=1 measures all anew."
        )
    print(
        f"{path.stem} comes with the project; {len(some)} samples measured anew gave the same within {TOLERANCE:g}. "
        "FRESH=1 measures all."
    )
    return result


def _problem(stored: pd.DataFrame, anew: pd.DataFrame, ids: Sequence[str]) -> str | None:
    """Say how the rows of some samples differ: probabilities by more than the tolerance, other values at all."""
    stored = stored[stored["sample_id"].isin(ids)].reset_index(drop=True)
    if len(stored) != len(anew):
        return f"{len(anew)} rows instead of {len(stored)}"
    for name in stored.columns.intersection(anew.columns):
        if name in ("p", "probability") or name.startswith("p_"):
            if not np.allclose(stored[name], anew[name], rtol=0, atol=TOLERANCE, equal_nan=True):
                return f"{name} differs by {(stored[name] - anew[name]).abs().max():.1e}"
        elif not pd.api.types.is_float_dtype(stored[name]) and list(map(str, stored[name])) != list(
            map(str, anew[name])
        ):
            return f"{name} differs"
    return None
