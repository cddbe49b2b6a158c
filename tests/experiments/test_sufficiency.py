"""What is left when all but some flows are cut: just the kept edges, and then just their answers."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.engine.checks import attention_pattern
from mmflow_utils.engine.reference import intervene, run_reference
from mmflow_utils.experiments.sufficiency import COLUMNS, all_but, keep_flows
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_TO_QUESTION,
    NO_PICTURE,
    NO_QUESTION,
    Flow,
    variants,
    whole_depth,
)

IMAGE, QUESTION, EVERY = IMAGE_TO_QUESTION[0], FLOW_TO_LAST[0], range(4)
KEPT = {
    "nothing": [],
    "everything": [(NO_PICTURE[0], EVERY), (NO_QUESTION[0], EVERY)],
    "two stages": [(IMAGE, range(1, 3)), (QUESTION, range(3, 4))],
}


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_just_the_kept_edges_carry_attention(family, tmp_path):
    model = tiny_vlm(family, n_kv_heads=2)
    encoded = encode(model, tiny_sample(tmp_path))
    spans, n_tokens = encoded.positions, encoded.positions.n_tokens
    with ExitStack() as stack:
        for cut in all_but(spans, KEPT["two stages"], n_layers=4):
            stack.enter_context(intervene(model, cut, n_tokens))
        patterns = [attention_pattern(model, encoded, layer) for layer in EVERY]
    for layer, pattern in enumerate(patterns):
        expected = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        for source, target in (("image", "after_image"), ("question", "after_question")):
            expected[np.ix_(spans[target], spans[source])] = False
        for flow, layers in KEPT["two stages"]:
            if layer in layers:
                expected[np.ix_(spans[flow.target], spans[flow.source])] = True
        expected &= torch.ones_like(expected).tril()
        assert torch.equal((pattern > 0).all(0), expected) and torch.equal((pattern > 0).any(0), expected)


def test_everything_kept_changes_nothing_and_nothing_kept_is_both_floors_at_once(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    result = keep_flows(model, [sample], KEPT, progress=False)
    frame, encoded = result.frame.set_index("kept"), encode(model, sample)
    assert tuple(result.frame) == COLUMNS and list(frame.index) == list(KEPT) and not result.skipped
    whole = frame.loc["everything"]
    assert whole.p_kept == whole.p_base and whole.correct_pct == 100
    with ExitStack() as stack:
        for cut in variants(encoded.positions, NO_PICTURE + NO_QUESTION, n_layers=4, **whole_depth(4)):
            stack.enter_context(intervene(model, cut, encoded.positions.n_tokens))
        floor = run_reference(model, encoded, []).base.softmax(-1)
    token = run_reference(model, encoded, []).base.argmax()
    assert np.isclose(frame.loc["nothing"].p_kept, floor[token], atol=1e-6)
    assert abs(frame.loc["two stages"].p_kept - frame.loc["nothing"].p_kept) > 1e-6


def test_a_flow_that_a_prompt_lacks_is_skipped_with_its_reason(tmp_path):
    sample = tiny_sample(tmp_path, objects=())
    related = Flow(source="image_related", target="question")
    result = keep_flows(tiny_vlm(), [sample], {"related": [(related, EVERY)], "nothing": []}, progress=False)
    assert result.frame.kept.tolist() == ["nothing"]
    assert result.skipped[0]["choice"] == "related" and "no object" in result.skipped[0]["reason"]
