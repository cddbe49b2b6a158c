"""Long computations in parts: what was computed is kept, a run goes on where it stopped, machines share one.

frame = compute_in_parts(
    lambda some: logit_lens(model, some, progress=False), samples, path, manifest(params, model)
)
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from mmflow_utils.data.sample import Sample
from mmflow_utils.results.frames import differences, load_frame, pack, save_frame, unpack, write_whole
from mmflow_utils.results.version import describe_measure

__all__ = ["compute_in_parts"]

BAR = "{desc}: {n_fmt} of {total_fmt} parts |{bar}| {elapsed} gone, {remaining} to go"

Measure = Callable[..., pd.DataFrame]


def compute_in_parts(
    measure: Measure,
    samples: Sequence[Sample],
    path: str | Path,
    manifest: Mapping[str, Any],
    *,
    part_size: int = 16,
    shard: str | None = None,
    n_check: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure samples part by part, keep each part on disk at once, and store the whole as `path`.

    A run that was stopped goes on with the parts that it finds in `<name>.parts/` beside `path`, and one
    that had come to its end loads `path`: delete that file to measure anew. Only what is whole and of this
    very run is taken: of the same `depends_on`, samples, package versions, code that measures, and `measure`
    itself, that is its code and the numbers, texts and flows that it names. What else it depends on (an
    object's inside) belongs into the manifest's `depends_on`.

    Args:
        measure: samples -> frame, `measure(samples)`; a sample's rows may not depend on the other samples.
        samples: all samples, in the order that the rows shall have.
        path: where the whole goes, a parquet file.
        manifest: from `manifest(params, model)`.
        part_size: samples in a part; so many are measured again, at most, where a run was killed.
        shard: "2/8" measures only the second of eight shares (part 2, 10, 18 …), so that eight machines or
            GPUs share the work; a run without it puts the parts together. Part sizes must be the same.
        n_check: how many of the first samples `measure` checks: it is then called as
            `measure(samples, n_check=…)`, so that the parts check what one call would, not each its first.
        progress: show a bar of parts.

    Returns:
        The rows of all parts in the samples' order, numbered anew; `attrs` hold lists joined and numbers by
        their largest. Equal for every `part_size` and sharding, as far as `measure` is. With `shard`, the
        rows of all parts that are there so far; nothing is stored as `path`.

    Raises:
        ValueError: a bad shard or part size; parts whose `attrs` contradict one another; what `measure`
            refuses.

    Example:
        >>> sweep = lambda some, n_check: knockout_sweep(
        ...     model, some, flows, window=9, n_check=n_check, progress=False
        ... )
        >>> frame = compute_in_parts(sweep, samples, path, manifest(params, model), n_check=2)
    """
    path, samples = Path(path), list(samples)
    share, n_shares = _read_shard(shard)
    more = describe_measure(measure, manifest, samples) | {"n_check": n_check}
    whole = {**manifest, "depends_on": {**manifest["depends_on"], **more}}
    if (frame := _finished(path, whole)) is not None:
        return frame
    parts = list(_cut(path, samples, part_size, n_check, whole))
    found, unfit = _find(parts)
    mine = [part.number for part in parts if part.number % n_shares == share - 1]
    todo = [number for number in mine if number not in found]
    _tell(path, [number for number in mine if number in found], [unfit[n] for n in todo if n in unfit])
    with tqdm(
        total=len(mine),
        initial=len(mine) - len(todo),
        desc=path.stem if shard is None else f"{path.stem}, shard {shard}",
        bar_format=BAR,
        disable=not (progress and todo),
    ) as bar:
        for number in todo:
            # Another process may have come by here since.
            found[number], _ = parts[number].load()
            if found[number] is None:
                found[number] = parts[number].compute(measure)
            bar.update()
    frame = _join([found[number] for number in sorted(found)] or [measure([], **parts[0].options)])
    if shard is None:
        measured = {name: value for name, value in frame.attrs.items() if not isinstance(value, list)}
        save_frame(frame, path, whole | {"made_by": {**manifest.get("made_by", {}), **measured}})
        shutil.rmtree(parts[0].file.parent, ignore_errors=True)
    return frame


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some consecutive samples, and the file that receives their rows."""

    number: int
    samples: list[Sample]
    options: dict[str, int]
    file: Path
    manifest: dict[str, Any]

    def load(self) -> tuple[pd.DataFrame | None, str]:
        """Give the stored frame, or None with the reason, "" where there is no file."""
        try:
            frame, found = unpack(self.file.read_bytes())
        except FileNotFoundError:
            return None, ""
        except ValueError:
            return None, "damaged"
        differ = differences(found, self.manifest)
        return (None, f"of another run ({differ[0]})") if differ else (frame, "")

    def compute(self, measure: Measure) -> pd.DataFrame:
        """Measure, store, and give what a later run would load."""
        content = pack(measure(self.samples, **self.options), self.manifest)
        try:
            write_whole(self.file, content)
        except FileNotFoundError:  # a run that came to its end removed the folder just now
            write_whole(self.file, content)
        return unpack(content)[0]


def _cut(
    path: Path, samples: list[Sample], part_size: int, n_check: int | None, whole: dict[str, Any]
) -> Iterator[_Part]:
    if part_size < 1:
        raise ValueError(f"part_size must be at least 1 sample, got {part_size}.")
    folder = path.with_name(f"{path.stem}.parts")
    for number, start in enumerate(range(0, len(samples), part_size) or [0]):
        some = samples[start : start + part_size]
        depends_on = whole["depends_on"] | {"samples": [sample.sample_id for sample in some]}
        yield _Part(
            number=number,
            samples=some,
            options={} if n_check is None else {"n_check": min(max(n_check - start, 0), len(some))},
            file=folder / f"{number:05}.parquet",
            manifest=whole | {"depends_on": depends_on},
        )


def _read_shard(shard: str | None) -> tuple[int, int]:
    """Read "2/8" as (2, 8); no shard is the only one of one."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", "1/1" if shard is None else shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard must be of the form 2/8, the second of eight, got {shard!r}.")
    return int(found[1]), int(found[2])


def _finished(path: Path, whole: dict[str, Any]) -> pd.DataFrame | None:
    try:
        frame = load_frame(path, whole)
    except ValueError:  # not there, of another run, or damaged: all three are replaced
        return None
    print(f"{path.name} is of this very run: loaded. Delete it to measure anew.")
    return frame


def _find(parts: list[_Part]) -> tuple[dict[int, pd.DataFrame], dict[int, str]]:
    """Load what is there; also say why a file is unfit, by the part's number."""
    found, unfit = {}, {}
    for part in parts:
        frame, problem = part.load()
        if frame is not None:
            found[part.number] = frame
        elif problem:
            unfit[part.number] = problem
    return found, unfit


def _tell(path: Path, found: list[int], unfit: list[str]) -> None:
    """Say in one line what is taken from an earlier run and what isn't."""
    said = [f"{len(found)} were measured before"] if found else []
    said += [f"{n} {why}: measured again" for why, n in Counter(unfit).items()]
    if said:
        print(f"Parts of {path.stem}: {'; '.join(said)}.")


def _join(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Put frames below one another, with the types that one frame of all rows would have."""
    filled = [frame for frame in frames if len(frame)] or frames[:1]
    joined = pd.concat(filled, ignore_index=True)
    for name in joined:
        if len({frame[name].dtype for frame in filled}) > 1:  # a column without a value in some part
            joined[name] = pd.Series([value for frame in filled for value in frame[name].tolist()])
    joined.attrs = {
        name: _merge(name, [frame.attrs[name] for frame in frames if name in frame.attrs])
        for name in dict.fromkeys(name for frame in frames for name in frame.attrs)
    }
    return joined


def _merge(name: str, values: list[Any]) -> Any:
    """Join lists, take the largest number, and keep what is the same in all; None says nothing."""
    values = [value for value in values if value is not None]
    if values and all(isinstance(value, list) for value in values):
        return [entry for value in values for entry in value]
    if values and all(isinstance(value, int | float) for value in values):
        return max(values)
    if any(value != values[0] for value in values):
        raise ValueError(
            f"attrs[{name!r}] differs between parts ({values[0]!r:.40}, …): a measure may leave lists, "
            "numbers, or what is the same for all samples there."
        )
    return values[0] if values else None
