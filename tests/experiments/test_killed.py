"""Every experiment that a notebook runs: killed in the middle, the next run measures only what is left."""

from functools import wraps

import pandas as pd
import pytest
from expected_frames import CALLS, find_experiment
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.experiments import patching
from mmflow_utils.experiments.patching import Pair
from mmflow_utils.params import Params
from mmflow_utils.prompts.subwords import answer_subwords, at_last_subword
from mmflow_utils.results.record import Result
from mmflow_utils.results.resume import measure_in_parts


def in_parts(measure, model, samples, path, stop_at=None, shard=None, **call):
    """Measure in parts of one sample; also list what was measured. A run is killed before `stop_at`."""
    measured = []

    @wraps(measure)
    def noting(model, some, **options):
        if stop_at in [sample.sample_id for sample in some]:
            raise KeyboardInterrupt
        measured.extend(sample.sample_id for sample in some)
        return measure(model, some, **options)

    params = Params(model="tiny", checkpoint=str(path), shard=shard)
    try:
        return measure_in_parts(noting, model, samples, path, params, part_size=1, progress=False, **call), measured
    except KeyboardInterrupt:
        return None, measured


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_killed_run_measures_only_what_is_left(name, tmp_path, monkeypatch):
    measure, model, call = find_experiment(name), tiny_vlm(), CALLS[name][0]
    samples = [tiny_sample(tmp_path, sample_id=letter, seed=n) for n, letter in enumerate("abc")]
    if name == "patch_sweep":
        model = tiny_vlm(n_layers=3)
        others = [tiny_sample(tmp_path, sample_id=f"{letter}2", seed=n + 3) for n, letter in enumerate("abc")]
        samples = [Pair(**vars(sample), other=other) for sample, other in zip(samples, others, strict=True)]
        monkeypatch.setattr(patching, "LEAST_GAP", 1e-3)  # a random model's answers are close
    if name == "knockout_sweep":
        call = call | {"encoder": at_last_subword(answer_subwords(model, samples, progress=False))}
    path = tmp_path / "out" / "result.parquet"
    assert in_parts(measure, model, samples, path, stop_at="c", **call) == (None, ["a", "b"])
    result, measured = in_parts(measure, model, samples, path, **call)
    assert measured == ["c"]
    assert in_parts(measure, model, samples, path, **call)[1] == []
    _, of_shard = in_parts(measure, model, samples, tmp_path / "out" / "shard.parquet", shard="2/2", **call)
    assert of_shard == ["b"]
    whole = measure(model, samples, **call, progress=False)
    whole = whole if isinstance(whole, Result) else Result(whole)
    lists = [name for name in whole.frame if name in ("subwords", "token_ids")]  # they come back as arrays
    pd.testing.assert_frame_equal(result.frame.drop(columns=lists), whole.frame.drop(columns=lists), check_exact=True)
    for name in lists:
        assert list(map(list, result.frame[name])) == list(map(list, whole.frame[name]))
    assert result.skipped == whole.skipped
