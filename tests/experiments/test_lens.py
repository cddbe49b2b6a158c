"""The lens says what the library's own hidden states say, under each protocol, and knows where it ends."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import PROMPT, tiny_sample, tiny_vlm

from mmflow_utils.analysis.stats import summarize
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments.lens import LENS_COLUMNS, LENS_WORDS, lens_logits, logit_lens
from mmflow_utils.prompts.encoding import encode


def lens_of(model, samples, **options):
    return logit_lens(model, samples, progress=False, **options)


def run(model, samples, **options):
    return lens_of(model, samples, **options).frame


def library_states(model, sample):
    """The library's hidden states at the last position, after each layer; the last one is normed."""
    with torch.inference_mode():
        out = model.hf(**encode(model, sample).inputs, output_hidden_states=True)
    return torch.stack([state[0, -1] for state in out.hidden_states[1:]]), out.logits[0, -1]


def norm_by_hand(model, states):
    scale = torch.rsqrt((states**2).mean(-1, keepdim=True) + model.text.config.rms_norm_eps)
    return states * scale * model.final_norm.weight


def paper_lens(model, states):
    return states @ model.unembed.weight.T


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_each_row_is_what_the_librarys_states_say(family, tmp_path):
    model, sample = tiny_vlm(family, n_kv_heads=2), tiny_sample(tmp_path)
    result = lens_of(model, [sample])
    frame = result.frame
    states, logits = library_states(model, sample)
    by_hand = {
        "paper": paper_lens(model, states),
        "corrected": torch.cat([norm_by_hand(model, states[:-1]), states[-1:]]) @ model.unembed.weight.T,
    }
    spelled = dict(zip(LENS_WORDS, ("Left", "left", "right", "Right"), strict=True))
    assert tuple(frame.columns) == LENS_COLUMNS and len(frame) == 2 * 4 * model.n_layers
    for (protocol, word), part in frame.groupby(["protocol", "word"]):
        assert part.layer.tolist() == [0, 1, 2, 3]
        token = model.tokenizer.encode(spelled[word], add_special_tokens=False)[0]
        probability = by_hand[protocol].softmax(-1)
        assert np.allclose(part.probability, probability[:, token], rtol=1e-4)
        assert np.allclose(part.logprob, probability[:, token].log(), atol=1e-4)
        order = by_hand[protocol].argsort(-1, descending=True)
        assert part["rank"].tolist() == [row.tolist().index(token) + 1 for row in order]
        assert part.top_token.tolist() == [model.tokenizer.decode([row[0]]) for row in order.tolist()]
        assert part.token.unique().tolist() == [model.tokenizer.decode([token])]
    end = frame[(frame.layer == 3) & (frame.word == LENS_WORDS[0])]
    token = model.first_token_id("Left")
    assert np.allclose(end.probability, logits.softmax(-1)[token], rtol=1e-4)
    assert result.max_check_diff < 1e-6 and result.skipped == []


def test_a_word_counts_with_and_without_its_space_where_these_are_two_tokens(tmp_path):
    model, sample = tiny_vlm(prompt=PROMPT + "\n"), tiny_sample(tmp_path)
    spelled = dict(zip(LENS_WORDS, ("Left", "left", "right", "Right"), strict=True))
    frame = run(model, [sample], protocol="corrected")
    states, _ = library_states(model, sample)
    logits = torch.cat([norm_by_hand(model, states[:-1]), states[-1:]]) @ model.unembed.weight.T
    order = logits.argsort(-1, descending=True).argsort(-1) + 1
    for word, part in frame.groupby("word"):
        tokens = list(model.first_token_ids(spelled[word]))
        assert len(set(tokens)) == len(tokens) > 1 and tokens[0] == model.first_token_id(spelled[word])
        assert np.allclose(part.probability, logits.softmax(-1)[:, tokens].sum(-1), rtol=1e-4)
        assert np.allclose(part.logprob, np.log(part.probability))
        assert part["rank"].tolist() == order[:, tokens].min(-1).values.tolist()
        likelier = [tokens[n] for n in logits[:, tokens].argmax(-1)]
        assert part.token.tolist() == [model.tokenizer.decode([token]) for token in likelier]
    paper = run(model, [sample], protocol="paper").query("word == 'Noncapitalized answer'")
    assert np.allclose(
        paper.probability, paper_lens(model, states).softmax(-1)[:, model.first_token_id("left")], rtol=1e-4
    )
    assert model.first_token_ids("left") == model.first_token_ids("left hand"), "one that begins alike is skipped"
    result = lens_of(model, [replace(sample, option_false="left hand")])
    assert {skipped["word"] for skipped in result.skipped} == set(LENS_WORDS[2:])


def test_the_protocols_part_everywhere_but_at_the_end(tmp_path):
    frame = run(tiny_vlm(), [tiny_sample(tmp_path)])
    wide = frame.pivot(index=["word", "layer"], columns="protocol", values="probability").reset_index()
    apart = (wide.corrected / wide.paper - 1).abs()
    assert (apart[wide.layer == 3] < 1e-6).all() and apart[wide.layer < 3].min() > 1e-3
    norms = frame[frame.word == LENS_WORDS[0]].groupby("protocol").norm.agg(list)
    assert norms["paper"] == ["none"] * 3 + ["final norm"] and norms["corrected"] == ["final norm"] * 4
    with pytest.raises(ValueError, match="mixes several values of 'protocol'"):
        summarize(frame, "probability", by=("word", "layer"), n_boot=100)


def test_a_model_whose_layers_add_nothing_says_the_same_after_each(tmp_path):
    model = tiny_vlm()
    for n in range(model.n_layers):
        for part in (model.output_proj(n), model.mlp(n).down_proj):
            part.weight.zero_()
    sample = tiny_sample(tmp_path)
    frame = run(model, [sample], protocol="corrected")
    assert np.allclose(frame.groupby("word").probability.agg(np.ptp), 0, atol=1e-9)
    # Negative control: the paper's last point jumps though no layer did anything.
    paper = run(model, [sample], protocol="paper").pivot(index="layer", columns="word", values="logprob")
    jumps = paper.diff().abs().max(axis=1)
    assert jumps[1] == jumps[2] == 0 and jumps[3] > 0.1


def test_options_that_are_absent_or_begin_like_the_answer_are_left_out(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    result = lens_of(model, [replace(sample, option_true=None, option_false=None)])
    assert set(result.frame.word) == set(LENS_WORDS[:2]) and result.skipped == []
    twin = model.tokenizer.convert_ids_to_tokens(model.first_token_id("left"))
    assert model.first_token_id("left hand") == model.first_token_id("left"), twin
    result = lens_of(model, [replace(sample, option_false="left hand")])
    assert "False option" not in set(result.frame.word)
    (first, *_) = result.skipped
    assert first["sample_id"] == "q1" and "'left hand' begins with the same token" in first["reason"]


def test_case_of_the_label_does_not_matter(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    pd.testing.assert_frame_equal(run(model, [sample]), run(model, [replace(sample, answer="LEFT")]))


def test_a_lens_that_does_not_end_in_the_models_output_is_refused(tmp_path, monkeypatch):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    shifted = torch.nn.Linear(32, 32)
    monkeypatch.setattr(type(model), "final_norm", shifted)
    with pytest.raises(ValueError, match="Norm and unembedding and the library's own output differ"):
        run(model, [sample])


def test_half_precision_reads_its_own_stream(tmp_path):
    sample = tiny_sample(tmp_path)
    exact, rough = (lens_of(tiny_vlm(dtype=kind), [sample]) for kind in (torch.float32, torch.bfloat16))
    assert np.allclose(exact.frame.probability, rough.frame.probability, atol=0.03)
    assert rough.max_check_diff < 1e-6


def test_nothing_in_nothing_out_and_wrong_names_are_told(tmp_path):
    model = tiny_vlm()
    result = lens_of(model, [])
    assert result.frame.empty and tuple(result.frame.columns) == LENS_COLUMNS and result.max_check_diff is None
    stream = run_reference(model, encode(model, tiny_sample(tmp_path)), []).resid_post
    with pytest.raises(ValueError, match="one of corrected, paper, got 'normed'"):
        lens_logits(model, stream, protocol="normed")
    with pytest.raises(ValueError, match="got 'both'"):
        run(model, [], protocol="both")
