"""What an experiment gives: its rows, what it left out and why, and how far its check was off.

result = knockout_sweep(model, samples, FLOW_TO_LAST, window=9)
result.frame, result.skipped, result.max_check_diff
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mmflow_utils.data.sample import Sample


@dataclass(frozen=True, eq=False)
class Result:
    """The record of an experiment.

    Attributes:
        frame: the measured rows.
        skipped: what could not be measured, one dict each: sample_id, what was left out, and the reason.
        max_check_diff: the largest difference between the fast way and the plain one; None if none was computed.
        manifest: what a stored result was made from; empty for one that was never stored.
    """

    frame: pd.DataFrame
    skipped: list[dict[str, str]] = field(default_factory=list)
    max_check_diff: float | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def join(cls, results: Iterable["Result"]) -> "Result":
        """Return one result of several: rows below one another, numbered anew, as one call would give them."""
        results = list(results)
        frames = [result.frame for result in results]
        filled = [frame for frame in frames if len(frame)] or frames[:1]
        joined = pd.concat(filled, ignore_index=True)
        for name in joined:
            if len({frame[name].dtype for frame in filled}) > 1:  # a column without a value in some part
                joined[name] = pd.Series([value for frame in filled for value in frame[name].tolist()])
        found = [result.max_check_diff for result in results if result.max_check_diff is not None]
        skipped = [note for result in results for note in result.skipped]
        return cls(joined, skipped, max(found, default=None), results[0].manifest)

    def with_manifest(self, manifest: Mapping[str, Any]) -> "Result":
        """Return the result with what it was made from, to which what it left out and its check are added."""
        made_by = {**manifest.get("made_by", {}), "max_check_diff": self.max_check_diff}
        whole = {**manifest, "made_by": made_by, "skipped": self.skipped}
        return Result(self.frame, self.skipped, self.max_check_diff, whole)

    def in_order_of(self, samples: Iterable[Sample]) -> "Result":
        """Return the result with its rows, and what it left out, in the order of some samples, by their `sample_id`."""
        place = {sample.sample_id: n for n, sample in reversed(list(enumerate(samples)))}
        skipped = sorted(self.skipped, key=lambda note: place.get(note["sample_id"], len(place)))
        frame = self.frame
        if "sample_id" in frame:
            order = frame["sample_id"].map(place).argsort(kind="stable")
            frame = frame.iloc[order].reset_index(drop=True)
        return Result(frame, skipped, self.max_check_diff, self.manifest)

    @classmethod
    def of(cls, frame: pd.DataFrame, manifest: Mapping[str, Any]) -> "Result":
        """Return the result that a frame and its manifest (`with_manifest`) stand for."""
        made_by = manifest.get("made_by", {})
        return cls(frame, manifest.get("skipped", []), made_by.get("max_check_diff"), manifest)
