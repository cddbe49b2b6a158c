"""Answers of several sub-words: the same experiments at the last sub-word that the model generates (App. C).

said = answer_subwords(model, samples)               # which tokens each answer consists of
result = knockout_sweep(model, samples, FLOW_TO_LAST, window=9, encoder=at_last_subword(said))
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from mmflow_utils.data.sample import Sample
from mmflow_utils.models.adapter import VLM
from mmflow_utils.prompts.encoding import Encoded, encode

__all__ = ["SUBWORD_COLUMNS", "answer_subwords", "answer_tokens", "at_last_subword", "long_answers"]

SUBWORD_COLUMNS = ("sample_id", "image_id", "task", "answer", "n_subwords", "subwords", "token_ids")


@torch.inference_mode()
def answer_tokens(model: VLM, encoded: Encoded, *, max_new_tokens: int = 8) -> tuple[int, ...]:
    """Let the model answer greedily, and return the answer's tokens.

    What ends the answer isn't part of it: the first special token and all after it, and blanks before it.
    """
    ids = model.hf.generate(**encoded.inputs, max_new_tokens=max_new_tokens, do_sample=False)
    tokens = ids[0, encoded.inputs["input_ids"].shape[1] :].tolist()
    special = set(model.tokenizer.all_special_ids)
    end = next((n for n, token in enumerate(tokens) if token in special), len(tokens))
    while end and not model.tokenizer.decode([tokens[end - 1]]).strip():
        end -= 1
    return tuple(tokens[:end])


def answer_subwords(
    model: VLM, samples: Iterable[Sample], *, max_new_tokens: int = 8, progress: bool = True
) -> pd.DataFrame:
    """Ask each question, and list the sub-words that the model's answer consists of.

    Returns:
        One row per sample with `SUBWORD_COLUMNS`: the answer as the model gives it, the number of its
        sub-words, their texts and their token ids. An empty answer has none.
    """
    rows: list[dict[str, Any]] = []
    for sample in tqdm(list(samples), desc="Sub-words", unit="question", disable=not progress):
        tokens = answer_tokens(model, encode(model, sample), max_new_tokens=max_new_tokens)
        row = {"sample_id": sample.sample_id, "image_id": sample.image_id, "task": sample.task}
        row |= {"answer": model.tokenizer.decode(list(tokens)).strip(), "n_subwords": len(tokens)}
        row |= {"subwords": [model.tokenizer.decode([token]) for token in tokens], "token_ids": list(tokens)}
        rows.append(row)
    return pd.DataFrame(rows, columns=list(SUBWORD_COLUMNS))


def at_last_subword(said: pd.DataFrame) -> Callable[[VLM, Sample], Encoded]:
    """Make an encoder whose `last` predicts the last sub-word of the answer, for `knockout_sweep` (App. C).

    The earlier sub-words are appended to the prompt as the tokens that the model generated, and `last` moves
    to the last of these. The others are in no set but `after_question` and `after_image`: what they gathered stays
    within reach. An answer of one sub-word is encoded as ever. The options' logit difference still compares first ones.

    Args:
        said: From `answer_subwords`.

    Raises:
        ValueError: From the encoder: a sample that `said` doesn't hold, or that was answered with nothing.
    """
    tokens = {sample_id: list(map(int, ids)) for sample_id, ids in zip(said.sample_id, said.token_ids, strict=True)}
    return partial(_encode_to_last_subword, tokens=tokens)


def _encode_to_last_subword(model: VLM, sample: Sample, *, tokens: Mapping[str, Sequence[int]]) -> Encoded:
    found = tokens.get(sample.sample_id)
    if not found:
        held = "no answer" if found is None else "an empty answer"
        raise ValueError(
            f"Expected the answer's sub-words for sample {sample.sample_id}, got {held}: pass the frame "
            "of answer_subwords for these samples, and leave out those with n_subwords of 0."
        )
    return encode(model, sample, answer_prefix=found[:-1])


def long_answers(model: VLM, samples: Iterable[Sample]) -> list[Sample]:
    """Keep the samples whose labeled answer, capitalized, is cut into several sub-words by the tokenizer.

    They are candidates: what the model really says is for `answer_subwords` to count.
    """
    return [
        sample
        for sample in samples
        if len(model.tokenizer.encode(sample.answer.strip().capitalize(), add_special_tokens=False)) > 1
    ]
