"""The lens says what the library's own hidden states say, under each protocol, and knows where it ends."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.analysis.stats import summarize
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments.lens import (
    LENS_COLUMNS,
    LENS_WORDS,
    decision_curves,
    decision_layers,
    describe_decisions,
    lens_logits,
    logit_lens,
)
from mmflow_utils.plots.style import WORD_COLORS
from mmflow_utils.prompts.encoding import encode


def run(model, samples, **options):
    return logit_lens(model, samples, progress=False, **options)


def library_states(model, sample):
    """The library's hidden states at the last position, after each layer; the last one is normed."""
    with torch.inference_mode():
        out = model.hf(**encode(model, sample).inputs, output_hidden_states=True)
    return torch.stack([state[0, -1] for state in out.hidden_states[1:]]), out.logits[0, -1]


def norm_by_hand(model, states):
    scale = torch.rsqrt((states**2).mean(-1, keepdim=True) + model.text.config.rms_norm_eps)
    return states * scale * model.final_norm.weight


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_each_row_is_what_the_librarys_states_say(family, tmp_path):
    model, sample = tiny_vlm(family, n_kv_heads=2), tiny_sample(tmp_path)
    frame = run(model, [sample])
    states, logits = library_states(model, sample)
    by_hand = {
        "paper": states @ model.unembed.weight.T,
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
    assert frame.attrs["max_check_diff"] < 1e-6 and frame.attrs["skipped"] == []


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
    frame = run(model, [replace(sample, option_true=None, option_false=None)])
    assert set(frame.word) == set(LENS_WORDS[:2]) and frame.attrs["skipped"] == []
    twin = model.tokenizer.convert_ids_to_tokens(model.first_token_id("left"))
    assert model.first_token_id("left hand") == model.first_token_id("left"), twin
    frame = run(model, [replace(sample, option_false="left hand")])
    assert "False option" not in set(frame.word)
    (first, *_) = frame.attrs["skipped"]
    assert first["sample_id"] == "q1" and "'left hand' begins with the same token" in first["reason"]


def test_case_of_the_label_does_not_matter(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    pd.testing.assert_frame_equal(run(model, [sample]), run(model, [replace(sample, answer="LEFT")]))


def test_a_lens_that_does_not_end_in_the_models_output_is_refused(tmp_path, monkeypatch):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    shifted = torch.nn.Linear(32, 32)
    monkeypatch.setattr(type(model), "final_norm", shifted)
    with pytest.raises(ValueError, match="After the last layer the lens differs"):
        run(model, [sample])


def test_half_precision_reads_its_own_stream(tmp_path):
    sample = tiny_sample(tmp_path)
    exact, rough = (run(tiny_vlm(dtype=kind), [sample]) for kind in (torch.float32, torch.bfloat16))
    assert np.allclose(exact.probability, rough.probability, atol=0.03)
    assert rough.attrs["max_check_diff"] < 1e-6


def test_nothing_in_nothing_out_and_wrong_names_are_told(tmp_path):
    model = tiny_vlm()
    frame = run(model, [])
    assert frame.empty and tuple(frame.columns) == LENS_COLUMNS and frame.attrs["max_check_diff"] is None
    stream = run_reference(model, encode(model, tiny_sample(tmp_path)), []).resid_post
    with pytest.raises(ValueError, match="one of corrected, paper, got 'normed'"):
        lens_logits(model, stream, protocol="normed")
    with pytest.raises(ValueError, match="got 'both'"):
        run(model, [], protocol="both")
    with pytest.raises(ValueError, match="without rank"):
        decision_layers(frame.drop(columns="rank"))


def ranks(capitalized, noncapitalized, sample_id="a", task="T"):
    rows = []
    for word, values in zip(LENS_WORDS, (capitalized, noncapitalized, [1] * len(capitalized)), strict=False):
        rows += [{"word": word, "layer": n, "rank": rank} for n, rank in enumerate(values)]
    same = {"sample_id": sample_id, "image_id": "i", "task": task, "protocol": "paper"}
    return pd.DataFrame(rows).assign(**same)


@pytest.mark.parametrize(
    ("capitalized", "noncapitalized", "expected"),
    [
        # capitalized first, settled; noncapitalized first, settled; either case first, settled
        ([9, 1, 5, 1, 1], [2, 2, 2, 2, 2], (1, 3, None, None, 1, 3)),
        ([9, 9, 2, 1, 1], [9, 1, 1, 2, 2], (3, 3, 1, None, 1, 1)),  # from the meaning to the form
        ([1, 1, 1, 1, 1], [2, 2, 2, 2, 3], (0, 0, None, None, 0, 0)),
        ([1, 1, 1, 1, 2], [2, 2, 2, 2, 3], (0, None, None, None, 0, None)),  # lost at the very end
        ([9, 9, 9, 9, 1], [9, 9, 9, 9, 9], (4, 4, None, None, 4, 4)),
    ],
)
@pytest.mark.parametrize("task", ["T", None])
def test_first_and_settled_layers_by_hand(capitalized, noncapitalized, expected, task):
    frame = ranks(capitalized, noncapitalized, task=task).sample(frac=1, random_state=0)
    table = decision_layers(frame).set_index("word").loc[[*LENS_WORDS[:2], "Either case"]]
    found = table[["first_layer", "settled_layer"]].to_numpy().ravel()
    assert np.array_equal(found, np.array(expected, dtype=float), equal_nan=True)


def test_decisions_keep_samples_apart(tmp_path):
    both = pd.concat([ranks([1, 1], [2, 2], "a"), ranks([2, 1], [1, 2], "b")])
    table = decision_layers(both).query("word == 'Capitalized answer'").set_index("sample_id")
    assert table.settled_layer.to_dict() == {"a": 0.0, "b": 1.0}
    real = decision_layers(run(tiny_vlm(), [tiny_sample(tmp_path)]))
    assert len(real) == 2 * 3 and not (real.first_layer > real.settled_layer).any()


def test_decision_curves_count_from_the_layer_on():
    table = decision_layers(pd.concat([ranks([9, 1, 5, 1], [2] * 4, "a"), ranks([9] * 4, [2] * 4, "b")]))
    drawn = decision_curves(table[table.word == "Either case"], n_layers=4)
    share = drawn.groupby(["sample_id", "event"]).share_pct.agg(list)
    assert share["a", "Was on top"] == [0, 100, 100, 100]
    assert share["a", "Stays on top"] == [0, 0, 0, 100]
    assert share["b", "Was on top"] == share["b", "Stays on top"] == [0] * 4
    assert set(drawn.event) < set(WORD_COLORS) and set(LENS_WORDS) < set(WORD_COLORS)
    assert len(drawn) == 2 * 2 * 4 and "settled_layer" not in drawn


def test_decisions_are_described_with_n_and_a_null_result_as_one():
    settled = [ranks([9, 1, 5, 1], [2] * 4, "a"), ranks([9, 1, 1, 1], [2] * 4, "b").assign(image_id="j")]
    (line,) = describe_decisions(decision_layers(pd.concat([*settled, ranks([9] * 4, [2] * 4, "c")])))
    assert line.startswith("T, paper lens: on average the answer first becomes the most probable word after layer")
    assert "after layer 1.0 and stays so from layer 2.0 on (95 % interval " in line
    assert line.endswith("2 of 3 samples, on 2 images).")
    (line,) = describe_decisions(decision_layers(ranks([9] * 4, [2] * 4)))
    assert line == "T, paper lens: the answer is never the most probable word to the end (0 of 1 samples)."
