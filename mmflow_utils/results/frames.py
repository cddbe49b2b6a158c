"""Results on disk: a parquet file that carries the manifest of the run that made it, and its own checksum.

>>> path = tmp / "flow.parquet"
>>> save_frame(frame, path, manifest(params))
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
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mmflow_utils.data.captions import captions_file
from mmflow_utils.params import ROOT, Params

__all__ = ["load_frame", "manifest", "read_manifest", "save_frame"]

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pandas")
# What changes neither a sample nor a probability: where results go, where and in which shares they are
# computed, how they are summarized.
NOT_OF_THE_RESULT = frozenset({"outputs", "device", "device_map", "shard", "n_boot"})
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
    values = params.model_dump(mode="json")
    depends_on = {name: values[name] for name in values if name in names}
    files = sorted(params.path("checkpoint").glob("*.safetensors"))
    commit = getattr(getattr(getattr(model, "hf", None), "config", None), "_commit_hash", None)
    depends_on["weights_sha256"] = sha256(*files) if files else commit
    data = _data_files(params)
    depends_on["data_sha256"] = sha256(*data) if data and all(file.is_file() for file in data) else None
    own = set(names) - set(Params.model_fields) if fields is None else ()
    for name in sorted(name for name in own if isinstance(values[name], str)):
        if params.path(name).is_file():
            depends_on[f"{name}_sha256"] = sha256(params.path(name))
    return {
        "depends_on": depends_on,
        "made_by": {
            "device": str(getattr(model, "device", params.device)),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            **measured,
        },
    }


def _data_files(params: Params) -> list[Path]:
    """List what samples are read from: GQA's files or, in a folder of questions, the authors' CSV files."""
    questions = params.path("questions")
    if questions.is_dir():
        return sorted(questions.glob("*.csv"))
    graphs = [params.path("scene_graphs")] if params.scene_graphs else []
    captions = [captions_file((graphs or [questions])[0])] if "{caption}" in params.prompt else []
    return [questions, *graphs, *captions]


def save_frame(frame: pd.DataFrame, path: str | Path, manifest: Mapping[str, Any]) -> Path:
    """Write a frame with its manifest, whole or not at all.

    The manifest is inside the parquet file, so that the two can't be parted, and beside it as
    `.json`, to be read by eye. It ends with the checksum of the whole file.
    """
    path = Path(path)
    content = pack(frame, manifest)
    write_whole(path, content)
    write_whole(path.with_suffix(".json"), pq.read_metadata(pa.BufferReader(content)).metadata[KEY] + b"\n")
    return path


def load_frame(path: str | Path, expected: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Read a frame, and refuse it if it was made from something other than `expected`.

    Raises:
        ValueError: No such file, not a results file, altered or cut short, or a manifest that differs;
            says where.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no results at {path}: run the notebook that writes them first.")
    try:
        frame, found = unpack(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}: delete it and run again.") from None
    if expected is not None and (differ := differences(found, expected)):
        raise ValueError(
            f"{path} comes from another run ({'; '.join(differ)}): "
            "run the notebook that writes it again, or set these parameters back."
        )
    return frame


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest that a frame carries, without the frame and without a look at the checksum."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no results at {path}: run the notebook that writes them first.")
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
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: text.encode()})
    before, _, after = file.getvalue().rpartition(MARK + BLANK)
    return before + MARK + _checksum(before, after) + after


def unpack(content: bytes) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Turn the bytes of `pack` back into the frame and its manifest.

    Raises:
        ValueError: The bytes are not those that `pack` made; says how that is known.
    """
    before, mark, rest = content.rpartition(MARK)
    if not mark:
        raise ValueError("was not written by save_frame or is damaged (it has no checksum)")
    if rest[: len(BLANK)] != _checksum(before, rest[len(BLANK) :]):
        raise ValueError("is damaged (its content and its checksum differ)")
    file = pq.ParquetFile(pa.BufferReader(content))
    return file.read().to_pandas(), json.loads(file.metadata.metadata[KEY])


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name what a manifest depends on otherwise than expected, one clause each."""
    was, now = (json.loads(json.dumps(m["depends_on"], default=str)) for m in (found, expected))
    return [f"{key} was {was.get(key)!r:.80}, now {now[key]!r:.80}" for key in now if was.get(key) != now[key]]


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name in the same folder, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)  # else a power cut may leave the new name with nothing behind it
        os.chmod(name, 0o644)
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


def _git_commit() -> str | None:
    """Name the project's commit, with `+` where tracked files were changed since; None outside git."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
