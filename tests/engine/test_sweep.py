"""The sweep against the plain way: random small models, random positions, every intervention."""

from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from engines import KINDS, N_HEADS, N_LAYERS, TOLERANCE, assert_same, farthest, probs, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_pair

from mmflow_utils.engine import packed_pass
from mmflow_utils.engine.packed_pass import PackedPass
from mmflow_utils.engine.plan import count_rows
from mmflow_utils.engine.reference import Run, run_reference
from mmflow_utils.engine.sweep import run_sweep
from mmflow_utils.prompts.encoding import Encoded, encode
from mmflow_utils.prompts.flows import (
    FLOW_TO_LAST,
    IMAGE_PATCHES_TO_QUESTION,
    IMAGE_ROUTES,
    IMAGE_TO_QUESTION,
    NO_QUESTION,
    TEMPLATE_TO_LAST,
    Flow,
    Intervention,
    Variant,
    flow_problem,
    variants,
    whole_depth,
    window_layers,
)
from mmflow_utils.prompts.positions import PositionSets

pytestmark = pytest.mark.usefixtures("small_slices")
ENOUGH_ROWS = packed_pass.ENOUGH_ROWS
FLOWS = FLOW_TO_LAST + IMAGE_TO_QUESTION + IMAGE_PATCHES_TO_QUESTION


@st.composite
def edits(draw, encoded: Encoded) -> dict:
    """Any positions, any layers, any intervention: also acausal pairs, empty windows, starved targets."""
    n_tokens = encoded.positions.n_tokens
    positions = st.sets(st.integers(0, n_tokens - 1), min_size=1, max_size=n_tokens).map(
        lambda found: tuple(sorted(found))
    )
    known = [name for name in get_args(Intervention) if encoded.other or name != "resample"]
    intervention = draw(st.sampled_from(known))
    start = draw(st.integers(0, N_LAYERS))
    layers, on_edges = range(start, draw(st.integers(start, N_LAYERS))), not intervention.endswith("output")
    chosen = st.sets(st.sampled_from([*product(layers, range(N_HEADS))] or [()])).map(
        lambda pairs: tuple(sorted(pairs))
    )
    return dict(
        layers=layers,
        target=draw(positions),
        source=draw(positions) if on_edges else (),
        intervention=intervention,
        heads=draw(st.none() | chosen) if on_edges and layers else None,
    )


@pytest.mark.parametrize(
    "kind", [kind if kind.startswith("llava") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_edits_give_the_reference_numbers(kind, data):
    model, encoded = setting(kind)
    n_tokens = encoded.positions.n_tokens
    some = [Variant(**edit) for edit in data.draw(st.lists(edits(encoded), min_size=1, max_size=8))]
    read = data.draw(st.one_of(st.none(), st.integers(0, n_tokens - 1)))
    with patch.object(packed_pass, "ENOUGH_ROWS", data.draw(st.sampled_from((1, 100, ENOUGH_ROWS)))):
        swept = run_sweep(model, encoded, some, read=read, chunk=data.draw(st.sampled_from((None, 1, 3))))
    assert_same(swept, run_reference(model, encoded, some, read=read))


def test_slices_hold_as_many_rows_as_is_said_and_families_stay_together(monkeypatch):
    model, encoded = setting("llava")
    n_tokens = encoded.positions.n_tokens
    planned = variants(encoded.positions, FLOWS, window=2, n_layers=N_LAYERS)
    slices, through = [], PackedPass._through

    def note(self, i, layer, some):
        slices.append((i, some))
        return through(self, i, layer, some)

    monkeypatch.setattr(PackedPass, "_through", note)
    in_last = {}
    for enough in (1, 3 * n_tokens, 10**6):
        monkeypatch.setattr(packed_pass, "ENOUGH_ROWS", enough)
        slices.clear()
        run_sweep(model, encoded, planned)
        for i, some in slices:
            families = {branch.parent or branch for branch in some}
            rows = sum(len(branch.rows) for branch in some)
            assert rows <= max(n_tokens, enough) or len(families) == 1
            elsewhere = (branch for at, other in slices if at == i and other is not some for branch in other)
            assert families.isdisjoint(branch.parent or branch for branch in elsewhere)
        in_last[enough] = sum(i == N_LAYERS - 1 for i, _ in slices)
    assert in_last[1] > in_last[3 * n_tokens] > in_last[10**6] == 1


def long_prompt(kind: str, n_tokens: int):
    """Give a model and a prompt of that many tokens, so that many keys are a row's own run's."""
    model, encoded = setting(kind)
    more = [10 + n % 90 for n in range(n_tokens - encoded.positions.n_tokens)]
    with TemporaryDirectory() as folder:
        return model, encode(model, tiny_pair(Path(folder)), answer_prefix=more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("llava", "llava-gqa", "sliding"))
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    n_tokens=st.integers(130, 400),
    seed=st.integers(0, 2**32 - 1),
    intervention=st.sampled_from(["mask", "mask", "mask", *get_args(Intervention)]),
    window=st.integers(1, N_LAYERS),
)
def test_random_position_sets_of_long_prompts_give_the_reference_numbers(kind, n_tokens, seed, intervention, window):
    model, encoded = long_prompt(kind, n_tokens)
    rng = np.random.default_rng(seed)
    sets = {"last": [n_tokens - 1]}
    for name in ("image", "question", "objects"):
        low, high = sorted(rng.choice(n_tokens, 2, replace=False))
        share = rng.choice([0.1, 0.6, 1.0])
        sets[name] = [low, *(p for p in range(low + 1, high) if rng.random() < share)]
    positions = PositionSets(n_tokens=n_tokens, sets=sets)
    flows = [Flow(source=source, target=target) for source, target in product(sets, sets)]
    flows = [flow for flow in flows if not flow_problem(positions, flow, intervention=intervention)]
    some = variants(positions, flows, window=window, n_layers=N_LAYERS, intervention=intervention)
    assert_same(run_sweep(model, encoded, some), run_reference(model, encoded, some))


@pytest.mark.parametrize("kind", ("llava", "llava-gqa"))
def test_groups_that_begin_alike_may_need_more_room_one_after_the_other(kind):
    model, encoded = long_prompt(kind, 180)
    image = tuple(range(5, 149))
    flows = {"within": (image, image), "all but a few": (image[:140], image), "few": (image[:3], image)}
    some = [
        Variant(layers=range(start, stop), target=target, source=source)
        for source, target in flows.values()
        for start, stop in ((0, 2), (1, 3), (0, 4), (2, 4))
    ]
    assert_same(run_sweep(model, encoded, some), run_reference(model, encoded, some))


@pytest.mark.slow
@pytest.mark.parametrize("intervention", get_args(Intervention))
@pytest.mark.parametrize("window", (1, 3, 9))
def test_all_flows_and_layers_in_one_go(intervention, window):
    model, encoded = setting("llava_next" if window == 3 else "llava")
    some = variants(encoded.positions, FLOWS, window=window, n_layers=N_LAYERS, intervention=intervention)
    run = run_sweep(model, encoded, some)
    assert_same(run, run_reference(model, encoded, some))
    assert farthest(run.variants, run.base) > 1e-3  # and the knockouts bite


@pytest.mark.parametrize(
    ("kind", "intervention"),
    [*product(("llava", "llava_next"), ("mask", "zero_value", "mean_value", "resample"))]
    + [
        pytest.param(kind, "mask", marks=pytest.mark.slow) for kind in ("sliding", "idefics3", "qwen2_5_vl", "internvl")
    ],
)
def test_routes_cut_together_and_in_all_layers_are_the_references(kind, intervention):
    model, encoded = setting(kind)
    flows = (*IMAGE_ROUTES, *NO_QUESTION, *TEMPLATE_TO_LAST)
    some = variants(encoded.positions, flows, n_layers=N_LAYERS, intervention=intervention, **whole_depth(N_LAYERS))
    assert [v.layers for v in some] == [range(N_LAYERS)] * len(flows)
    run = run_sweep(model, encoded, some)
    assert_same(run, run_reference(model, encoded, some))
    bites = (probs(run.variants) - probs(run.base)).abs().amax(1)
    assert bites.max() > 1e-3 and (kind == "sliding" or bites.min() > 1e-6)  # where nothing reaches so far back


@pytest.mark.parametrize("intervention", get_args(Intervention))
def test_another_window_or_one_token_less_is_told_apart(intervention):
    model, encoded = setting("llava")
    positions = encoded.positions
    edges = not intervention.endswith("output")

    def variant(layers, source, target):
        source = source if edges else ()
        return Variant(layers=layers, target=target, source=source, intervention=intervention)

    image, question = positions["image"], positions["question"]
    right = variant(range(1, 3), image, question)
    wrong = [variant(range(1, 2), image, question), variant(range(0, 3), image, question)]
    wrong += [variant(range(1, 3), image, question[:-1]), variant(range(1, 3), image, question[1:])]
    if edges:
        wrong += [variant(range(1, 3), image[:-1], question), variant(range(1, 3), image[1:], question)]
    plain = run_reference(model, encoded, [right])
    run = run_sweep(model, encoded, [right, *wrong])
    assert farthest(run.variants[0], plain.variants[0]) < 1e-6
    for row in run.variants[1:]:
        assert farthest(row, plain.variants[0]) > 10 * TOLERANCE


@pytest.mark.parametrize("intervention", ("mask", "zero_value"))
def test_a_target_with_nothing_left_to_attend_to_gets_nothing(intervention):
    model, encoded = setting("llava-gqa")
    last = encoded.positions.last
    everything = tuple(range(last + 1))
    edges = Variant(layers=range(1, 3), target=(last,), source=everything, intervention=intervention)
    # Without biases, attention that reads nothing adds nothing.
    module = Variant(layers=range(1, 3), target=(last,), intervention="attention_output")
    first = Variant(layers=range(0, 2), target=(0,), source=(0,), intervention=intervention)
    run = run_sweep(model, encoded, [edges, module, first])
    assert torch.isfinite(run.variants).all()
    assert farthest(run.variants[0], run.variants[1]) < TOLERANCE
    assert_same(run, run_reference(model, encoded, [edges, module, first]))


def test_what_changes_nothing_gives_the_clean_logits():
    model, encoded = setting("llava")
    last = encoded.positions.last
    idle = [
        Variant(layers=range(2, 2), target=(last,), source=(0,)),
        Variant(layers=range(0, N_LAYERS), target=(3,), source=(4, 5)),  # acausal
        Variant(layers=range(N_LAYERS - 1, N_LAYERS), target=(last - 1,), source=(0,)),  # nobody reads it
        Variant(layers=range(0, 2), target=(last,), source=(4,), intervention="mean_value"),
    ]
    run = run_sweep(model, encoded, idle)
    assert torch.equal(run.variants[:3], run.base.expand(3, -1))
    assert farthest(run.variants[3], run.base) < TOLERANCE
    assert_same(run, run_reference(model, encoded, idle))
    assert run_sweep(model, encoded, []).variants.shape == (0, len(run.base))


def test_in_float64_the_two_ways_agree_far_beyond_float32():
    # The library's norms work in float32, so a difference of exactly 0.0 would be luck, not proof.
    model, encoded = setting("llava", torch.float64)
    some = variants(encoded.positions, FLOWS, window=3, n_layers=N_LAYERS)
    run, plain = run_sweep(model, encoded, some), run_reference(model, encoded, some)
    assert farthest(run.variants, plain.variants) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_in_half_precision_no_further_from_float32_than_the_plain_way(dtype):
    exact_model, encoded = setting("llava")
    rough_model, rough = setting("llava", dtype)
    some = variants(encoded.positions, FLOWS, window=3, n_layers=N_LAYERS)
    exact = probs(run_reference(exact_model, encoded, some).variants)
    errors = [
        (probs(run(rough_model, rough, some).variants) - exact).abs().mean() for run in (run_sweep, run_reference)
    ]
    assert 0 < errors[0] < 1.25 * errors[1]


def test_layers_that_live_on_disk_are_fetched(tmp_path):
    """accelerate takes layers from where they are; on a machine with cards it spreads them the same way."""
    model, encoded = setting("llava-gqa")
    some = variants(encoded.positions, FLOWS, window=3, n_layers=N_LAYERS)
    expected = run_reference(model, encoded, some)
    spread = replace(model, hf=deepcopy(model.hf))
    where = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    where |= dict.fromkeys(("model.language_model.embed_tokens", "model.language_model.norm"), "cpu")
    where |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(N_LAYERS)}
    where["model.language_model.rotary_emb"] = "cpu"
    dispatch_model(spread.hf, where, main_device="cpu", offload_dir=tmp_path)
    assert spread.layers[1].mlp.down_proj.weight.device.type == "meta"
    assert_same(run_sweep(spread, encoded, some), expected)


@pytest.mark.slow
def test_memory_that_runs_out_costs_time_only(monkeypatch):
    model, encoded = setting("llava")
    some = variants(encoded.positions, FLOWS, window=3, n_layers=N_LAYERS)
    sizes, whole = [], PackedPass.run

    def small(packed, encoded):
        sizes.append(sum(len(branch.variants) for branch in packed.branches))
        if sizes[-1] > 7:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")
        return whole(packed, encoded)

    expected = run_sweep(model, encoded, some)
    monkeypatch.setattr(PackedPass, "run", small)
    assert farthest(run_sweep(model, encoded, some).variants, expected.variants) < TOLERANCE
    assert max(sizes) > 7 >= sizes[-1]


def test_other_errors_are_not_swallowed_and_nothing_is_left_behind(monkeypatch):
    model, encoded = setting("llava")
    kernel = model.text.config._attn_implementation

    def fail(*_):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="a bug"):
        patched.setattr(PackedPass, "_through", fail)
        run_sweep(model, encoded, [Variant(layers=range(2), target=(encoded.positions.last,), source=(0,))])
    assert model.text.config._attn_implementation == kernel
    for i, layer in enumerate(model.layers):
        for module in (layer, model.attention(i), model.mlp(i)):
            assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": range(0, N_LAYERS + 1)}, "layers are 0 to 3"),
        ({"target": (10_000,)}, "position 10000"),
        ({"source": (10_000,)}, "position 10000"),
        ({"heads": ((1, N_HEADS),)}, "query heads are 0 to 3"),
    ],
)
def test_variants_that_do_not_fit_are_refused(change, says):
    model, encoded = setting("llava")
    fields = {"layers": range(2), "target": (5,), "source": (1,)} | change
    with pytest.raises(ValueError, match=says):
        run_sweep(model, encoded, [Variant(**fields)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_several_positions_are_read_as_each_alone(kind, data):
    model, encoded = setting(kind)
    n_tokens = encoded.positions.n_tokens
    some = [Variant(**data.draw(edits(encoded))) for _ in range(data.draw(st.integers(0, 4)))]
    read = sorted(data.draw(st.sets(st.integers(0, n_tokens - 1), min_size=1, max_size=4)))
    chunk = data.draw(st.sampled_from((None, 1, 3)))
    plain = [run_reference(model, encoded, some, read=position) for position in read]
    together = Run(
        base=torch.stack([run.base for run in plain]),
        variants=torch.stack([run.variants for run in plain], dim=1),
        resid_post=torch.stack([run.resid_post for run in plain], dim=1),
    )
    assert_same(run_sweep(model, encoded, some, read=read, chunk=chunk), together)


def test_what_is_kept_of_the_logits_is_theirs():
    model, encoded = setting("llava")
    read = encoded.positions["question"]
    some = variants(encoded.positions, IMAGE_TO_QUESTION, window=3, n_layers=N_LAYERS)
    whole = run_sweep(model, encoded, some, read=read)
    words = run_sweep(model, encoded, some, read=read, keep=lambda logits: logits.topk(5).indices)
    assert words.variants.shape == (len(some), len(read), 5)
    assert torch.equal(words.base, whole.base.topk(5).indices)
    assert torch.equal(words.variants, whole.variants.topk(5).indices)


@pytest.mark.parametrize("read", ([], [3, 2], [2, 2], [-1], [10_000]))
def test_bad_positions_to_read_are_refused(read):
    model, encoded = setting("llava")
    with pytest.raises(ValueError, match="`read`"):
        run_sweep(model, encoded, [], read=read)


def test_bad_read_and_chunk_are_refused():
    model, encoded = setting("llava")
    with pytest.raises(ValueError, match="`read`"):
        run_sweep(model, encoded, [], read=encoded.positions.n_tokens)
    with pytest.raises(ValueError, match="`chunk`"):
        run_sweep(model, encoded, [], chunk=0)


def test_few_rows_are_computed():
    _, encoded = setting("llava")
    positions, n_layers = encoded.positions, 16
    some = variants(positions, FLOWS, window=9, n_layers=n_layers)
    counts = count_rows(some, n_tokens=positions.n_tokens, n_layers=n_layers)
    full = len(some) * positions.n_tokens * n_layers
    assert counts["computed"] < counts["bound"] < full / 3
    to_last = [v for v in some if v.target == (positions.last,)]
    starts = {(v.layers.start, v.source) for v in to_last}
    alone = sum(n_layers - start for start, _ in starts)
    # Windows clipped at layer 0 share their start, so they cost less than each on its own.
    each = sum(n_layers - window_layers(i, window=9, n_layers=n_layers).start for i in range(n_layers))
    assert alone < count_rows(to_last, n_tokens=positions.n_tokens, n_layers=n_layers)["bound"] < 3 * each
