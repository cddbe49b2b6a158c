"""Results on disk: a parquet file that carries the manifest of the run that made it, and its own checksum.

>>> frame, path = pd.DataFrame({"layer": [0, 1]}), folder / "flow.parquet"
>>> _ = save_frame(frame, path, manifest(params))
>>> load_frame(path, manifest(params)).equals(frame)
True
"""

import hashlib
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmflow_utils.data.captions import captions_file
from mmflow_utils.params import ROOT, Params

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas")
# What changes neither a sample nor a probability: where results go, where and in which shares they are
# computed, how they are summarized.
NOT_OF_THE_RESULT = frozenset({"outputs", "device", "device_map", "shard", "n_boot"})
# Parameters that came later: told only where they are set, so that results from before stay results of this run.
LATER = {"needs_picture": False}
# What loading reads beside the weights: by another one of these they compute something else.
SETTINGS = ("*config.json", "tokenizer*", "*.jinja", "*.model", "*.gguf")
KEY = b"mmflow_manifest"
# Where the checksum of a file stands in it. It is taken with zeros in its own place.
MARK, BLANK = b'"sha256": "', b"0" * 64


def manifest(
    params: Params, model: Any = None, *, fields: Iterable[str] | None = None, **measured: Any
) -> dict[str, Any]:
    """Describe a run: what its result depends on, and how it came about.

    Args:
        params: The run's parameters.
        model: The loaded model, for the device it really ran on and the commit the hub served.
        fields: The parameters that the result depends on; by default all that can change a number, and of
            those that a notebook has of its own and that name a file, the file's content.
        measured: What else is worth keeping, such as `max_check_diff` of the self-check.

    Returns:
        `depends_on` (compared when a frame is loaded) and `made_by` (kept for the record).
    """
    names = set(type(params).model_fields) - NOT_OF_THE_RESULT if fields is None else set(fields)
    depends_on = params.model_dump(mode="json", include=names)
    depends_on = {name: value for name, value in depends_on.items() if value != LATER.get(name, ...)}
    files = sorted(params.path("checkpoint").glob("*.safetensors"))
    commit = getattr(getattr(getattr(model, "hf", None), "config", None), "_commit_hash", None)
    depends_on["weights_sha256"] = sha256(*files) if files else commit
    if settings := _settings(params):
        depends_on["settings_sha256"] = sha256(*settings)
    data = _data_files(params)
    depends_on["data_sha256"] = sha256(*data) if data and all(file.is_file() for file in data) else None
    for name in sorted(names - set(Params.model_fields)) if fields is None else ():
        if isinstance(depends_on[name], str) and params.path(name).is_file():
            depends_on[f"{name}_sha256"] = sha256(params.path(name))
    made_by = {
        "device": str(getattr(model, "device", params.device)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
    }
    return {"depends_on": depends_on, "made_by": made_by | measured}


def _settings(params: Params) -> list[Path]:
    """List what is read beside the checkpoint's weights, and all of a language model that lies in a folder here."""
    folder, language_model = params.path("checkpoint"), params.language_model
    found = [folder] if folder.is_file() else [file for some in SETTINGS for file in folder.glob(some)]
    if language_model and (other := params.path("language_model")).exists():
        found += [other] if other.is_file() else other.glob("*.*")
    return sorted(file for file in set(found) if file.is_file())


def _data_files(params: Params) -> list[Path]:
    """List what samples are read from: GQA's files or, in a folder of questions, the authors' CSV files."""
    questions = params.path("questions")
    if questions.is_dir():
        return sorted(questions.glob("*.csv"))
    graphs = [params.path("scene_graphs")] if params.scene_graphs else []
    captions = [captions_file((graphs or [questions])[0])] if "{caption}" in params.prompt else []
    return [questions, *graphs, *captions]


def save_frame(
    frame: pd.DataFrame, path: str | Path, manifest: Mapping[str, Any], *, fresh: bool | None = None
) -> Path:
    """Write a frame with its manifest, whole or not at all, and return where it went.

    The manifest is inside the parquet file, so that the two can't be parted, and beside it as
    `.json`, to be read by eye. It ends with the checksum of the whole file.

    What another run finished under this name is never replaced: the frame then goes beside it, as
    `flow.1f3a2b4c.parquet`. `fresh` replaces it; by default it is what the environment's `FRESH` says.
    """
    path, content = Path(path), pack(frame, manifest)
    taken, place = path.is_file(), place_for(path, manifest, fresh=fresh)
    try:
        write_whole(place, content, replace=taken or place != path)
    except FileExistsError:  # another run finished just now
        place = place_for(path, manifest, fresh=fresh)
        write_whole(place, content)
    write_whole(place.with_suffix(".json"), pq.read_metadata(pa.BufferReader(content)).metadata[KEY] + b"\n")
    return place


def load_frame(path: str | Path, expected: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Return the frame of a name that was made from what is `expected`, or the one of the latest run.

    Raises:
        ValueError: No such file, not a results file, altered or cut short, or only frames of another
            manifest; says where they differ.
    """
    return read_frame(find_frame(path, expected))[0]


def read_frame(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the frame and the manifest of one file; a ValueError where it was altered or cut short."""
    try:
        frame, manifest = unpack(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}: delete it and run again.") from None
    return frame.astype(dict.fromkeys(frame.select_dtypes("float32"), float)), manifest  # what was stored compactly


def find_frame(path: str | Path, expected: Mapping[str, Any] | None = None) -> Path:
    """Return the file of a name that `load_frame` reads: the latest that was made from what is `expected`."""
    files = list_frames(path)
    if not files:
        raise ValueError(f"There are no results at {path}: run the notebook that writes them first.")
    if expected is None:
        return files[0]
    for file in files:
        with suppress(ValueError):
            if not differences(read_manifest(file), expected):
                return file
    raise ValueError(
        f"{files[0]} comes from another run ({'; '.join(differences(read_manifest(files[0]), expected))}): "
        "run the notebook that writes it again, or set these parameters back."
    )


def list_frames(path: str | Path) -> list[Path]:
    """List the frames stored under a name, also those beside it, the one of the latest run first."""
    path = Path(path)
    files = [path, *path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 8}.parquet")]
    return sorted((file for file in files if file.is_file()), key=lambda file: (-file.stat().st_mtime_ns, file.name))


def place_for(path: Path, manifest: Mapping[str, Any], *, fresh: bool | None = None) -> Path:
    """Choose where a frame goes: where this very run stored it before, else where nothing finished is lost."""
    beside = path.with_name(f"{path.stem}.{identity_of(manifest)}.parquet")
    if _same_run(beside, manifest):
        return beside
    free = wants_fresh(fresh) or _same_run(path, manifest, damaged=True)
    return path if free else beside


def wants_fresh(fresh: bool | None = None) -> bool:
    """Say whether finished frames are to be made anew: as asked, or else as the environment says, `FRESH=1`."""
    return os.environ.get("FRESH", "0") not in ("", "0") if fresh is None else fresh


def identity_of(manifest: Mapping[str, Any]) -> str:
    """Return eight characters that stand for all that a result depends on."""
    content = json.dumps(manifest["depends_on"], default=str, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _same_run(file: Path, manifest: Mapping[str, Any], *, damaged: bool = False) -> bool:
    """Say whether a file is of this run; `damaged` says it too of one that nobody can read, or that isn't there."""
    try:
        return identity_of(read_manifest(file)) == identity_of(manifest)
    except ValueError:
        return damaged


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest that a frame carries, without the frame and without a look at the checksum."""
    try:
        return json.loads(pq.read_metadata(path).metadata[KEY])
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by save_frame or is damaged ({error!r:.80}): delete it and run again."
        ) from None


def pack(frame: pd.DataFrame, manifest: Mapping[str, Any]) -> bytes:
    """Turn a frame and its manifest into the bytes of a parquet file that holds its own checksum."""
    table, file = pa.Table.from_pandas(frame), io.BytesIO()
    text = json.dumps({**manifest, "sha256": BLANK.decode()}, indent=2, default=str)
    measured = [name for name in frame.select_dtypes("float") if frame[name].nunique() > len(frame) / 4]
    labels = [name for name in table.column_names if name not in measured]
    small = {"compression": "zstd", "use_dictionary": labels, "use_byte_stream_split": measured}
    with pq.ParquetWriter(file, table.schema, **small) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: text.encode()})
    before, _, after = file.getvalue().rpartition(MARK + BLANK)
    return before + MARK + _checksum(before, after) + after


def unpack(content: bytes) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Turn the bytes of `pack` back into the frame and its manifest; others are a ValueError that says why."""
    before, mark, rest = content.rpartition(MARK)
    if not mark:
        raise ValueError("was not written by save_frame or is damaged (it has no checksum)")
    if rest[: len(BLANK)] != _checksum(before, rest[len(BLANK) :]):
        raise ValueError("is damaged (its content and its checksum differ)")
    file = pq.ParquetFile(pa.BufferReader(content))
    return file.read().to_pandas(), json.loads(file.metadata.metadata[KEY])


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name what a manifest depends on otherwise than expected, one clause each."""
    was, now = (LATER | json.loads(json.dumps(m["depends_on"], default=str)) for m in (found, expected))
    told = [key for key in now if key != "arguments" and (key in was or key != "settings_sha256")]  # not always stored
    pairs = [(key, was.get(key), now[key]) for key in told]
    # A call's arguments are compared one by one; those that are parameters too are named once.
    given, asked = (m.get("arguments", {}) if "arguments" in now else {} for m in (was, now))
    pairs += [(key, given.get(key), asked.get(key)) for key in {**given, **asked}]
    return list(dict.fromkeys(f"{key} was {a!r:.80}, now {b!r:.80}" for key, a, b in pairs if a != b))


def write_whole(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write to a temporary name in the same folder, then rename: a reader never sees half a file.

    A file that is there, and is not to be replaced, is a FileExistsError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)  # else a power cut may leave the new name with nothing behind it
        os.chmod(name, 0o644)
        if not replace:
            try:
                return os.link(name, path)  # of two that do this at once, one is told
            except FileExistsError:
                raise
            except (OSError, NotImplementedError):  # a file system without links says so in many ways
                pass
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _checksum(before: bytes, after: bytes) -> bytes:
    return hashlib.sha256(before + MARK + BLANK + after).hexdigest().encode()


def sha256(*files: Path) -> str:
    """Hash files one after another; a file that didn't change since is not read again."""
    parts = [_sha256_of(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


@cache
def _sha256_of(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@cache
def _git_commit() -> str | None:
    """Name the project's commit, with `+` where tracked files were changed since; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
