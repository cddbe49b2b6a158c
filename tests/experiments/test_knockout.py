"""The tidy frame says what the logits say, skips carry their reason, and a wrong sweep is caught."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.engine import sweep
from mmflow_utils.engine.reference import Run, run_reference
from mmflow_utils.experiments import curation, knockout, loop
from mmflow_utils.experiments.knockout import COLUMNS, WHOLE_DEPTH_COLUMNS, answer_rows, knockout_sweep, stays_first
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_ROUTES,
    IMAGE_TO_QUESTION,
    NO_PICTURE,
    NO_QUESTION,
    Flow,
    Variant,
    variants,
    whole_depth,
)

FLOWS = FLOW_TO_LAST + IMAGE_TO_QUESTION


def sweep_of(model, samples, flows=FLOWS, **options):
    return knockout_sweep(model, samples, flows, **{"window": 3, "progress": False, **options})


def run(*args, **options):
    return sweep_of(*args, **options).frame


def samples_of(folder, n=2):
    return [tiny_sample(folder, sample_id=f"q{i}", seed=i, size=(30 + 8 * i, 30)) for i in range(n)]


@pytest.fixture
def every_variant(monkeypatch):
    """Hold all variants of a checked sample against full passes."""
    monkeypatch.setattr(loop, "N_PLAIN", 10**6)


def test_each_row_is_what_its_logits_say(tmp_path):
    model, (sample,) = tiny_vlm("llava_next", n_kv_heads=2), samples_of(tmp_path, 1)
    frame = run(model, [sample], method="reference")
    assert tuple(frame.columns) == COLUMNS and len(frame) == len(FLOWS) * model.n_layers
    spans = encode(model, sample).positions
    planned = variants(spans, FLOWS, window=3, n_layers=model.n_layers)
    logits = run_reference(model, encode(model, sample), planned)
    base, changed = logits.base.softmax(-1), logits.variants.softmax(-1)
    token = base.argmax()
    assert np.allclose(frame.p_base, base[token], rtol=1e-5)
    assert np.allclose(frame.p_knockout, changed[:, token], rtol=1e-5)
    ratio = changed[:, token] / base[token]
    assert np.allclose(frame.rel_change_pct, 100 * (ratio - 1), atol=1e-3)
    assert np.allclose(frame.logprob_change, ratio.log(), atol=1e-5)
    assert frame.token.unique().tolist() == [model.tokenizer.decode([int(token)])]
    assert frame.flow.tolist() == [str(f) for f in FLOWS for _ in range(model.n_layers)]
    assert frame.n_layers_blocked.tolist() == [2, 3, 3, 2] * len(FLOWS)
    assert frame.layer.tolist() == [0, 1, 2, 3] * len(FLOWS)
    assert frame.rel_change_pct.abs().max() > 1


def test_sweep_and_reference_give_the_same_frame(tmp_path):
    model, samples = tiny_vlm(n_kv_heads=2), samples_of(tmp_path)
    fast, slow = (sweep_of(model, samples, method=method) for method in ("sweep", "reference"))
    assert fast.max_check_diff < 1e-5 and slow.max_check_diff is None
    fast, slow = fast.frame, slow.frame
    labels = list(COLUMNS[:10])
    pd.testing.assert_frame_equal(fast[labels], slow[labels])
    numbers = list(COLUMNS[10:])
    assert np.allclose(fast[numbers], slow[numbers], atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("intervention", ["zero_value", "mean_value", "attention_output", "mlp_output"])
def test_every_intervention_passes_its_own_check(intervention, tmp_path, every_variant):
    result = sweep_of(tiny_vlm("llava_next"), samples_of(tmp_path), intervention=intervention, n_check=9)
    assert result.max_check_diff < 1e-5
    assert result.frame.rel_change_pct.abs().max() > 1


def test_a_sweep_that_is_wrong_is_caught(tmp_path, monkeypatch):
    model, samples = tiny_vlm(), samples_of(tmp_path)
    right = sweep.run_sweep

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return replace(result, variants=result.variants + 0.1 * torch.arange(result.variants.shape[1]))

    monkeypatch.setattr(sweep, "run_sweep", wrong)
    with pytest.raises(ValueError, match="on sample q0, more than the tolerance"):
        run(model, samples)
    assert sweep_of(model, samples, tolerance=0.5).max_check_diff > 1e-4
    assert sweep_of(model, samples, n_check=0).max_check_diff is None


def test_a_check_takes_some_variants_of_every_flow_and_others_in_each_sample(tmp_path, monkeypatch):
    taken = []

    def noting(model, encoded, planned, **options):
        taken.append([(str(variant.flow), variant.layer) for variant in planned])
        return run_reference(model, encoded, planned, **options)

    monkeypatch.setattr(loop, "N_PLAIN", 4)
    monkeypatch.setattr(sweep, "run_reference", noting)
    model = tiny_vlm()
    run(model, samples_of(tmp_path, 4), n_check=3)
    assert len(taken) == 3  # the fourth is not checked
    assert all(3 <= len(set(some)) == len(some) <= 4 for some in taken)
    assert len({variant for some in taken for variant in some}) == sum(map(len, taken))
    assert {flow for some in taken for flow, _ in some} == set(map(str, FLOWS))
    assert {layer for some in taken for _, layer in some} == set(range(model.n_layers))


@pytest.mark.parametrize("at", range(3))
def test_one_variant_that_is_wrong_is_caught_where_it_is_looked_at(tmp_path, monkeypatch, at):
    model, samples = tiny_vlm(), samples_of(tmp_path, 3)
    right, calls = sweep.run_sweep, []

    def wrong(*args, **kwargs):  # in the variant with which the check of this sample begins
        result = right(*args, **kwargs)
        calls.append(len(calls))
        rows = result.variants.clone()
        rows[at] += (calls[-1] == at) * torch.arange(rows.shape[1])
        return replace(result, variants=rows)

    monkeypatch.setattr(sweep, "run_sweep", wrong)
    monkeypatch.setattr(loop, "N_PLAIN", 4)
    with pytest.raises(ValueError, match=f"on sample q{at}, more than the tolerance"):
        run(model, samples, n_check=3)


def test_a_sweep_that_gives_no_numbers_is_caught(tmp_path, monkeypatch):
    right = sweep.run_sweep
    monkeypatch.setattr(sweep, "run_sweep", lambda *a, **_: replace(right(*a), variants=right(*a).variants * math.nan))
    with pytest.raises(ValueError, match="differ by nan"):
        run(tiny_vlm(), samples_of(tmp_path))


def test_flows_that_a_prompt_lacks_are_skipped_with_their_reason(tmp_path):
    samples = samples_of(tmp_path)
    samples[1] = replace(samples[1], objects=())
    backwards = Flow(source="last", target="image")
    result = sweep_of(tiny_vlm(), samples, (*IMAGE_PATCHES_TO_QUESTION, backwards, FLOW_TO_LAST[0]))
    skipped = {(s["sample_id"], s["flow"]): s["reason"] for s in result.skipped}
    assert len(skipped) == 4
    assert "no object" in skipped["q1", "Related image patches -> Question"]
    assert "back in time" in skipped["q0", "Last -> Image"]
    assert result.frame.groupby("sample_id").flow.nunique().tolist() == [3, 1]


def test_a_name_that_no_prompt_knows_is_an_error_and_not_a_skip(tmp_path):
    with pytest.raises(ValueError, match="imagee"):
        run(tiny_vlm(), samples_of(tmp_path), Flow(source="imagee", target="last"))
    with pytest.raises(ValueError, match="method must be"):
        run(tiny_vlm(), [], method="fast")


def test_nothing_left_is_an_empty_frame_with_the_same_columns(tmp_path):
    model, (sample,) = tiny_vlm(), samples_of(tmp_path, 1)
    result = sweep_of(model, [replace(sample, objects=())], IMAGE_PATCHES_TO_QUESTION)
    assert result.frame.empty and tuple(result.frame.columns) == COLUMNS and len(result.skipped) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_answer_that_nothing_changes_stays_first(dtype):
    """A lead below what half precision rounds is still a lead where it is the intact run's own."""
    model, base = tiny_vlm(dtype=dtype), torch.tensor([0.525, 0.475]).log()
    variants = torch.stack([base, base.flip(0), torch.zeros(2)])
    assert stays_first(model, base, variants) == [True, False, False]


def test_logit_differences_compare_the_options_first_tokens(tmp_path):
    model, (sample,) = tiny_vlm(), samples_of(tmp_path, 1)
    frame = run(model, [sample], FLOW_TO_LAST[0])
    planned = variants(encode(model, sample).positions, FLOW_TO_LAST[:1], window=3, n_layers=4)
    logits = run_reference(model, encode(model, sample), planned)
    case = str.capitalize if frame.token[0].strip()[:1].isupper() else str.lower
    ids = [model.tokenizer.encode(case(w), add_special_tokens=False)[0] for w in ("left", "right")]
    diff = torch.cat([logits.base[None], logits.variants])[:, ids] @ torch.tensor([1.0, -1.0])
    assert np.allclose(frame.logit_diff_base, diff[0], atol=1e-4)
    assert np.allclose(frame.logit_diff_change, diff[1:] - diff[0], atol=1e-4)
    flipped = replace(sample, option_true="right", option_false="left")
    assert np.allclose(run(model, [flipped], FLOW_TO_LAST[0]).logit_diff_base, -diff[0], atol=1e-4)


@pytest.mark.parametrize("options", [(None, None), ("left", "left")])
def test_without_two_options_there_is_no_logit_difference(options, tmp_path):
    model, (sample,) = tiny_vlm(), samples_of(tmp_path, 1)
    sample = replace(sample, option_true=options[0], option_false=options[1])
    frame = run(model, [sample], FLOW_TO_LAST[0])
    assert frame.logit_diff_base.isna().all() and frame.logit_diff_change.isna().all()
    assert frame.p_knockout.notna().all()


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_routes_are_cut_together_and_in_all_layers(family, tmp_path, every_variant):
    model, samples = tiny_vlm(family, n_kv_heads=2), samples_of(tmp_path)
    result = sweep_of(model, samples, (*IMAGE_ROUTES, *NO_QUESTION), window="all", n_check=9)
    assert result.max_check_diff < 1e-5 and not result.skipped
    frame = result.frame
    assert tuple(frame) == WHOLE_DEPTH_COLUMNS and len(frame) == 2 * 6
    assert set(frame.n_layers_blocked) == set(frame.window) == {model.n_layers} and set(frame.layer) == {0}
    slow = sweep_of(model, samples, (*IMAGE_ROUTES, *NO_QUESTION), window="all", method="reference").frame
    assert np.allclose(frame.p_knockout, slow.p_knockout, atol=1e-5)
    assert frame.correct_pct.tolist() == slow.correct_pct.tolist() and set(frame.correct_pct) <= {0.0, 100.0}
    for sample in samples:
        encoded = encode(model, sample)
        image, after = (encoded.positions[name] for name in ("image", "after_image"))
        cut = Variant(layers=range(model.n_layers), source=image, target=after)
        run = run_reference(model, encoded, [cut])
        row = frame[(frame.sample_id == sample.sample_id) & (frame.flow == str(NO_PICTURE[0]))].iloc[0]
        assert (row.correct_pct == 0) == curation.needs_picture(model, encoded)
        token = run.base.argmax()
        assert np.isclose(row.p_knockout, run.variants[0].softmax(-1)[token], atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_without_the_picture_no_picture_matters(family, tmp_path):
    """What is left once all after the image is cut off from it: the same for any other picture of that size."""
    model, (one, other) = tiny_vlm(family), samples_of(tmp_path)
    other = replace(one, image=tiny_sample(tmp_path, sample_id="other", seed=5, size=(30, 30)).image)
    found = []
    for sample in (one, other):
        encoded = encode(model, sample)
        cut = variants(encoded.positions, NO_PICTURE, n_layers=model.n_layers, **whole_depth(model.n_layers))
        run = run_reference(model, encoded, cut)
        found.append((run.base.softmax(-1), run.variants[0].softmax(-1)))
    (base, blind), (other_base, other_blind) = found
    assert (base - other_base).abs().max() > 1e-3 and (blind - other_blind).abs().max() < 1e-6


def test_a_union_of_which_a_prompt_lacks_a_part_is_skipped(tmp_path):
    samples = samples_of(tmp_path)
    samples[1] = replace(samples[1], objects=())
    result = sweep_of(tiny_vlm(), samples, Flow(source="image", target="objects+last"), window="all")
    assert [s["sample_id"] for s in result.skipped] == ["q1"] and "names no object" in result.skipped[0]["reason"]
    with pytest.raises(ValueError, match="objcts"):
        run(tiny_vlm(), samples, Flow(source="image", target="objcts+last"))


def test_layers_and_encoder_can_be_chosen(tmp_path):
    model, (sample,) = tiny_vlm(), samples_of(tmp_path, 1)
    frame = run(
        model,
        [sample],
        FLOW_TO_LAST[0],
        layers=[3, 1],
        encoder=lambda model, sample: encode(model, sample, answer_prefix=[7]),
    )
    assert frame.layer.tolist() == [3, 1]
    assert frame.p_base[0] != run(model, [sample], FLOW_TO_LAST[0]).p_base[0]


@pytest.mark.parametrize("n_rows", [1, 64, 150])
def test_rows_of_logits_read_block_by_block_are_those_read_at_once(n_rows, monkeypatch, tmp_path):
    model, (sample,), flow = tiny_vlm(), samples_of(tmp_path, 1), FLOW_TO_LAST[0]
    base = torch.randn(440, generator=torch.Generator().manual_seed(n_rows))
    changed = base + torch.randn(n_rows, 440, generator=torch.Generator().manual_seed(n_rows + 1))
    run = Run(base, changed, torch.zeros(1, 1))
    planned = [Variant(layers=range(1), target=(0,), flow=flow)] * n_rows
    rows = answer_rows(model, sample, planned, run)
    monkeypatch.setattr(knockout, "SOME_ROWS", n_rows)
    assert rows == answer_rows(model, sample, planned, run) and len(rows) == n_rows
