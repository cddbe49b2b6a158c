"""Knockouts in chosen heads: the sweep against the plain way, and both against what must come out."""

from itertools import product

import pytest
import torch
from engines import KINDS, N_HEADS, N_LAYERS, TOLERANCE, assert_same, farthest, setting

from mmflow_utils.engine.checks import attention_pattern
from mmflow_utils.engine.plan import count_rows
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION, Variant, variants

pytestmark = pytest.mark.usefixtures("small_slices")
EVERY_HEAD = [*product(range(N_LAYERS), range(N_HEADS))]


def one_by_one(encoded, flow, intervention="mask"):
    """Cut a flow in each head of each layer alone."""
    source, target = encoded.positions[flow.source], encoded.positions[flow.target]
    edit = {"source": source, "target": target, "intervention": intervention}
    return [Variant(layers=range(layer, layer + 1), heads=((layer, head),), **edit) for layer, head in EVERY_HEAD]


@pytest.mark.parametrize(
    "kind", [kind if kind == "llava-gqa" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("flow", (*FLOW_TO_LAST[:2], *IMAGE_TO_QUESTION), ids=str)
def test_each_head_alone_is_the_references_and_no_other_heads(kind, flow):
    model, encoded = setting(kind)
    if flow.source not in encoded.positions:
        pytest.skip("this model sees no picture")
    some = one_by_one(encoded, flow)
    run = run_sweep(model, encoded, some)
    plain = run_reference(model, encoded, some)
    assert_same(run, plain)
    n_layers = N_LAYERS if flow.target == "last" else N_LAYERS - 1  # what other targets read last, nobody reads
    for n in range(0, n_layers * N_HEADS, N_HEADS):
        wrong = torch.roll(plain.variants[n : n + N_HEADS], 1, 0)  # another head of the same layer
        if kind != "sliding":  # where little reaches so far back
            assert farthest(run.variants[n : n + N_HEADS], wrong) > 10 * TOLERANCE


@pytest.mark.parametrize("engine", (run_sweep, run_reference))
@pytest.mark.parametrize("intervention", ("mask", "zero_value", "mean_value"))
def test_all_heads_together_are_the_plain_knockout_and_none_is_the_clean_run(engine, intervention):
    model, encoded = setting("llava-gqa")
    flows, options = (*FLOW_TO_LAST, *IMAGE_TO_QUESTION), {"window": 2, "n_layers": N_LAYERS}
    options["intervention"] = intervention
    plain, whole, none, but_one = (
        engine(model, encoded, variants(encoded.positions, flows, heads=heads, **options))
        for heads in (None, range(N_HEADS), (), range(1, N_HEADS))
    )
    assert farthest(whole.variants, plain.variants) < TOLERANCE
    assert farthest(none.variants, none.base.expand_as(none.variants)) < TOLERANCE
    assert farthest(but_one.variants, plain.variants) > 10 * TOLERANCE


def test_a_query_head_is_counted_among_query_heads_and_only_its_pattern_changes():
    model, encoded = setting("llava-gqa")
    image, question = encoded.positions["image"], encoded.positions["question"]
    cut = Variant(layers=range(1, 3), target=question, source=image, heads=((1, 3), (2, 0)))
    for layer, head in ((1, 3), (2, 0)):
        clean, blocked = (attention_pattern(model, encoded, layer, variant) for variant in (None, cut))
        assert not blocked[head][list(question)][:, list(image)].any()
        others = [n for n in range(N_HEADS) if n != head]
        if layer == 1:  # what enters the second layer differs already
            torch.testing.assert_close(blocked[others], clean[others])
        assert blocked[others][:, list(question)][..., list(image)].any()


def test_a_head_with_nothing_left_to_attend_to_gets_nothing():
    model, encoded = setting("llava-gqa")
    last = encoded.positions.last
    some = [
        Variant(layers=range(1, 3), target=(last,), source=tuple(range(last + 1)), heads=heads, intervention=name)
        for heads in (((1, 0),), ((1, 1), (2, 3)), tuple(product((1, 2), range(N_HEADS))))
        for name in ("mask", "zero_value")
    ]
    run = run_sweep(model, encoded, some)
    assert_same(run, run_reference(model, encoded, some))
    silent = Variant(layers=range(1, 3), target=(last,), intervention="attention_output")
    assert farthest(run.variants[-1], run_sweep(model, encoded, [silent]).variants[0]) < TOLERANCE
    assert farthest(run.variants[0], run.base) > 10 * TOLERANCE


def test_all_heads_of_all_layers_take_fewer_rows_than_a_clean_pass():
    n_layers, n_heads, n_tokens = 32, 32, 600
    some = [
        Variant(layers=range(at, at + 1), heads=((at, head),), target=(n_tokens - 1,), source=tuple(range(5, 581)))
        for at, head in product(range(n_layers), range(n_heads))
    ]
    counts = count_rows(some, n_tokens=n_tokens, n_layers=n_layers)
    assert counts["computed"] == n_heads * n_layers * (n_layers + 1) / 2 < 0.9 * counts["clean"]


@pytest.mark.parametrize(
    "fields",
    (
        {"heads": ((2, 0), (1, 0))},
        {"heads": ((1, 0), (1, 0))},
        {"heads": ((3, 0),)},
        {"heads": ((1, -1),)},
        {"heads": ((1, 0),), "source": (), "intervention": "mlp_output"},
    ),
)
def test_heads_that_are_none_of_the_variants_are_refused(fields):
    with pytest.raises(ValueError, match="heads"):
        Variant(**{"layers": range(1, 3), "target": (5,), "source": (1,)} | fields)
