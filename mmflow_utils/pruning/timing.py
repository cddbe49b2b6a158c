"""What removing image tokens saves in time, each part apart.

times = measure_times(model, encoded, {"intact": None, "last half": Pruning(from_layer=20)})
print(summarise_times(times))
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch

from mmflow_utils.encode import Encoded
from mmflow_utils.models import VLM, picture_features
from mmflow_utils.pruning.remove import (
    Pruning,
    continue_prompt,
    image_tokens_removed,
    prompt_embeds,
    read_prompt,
)

__all__ = ["PARTS", "measure_times", "summarise_times"]

PARTS = ("image encoder", "first token", "first token with image", "next tokens", "end to end")
"""What is timed."""


@torch.inference_mode()
def measure_times(
    model: VLM,
    encoded: Encoded,
    prunings: Mapping[str, Pruning | None],
    *,
    n_new: int = 8,
    n_rounds: int = 5,
) -> pd.DataFrame:
    """Time a prompt in several ways, in turns, in the attention kernel that is set (`sdpa` unless changed).

    Args:
        model: the model.
        encoded: the prompt.
        prunings: the ways by name; None is the intact model.
        n_new: tokens decoded, whatever they are.
        n_rounds: how often each runs, after one round to warm up.

    Returns:
        One row per way, round and part of `PARTS`, with wall-clock `seconds`: the image encoder alone; the
        first token of a prompt whose picture is encoded already, and with its encoding; the next n_new - 1
        tokens; and the last two together.
    """
    embeds = prompt_embeds(model, encoded)
    n_tokens, rows = embeds.shape[1], []

    def whole_prompt() -> tuple[int, Any]:
        out = model.hf(**encoded.inputs, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    for n in range(n_rounds + 1):
        for way, pruning in prunings.items():
            with image_tokens_removed(model, encoded, pruning):
                encoder, _ = _timed(model, lambda: picture_features(model, encoded.inputs))
                reading, _ = _timed(model, lambda: int(read_prompt(model, embeds)[0].argmax()))
                prompt, (first, cache) = _timed(model, whole_prompt)
                decoding, _ = _timed(
                    model,
                    lambda first=first, cache=cache: continue_prompt(model, first, cache, n_tokens, n_new),
                )
            seconds = (encoder, reading, prompt, decoding, prompt + decoding)
            if n:
                rows += [
                    {"way": way, "round": n, "part": part, "seconds": taken}
                    for part, taken in zip(PARTS, seconds, strict=True)
                ]
    return pd.DataFrame(rows, columns=["way", "round", "part", "seconds"])


def summarise_times(times: pd.DataFrame, *, base: str = "intact") -> pd.DataFrame:
    """Give medians and quartiles over rounds, in milliseconds and in percent of `base` in the same round.

    Returns:
        One row per way and part: n (rounds), ms, ms_q1, ms_q3, pct, pct_q1, pct_q3.

    Raises:
        ValueError: `base` was not timed.
    """
    if base not in set(times["way"]):
        raise ValueError(f"Expected {base!r} among the ways timed, got {', '.join(times['way'].unique())}.")
    own = times[times["way"] == base].set_index(["round", "part"])["seconds"]
    beside = own.loc[list(zip(times["round"], times["part"], strict=True))].to_numpy()
    table = times.assign(ms=1000 * times["seconds"], pct=100 * times["seconds"] / beside)
    groups = table.groupby(["way", "part"], sort=False)
    found = {"n": groups.size()}
    for column in ("ms", "pct"):
        found[column] = groups[column].median()
        found |= {f"{column}_q{k}": groups[column].quantile(k / 4) for k in (1, 3)}
    return pd.DataFrame(found).reset_index()


def _timed(model: VLM, call: Callable[[], Any]) -> tuple[float, Any]:
    """Give the wall-clock seconds of a call, its result, and wait for the device before and after."""
    _wait(model.device)
    start = time.perf_counter()
    result = call()
    _wait(model.device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
