"""The benchmark's ways all do the same work; its counts and costs hang together. No test measures time."""

import math

import pandas as pd
import pytest
import torch
from matplotlib.collections import PathCollection

from benchmarks.baselines import BASELINES, has_nnsight
from benchmarks.head_speed import measure_heads
from benchmarks.plots import plot_costs
from benchmarks.speed import SIX_FLOWS, measure_speed, random_llava, random_prompt
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.models.adapter import text_inputs
from mmflow_utils.prompts.flows import FLOW_TO_LAST, variants

SHAPE = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2}


@pytest.fixture(scope="module")
def race():
    model = random_llava(n_layers=4, n_image=16, **SHAPE)
    encoded = random_prompt(model, n_image=16)
    planned = variants(encoded.positions, SIX_FLOWS, window=3, n_layers=4)
    return model, encoded, planned, text_inputs(model, encoded.inputs)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_way_gives_the_reference_numbers(race, name):
    if name == "nnsight" and not has_nnsight():
        pytest.skip("nnsight isn't installed; it is no part of the environment")
    model, encoded, planned, inputs = race
    with torch.inference_mode():
        found = torch.stack(list(BASELINES[name](model, encoded, planned, inputs))).softmax(-1)
    plain = run_reference(model, encoded, planned)
    assert (found - plain.variants.softmax(-1)).abs().max() < 1e-5
    # A knockout that does nothing would agree with a baseline that does nothing.
    assert (found - plain.base.softmax(-1)).abs().amax(-1).gt(1e-4).float().mean() > 0.8


def test_ways_leave_the_model_as_it_was(race):
    model, encoded, planned, _ = race
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.layers)
    again = run_sweep(model, encoded, planned)
    assert (again.base - run_reference(model, encoded, []).base).abs().max() < 1e-4


@pytest.fixture(scope="module")
def measured():
    lines = []
    frame = measure_speed(
        n_layers=(2, 3), n_image=(9, 16), flows=FLOW_TO_LAST, window=1, n_rounds=1, n_some=2,
        progress=lines.append, **SHAPE,
    )  # fmt: skip
    return frame, lines


@pytest.mark.slow
def test_a_row_for_each_model_and_way(measured):
    frame, lines = measured
    ways = ["clean pass", "sweep", *(name for name in BASELINES if name != "nnsight" or has_nnsight())]
    assert frame.groupby(["n_layers", "n_tokens"], sort=False).way.agg(list).tolist() == [ways] * 4
    assert len(lines) == len(frame) and "2 layers" in lines[0]
    assert (frame.n_variants == frame.n_layers * len(FLOW_TO_LAST)).all()
    assert frame.n_tokens.unique().tolist() == [9 + 29, 16 + 29]


@pytest.mark.slow
def test_costs_are_ratios_of_the_same_run(measured):
    frame, _ = measured
    clean, sweep = frame[frame.way == "clean pass"], frame[frame.way == "sweep"]
    assert (clean.clean_passes == 1).all() and (sweep.times_sweep == 1).all()
    assert (frame.cpu_s > 0).all()
    full = frame[frame.way == "full forwards"]
    assert (full.clean_passes > 1).all()  # many variants, each a pass
    assert sweep.max_diff.between(0, 1e-5, inclusive="right").all()
    assert (sweep.computed <= sweep.bound).all()
    assert (sweep[["memory_mb", "clean_memory_mb"]] > 0).all(axis=None)
    assert frame[frame.way != "sweep"].bound.isna().all()


@pytest.mark.slow
def test_costs_are_drawn_with_their_bound(measured):
    frame, _ = measured
    some = frame[(frame.way != "clean pass") & (frame.n_tokens == 38)]
    figure = plot_costs(some, title="Cost")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["2 layers", "3 layers"]
    (dots,) = [found for found in figure.axes[0].collections if isinstance(found, PathCollection)]
    assert dots.get_offsets()[:, 0].tolist() == pytest.approx(some[some.n_layers == 2].clean_passes.tolist())
    (mark,) = figure.axes[0].lines
    assert mark.get_xdata()[0] == pytest.approx(some.bound.dropna().iloc[0])
    assert math.isclose(figure.axes[0].get_xlim()[1], figure.axes[1].get_xlim()[1])
    with pytest.raises(ValueError, match="clean_passes"):
        plot_costs(pd.DataFrame({"way": ["a"], "n_layers": [1]}))


def test_every_head_alone_is_what_full_passes_give_and_few_rows_are_counted():
    frame = measure_heads(n_layers=2, n_heads=4, n_image=16, chunks=(None, 3), n_rounds=1, d_model=32)
    assert frame.n_cuts.tolist() == [8] * 4 and frame.chunk.tolist() == [8, 3] * 2
    assert frame.max_diff.max() < 1e-5 and (frame.counted == 12 / (2 * frame.n_tokens)).all()
    assert (frame.memory > 0).all() and (frame.beside == frame.clean_passes - 1).all()
