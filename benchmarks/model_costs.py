"""What each model of params/ costs: counted from its true shape, or measured on a card with random weights.

    python benchmarks/model_costs.py                                   # count; write CSV and docs/models.md
    python benchmarks/model_costs.py --measure llava-1.5-13b           # time the sweep on this machine's card
    python benchmarks/model_costs.py --measure llava-1.5-13b --small   # the same shrunk, to try the command

No weights are downloaded. Counting builds the model without memory (torch's meta device) and sends a blank
picture through its picture processor. docs/models.md shows the table and says what it rests on.
"""

import argparse
import inspect
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from benchmarks.model_shapes import SHAPES, Shape, shrunk
from benchmarks.speed import SIX_FLOWS
from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.packed_pass import ENOUGH_ROWS
from mmflow_utils.engine.plan import count_rows, plan_branches
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.engine.work import count_work
from mmflow_utils.models.adapter import VLM
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import CAPTIONS_TO_LAST, flow_problem, variants
from mmflow_utils.prompts.positions import PositionSets

RECORDED = ROOT / "benchmarks" / "recorded" / "model_costs.csv"
PAGE = ROOT / "docs" / "models.md"
PICTURE = (640, 480)  # a usual size in GQA
N_BEFORE, N_QUESTION, N_AFTER = 40, 12, 17  # tokens of the Vicuna prompt about picture and question
N_CAPTIONS = 320  # App. G's dense captions, some 240 words
ITEM = 2  # bytes of a number in half precision
CARD, PEAK_TFLOPS, REACHED = "A100", 312, 0.4
WINDOW = 9


class Pictures(ProcessorMixin):
    """A processor with nothing but its part for pictures."""

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor


def build(name: str, shape: Shape, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> VLM:
    """Build a model of random weights (none on meta) with its picture processor, but no tokenizer."""
    config = AutoConfig.for_model(**shape.config)
    kind = AutoModelForImageTextToText if shape.images else AutoModelForCausalLM
    with torch.device(device):
        hf = kind.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    return VLM(
        name=name,
        hf=hf,
        processor=Pictures(shape.images) if shape.images else None,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, "?"))),  # never asked
        prompt="",
        do_pad=False,
        device=torch.device(device),
        dtype=dtype,
    )


def prompt(model: VLM, shape: Shape) -> Encoded:
    """Make a prompt of random words with the lengths of a real one; a quarter of the picture is related."""
    shown, n_image = {}, 0
    if shape.images:
        shown = dict(shape.images(images=[Image.new("RGB", PICTURE)], return_tensors="pt", **shape.options))
        shown = {name: tensor for name, tensor in shown.items() if isinstance(tensor, torch.Tensor)}
        tiles, side = model.tiles(shown), model.image_patch_size
        patches = torch.zeros(len(tiles), (tiles.shape[-2] // side) * (tiles.shape[-1] // side), 1)
        n_image = len(model.in_token_order(patches, shown))
    n_shown = n_image or N_CAPTIONS
    last = N_BEFORE + n_shown + N_QUESTION + N_AFTER - 1
    ids = torch.randint(5, 300, (1, last + 1), generator=torch.Generator().manual_seed(0))
    is_image = torch.zeros_like(ids)
    if n_image:
        is_image[:, N_BEFORE : N_BEFORE + n_image] = 1
        ids = torch.where(is_image == 1, model.image_token_id, ids)
        types = {"token_type_ids", "mm_token_type_ids"} & {*inspect.signature(model.hf.forward).parameters}
        shown |= dict.fromkeys(types, is_image)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown}
    place = range(N_BEFORE, N_BEFORE + n_shown)
    sets = {"question": range(place.stop, place.stop + N_QUESTION), "last": [last]}
    related = {"image": place, "image_related": place[: n_image // 4], "image_other": place[n_image // 4 :]}
    sets |= related if n_image else {"captions": place}
    sample = Sample(
        sample_id="random", image_id="random", image=Path(), question="?", answer="?", task=None,
        structural="", semantic="", detailed="",
    )  # fmt: skip
    inputs = {name: t.to(model.dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}
    if model.device.type != "meta":
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return Encoded(sample, inputs, PositionSets(n_tokens=last + 1, sets=sets), "", ())


def plan(model: VLM, encoded: Encoded) -> list:
    """List all knockouts of a sample: six flows, or the two of App. G, around every layer."""
    flows = SIX_FLOWS if "image" in encoded.positions else CAPTIONS_TO_LAST
    flows = [flow for flow in flows if flow_problem(encoded.positions, flow) is None]
    return variants(encoded.positions, flows, window=WINDOW, n_layers=model.n_layers)


def picture_flops(model: VLM, encoded: Encoded) -> int:
    """Count the picture's path: matrix products of tower and projector, the tower's attention as full."""
    if "image" not in encoded.positions:
        return 0
    pixels, side = model.tiles(encoded.inputs), model.image_patch_size // model.n_merged
    per_tile = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
    tower, config = model.hf.get_encoder("image"), model.hf.config.vision_config
    words = {id(part) for part in (*model.text.modules(), *tower.modules(), *model.unembed.modules())}
    between = [part for part in model.hf.modules() if isinstance(part, nn.Linear) and id(part) not in words]
    linear = [part.weight.numel() for part in tower.modules() if isinstance(part, nn.Linear)]
    attention = 4 * config.num_hidden_layers * per_tile * config.hidden_size
    in_tower = len(pixels) * per_tile * (2 * sum(linear) + attention)
    n_projected = len(pixels) * per_tile // model.n_merged**2
    return in_tower + n_projected * 2 * sum(part.weight.numel() for part in between)


def sweep_memory(config: Any, planned: list, *, n_tokens: int, itemsize: int = ITEM) -> int:
    """Bound what a sweep holds at once beside the weights, in bytes.

    The rows of all variants; a layer's clean states, its queries, keys, values and MLP for no more rows than
    the clean pass has, or `ENOUGH_ROWS`; all variants' logits, once as they come and once in float32.
    """
    d_model, last = config.hidden_size, n_tokens - 1
    branches = plan_branches(planned, read=[last], n_layers=config.num_hidden_layers)
    rows = sum(len(branch.rows) for branch in branches) * d_model
    layer = max(n_tokens, ENOUGH_ROWS) * (12 * d_model + 3 * config.intermediate_size)
    return itemsize * (rows + layer) + (itemsize + 4) * len(planned) * config.vocab_size


def count(name: str, shape: Shape) -> dict[str, Any]:
    """Count one model's costs; nothing is run."""
    model = build(name, shape)
    repository = Params.from_yaml(ROOT / "params" / f"{name}.yaml").checkpoint
    return {"model": name, "repository": repository} | count_of(model, prompt(model, shape))


def count_of(model: VLM, encoded: Encoded, *, itemsize: int = ITEM, weight: float | None = None) -> dict[str, Any]:
    """Count what a model, whose weights may be missing, costs on one prompt.

    Args:
        model, encoded: The model and the prompt.
        itemsize: Bytes of a number that is computed.
        weight: Bytes of a stored weight, if they are others.
    """
    planned, config, n_tokens = plan(model, encoded), model.text.config, encoded.positions.n_tokens
    rows = count_rows(planned, n_tokens=n_tokens, n_layers=model.n_layers)
    passes = 1 + rows["computed"] / rows["clean"]
    work = count_work(config, [n_tokens] * model.n_layers, itemsize=itemsize)
    flops = picture_flops(model, encoded) + passes * work.first_token_flops
    n_weights = sum(part.numel() for part in model.hf.parameters())
    return {
        "parameters_b": n_weights / 1e9,
        "weights_gb": n_weights * (weight or itemsize) / 1e9,
        "n_layers": model.n_layers,
        "image_tokens": len(encoded.positions.get("image")),
        "prompt_tokens": n_tokens,
        "cache_gb": work.cache_bytes / 1e9,
        "sweep_gb": sweep_memory(config, planned, n_tokens=n_tokens, itemsize=itemsize) / 1e9,
        "n_knockouts": len(planned),
        "passes": passes,
        "tflop": flops / 1e12,
        "seconds": flops / (PEAK_TFLOPS * 1e12 * REACHED),
    }


COLUMNS = {
    "model": "model",
    "parameters_b": "parameters (10⁹)",
    "n_layers": "layers",
    "image_tokens": "image tokens",
    "weights_gb": "weights (GB)",
    "cache_gb": "KV cache (GB)",
    "sweep_gb": "sweep (GB)",
    "passes": "passes",
    "tflop": "TFLOP",
    "seconds": f"s on an {CARD}",
}


def as_table(frame: pd.DataFrame) -> str:
    """Write the counts as the table that docs/models.md shows."""
    digits = {"parameters_b": 2, "weights_gb": 1, "cache_gb": 2, "sweep_gb": 2, "passes": 2, "tflop": 0}
    shown = frame.assign(**{c: frame[c].map(f"{{:.{n}f}}".format) for c, n in (digits | {"seconds": 2}).items()})
    links = [f"[{row.model}](https://huggingface.co/{row.repository})" for row in frame.itertuples()]
    lines = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    lines += shown.assign(model=links)[list(COLUMNS)].astype(str).to_numpy().tolist()
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measure(name: str, shape: Shape, *, n_rounds: int = 5) -> dict[str, Any]:
    """Time sweep and clean pass on this machine's card, in turns, with random weights of the true shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = Params.from_yaml(ROOT / "params" / f"{name}.yaml")
    dtype = getattr(torch, params.dtype) if device == "cuda" else torch.float32
    model = build(name, shape, device, dtype)
    encoded = prompt(model, shape)
    planned = plan(model, encoded)
    ways = {"clean_s": lambda: run_sweep(model, encoded, []), "sweep_s": lambda: run_sweep(model, encoded, planned)}
    held = torch.cuda.memory_allocated() if device == "cuda" else None
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for n in range(n_rounds + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()  # its result is on the CPU, so the card is done
            if n:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    found = {"model": name, "device": torch.cuda.get_device_name() if held is not None else "cpu"}
    found |= {"n_tokens": encoded.positions.n_tokens, "n_knockouts": len(planned)}
    found |= {way: median(taken) for way, taken in seconds.items()}
    if held is not None:
        found |= {"weights_gb": held / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return found


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--measure", choices=SHAPES, help="time this model on the card")
    read.add_argument("--small", action="store_true", help="a shrunk shape, to try --measure anywhere")
    args = read.parse_args()
    if args.measure:
        shape = shrunk(SHAPES[args.measure]) if args.small else SHAPES[args.measure]
        for key, value in measure(args.measure, shape).items():
            print(f"{key:12} {value:.3f}" if isinstance(value, float) else f"{key:12} {value}")
        return
    frame = pd.DataFrame([count(name, shape) for name, shape in SHAPES.items()])
    frame.to_csv(RECORDED, index=False, float_format="%.6g")
    table = as_table(pd.read_csv(RECORDED))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"(?m)(^\|.*\n)+", lambda _: table + "\n", page, count=1), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
