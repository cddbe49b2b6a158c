"""What removing image tokens saves in time, each part apart.

times = measure_times(model, encoded, {"intact": None, "last half": Pruning(from_layer=20)})
print(summarize_times(times))
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch

from mmflow_utils.engine.pruning import Pruning, continue_prompt, image_tokens_removed, prompt_embeds, read_prompt
from mmflow_utils.engine.work import equal_work, work_of
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, image_positions

__all__ = ["PARTS", "cost_curves", "measure_times", "plan_times", "summarize_times"]

PARTS = ("image encoder", "first token", "first token with image", "next tokens", "end to end")
"""What is timed."""

ENDS = ("mean", "ci_low", "ci_high")


@torch.inference_mode()
def measure_times(
    model: VLM, encoded: Encoded, prunings: Mapping[str, Pruning | None], *, n_new: int = 8, n_rounds: int = 5
) -> pd.DataFrame:
    """Time a prompt in several ways, in turns, in the attention kernel that is set (`sdpa` unless changed).

    Args:
        model: The model.
        encoded: The prompt.
        prunings: The ways by name; None is the intact model.
        n_new: Tokens decoded, whatever they are.
        n_rounds: How often each runs, after one round to warm up.

    Returns:
        One row per way, round and part of `PARTS`, with `seconds` (on a CPU, this process's own; elsewhere
        those of wall-clock time): the image encoder alone; the first token of a prompt whose picture is
        encoded already, and with its encoding; the next n_new - 1 tokens; and the last two together. Beside
        it `counted_pct`, the decoder's counted work in percent of the intact model's, NaN where more than the
        decoder runs; from_layer and n_kept.
    """
    embeds = prompt_embeds(model, encoded)
    pixels = {name: held for name, held in encoded.inputs.items() if name.startswith(("pixel_", "image_"))}
    position, rows = int(embeds[1].max()) + 1, []

    def whole_prompt() -> tuple[int, Any]:
        out = model.hf(**encoded.inputs, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    for n in range(n_rounds + 1):
        for way, pruning in prunings.items():
            with image_tokens_removed(model, encoded, pruning):
                encoder, _ = _timed(model, lambda: model.hf.get_image_features(**pixels))
                reading, _ = _timed(model, lambda: int(read_prompt(model, embeds)[0].argmax()))
                prompt, (first, cache) = _timed(model, whole_prompt)
                decoding, _ = _timed(
                    model, lambda first=first, cache=cache: continue_prompt(model, first, cache, position, n_new)
                )
            seconds = (encoder, reading, prompt, decoding, prompt + decoding)
            shared = {"way": way, "round": n, **_counted(model, encoded, pruning, n_new)}
            counted = shared.pop("counted_pct")
            rows += [
                shared | {"part": part, "seconds": taken, "counted_pct": counted.get(part, float("nan"))}
                for part, taken in zip(PARTS, seconds, strict=True)
            ]
    times = pd.DataFrame(rows)
    return times[times["round"] > 0].reset_index(drop=True)  # the first round warms up


def summarize_times(times: pd.DataFrame, *, base: str = "intact") -> pd.DataFrame:
    """Return medians and quartiles over rounds, in milliseconds and in percent of `base` in the same round.

    Returns:
        One row per way and part: from_layer, n_kept, n (rounds), ms, ms_q1, ms_q3, pct, pct_q1, pct_q3, and
        counted_pct.

    Raises:
        ValueError: `base` was not timed.
    """
    if base not in set(times["way"]):
        raise ValueError(f"Expected {base!r} among the ways timed, got {', '.join(times['way'].unique())}.")
    own = times[times["way"] == base].set_index(["round", "part"])["seconds"]
    beside = own.loc[list(zip(times["round"], times["part"], strict=True))].to_numpy()
    table = times.assign(ms=1000 * times["seconds"], pct=100 * times["seconds"] / beside)
    groups = table.groupby(["way", "from_layer", "n_kept", "part"], sort=False)
    found = {"n": groups.size()}
    for column in ("ms", "pct"):
        found[column] = groups[column].median()
        found |= {f"{column}_q{k}": groups[column].quantile(k / 4) for k in (1, 3)}
    return pd.DataFrame(found | {"counted_pct": groups["counted_pct"].first()}).reset_index()


def cost_curves(table: pd.DataFrame, *, n_layers: int, base: str = "intact") -> pd.DataFrame:
    """Lay out a summary of times for `plot_curves`: counted and measured cost, by layers without image.

    Returns:
        Of `base` and the ways that keep no image token, for each part: cost ("counted work" or "measured
        time"), share_pct (the last layers without image, of all), and in percent of `base` mean (measured:
        the median), ci_low and ci_high (the quartiles).
    """
    table = table[(table["n_kept"] == 0) | (table["way"] == base)]
    table = table.assign(share_pct=(100 * (1 - table["from_layer"] / n_layers)).round().astype(int))
    ends = {"counted work": ["counted_pct"] * 3, "measured time": ["pct", "pct_q1", "pct_q3"]}
    curves = [
        table.assign(cost=cost, **{name: table[end] for name, end in zip(ENDS, columns, strict=True)})
        for cost, columns in ends.items()
    ]
    return pd.concat(curves)[["part", "cost", "share_pct", *ENDS]].dropna().reset_index(drop=True)


def plan_times(model: VLM, encoded: Encoded, *, n_depths: int = 4) -> dict[str, Pruning | None]:
    """Name what is worth timing: the image gone in 1/n, 2/n, ... of the layers; FastV at the work of half.

    FastV is left out where it may keep no token, and is the same.

    Example:
        >>> list(plan_times(model, mm.encode(model, sample)))[:2]
        ['intact', 'no image in the last 3']
    """
    counts = [round(n * model.n_layers / n_depths) for n in range(1, n_depths)]
    ways = {f"no image in the last {n}": Pruning(from_layer=model.n_layers - n) for n in counts}
    half = Pruning(from_layer=model.n_layers - model.n_layers // 2)
    fastv = equal_work(model, encoded, half, choice="attention")
    return {"intact": None, **ways} | ({"FastV, at the work of half": fastv} if fastv and fastv.n_kept else {})


def _counted(model: VLM, encoded: Encoded, pruning: Pruning | None, n_new: int) -> dict[str, Any]:
    intact = Pruning(from_layer=model.n_layers, n_kept=len(image_positions(encoded)))
    own, full = (work_of(model, encoded, one, n_new=n_new) for one in (pruning or intact, intact))
    counted = {"first token": 100 * own.first_token_flops / full.first_token_flops}
    if n_new > 1:
        counted["next tokens"] = 100 * sum(own.next_token_flops) / sum(full.next_token_flops)
    pruning = pruning or intact
    return {"from_layer": pruning.from_layer, "n_kept": pruning.n_kept, "counted_pct": counted}


def _timed(model: VLM, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result.

    On a CPU they are this process's own, on all its cores, so that other processes don't count; elsewhere
    those of wall-clock time, and the device is waited for before and after.
    """
    on_cpu = model.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    if not on_cpu:
        torch.accelerator.synchronize(model.device)
    start = clock()
    result = call()
    if not on_cpu:
        torch.accelerator.synchronize(model.device)
    return clock() - start, result
