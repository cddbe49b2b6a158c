"""How much the sweep saves: it and the other ways, measured in turns in one run, on random weights.

frame = measure_speed(n_layers=(8, 16), n_image=(576,))
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from benchmarks.baselines import BASELINES, has_nnsight
from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.plan import count_rows
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.models.adapter import VLM, text_inputs
from mmflow_utils.prompts.encoding import Encoded
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_TO_QUESTION,
    Flow,
    Variant,
    variants,
)
from mmflow_utils.prompts.positions import PositionSets

__all__ = ["SIX_FLOWS", "measure_speed", "random_llava", "random_prompt"]

SIX_FLOWS = FLOW_TO_LAST + IMAGE_TO_QUESTION + IMAGE_PATCHES_TO_QUESTION
# Token counts of the paper's prompt around a short question, in Llama's tokenizer.
N_BEFORE, N_QUESTION, N_AFTER = 4, 8, 17
IMAGE_TOKEN = 4


def random_llava(
    *, n_layers: int, n_image: int, d_model: int = 512, n_heads: int = 8, n_kv_heads: int = 8, seed: int = 0
) -> VLM:
    """Build a LLaVA-1.5 of random weights with an all but empty vision tower."""
    side = math.isqrt(n_image)
    text = LlamaConfig(
        vocab_size=2048, hidden_size=d_model, intermediate_size=d_model * 43 // 16,
        num_hidden_layers=n_layers, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads,
        max_position_embeddings=8192,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
        image_size=14 * side, patch_size=14,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    hf = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, weight in hf.named_parameters():
        if weight.ndim > 1:  # so that a knockout changes probabilities, and a wrong one would show
            weight.mul_(10 if "lm_head" in name else 2)
    hf.set_attn_implementation("sdpa")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, "?")))  # never asked
    return VLM(
        name=f"random, {n_layers} layers", hf=hf, processor=None, tokenizer=tokenizer, prompt="{question}",
        do_pad=False, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip


def random_prompt(model: VLM, *, n_image: int, seed: int = 0) -> Encoded:
    """Make a prompt of random tokens with the lengths of a real one, a quarter of the image related."""
    generator = torch.Generator().manual_seed(seed)
    n_image = math.isqrt(n_image) ** 2
    lengths = (N_BEFORE, n_image, N_QUESTION + N_AFTER)
    before, image, after = (torch.randint(5, 2048, (n,), generator=generator) for n in lengths)
    ids = torch.cat([before, image.fill_(IMAGE_TOKEN), after])[None]
    size = model.hf.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    first = N_BEFORE + n_image
    patches = tuple(range(N_BEFORE, first))
    sets = {
        "image": patches,
        "image_related": patches[: n_image // 4],
        "image_other": patches[n_image // 4 :],
        "question": tuple(range(first, first + N_QUESTION)),
        "last": (ids.shape[1] - 1,),
    }
    sample = Sample(
        sample_id="random", image_id="random", image=Path(), question="?", answer="?", task=None,
        structural="", semantic="", detailed="",
    )  # fmt: skip
    return Encoded(
        sample=sample,
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels},
        positions=PositionSets(n_tokens=ids.shape[1], sets=sets, missing={}),
        prompt="",
        tokens=(),
    )


@torch.inference_mode()
def measure_speed(
    *,
    n_layers: Sequence[int] = (8, 16),
    n_image: Sequence[int] = (576,),
    flows: Sequence[Flow] = SIX_FLOWS,
    window: int = 9,
    baselines: Iterable[str] = tuple(BASELINES),
    n_rounds: int = 5,
    n_some: int = 6,
    progress: Callable[[str], None] = lambda line: None,
    **shape: int,
) -> pd.DataFrame:
    """Measure the sweep, the clean pass and other ways in turns, in this process's own CPU time.

    Of the slow ways `n_some` variants run, spread evenly over flows and layers, and count for all.

    Args:
        n_layers, n_image: What to vary.
        baselines: The other ways, of `BASELINES`; nnsight is left out where it isn't installed.
        n_rounds: How often each runs; the frame holds medians.
        shape: More of `random_llava`.

    Returns:
        A row for each model and way: `cpu_s` for all variants, in `clean_passes` (of the same round), and
        `times_sweep`, how often the sweep would fit in. For the sweep also `bound` and `computed`, the rows x
        layers in clean passes (see `count_rows`), `max_diff` to full forwards in probability, and the peak
        memory beside a clean pass's, image encoder included: `memory_mb`, `clean_memory_mb`.
    """
    rows = []
    for layers, image in product(n_layers, n_image):
        model = random_llava(n_layers=layers, n_image=image, **shape)
        encoded = random_prompt(model, n_image=image)
        planned = variants(encoded.positions, flows, window=window, n_layers=layers)
        some = _spread(planned, n_some)
        inputs, _ = text_inputs(model, encoded.inputs)
        ways = {"clean pass": lambda: model.unembed(model.text(**inputs).last_hidden_state[0, -1])}  # noqa: B023
        ways["sweep"] = lambda: run_sweep(model, encoded, planned)  # noqa: B023
        for name in baselines:
            if name != "nnsight" or has_nnsight():
                ways[name] = lambda way=BASELINES[name]: list(way(model, encoded, some, inputs))  # noqa: B023
        seconds = _in_turns(ways, n_rounds)
        scale = {name: len(planned) / len(some) for name in ways if name in BASELINES}
        counts = count_rows(planned, n_tokens=encoded.positions.n_tokens, n_layers=layers)
        shared = {
            "n_layers": layers,
            "n_tokens": encoded.positions.n_tokens,
            "n_flows": len(flows),
            "n_variants": len(planned),
        }
        for name, taken in seconds.items():
            ratios = [scale.get(name, 1) * a / b for a, b in zip(taken, seconds["clean pass"], strict=True)]
            versus = [scale.get(name, 1) * a / b for a, b in zip(taken, seconds["sweep"], strict=True)]
            row = {"way": name, "cpu_s": scale.get(name, 1) * median(taken)}
            rows.append(shared | row | {"clean_passes": median(ratios), "times_sweep": median(versus)})
            if name == "sweep":
                # As the sweep, with the image encoder.
                own = _peak_bytes(lambda: model.hf(**encoded.inputs, use_cache=False, logits_to_keep=1))  # noqa: B023
                whole = _peak_bytes(ways["sweep"])
                rows[-1] |= {
                    "bound": 1 + counts["bound"] / counts["clean"],
                    "computed": 1 + counts["computed"] / counts["clean"],
                    "max_diff": _difference(model, encoded, some, inputs),
                    "clean_memory_mb": own / 2**20,
                    "memory_mb": whole / 2**20,
                }
            progress(f"{layers} layers, {shared['n_tokens']} tokens, {name}: {rows[-1]['clean_passes']:.2f}")
    return pd.DataFrame(rows)


def _spread(planned: list[Variant], n: int) -> list[Variant]:
    """Pick variants of all flows and depths: a step of whole flows would find the same layer each time."""
    n = min(n, len(planned))
    return [planned[int((k + (k + 0.5) / n) * len(planned) / n)] for k in range(n)]


def _in_turns(ways: dict[str, Callable], n_rounds: int) -> dict[str, list[float]]:
    """Time each way once a round; the clean pass, short as it is, before and after every other."""
    seconds = {name: [] for name in ways}
    for n in range(n_rounds + 1):
        clean = []
        for name, way in islice(ways.items(), 1, None):
            clean.append(_seconds(ways["clean pass"]))
            taken = _seconds(way)
            if n:  # the first round warms up
                seconds[name].append(taken)
        clean.append(_seconds(ways["clean pass"]))
        if n:
            seconds["clean pass"].append(median(clean))
    return seconds


def _seconds(way: Callable) -> float:
    start = time.process_time()
    way()
    return time.process_time() - start


def _difference(model: VLM, encoded: Encoded, some: list[Variant], inputs: dict) -> float:
    mine = run_sweep(model, encoded, some).variants.softmax(-1)
    plain = torch.stack(list(BASELINES["full forwards"](model, encoded, some, inputs))).softmax(-1)
    return float((mine - plain).abs().max())


def _peak_bytes(way: Callable) -> int:
    """Return the most memory that a call holds at once, beyond what was there before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes of its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        way()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
