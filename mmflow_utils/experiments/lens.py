"""The logit lens: how probable is the answer at the last position after every layer (§7, Fig. 6)?

frame = logit_lens(model, samples)
decision_layers(frame)                               # from where on is the answer the most probable word?
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mmflow_utils.analysis.sentences import format_number
from mmflow_utils.analysis.stats import summarize
from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.checks import rounding
from mmflow_utils.engine.reference import Run, run_reference
from mmflow_utils.models.adapter import VLM, compute_device
from mmflow_utils.prompts.encoding import Encoded, encode

__all__ = [
    "LENS_COLUMNS",
    "LENS_PROTOCOLS",
    "LENS_WORDS",
    "decision_curves",
    "decision_layers",
    "describe_decisions",
    "lens_logits",
    "logit_lens",
]

LENS_PROTOCOLS = ("corrected", "paper")
LENS_WORDS = ("Capitalized answer", "Noncapitalized answer", "False option", "Capitalized false option")
LENS_COLUMNS = (
    "sample_id",
    "image_id",
    "task",
    "protocol",
    "norm",
    "layer",
    "word",
    "token",
    "probability",
    "logprob",
    "rank",
    "top_token",
)


def logit_lens(
    model: VLM,
    samples: Iterable[Sample],
    *,
    protocol: str | Sequence[str] = LENS_PROTOCOLS,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    progress: bool = True,
) -> pd.DataFrame:
    """Read the residual stream at `last` through the unembedding after every layer (§7, Fig. 6).

    A word counts by its first token, as an answer begins with it. "Capitalized" is `str.capitalize()`; the
    answer and the false option without it are in lower case. One clean pass per sample.

    Args:
        model: the model.
        samples: questions that it answers correctly.
        protocol: `corrected` applies the final norm after every layer. `paper` multiplies by the unembedding
            alone, as the authors do, except after the last layer: the state that the library hands out there
            is normed already, so that point is on another footing than the rest. Both by default.
        encoder: makes the prompt and its positions.
        progress: show a bar.

    Returns:
        One row per sample, protocol, layer (after which it is read) and word, with `LENS_COLUMNS`: `norm`,
        "final norm" or "none", is what was really applied at that point; `token` the word's first token;
        `probability`, `logprob` (nats) and `rank` (1 is the most probable) are that token's; `top_token` is
        the most probable one. Samples without options have no rows for a false option.
        `attrs["skipped"]` lists `{sample_id, word, reason}` where a false option begins with the answer's own
        token; `attrs["max_check_diff"]` is how far the last point is from the model's own probabilities.

    Raises:
        ValueError: an unknown protocol; the last point isn't the model's own output; what `encode` refuses.

    Example:
        >>> frame = logit_lens(model, samples)
        >>> summarize(frame, "probability", by=("task", "protocol", "word", "layer"))
    """
    protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    _check_protocols(protocols)
    columns: dict[str, list] = defaultdict(list, {name: [] for name in LENS_COLUMNS})
    skipped: list[dict[str, str]] = []
    differences: list[float] = []
    for sample in tqdm(list(samples), desc="Logit lens", unit="question", disable=not progress):
        run = run_reference(model, encoder(model, sample), [])
        words = _word_tokens(model, sample, skipped)
        for name in protocols:
            logits = lens_logits(model, run.resid_post[1:], protocol=name)
            differences.append(_check(model, sample, run, logits[-1]))
            for column, values in _measure(model, sample, words, logits, name).items():
                columns[column] += values
    frame = pd.DataFrame(columns)
    frame.attrs |= {"skipped": skipped, "max_check_diff": max(differences, default=None)}
    return frame


@torch.inference_mode()
def lens_logits(
    model: VLM, resid_post: Float[Tensor, "n_layers d"], *, protocol: str = "corrected"
) -> Float[Tensor, "n_layers vocab"]:
    """Turn the residual stream after each layer into logits (float32); see `logit_lens` for the protocols."""
    _check_protocols([protocol])
    # The norm and the head may lie on another device than the stream, and in half precision.
    resid_post = resid_post.to(compute_device(model.final_norm), model.final_norm.weight.dtype)
    read = model.final_norm(resid_post)
    if protocol == "paper":
        read = torch.cat([resid_post[:-1], read[-1:]])
    return model.unembed(read.to(compute_device(model.unembed), model.unembed.weight.dtype)).float().cpu()


def decision_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """Find from which layer on the answer is the most probable word.

    Args:
        frame: from `logit_lens`.

    Returns:
        One row per sample, protocol and word: the answer capitalized, noncapitalized, and "Either case" (a
        change of case doesn't end it). `first_layer` is the first layer after which it is the most probable
        word, `settled_layer` the first from which it stays so up to the last; NaN where there is none, so a
        mean over them is one over the samples that have it: show its n.

    Raises:
        ValueError: a column is missing.
    """
    keys = ["sample_id", "image_id", "task", "protocol", "word"]
    if missing := [name for name in (*keys, "layer", "rank") if name not in frame]:
        raise ValueError(f"Expected the frame of logit_lens, got one without {', '.join(missing)}.")
    answers = frame[frame.word.isin(LENS_WORDS[:2])]
    ranks = pd.concat([answers, answers.assign(word="Either case")])
    # A task may be missing (None), which a group's key may not be.
    best = ranks.groupby([*keys, "layer"], dropna=False)["rank"].min().unstack("layer")
    layers, on_top = best.columns.to_numpy(dtype=float), best.to_numpy() == 1
    stays = np.logical_and.accumulate(on_top[:, ::-1], axis=1)[:, ::-1]
    table = best.index.to_frame(index=False)
    for name, held in (("first_layer", on_top), ("settled_layer", stays)):
        table[name] = [layers[row.argmax()] if row.any() else np.nan for row in held]
    return table


def decision_curves(decisions: pd.DataFrame, *, n_layers: int) -> pd.DataFrame:
    """Say for each sample and layer whether the answer has been on top by then, and whether it stays there.

    Args:
        decisions: from `decision_layers`.
        n_layers: decoder layers.

    Returns:
        One row per row of `decisions`, `event` ("Was on top": the most probable word after this layer or an
        earlier one; "Stays on top": from this layer to the last) and layer, with `share_pct`, 0 or 100: its
        mean is the share of samples. A sample whose answer never comes counts as 0.

    Example:
        >>> curves = decision_curves(decision_layers(frame), n_layers=model.n_layers)
        >>> summarize(curves, "share_pct", by=("task", "protocol", "word", "event", "layer"))
    """
    events = {"Was on top": "first_layer", "Stays on top": "settled_layer"}
    keys = decisions.drop(columns=list(events.values()))
    return pd.concat(
        [
            keys.assign(event=event, layer=layer, share_pct=100.0 * (decisions[column] <= layer))
            for event, column in events.items()
            for layer in range(n_layers)
        ],
        ignore_index=True,
    )


def describe_decisions(
    decisions: pd.DataFrame, *, word: str = "Either case", n_boot: int = 1000, seed: int = 0
) -> list[str]:
    """Write one finding per task and protocol: the layer from which the answer stays the most probable word.

    The layer is a mean over the samples in which that happens, with its interval over images.
    """
    lines = []
    for (task, protocol), part in decisions[decisions.word == word].groupby(["task", "protocol"]):
        settled = part.dropna(subset="settled_layer")
        name, counted = f"{task}, {protocol} lens", f"{len(settled)} of {len(part)} samples"
        if settled.empty:
            lines.append(f"{name}: the answer is never the most probable word to the end ({counted}).")
            continue
        row = summarize(settled, "settled_layer", by=["task"], n_boot=n_boot, seed=seed).iloc[0]
        interval = f"95 % interval {format_number(row.ci_low)} to {format_number(row.ci_high)}"
        lines.append(
            f"{name}: on average the answer first becomes the most probable word after layer "
            f"{format_number(settled.first_layer.mean())} and stays so from layer {format_number(row['mean'])} on "
            f"({interval}, {counted}, on {row.n_clusters} images)."
        )
    return lines


def _check_protocols(protocols: Sequence[str]) -> None:
    if unknown := [name for name in protocols if name not in LENS_PROTOCOLS]:
        raise ValueError(f"protocol must be one of {', '.join(LENS_PROTOCOLS)}, got {unknown[0]!r}.")


def _word_tokens(model: VLM, sample: Sample, skipped: list[dict[str, str]]) -> dict[str, int]:
    """Give the first token of each word whose probability is followed."""
    answer, false = sample.answer.lower(), (sample.option_false or "").lower()
    spelled = dict(zip(LENS_WORDS, (answer.capitalize(), answer, false, false.capitalize()), strict=True))
    tokens = {word: model.first_token_id(text) for word, text in spelled.items() if text}
    for word in LENS_WORDS[2:]:
        if tokens.get(word) in (tokens[name] for name in LENS_WORDS[:2]):
            reason = f"{spelled[word]!r} begins with the same token as the answer {answer!r}"
            skipped.append({"sample_id": sample.sample_id, "word": word, "reason": reason})
            del tokens[word]
    return tokens


def _check(model: VLM, sample: Sample, run: Run, last: Float[Tensor, " vocab"]) -> float:
    """Hold the last point against the model's own output, and give the largest difference in probability."""
    worst = (last.double().softmax(-1) - run.base.double().softmax(-1)).abs().max().item()
    if not worst <= rounding(model.dtype):
        raise ValueError(
            f"After the last layer the lens differs from the model's own output by {worst:.1e} in "
            f"probability on sample {sample.sample_id}: the model does more than norm and unembed. Look at "
            "`check_model`."
        )
    return worst


def _measure(
    model: VLM,
    sample: Sample,
    words: dict[str, int],
    logits: Float[Tensor, "n_layers vocab"],
    protocol: str,
) -> dict[str, list[Any]]:
    """Turn logits into columns: for each word one value per layer."""
    n_layers, logprobs = len(logits), logits.double().log_softmax(-1)
    top = [model.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
    bare = n_layers - 1 if protocol == "paper" else 0
    shared = {"sample_id": sample.sample_id, "image_id": sample.image_id, "task": sample.task}
    columns: dict[str, list] = defaultdict(list)
    for word, token in words.items():
        own = logprobs[:, token]
        same = shared | {"protocol": protocol, "word": word, "token": model.tokenizer.decode([token])}
        varying = {
            "norm": ["none"] * bare + ["final norm"] * (n_layers - bare),
            "layer": list(range(n_layers)),
            "probability": own.exp().tolist(),
            "logprob": own.tolist(),
            "rank": ((logprobs > own[:, None]).sum(-1) + 1).tolist(),
            "top_token": top,
        }
        for column, values in ({name: [value] * n_layers for name, value in same.items()} | varying).items():
            columns[column] += values
    return columns
