"""Accuracy by group, and the layer from which the lens reads the answer."""

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.analysis.answers import decision_curves, decision_layers, describe_decisions, group_accuracy
from mmflow_utils.experiments.lens import LENS_WORDS, logit_lens
from mmflow_utils.plots.style import WORD_COLORS


def test_accuracy_by_hand():
    kinds = ["attr"] * 4 + ["rel"] * 2
    rows = [{"sample_id": n, "image_id": n // 2, "semantic": kind} for n, kind in enumerate(kinds)]
    asked = pd.DataFrame(rows).assign(structural="choose", prediction="Red", correct=[True] * 3 + [False] * 3)
    unusable = asked.iloc[[0]].assign(prediction=None, correct=False)
    table = group_accuracy(pd.concat([asked, unusable]), n_boot=200).set_index(["structural", "semantic"])
    assert table.accuracy_pct.to_dict() == {("choose", "attr"): 75.0, ("choose", "rel"): 0.0}
    # What went unheard isn't counted.
    assert table.n.tolist() == [4, 2] and table.n_clusters.tolist() == [2, 1]
    low, high = table.loc[("choose", "attr"), ["ci_low", "ci_high"]]
    assert 0 <= low <= 75 <= high <= 100


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
    real = decision_layers(logit_lens(tiny_vlm(), [tiny_sample(tmp_path)], progress=False).frame)
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
    (line,) = describe_decisions(decision_layers(ranks([9, 1, 1, 1], [2] * 4, task=None)))
    assert line.startswith("No task, paper lens: on average the answer first becomes")
    (line,) = describe_decisions(decision_layers(ranks([9] * 4, [2] * 4)))
    assert line == "T, paper lens: the answer is never the most probable word to the end (0 of 1 samples)."


def test_a_frame_without_ranks_is_refused():
    with pytest.raises(ValueError, match="without rank"):
        decision_layers(ranks([1], [2]).drop(columns="rank"))
