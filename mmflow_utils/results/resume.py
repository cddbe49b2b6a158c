"""Long measurements in parts: what was computed is kept, a run goes on where it stopped, machines share one.

result = measure_in_parts(knockout_sweep, model, samples, path, params, flows=FLOW_TO_LAST, window=9, n_check=2)
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmflow_utils.data.sample import Sample, picture_by_picture
from mmflow_utils.params import Params
from mmflow_utils.results import frames
from mmflow_utils.results.committed import find_result, take_committed
from mmflow_utils.results.record import Result
from mmflow_utils.results.version import describe_call

BAR = "{desc}: {n_fmt} of {total_fmt} parts |{bar}| {elapsed} elapsed, {remaining} left"


def measure_in_parts(
    measure: Callable[..., Any],
    model: Any,
    samples: Sequence[Sample],
    path: str | Path,
    params: Params,
    *,
    n_check: int | None = None,
    version: int | None = None,
    part_size: int = 16,
    shared: bool = True,
    fresh: bool | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Result:
    """Run an experiment part by part, keep each part on disk at once, and store the whole as `path`.

    A run that was stopped goes on with its own parts, and one that had come to its end is loaded. Which run it
    is, is told by the parameters, weights and data (`manifest`), the samples, the experiment's version and the
    arguments. What another run finished under the same name stays, and this one is stored beside it, unless
    `fresh` is set.

    Args:
        measure: the experiment, `measure(model, samples, **arguments, progress=False)`, such as
            `knockout_sweep` or `ask_questions`; a sample's rows may not depend on the other samples.
        model: the model.
        samples: all samples, in the desired row order. They are measured picture by picture, and their rows put in
            this order by `sample_id`.
        path: where the whole goes, a parquet file.
        params: the run's parameters. With `shard` "2/8" only the second of eight shares is measured (part 2, 10,
            18 …), so that eight machines or GPUs share the work; a run without it puts the parts together.
        n_check: how many of the first samples `measure` checks, over all parts; None where it checks none.
        version: of an experiment that isn't the package's own; raise it whenever its rows would change.
        part_size: samples in a part; so many are measured again, at most, where a run was killed. All shards of
            a run must have the same.
        shared: False where what follows needs all rows: each run then measures all parts, whatever its `shard`.
        fresh: measure what is finished anew, and replace what another run finished; by default as the
            environment's `FRESH` says.
        progress: show a bar of parts.
        arguments: of `measure`: plain values, which tell one run from another.

    Returns:
        The rows of all parts in the samples' order, as one call of `measure` gives them, with the manifest. With
        `shard`, those of the parts that are there so far; nothing is stored as `path`.

    Raises:
        ValueError: a bad shard or part size; an argument that isn't plain; what `measure` refuses.

    Example:
        >>> result = measure_in_parts(mm.logit_lens, model, samples, folder / "lens.parquet", params)
        >>> mm.load_frame(folder / "lens.parquet", result.manifest).equals(result.frame)
        True
    """
    path, asked_for, shard = Path(path), list(samples), params.shard if shared else None
    # Questions about one picture share much of their work, so they come into one part.
    samples = [asked_for[n] for n in picture_by_picture(asked_for)]
    share, n_shares = _read_shard(shard)
    whole = frames.manifest(params, model)
    asked = arguments if n_check is None else arguments | {"n_check": n_check}
    whole["depends_on"] |= describe_call(measure, asked_for, asked, version=version)

    def run(some: Sequence[Sample], **options: Any) -> Result:
        found = measure(model, some, **(arguments | options), progress=False)
        return found if isinstance(found, Result) else Result(found)

    checked: dict[str, Any] = {} if n_check is None else {"n_check": 1}  # of one sample at a time
    if not frames.wants_fresh(fresh):
        if finished := _finished(path, whole):
            return finished
        if committed := take_committed(path, whole, asked_for, partial(run, **checked), arguments.get("flows", ())):
            frames.save_frame(committed.frame, path, committed.manifest)
            return committed

    parts = list(_cut(path, samples, part_size, n_check, whole))
    found = {part.number: result for part in parts if (result := part.load())}
    mine = parts[share - 1 :: n_shares]
    todo = [part for part in mine if part.number not in found]
    _tell_place(path, whole, fresh)
    _tell_parts(path, len(mine) - len(todo), sum(part.file.is_file() for part in todo))
    with tqdm(
        total=len(mine),
        initial=len(mine) - len(todo),
        desc=path.stem if shard is None else f"{path.stem}, shard {shard}",
        bar_format=BAR,
        disable=not (progress and todo),
    ) as bar:
        for part in todo:
            found[part.number] = part.load() or part.compute(run)  # another process may have come by here since
            bar.update()
    result = Result.join([found[number] for number in sorted(found)] or [run([], **parts[0].options)])
    result = result.in_order_of(asked_for).with_manifest(whole)
    if shard is None:
        frames.save_frame(result.frame, path, result.manifest, fresh=fresh)
        shutil.rmtree(parts[0].file.parent, ignore_errors=True)
    return result


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some consecutive samples, and the file that receives their rows."""

    number: int
    samples: list[Sample]
    options: dict[str, int]
    file: Path
    manifest: dict[str, Any]

    def load(self) -> Result | None:
        """Return the stored result; None where there is none, or it is damaged or of other samples."""
        try:
            result = Result.of(*frames.unpack(self.file.read_bytes()))
        except (FileNotFoundError, ValueError):
            return None
        return None if frames.differences(result.manifest, self.manifest) else result

    def compute(self, measure: Callable[..., Result]) -> Result:
        """Measure, store, and return what a later run would load."""
        result = measure(self.samples, **self.options).with_manifest(self.manifest)
        content = frames.pack(result.frame, result.manifest)
        try:
            frames.write_whole(self.file, content)
        except FileNotFoundError:  # a run that came to its end removed the folder just now
            frames.write_whole(self.file, content)
        return Result.of(*frames.unpack(content))


def _cut(
    path: Path, samples: list[Sample], part_size: int, n_check: int | None, whole: Mapping[str, Any]
) -> Iterator[_Part]:
    if part_size < 1:
        raise ValueError(f"part_size must be at least 1 sample, got {part_size}.")
    folder = path.with_name(f"{path.stem}.{frames.identity_of(whole)}.parts")
    for number, start in enumerate(range(0, len(samples), part_size) or [0]):
        some = samples[start : start + part_size]
        yield _Part(
            number=number,
            samples=some,
            options={} if n_check is None else {"n_check": min(max(n_check - start, 0), len(some))},
            file=folder / f"{number:05}.parquet",
            manifest={**whole, "depends_on": whole["depends_on"] | {"part": [sample.sample_id for sample in some]}},
        )


def _read_shard(shard: str | None) -> tuple[int, int]:
    """Read "2/8" as (2, 8); no shard is the only one of one."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", "1/1" if shard is None else shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard must be of the form 2/8, the second of eight, got {shard!r}.")
    return int(found[1]), int(found[2])


def _finished(path: Path, whole: Mapping[str, Any]) -> Result | None:
    """Load what this very run finished before."""
    if not (found := find_result(path, whole)):
        return None
    file, result = found
    with suppress(OSError):
        os.utime(file)  # so that it is the latest run of this name
    print(f"{file.name} matches this run; loaded from disk. FRESH=1 measures it anew.")
    return result


def _tell_place(path: Path, whole: Mapping[str, Any], fresh: bool | None) -> None:
    """Say how the latest run of this name differs, and whether its frame stays."""
    place = frames.place_for(path, whole, fresh=fresh)
    stays = f"stays, {place.name} comes beside it (FRESH=1 replaces it)"
    for latest in frames.list_frames(path)[:1]:
        with suppress(ValueError):  # damaged
            if differ := frames.differences(frames.read_manifest(latest), whole):
                kept = "is replaced" if place == latest else stays
                print(f"{latest.name} is of another run ({'; '.join(differ)}) and {kept}.")


def _tell_parts(path: Path, n_found: int, n_unfit: int) -> None:
    """Say in one line what is taken from an earlier run and what isn't."""
    said = [f"{n_found} were measured before"] if n_found else []
    said += [f"{n_unfit} damaged or of other samples: measured again"] if n_unfit else []
    if said:
        print(f"Parts of {path.stem}: {'; '.join(said)}.")
