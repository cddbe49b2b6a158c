"""The logit lens: how probable is the answer at the last position after every layer (§7, Fig. 6)?

frame = logit_lens(model, samples).frame
decision_layers(frame)                               # from where on is the answer the most probable word?
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.closeness import check_close, probabilities, rounding
from mmflow_utils.engine.prefix import run_clean
from mmflow_utils.experiments.loop import Loop
from mmflow_utils.models.adapter import VLM, compute_device
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.results.record import Result

__all__ = ["LENS_COLUMNS", "LENS_PROTOCOLS", "LENS_WORDS", "lens_logits", "logit_lens"]

LENS_PROTOCOLS = ("corrected", "paper")
LENS_WORDS = ("Capitalized answer", "Noncapitalized answer", "False option", "Capitalized false option")
LENS_COLUMNS = (
    "sample_id", "image_id", "task", "protocol", "norm", "layer", "word", "token", "probability", "logprob", "rank",
    "top_token",
)  # fmt: skip


def logit_lens(
    model: VLM,
    samples: Iterable[Sample],
    *,
    protocol: str | Sequence[str] = LENS_PROTOCOLS,
    encoder: Callable[[VLM, Sample], Encoded] = encode,
    progress: bool = True,
) -> Result:
    """Read the residual stream at `last` through the unembedding after every layer (§7, Fig. 6).

    A word counts by its first token. "Capitalized" is `str.capitalize()`; the answer and the false option without
    it are in lower case. One clean pass per sample.

    Args:
        model, samples, encoder, progress: as for `knockout_sweep`.
        protocol: `corrected` applies the final norm after every layer, and counts a word as the answer begins with
            it and as running text has it, behind a space: where these are two tokens, as in Llama 3's tokenizer
            and many others, middle layers hold " left" though the answer will be "Left". `paper` multiplies by the
            unembedding alone and counts the first of these tokens, as the authors do, except after the last layer:
            the state that the library hands out there is normed already, so that point is on another footing than
            the rest. Both by default.

    Returns:
        A frame of one row per sample, protocol, layer (after which it is read) and word, with `LENS_COLUMNS`:
        `norm`, "final norm" or "none", is what was really applied at that point; `token` the word's first token,
        the likelier one of two; `probability` and `logprob` (nats) are those of both together, `rank` (1 is the
        most probable) is the likelier one's; `top_token` is the most probable of all. Samples without options have
        no rows for a false option. `skipped` lists `{sample_id, word, reason}` where a false option begins with a
        token of the answer's; `max_check_diff` is how far the last point is from the model's own probabilities.

    Raises:
        ValueError: an unknown protocol; the last point isn't the model's own output; what `encode` refuses.

    Example:
        >>> frame = logit_lens(model, samples, protocol="corrected").frame
        >>> frame[frame.word == "Capitalized answer"].groupby("layer")["rank"].mean().iloc[[0, -1]].tolist()
        [8.75, 1.0]
    """
    protocols = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    _check_protocols(protocols)
    loop = Loop(model, encoder)
    names = ("The lens after the last layer", "the model's own output")
    advice = "the model does more than norm and unembed, look at `check_model`"

    def measure(encoded: Encoded) -> list[dict[str, Any]]:
        run, words, rows = run_clean(model, encoded, loop.prefix), _word_tokens(loop, encoded), []
        for name in protocols:
            logits = lens_logits(model, run.resid_post[1:], protocol=name)
            last, own = probabilities(logits[-1]), probabilities(run.base)
            worst = check_close(encoded, last, own, tolerance=rounding(model.dtype), names=names, advice=advice)
            loop.differences.append(worst)
            counted = words if name == "corrected" else {word: tokens[:1] for word, tokens in words.items()}
            rows += _rows(model, counted, logits, name)
        return rows

    return loop.over(samples, measure, LENS_COLUMNS, name="Logit lens", progress=progress)


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


def _check_protocols(protocols: Sequence[str]) -> None:
    if unknown := [name for name in protocols if name not in LENS_PROTOCOLS]:
        raise ValueError(f"protocol must be one of {', '.join(LENS_PROTOCOLS)}, got {unknown[0]!r}.")


def _word_tokens(loop: Loop, encoded: Encoded) -> dict[str, list[int]]:
    """Return the first tokens of each word whose probability is followed; skip what begins like the answer."""
    sample = encoded.sample
    answer, false = sample.answer.lower(), (sample.option_false or "").lower()
    spelled = dict(zip(LENS_WORDS, (answer.capitalize(), answer, false, false.capitalize()), strict=True))
    tokens = {word: list(loop.model.first_token_ids(text)) for word, text in spelled.items() if text}
    of_answer = {token for word in LENS_WORDS[:2] for token in tokens[word]}
    for word in LENS_WORDS[2:]:
        if of_answer.intersection(tokens.get(word, ())):
            reason = f"{spelled[word]!r} begins with the same token as the answer {answer!r}"
            loop.skip(encoded, reason, word=word)
            del tokens[word]
    return tokens


def _rows(
    model: VLM, words: dict[str, list[int]], logits: Float[Tensor, "n_layers vocab"], protocol: str
) -> list[dict[str, Any]]:
    """Turn logits into rows: one per word and layer."""
    logprobs, rows = logits.double().log_softmax(-1), []
    top = [model.tokenizer.decode([token]) for token in logits.argmax(-1).tolist()]
    bare = len(logits) - 1 if protocol == "paper" else 0
    norms = ["none"] * bare + ["final norm"] * (len(logits) - bare)
    for word, tokens in words.items():
        own = logprobs[:, tokens]
        both, (likelier, which) = own.logsumexp(-1), own.max(-1)
        ranks = (logprobs > likelier[:, None]).sum(-1) + 1
        read = {"norm": norms, "probability": both.exp().tolist(), "logprob": both.tolist(), "rank": ranks.tolist()}
        read |= {"token": [model.tokenizer.decode([tokens[n]]) for n in which.tolist()], "top_token": top}
        read["layer"] = list(range(len(own)))
        shared = {"protocol": protocol, "word": word}
        rows += [shared | dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]
    return rows
