"""Jaccard by hand; words as the reference's logits give them; zeroed modules leave what must be left."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.analysis.stats import summarize
from mmflow_utils.engine.packed_pass import PackedPass
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments.semantics import (
    SEMANTICS_COLUMNS,
    jaccard,
    module_knockout,
    question_semantics,
    top_words,
)
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import IMAGE_PATCHES_TO_QUESTION, Flow, Variant

EVERY = range(4)


def ready(folder, family="llava", **options):
    model = tiny_vlm(family, **options)
    return model, encode(model, tiny_sample(folder))


@pytest.mark.parametrize(
    ("original", "intervened", "pairs", "pooled"),
    [
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], 1, 1),
        ([[1, 2], [3, 4]], [[2, 1], [4, 3]], 1, 1),  # their order doesn't count
        ([[1, 2], [3, 4]], [[3, 4], [1, 2]], 0, 1),  # the same words at other positions
        ([[1, 2], [1, 2]], [[1, 2], [5, 6]], 2 / 6, 2 / 4),
        ([[1, 2]], [[3, 4]], 0, 0),
    ],
)
def test_jaccard_by_hand(original, intervened, pairs, pooled):
    a, b = torch.tensor(original), torch.tensor(intervened)
    assert jaccard(a, b) == pytest.approx(pairs)
    assert jaccard(a, b, pooled=True) == pytest.approx(pooled)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
def test_jaccard_is_symmetric_bounded_and_blind_to_order(seed, n, pooled):
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(np.stack([rng.permutation(12)[:4] for _ in range(n)])) for _ in range(2))
    value = jaccard(a, b, pooled=pooled)
    assert 0 <= value <= 1 and value == jaccard(b, a.flip(-1), pooled=pooled)
    assert jaccard(a, a.flip(-1), pooled=pooled) == 1


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_words_are_those_of_the_references_logits(family, tmp_path):
    model, encoded = ready(tmp_path, family, n_kv_heads=2)
    spans = encoded.positions
    question = spans["question"]
    rows = [
        Variant(layers=range(1, 3), target=question, intervention="mlp_output"),
        Variant(layers=range(0, 2), target=question, intervention="attention_output"),
        Variant(layers=range(0, 3), target=question, source=spans["image"]),
    ]
    base, changed = top_words(model, encoded, rows, positions=question, top_k=5)
    assert base.shape == (len(question), 5) and changed.shape == (3, len(question), 5)
    for n, position in list(enumerate(question))[::5]:
        run = run_reference(model, encoded, rows, read=position)
        assert base[n].tolist() == run.base.topk(5).indices.tolist()
        assert changed[:, n].tolist() == run.variants.topk(5).indices.tolist()
    assert not any(torch.equal(base, words) for words in changed)


def test_modules_that_can_be_read_once_are_all_zeroed(tmp_path):
    model, encoded = ready(tmp_path)
    names = iter(["attention_output", "mlp_output"])
    frame = module_knockout(model, [encoded.sample], names, window=1, layers=[1], n_check=0, progress=False).frame
    assert frame.knockout.tolist() == ["Attention", "MLP"]


def test_a_position_without_modules_says_what_its_embedding_says(tmp_path):
    model, encoded = ready(tmp_path)
    for n in EVERY:
        model.mlp(n).down_proj.weight.zero_()  # so attention is all that moves a position
    question = encoded.positions["question"]
    zeroed = Variant(layers=EVERY, target=question, intervention="attention_output")
    base, changed = top_words(model, encoded, [zeroed], positions=question)
    ids = encoded.inputs["input_ids"][0, list(question)]
    alone = model.unembed(model.final_norm(model.text.embed_tokens.weight[ids])).topk(10).indices
    assert changed[0].tolist() == alone.tolist()
    frame = module_knockout(model, [encoded.sample], ["attention_output"], window=4, layers=[0], progress=False).frame
    common = sum(len({*a} & {*b}) for a, b in zip(base.tolist(), alone.tolist(), strict=True))
    assert frame.jaccard.tolist() == pytest.approx([common / (20 * len(question) - common)])
    assert 0 < frame.jaccard[0] < 1


def test_what_can_not_reach_the_question_changes_no_word(tmp_path):
    model, encoded = ready(tmp_path)
    spans, question = encoded.positions, encoded.positions["question"]
    rows = [
        Variant(layers=EVERY, target=spans["last"], intervention="mlp_output"),  # later than the question
        Variant(layers=EVERY, target=spans["last"], source=spans["image"]),
        Variant(layers=range(3, 4), target=spans["image"], intervention="mlp_output"),  # in the last layer
        Variant(layers=range(2, 2), target=question, intervention="mlp_output"),  # in no layer
        Variant(layers=range(2, 3), target=spans["image"], intervention="mlp_output"),  # control: one earlier
    ]
    base, changed = top_words(model, encoded, rows, positions=question)
    assert [jaccard(base, words) == 1 for words in changed] == [True] * 4 + [False]


@pytest.mark.parametrize(("module", "name"), [("attention_output", "Attention"), ("mlp_output", "MLP")])
def test_zeroing_a_module_that_adds_nothing_changes_nothing(module, name, tmp_path):
    model, encoded = ready(tmp_path)
    for n in EVERY:
        (model.output_proj(n) if name == "Attention" else model.mlp(n).down_proj).weight.zero_()
    frame = module_knockout(model, [encoded.sample], window=2, progress=False).frame
    dead = frame[frame.intervention == module]
    assert dead.knockout.unique().tolist() == [name] and (dead.jaccard == 1).all()
    assert (frame[frame.intervention != module].jaccard < 1).all()


def test_frames_of_both_experiments(tmp_path):
    model = tiny_vlm("llava_next", n_kv_heads=2)
    samples = [tiny_sample(tmp_path, sample_id=f"q{n}", seed=n, size=(30 + 8 * n, 30)) for n in range(2)]
    zeroed = module_knockout(model, samples, window=3, progress=False)
    cut = question_semantics(model, samples, window=3, progress=False)
    assert zeroed.skipped == cut.skipped == []
    zeroed, cut = zeroed.frame, cut.frame
    for frame, n_knockouts, n_blocked in ((zeroed, 2, [3, 3, 2, 1]), (cut, 1, [2, 3, 3, 2])):
        assert tuple(frame.columns) == SEMANTICS_COLUMNS and len(frame) == 2 * n_knockouts * 4
        assert frame.n_layers_blocked.tolist() == n_blocked * 2 * n_knockouts  # forward; centered
        assert frame.layer.tolist() == [0, 1, 2, 3] * 2 * n_knockouts
        assert frame.jaccard.between(0, 1, inclusive="left").all()
        assert not frame.pooled.any()
    assert cut.knockout.unique().tolist() == ["Image -> Question"]
    assert zeroed.n_positions.tolist() == [
        len(encode(model, s).positions["question"]) for s in samples for _ in range(8)
    ]
    summary = summarize(zeroed, "jaccard", by=("task", "knockout", "layer"), n_boot=100)
    assert (summary.n == 2).all() and (summary.n_clusters == 2).all()


def test_parameters_reach_the_measure(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    plain = question_semantics(model, [sample], window=3, progress=False).frame
    pooled = question_semantics(model, [sample], window=3, pooled=True, progress=False).frame
    assert pooled.pooled.all() and (plain.jaccard != pooled.jaccard).all()
    some = question_semantics(model, [sample], window=3, top_k=1, layers=[2, 0], progress=False).frame
    assert some.layer.tolist() == [2, 0] and (some.top_k == 1).all()
    hits = some.jaccard * 2 * some.n_positions / (1 + some.jaccard)  # whole words in common
    assert np.allclose(hits, hits.round())
    values = question_semantics(model, [sample], window=3, intervention="zero_value", progress=False).frame
    assert not np.allclose(values.jaccard, plain.jaccard)
    every = model.unembed.weight.shape[0]
    whole = module_knockout(model, [sample], window=3, top_k=every, layers=[0], progress=False).frame
    assert (whole.jaccard == 1).all()  # the whole vocabulary is always the same


def test_the_two_ways_find_the_same_and_a_wrong_sweep_is_stopped(tmp_path, monkeypatch):
    model, sample = tiny_vlm("llava_next", n_kv_heads=2), tiny_sample(tmp_path)
    for measure in (module_knockout, question_semantics):
        ours = measure(model, [sample], window=3, progress=False)
        plain = measure(model, [sample], window=3, method="reference", progress=False)
        assert np.allclose(ours.frame.jaccard, plain.frame.jaccard, atol=0.02)
        assert ours.max_check_diff <= 0.02 and plain.max_check_diff is None
        assert measure(model, [sample], window=3, n_check=0, progress=False).max_check_diff is None
    monkeypatch.setattr(PackedPass, "_blocks", lambda packed, i, here, begins: whole(packed, 0, here, begins))
    with pytest.raises(ValueError, match="method='reference'"):
        question_semantics(model, [sample], window=1, progress=False)


whole = PackedPass._blocks  # as if every window began at layer 0


def test_what_a_prompt_lacks_is_skipped_with_its_reason(tmp_path):
    model, sample = tiny_vlm(), tiny_sample(tmp_path)
    samples = [sample, replace(sample, sample_id="q2", objects=())]
    result = question_semantics(model, samples, IMAGE_PATCHES_TO_QUESTION, window=3, progress=False)
    assert set(result.frame.sample_id) == {"q1"}
    skipped = result.skipped
    assert [s["sample_id"] for s in skipped] == ["q2", "q2"] and "no object" in skipped[0]["reason"]
    empty = module_knockout(model, samples[1:], window=3, positions="objects", progress=False)
    assert empty.frame.empty and tuple(empty.frame.columns) == SEMANTICS_COLUMNS and len(empty.skipped) == 2


def test_wrong_parameters_are_told(tmp_path):
    model, sample = tiny_vlm(), [tiny_sample(tmp_path)]
    options = {"window": 3, "progress": False}
    with pytest.raises(ValueError, match="questionn"):
        module_knockout(model, sample, positions="questionn", **options)
    with pytest.raises(ValueError, match="imagee"):
        question_semantics(model, sample, Flow(source="imagee", target="question"), **options)
    with pytest.raises(ValueError, match="top_k of 0"):
        module_knockout(model, sample, top_k=0, **options)
    with pytest.raises(ValueError, match="modules must be among"):
        module_knockout(model, sample, ["mask"], **options)
    with pytest.raises(ValueError, match="intervention must be one of mask"):
        question_semantics(model, sample, intervention="mlp_output", **options)
    with pytest.raises(ValueError, match="window"):
        module_knockout(model, sample, window=0, progress=False)
