"""Look before you leap: is all there that a model's report needs, is it right, and how long will it take?

    python -m workflow.check llava-1.5-7b            # or make check MODEL=llava-1.5-7b
    python -m workflow.check llava-1.5-7b --fetch    # fetches weights that aren't here, if the disk has room for them

Each line says PASS, FAIL with a remedy, or NOT CHECKED with the reason; the exit code is 1 where one fails. Nothing is
downloaded unless asked for. Without weights, what can be looked at is: prompts and boxes are made from a checkpoint's
small files, and where the model's own data isn't here, the miniature's pictures stand in.
"""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoTokenizer

import mmflow_utils as mm
from mmflow_utils.data.sample import load_image
from mmflow_utils.models.partial import adapter_base
from mmflow_utils.models.precision import find_device
from mmflow_utils.models.sources import find_checkpoint, gguf_file, reason_of
from mmflow_utils.params import ROOT, Params, project_path
from mmflow_utils.prompts.encoding import image_positions
from workflow import check_model as of_model
from workflow.check_model import Look, Untold, choose, costs
from workflow.download import DATA

__all__ = ["CHECKS", "Row", "check", "judge"]

PASS, FAIL, NOT_CHECKED = "PASS", "FAIL", "NOT CHECKED"
RESULTS_GB = 1.0  # of a whole report, with room to spare


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    status: str
    detail: str
    remedy: str = ""


def look_at_data(look: Look) -> str:
    samples, left_out = mm.read_questions(look.params, tasks=look.params.tasks)
    if absent := set(look.params.tasks) - {sample.task for sample in samples}:
        raise ValueError(f"{look.params.questions} holds no question of {', '.join(sorted(absent))}.")
    look.samples = samples
    lost = len(left_out) and int((left_out.kept == False).sum())  # noqa: E712
    return f"{len(samples):,} questions of {len(look.params.tasks)} tasks; {lost:,} can't be used"


def look_at_pictures(look: Look) -> str:
    if not look.sees:
        return "not applicable: it reads captions"
    if not look.samples:
        raise Untold("which ones is said by the questions, which weren't read")
    files = {sample.image for sample in look.samples}
    if missing := sorted(file for file in files if not file.is_file()):
        raise ValueError(f"{len(missing):,} of {len(files):,} pictures are missing, such as {missing[0]}.")
    for sample in (shown := choose(look.samples, look.params)):
        load_image(sample)
    look.shown = shown
    return f"{len(files):,} are there; {len(look.shown)} were opened"


def free_disk(folder: Path) -> float:
    """Return the free bytes of the disk that a folder is on."""
    return shutil.disk_usage(folder).free


def look_at_disk(look: Look) -> str:
    params, wanted = look.params, {"results": (look.params.folder, RESULTS_GB)}
    if not {"data", "pictures"} <= look.passed:
        sizes = [re.fullmatch(r"([\d.]+) (GB|MB)", archive.size) for archive in DATA["gqa"]]
        gb = sum(float(size[1]) / (1000 if size[2] == "MB" else 1) for size in sizes if size)
        wanted["data"] = (ROOT / "data", 2 * gb)  # archives, and what is unpacked
    if not weights_here(params):
        folder = project_path(params.checkpoint)
        place = folder if folder.is_dir() else Path(constants.HF_HUB_CACHE)
        wanted["weights"] = (place, costs(look, in_half=True)["weights_gb"])
    disks: dict[int, dict[str, float]] = {}
    for name, (place, gb) in wanted.items():
        place = next(path for path in (place, *place.parents) if path.is_dir())
        disk = disks.setdefault(place.stat().st_dev, {"free": free_disk(place) / 1e9})
        disk[name] = gb
    said = []
    for disk in disks.values():
        free, parts = disk.pop("free"), ", ".join(f"{name} {sized(gb)}" for name, gb in disk.items() if name != "free")
        said.append(f"{sized(sum(disk.values()))} needed ({parts}), {sized(free)} free")
        if free < sum(disk.values()):
            raise ValueError(f"Not enough room: {said[-1]}.")
    return "; ".join(said)


def sources(params: Params) -> Iterator[tuple[str, str | None]]:
    """Name where weights come from: the checkpoint, and a language model beside it."""
    yield params.checkpoint, params.revision
    if params.language_model:
        yield params.language_model, None


def weights_here(params: Params) -> bool:
    with suppress(ValueError):
        return all(find_checkpoint(name, revision, fetch=False).is_dir() for name, revision in sources(params))
    return False


def look_at_weights(look: Look) -> str:
    fetch, files = look.fetch and "disk" in look.passed, []
    for name, revision in sources(look.params):
        folder = find_checkpoint(name, revision, fetch=fetch)
        base = adapter_base(folder) if not (folder / "config.json").is_file() else None
        for part in (folder, find_checkpoint(base, fetch=fetch)) if base else (folder,):
            files += [*part.glob("*.safetensors"), *part.glob("*.gguf")]
    for file in files:
        if file.suffix == ".safetensors":
            check_whole(file)
    size = sum(file.stat().st_size for file in files) / 1e9
    return f"{sized(size)} in {len(files)} file{'s' * (len(files) > 1)}, each whole"


def check_whole(file: Path) -> None:
    try:
        with safe_open(file, "pt"):
            pass
    except Exception as error:  # what a broken file raises depends on where it is broken
        raise ValueError(f"{file} is not whole: {reason_of(error)}.") from None


def look_at_tokenizer(look: Look) -> str:
    file = {"gguf_file": name} if (name := gguf_file(look.folder)) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(look.folder, local_files_only=True, **file)
    except Exception as error:
        raise ValueError(f"The tokenizer in {look.folder} can't be read: {reason_of(error)}.") from None
    said = look.some()[0].question
    back = tokenizer.decode(tokenizer(said, add_special_tokens=False)["input_ids"])
    if not tokenizer.is_fast or "".join(back.split()) != "".join(said.split()):
        raise ValueError(f"Expected a fast tokenizer that gives {said!r} back, got {back!r}.")
    return f"{len(tokenizer):,} tokens"


def look_at_processor(look: Look) -> str:
    model = look.ready()
    if not look.sees:
        return "not applicable: it reads text alone"
    n = len(image_positions(look.prompts()[0]))
    return f"{type(model.processor.image_processor).__name__}: {n} image tokens for a picture"


def free_memory(device: torch.device, *, spread: bool) -> float:
    """Return the free bytes of a device, or of all that a model may be spread over."""
    cards = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    on_cards = sum(torch.cuda.mem_get_info(card)[0] for card in cards if spread or card == (device.index or 0))
    group, free = Path("/sys/fs/cgroup"), float(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # a container's own limit, where it has one
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return on_cards + free * (spread or device.type != "cuda")


def look_at_memory(look: Look) -> str:
    params = look.params
    device, cost = find_device(params), costs(look)
    parts = {name: cost[f"{name}_gb"] for name in ("weights", "cache", "sweep")}
    need, free = sum(parts.values()), free_memory(device, spread=bool(params.device_map)) / 1e9
    listed = ", ".join(f"{name} {sized(gb)}" for name, gb in parts.items())
    said = f"{sized(need)} needed in {params.dtype} ({listed})"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} (no card is used)"
    if need > free:
        raise ValueError(f"Not enough memory: {said}, {sized(free)} free on {where}.")
    return f"{said}, {sized(free)} free on {where}"


def sized(gb: float) -> str:
    return f"{gb:.1f} GB" if gb >= 0.1 else f"{1000 * gb:.1f} MB"


@dataclass(frozen=True)
class Check:
    """What is looked at, what must have passed for it, and what to do where it fails."""

    title: str
    look: Callable[[Look], str]
    remedy: str
    needs: tuple[str, ...] = ()


_ADAPTER = "choose a checkpoint of a family in docs/models.md, or teach mmflow_utils/models/adapter.py this one"
_FILES = "fetch the checkpoint's small files again: config.json, tokenizer's and processor's"
_TURNS = """write the conversation into prompt in {file}; where a '▁' alone is missing after the picture, write \
"legacy": true into tokenizer_config.json of a copy"""
CHECKS = (
    Check("data", look_at_data, "make data DATA=gqa, or set questions and scene_graphs in {file} (docs/data.md)"),
    Check("pictures", look_at_pictures, "make data DATA=gqa, or set images in {file} to the folder that holds them"),
    Check("disk", look_at_disk, "free some, or move what grows: HF_HOME for weights, MMFLOW_OUTPUTS for results"),
    Check("weights", look_at_weights, "make check MODEL={model} FETCH=1, or set checkpoint in {file} to a whole copy"),
    Check("tokenizer", look_at_tokenizer, _FILES),
    Check("picture processor", look_at_processor, _FILES),
    Check("memory", look_at_memory, "set device_map: auto or a smaller dtype in {file}, or take a larger card"),
    Check("prompt", of_model.look_at_prompt, _TURNS),
    Check("boxes", of_model.look_at_boxes, "set do_pad in {file} as the model was trained, and look at the page"),
    Check("loading", of_model.load, "fetch config.json and the weights of one checkpoint again", ("weights", "memory")),
    Check("image features", of_model.look_at_features, _ADAPTER, ("loading",)),
    Check("three answers", of_model.look_at_answers, "look at prompt, do_pad and dtype in {file}", ("loading",)),
    Check("adapter", of_model.look_at_adapter, _ADAPTER, ("loading",)),
    Check("sweep", of_model.look_at_sweep, "set method: reference, or dtype: float32, in {file}", ("loading",)),
    Check("time", of_model.estimate_time, "look at what failed above"),
)


def check(params: Params, *, fetch: bool = False, begin: Callable[[str], None] = lambda title: None) -> Iterator[Row]:
    """Look at everything in turn, and give a row for each; what fails doesn't keep the others from being looked at.

    Args:
        params: The model's.
        fetch: Fetch weights that aren't here.
        begin: Told each title before its check begins.
    """
    look = Look(params, fetch)
    for one in CHECKS:
        begin(one.title)
        yield judge(look, one)


def judge(look: Look, one: Check) -> Row:
    """Make one check, and note if it passed."""
    params = look.params
    try:
        if lacking := [name for name in one.needs if name not in look.passed]:
            raise Untold(f"needs {' and '.join(lacking)}, see above")
        found = one.look(look)
    except Untold as error:
        return Row(one.title, NOT_CHECKED, str(error))
    except Exception as error:  # a broken model raises what it likes, and the next check goes on
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {reason_of(error)}"
        return Row(one.title, FAIL, said, one.remedy.format(model=params.model, file=f"params/{params.model}.yaml"))
    look.passed.add(one.title)
    return Row(one.title, PASS, found)


def show(row: Row) -> str:
    """Write a row of the table, wrapped to the terminal."""
    width, indent = min(120, shutil.get_terminal_size().columns), " " * 31
    wrap = textwrap.TextWrapper(
        width=max(width, 60), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    lines = [wrap.fill(f"{row.status:<12} {row.title:<17} {row.detail}")]
    if row.remedy:
        lines.append(wrap.fill(f"{'':12} {'  remedy:':<17} {row.remedy}"))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m workflow.check", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="mini", help="the name of a file in params/")
    parser.add_argument("--fetch", action="store_true", help="fetch weights that aren't here")
    given = parser.parse_args(arguments)
    try:
        params = Params.from_yaml(ROOT / "params" / f"{given.model}.yaml")
    except ValueError as error:
        print(f"mmflow: {error}", file=sys.stderr)
        return 1
    terminal, counts = sys.stdout.isatty(), dict.fromkeys((PASS, FAIL, NOT_CHECKED), 0)

    def begin(title: str) -> None:
        if terminal:
            print(f"{'…':<12} {title}", end="\r", flush=True)

    print(f"mmflow checks {params.model} ({params.checkpoint.split('#')[0]}, {params.dtype})\n", flush=True)
    for row in check(params, fetch=given.fetch, begin=begin):
        print(show(row), flush=True)
        counts[row.status] += 1
    then = f"make report MODEL={params.model}" if not counts[FAIL] else "see the remedies"
    print("\n" + ", ".join(f"{n} {status}" for status, n in counts.items()) + f": {then}")
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
