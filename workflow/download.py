"""Fetch what can be fetched of the real data, and say what must be fetched by hand and where it belongs.

    python -m workflow.download            # or make data
    python -m workflow.download gqa        # GQA alone

A download that broke off goes on where it stopped. For COCO's pictures, checksums are published. The others'
publishers name none: the checksum of the first whole download is written down in `data/checksums.json`, and
later downloads are held against it; what an archive holds is checked by its own CRC in any case.
"""

import argparse
import fcntl
import gzip
import json
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pooch
from tqdm.auto import tqdm

from mmflow_utils.params import ROOT
from mmflow_utils.results.frames import write_whole

__all__ = ["Archive", "fetch"]

_ATTEMPTS = 20
_CHUNK = 2**16  # bytes; what came of a chunk that broke off is lost


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A zip or tar file on the web, and what of it is needed.

    Attributes:
        members: Pattern of the file names that are unpacked, whatever folder the archive has them in.
        to: The folder that they go to, below `data/`.
        size: Of the archive, as the publisher or others report it.
        n_files: How many files are unpacked from it.
        sha256: As published; None where nobody publishes it.
    """

    url: str
    members: str
    to: str
    size: str
    n_files: int = 1
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


_VISUAL_GENOME = "https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset"
_GQA = "https://downloads.cs.stanford.edu/nlp/data/gqa"
_COCO_SHA256 = {  # tensorflow/datasets, tensorflow_datasets/url_checksums/coco.txt
    "val2014": "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
    "val2017": "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
}


def _coco(split: str, size: str, n_files: int) -> Archive:
    url, to = f"http://images.cocodataset.org/zips/{split}.zip", f"coco/{split}"
    return Archive(url=url, members="*.jpg", to=to, size=size, n_files=n_files, sha256=_COCO_SHA256[split])


def _okvqa(members: str) -> Archive:
    url = f"https://okvqa.allenai.org/static/data/{members}.zip"
    return Archive(url=url, members=members, to="okvqa", size="some MB")


DATA: dict[str, tuple[Archive, ...]] = {
    "gqa": (
        Archive(url=f"{_GQA}/questions1.2.zip", members="val_balanced_questions.json", to="gqa", size="1.4 GB"),
        Archive(url=f"{_GQA}/sceneGraphs.zip", members="val_sceneGraphs.json", to="gqa", size="43 MB"),
        Archive(url=f"{_GQA}/images.zip", members="*.jpg", to="gqa/images", size="20.3 GB", n_files=148_854),
    ),
    "captions": (
        Archive(
            url=f"{_VISUAL_GENOME}/region_descriptions.json.zip",
            members="region_descriptions.json",
            to="gqa",
            size="127 MB",
        ),
    ),
    "okvqa": (
        _okvqa("OpenEnded_mscoco_val2014_questions.json"),
        _okvqa("mscoco_val2014_annotations.json"),
        _coco("val2014", "6.6 GB", 40_504),
    ),
    "aokvqa": (
        Archive(
            url="https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/aokvqa_v1p0.tar.gz",
            members="aokvqa_v1p0_val.json",
            to="aokvqa",
            size="some MB",
        ),
        _coco("val2017", "0.8 GB", 5_000),
    ),
}

BY_HAND = """\
By hand:
- The authors' six CSV files (their 5,525 questions): from the folder datasets/ of
  https://github.com/FightingFighting/cross-modal-information-flow-in-MLLM to data/authors/.
- Weights come from the Hugging Face hub when a notebook first asks for them. For those that ask for consent
  (google/gemma-3-4b-it), accept the license on the model's page, then: .venv/bin/hf auth login
"""


def fetch(archive: Archive, folder: Path, *, progress: bool = True) -> str:
    """Download an archive and unpack what is needed of it; what is there already stays.

    Args:
        archive: What to fetch.
        folder: The data folder: archives go to its `downloads/`, their files where they belong.
        progress: Show bars.

    Returns:
        What was done, in a few words.

    Raises:
        ValueError: A connection that broke off, another checksum, an archive that is broken or holds nothing
            of what is needed, another command that fetches it just now; says what to do.
    """
    noted = _checksums(folder).get(archive.url, {})
    target = folder / archive.to
    if sum(1 for _ in target.glob(archive.members)) >= noted.get("n_files", archive.n_files):
        return "there already"
    file = folder / "downloads" / archive.name
    with _alone(file.with_name(f"{file.name}.lock")):
        _download(archive, file, archive.sha256 or noted.get("sha256"), progress)
        sha256 = pooch.file_hash(str(file))
        n_files = _unpack(file, archive.members, target, progress)
    note = {"sha256": sha256, "n_files": n_files, "published": archive.sha256 is not None}
    with _alone(file.with_name("checksums.lock"), waits=True):  # another archive's may have been noted meanwhile
        known = _checksums(folder) | {archive.url: note}
        write_whole(folder / "checksums.json", json.dumps(known, indent=1).encode())
    held = "held against the published checksum" if archive.sha256 else "its checksum is written down"
    return f"{n_files} files in {target}; {held}"


def _checksums(folder: Path) -> dict[str, Any]:
    notes = folder / "checksums.json"
    return json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}


@contextmanager
def _alone(lock: Path, *, waits: bool = False) -> Iterator[None]:
    """Hold a lock, which ends with the process; where another has it, wait, or raise a ValueError."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            name = lock.name.removesuffix(".lock")
            raise ValueError(f"another command fetches {name} just now: wait for its end, then run again") from None
        except OSError:  # a file system without locks
            pass
        yield


def _download(archive: Archive, file: Path, sha256: str | None, progress: bool) -> None:
    """Fetch the archive whole, or leave what came in `<name>.part` for the next time."""
    part = file.with_name(f"{file.name}.part")
    store = pooch.create(file.parent, "", registry={file.name: sha256}, urls={file.name: archive.url})
    try:
        store.fetch(file.name, downloader=partial(_resume, part, progress))
    except OSError as error:  # those of requests are OSErrors
        n = part.stat().st_size if part.exists() else 0
        raise ValueError(
            f"{archive.url} wasn't fetched whole, {n:,} bytes are here ({error}): run the same command again"
            " to go on from there"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{archive.url} has another checksum than {sha256}: run the same command again; if it stays so,"
            " the publisher changed the file: look at it, then take its entry out of checksums.json"
        ) from error


def _resume(part: Path, progress: bool, url: str, output_file: str, _: Any) -> None:
    """Download for pooch, which has no way to go on: ask for the bytes that `part` lacks."""
    with open(part, "ab") as file:
        for attempt in range(_ATTEMPTS):
            have = file.tell()
            try:
                _append(url, file, progress)
                break
            except _Whole:
                break
            except OSError:
                if file.tell() == have or attempt == _ATTEMPTS - 1:  # nothing came
                    raise
    shutil.move(part, output_file)


class _Whole(Exception):
    """Nothing is lacking."""


def _append(url: str, file: IO[bytes], progress: bool) -> None:
    """Ask for what comes after the file's end, and write it there."""

    def look(response: Any, **_: Any) -> None:
        if response.headers.get("Content-Range") == f"bytes */{file.tell()}":
            raise _Whole
        if response.status_code in (200, 416):  # all comes, whatever was asked; or less is there than here
            file.seek(0)
            file.truncate()

    headers = {"Range": f"bytes={file.tell()}-", "Accept-Encoding": "identity"}
    pooch.HTTPDownloader(progressbar=progress, chunk_size=_CHUNK, headers=headers, hooks={"response": look})(
        url, file, None
    )


def _unpack(file: Path, pattern: str, target: Path, progress: bool) -> int:
    """Unpack the members of that name; each appears whole or not at all. Gives their number."""
    target.mkdir(parents=True, exist_ok=True)
    n = 0
    try:
        for name, size, read in tqdm(_members(file), desc=file.name, unit="file", disable=not progress):
            name = PurePosixPath(name).name  # whatever folder it says, it can't lead out of the target
            if not fnmatch(name, pattern) or name.startswith("."):
                continue
            n += 1
            if (target / name).exists() and (target / name).stat().st_size == size:
                continue
            with read() as packed, open(target / f"{name}.part", "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            (target / f"{name}.part").replace(target / name)
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file} is broken ({error}): delete it and run the same command again") from error
    if not n:
        raise ValueError(f"{file} holds no {pattern}: look at what the publisher put into it")
    return n


def _members(file: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Give each file of an archive: name, size in bytes, and a function that opens it."""
    if file.name.endswith(".zip"):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                yield member.filename, member.file_size, partial(archive.open, member)
    else:
        with tarfile.open(file) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, member.size, partial(archive.extractfile, member)


def main(arguments: list[str] | None = None) -> int:
    """Fetch what was asked for; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m workflow.download", description=__doc__)
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"{', '.join(DATA)}; by default all")
    parser.add_argument("--to", type=Path, default=ROOT / "data", help="the data folder")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.data) - DATA.keys()):
        parser.error(f"unknown data {', '.join(unknown)}: there are {', '.join(DATA)}")
    failed = 0
    for archive in (archive for name in asked.data or DATA for archive in DATA[name]):
        print(f"{archive.name} ({archive.size})", flush=True)
        try:
            print(f"  {fetch(archive, asked.to)}")
        except ValueError as error:
            failed += 1
            print(f"  failed: {error}", file=sys.stderr)
    print(BY_HAND, end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
