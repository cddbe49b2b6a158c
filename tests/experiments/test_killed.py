"""Every experiment that a notebook runs: killed in the middle, the next run measures only what is left."""

from functools import wraps
from inspect import signature

import pandas as pd
import pytest
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.experiments.curation import ask_questions
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.experiments.lens import logit_lens
from mmflow_utils.experiments.pruning import picture_sweep, prune_sweep
from mmflow_utils.experiments.semantics import module_knockout, question_semantics
from mmflow_utils.params import Params
from mmflow_utils.prompts.flows import FLOW_TO_LAST
from mmflow_utils.prompts.subwords import answer_subwords, at_last_subword
from mmflow_utils.results.record import Result
from mmflow_utils.results.resume import measure_in_parts
from mmflow_utils.results.version import VERSIONS

CALLS = {
    knockout_sweep: {"flows": FLOW_TO_LAST, "window": 2},
    logit_lens: {},
    module_knockout: {"window": 2},
    question_semantics: {"window": 2},
    prune_sweep: {"removed": [0, 2]},
    picture_sweep: {"scales": [0.5]},
    ask_questions: {},
    answer_subwords: {},
}


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
    n_check = (
        1 if "n_check" in signature(measure).parameters or measure in (module_knockout, question_semantics) else None
    )
    options = {"n_check": n_check, "part_size": 1, "progress": False}
    try:
        return measure_in_parts(noting, model, samples, path, params, **options, **call), measured
    except KeyboardInterrupt:
        return None, measured


@pytest.mark.slow
@pytest.mark.parametrize("measure", CALLS, ids=lambda measure: measure.__name__)
def test_a_killed_run_measures_only_what_is_left(measure, tmp_path):
    model, names = tiny_vlm(), ["a", "b", "c"]
    samples, call = [tiny_sample(tmp_path, sample_id=name, seed=n) for n, name in enumerate(names)], CALLS[measure]
    if measure is knockout_sweep:
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
    lists = [name for name in whole.frame if name in ("subwords", "token_ids")]  # a list comes back as an array
    pd.testing.assert_frame_equal(result.frame.drop(columns=lists), whole.frame.drop(columns=lists), check_exact=True)
    for name in lists:
        assert list(map(list, result.frame[name])) == list(map(list, whole.frame[name]))
    assert result.skipped == whole.skipped


def test_every_experiment_that_is_stored_is_tried():
    assert {measure.__name__ for measure in CALLS} == set(VERSIONS)
