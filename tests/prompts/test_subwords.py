"""What the model says is cut as it said it, and the last sub-word is asked for where it is predicted."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST
from mmflow_utils.prompts.subwords import (
    SUBWORD_COLUMNS,
    answer_subwords,
    answer_tokens,
    at_last_subword,
    long_answers,
)


def speaking(monkeypatch, model, *tokens):
    """Make the model answer with these tokens, whatever it is asked."""

    def generate(input_ids, max_new_tokens, **_):
        return torch.cat([input_ids, torch.tensor([tokens[:max_new_tokens]])], dim=1)

    monkeypatch.setattr(model.hf, "generate", generate)


def ids(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


def test_the_answer_is_what_greedy_decoding_says(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    encoded = encode(model, sample)
    tokens = answer_tokens(model, encoded, max_new_tokens=3)
    with torch.inference_mode():
        for n, token in enumerate(tokens):
            grown = encode(model, sample, answer_prefix=tokens[:n])
            assert int(model.hf(**grown.inputs).logits[0, -1].argmax()) == token
    assert 1 <= len(tokens) <= 3


def test_what_ends_an_answer_is_not_part_of_it(tmp_path, monkeypatch):
    model, encoded = (m := tiny_vlm()), encode(m, tiny_sample(tmp_path))
    left, end, blank = ids(model, "Left Blue"), model.tokenizer.eos_token_id, ids(model, "\n")
    assert len(left) > 1
    for said in ([*left, end], [*left, *blank, end], [*left, end, *left], left):
        speaking(monkeypatch, model, *said)
        assert list(answer_tokens(model, encoded)) == left
    speaking(monkeypatch, model, end, *left)
    assert answer_tokens(model, encoded) == ()


def test_sub_words_are_listed_with_their_texts(tmp_path, monkeypatch):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    said = ids(model, "Left Blue")
    speaking(monkeypatch, model, *said, model.tokenizer.eos_token_id)
    frame = answer_subwords(model, [sample], progress=False)
    assert tuple(frame.columns) == SUBWORD_COLUMNS
    row = frame.iloc[0]
    assert (row.answer, row.n_subwords, row.token_ids) == ("Left Blue", len(said), said)
    assert row.subwords == [model.tokenizer.decode([token]) for token in said]
    assert tuple(answer_subwords(model, [], progress=False).columns) == SUBWORD_COLUMNS


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_knockout_is_measured_on_the_last_sub_word(family, tmp_path):
    model, sample = tiny_vlm(family, n_kv_heads=2), tiny_sample(tmp_path)
    said = answer_subwords(model, [sample], max_new_tokens=3, progress=False)
    tokens = said.token_ids[0]
    assert len(tokens) == 3
    encoder = at_last_subword(said)
    first, last = encode(model, sample), encoder(model, sample)
    assert last.positions.last == first.positions.last + 2 and last.positions["question"] == first.positions["question"]
    assert last.inputs["input_ids"][0, -2:].tolist() == tokens[:2]
    frame = knockout_sweep(model, [sample], FLOW_TO_LAST, window=2, encoder=encoder, n_check=1, progress=False).frame
    assert set(frame.token) == {said.subwords[0][-1]}
    plain = knockout_sweep(model, [sample], FLOW_TO_LAST, window=2, n_check=0, progress=False).frame
    assert set(plain.token) == {said.subwords[0][0]}
    assert not np.allclose(frame.rel_change_pct, plain.rel_change_pct)


def test_an_answer_of_one_sub_word_is_the_plain_experiment(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    said = answer_subwords(model, [sample], max_new_tokens=1, progress=False)
    assert said.n_subwords.tolist() == [1]
    one, plain = (
        knockout_sweep(model, [sample], FLOW_TO_LAST, window=2, n_check=0, progress=False, **options).frame
        for options in ({"encoder": at_last_subword(said)}, {})
    )
    pd.testing.assert_frame_equal(one, plain)


@pytest.mark.parametrize(("tokens", "message"), [(None, "got no answer"), ([], "got an empty answer")])
def test_a_sample_without_an_answer_is_refused(tokens, message, tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    said = pd.DataFrame({"sample_id": ["q1" if tokens is not None else "q2"], "token_ids": [tokens or []]})
    with pytest.raises(ValueError, match=f"sub-words for sample q1, {message}"):
        at_last_subword(said)(model, sample)


def test_long_answers_are_those_the_tokenizer_cuts(tmp_path):
    model = tiny_vlm()
    samples = [tiny_sample(tmp_path, sample_id=word, answer=word) for word in ("left", "xylophone", "red wood")]
    assert len(ids(model, "Left")) == 1
    assert [sample.sample_id for sample in long_answers(model, samples)] == ["xylophone", "red wood"]
