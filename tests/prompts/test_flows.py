"""Windows, variants, and the flows that are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmflow_utils.prompts import flows
from mmflow_utils.prompts.flows import Flow, Variant, flow_problem, variants, window_layers, window_sizes
from mmflow_utils.prompts.positions import PositionSets

POSITIONS = PositionSets(
    n_tokens=9,
    sets={"image": range(1, 4), "question": (5, 6, 7), "last": [8], "option_true": [6], "options": [6, 7]},
    missing={"objects": "object 'phone' is not a whole word of the question"},
)
SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(1, 50)))
few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("layer", "window", "expected"),
    [(0, 1, [0]), (0, 9, [0, 1, 2, 3, 4]), (5, 3, [4, 5, 6]), (5, 4, [3, 4, 5, 6]), (9, 9, [5, 6, 7, 8, 9])],
)
def test_centered_windows_of_ten_layers(layer, window, expected):
    assert list(window_layers(layer, window=window, n_layers=10)) == expected


@few
@given(SIZES)
def test_centered_window_is_the_protocols_formula(size):
    n_layers, layer, window = size
    held = window_layers(layer, window=window, n_layers=n_layers)
    assert held == range(max(0, layer - window // 2), min(n_layers, layer + -(-window // 2)))
    assert layer in held


@few
@given(SIZES)
def test_forward_window_starts_at_its_layer(size):
    n_layers, layer, window = size
    held = window_layers(layer, window=window, n_layers=n_layers, placement="forward")
    assert held == range(layer, min(layer + window, n_layers))


@pytest.mark.parametrize(("layer", "window", "match"), [(0, 0, "window"), (-1, 3, "0 to 3"), (4, 3, "0 to 3")])
def test_windows_outside_the_model_are_refused(layer, window, match):
    with pytest.raises(ValueError, match=match):
        window_layers(layer, window=window, n_layers=4)


def test_variants_visit_every_flow_and_layer_in_order():
    made = variants(POSITIONS, flows.FLOW_TO_LAST, window=3, n_layers=4)
    assert [(str(v.flow), v.layer) for v in made] == [
        (f"{source} -> Last", layer) for source in ("Question", "Image", "Last") for layer in range(4)
    ]
    assert {v.source for v in made} == {(5, 6, 7), (1, 2, 3), (8,)}
    assert {v.target for v in made} == {(8,)}
    assert [v.n_layers_blocked for v in made[:4]] == [2, 3, 3, 2]


def test_variants_of_chosen_layers_keep_their_order():
    made = variants(POSITIONS, flows.IMAGE_TO_QUESTION, window=1, n_layers=8, layers=[5, 2])
    assert [(v.layer, v.layers) for v in made] == [(5, range(5, 6)), (2, range(2, 3))]


def test_module_variants_have_no_source_and_look_forward():
    flow = Flow(source="objects", target="question")  # the source isn't used, so it needn't be there
    made = variants(POSITIONS, [flow], window=9, n_layers=4, intervention="mlp_output")
    assert [v.layers for v in made] == [range(i, 4) for i in range(4)]
    assert all(v.source == () and v.target == (5, 6, 7) for v in made)
    assert variants(POSITIONS, [flow], window=1, n_layers=4, intervention="mlp_output", placement="centered")


@pytest.mark.parametrize(
    ("flow", "reason"),
    [
        (Flow(source="last", target="question"), "nothing flows back"),
        (Flow(source="question", target="image"), "nothing flows back"),
        (Flow(source="objects", target="last"), "'phone' is not a whole word"),
        (Flow(source="image", target="objects"), "'phone' is not a whole word"),
        (Flow(source="imgae", target="last"), "no position set 'imgae'"),
    ],
)
def test_flows_that_cannot_be_blocked_are_refused_with_the_reason(flow, reason):
    assert reason in flow_problem(POSITIONS, flow)
    with pytest.raises(ValueError, match=reason):
        variants(POSITIONS, [flow], window=3, n_layers=4)


def test_a_union_of_sets_is_cut_together():
    flow = Flow(source="image+last", target="question+last")
    (cut,) = variants(POSITIONS, [flow], n_layers=5, **flows.whole_depth(5))
    assert (cut.source, cut.target, cut.layers) == ((1, 2, 3, 8), (5, 6, 7, 8), range(5))
    assert str(flow) == "Image + Last -> Question + Last"
    assert "image+question" in POSITIONS and "image+objects" not in POSITIONS
    assert POSITIONS.get("image+objects") == () and "image+objects" in POSITIONS.missing
    assert "image+objcts" not in POSITIONS.missing
    for name, reason in (("last+objects", "'phone' is not a whole"), ("last+objcts", "no position set 'objcts'")):
        assert reason in flow_problem(POSITIONS, Flow(source="image", target=name))


@pytest.mark.parametrize("n_layers", [1, 2, 7])
@pytest.mark.parametrize("intervention", ["mask", "mlp_output"])
def test_the_whole_depth_is_every_layer(n_layers, intervention):
    options = {"n_layers": n_layers, "intervention": intervention, **flows.whole_depth(n_layers)}
    (cut,) = variants(POSITIONS, flows.FLOW_TO_LAST[:1], **options)
    assert cut.layers == range(n_layers)


def test_a_flow_that_is_partly_causal_is_kept():
    assert flow_problem(POSITIONS, Flow(source="question", target="option_true")) is None
    assert flow_problem(POSITIONS, Flow(source="last", target="last")) is None


def test_an_empty_set_is_refused():
    positions = POSITIONS.with_(image_other=())
    with pytest.raises(ValueError, match="image_other"):
        variants(positions, flows.IMAGE_PATCHES_TO_QUESTION[1:], window=3, n_layers=4)


@pytest.mark.parametrize(
    "wrong",
    [{"layers": []}, {"layers": [1, 1]}, {"layers": [4]}, {"window": 0}, {"flows": []}],
)
def test_variants_refuses_what_it_cannot_visit(wrong):
    asked = {"flows": flows.FLOW_TO_LAST, "window": 3, "n_layers": 4} | wrong
    with pytest.raises(ValueError):
        variants(POSITIONS, asked.pop("flows"), **asked)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": ()},
        {"target": (2, 1)},
        {"target": (1, 1)},
        {"source": (-1, 0)},
        {"layers": range(0, 4, 2)},
        {"layers": range(-1, 2)},
        {"intervention": "attention_output"},
    ],
)
def test_variant_refuses_malformed_positions(wrong):
    good = {"layers": range(2), "target": (3,), "source": (1, 2)}
    assert Variant(**good).n_layers_blocked == 2
    with pytest.raises(ValueError):
        Variant(**good | wrong)


def test_controls_that_change_nothing_can_be_made():
    assert Variant(layers=range(0), target=(3,), source=(1,)).n_layers_blocked == 0
    assert Variant(layers=range(2), target=(3,)).source == ()


def test_every_published_flow_has_a_readable_name_once():
    sets = [getattr(flows, name) for name in flows.__all__ if isinstance(getattr(flows, name), tuple)]
    published = [flow for held in sets for flow in held if isinstance(flow, Flow)]
    assert len(published) > 25
    for held in sets:
        assert len({str(flow) for flow in held}) == len(held)
    assert not [flow for flow in published if "_" in str(flow)]
    assert str(flows.IMAGE_PATCHES_TO_QUESTION[0]) == "Related image patches -> Question"


@pytest.mark.parametrize("n_layers", [32, 40, 80])
def test_models_as_deep_as_the_papers_get_the_papers_windows(n_layers):
    assert window_sizes(n_layers) == [1, 3, 5, 7, 9, 11, 15]


def test_shallower_models_get_windows_of_the_same_share_of_their_depth():
    assert window_sizes(12) == [1, 2, 3, 4, 6]
    assert window_sizes(8) == [1, 2, 3, 4]
    assert window_sizes(1) == [1]
    for n_layers in range(1, 32):
        sizes = window_sizes(n_layers)
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] <= max(1, n_layers / 2)
    with pytest.raises(ValueError, match="1 or more layers, got 0"):
        window_sizes(0)


def test_heads_that_can_be_read_once_are_cut_in_every_window():
    cuts = variants(POSITIONS, [Flow(source="image", target="last")], window=1, n_layers=3, heads=iter([1, 0, 1]))
    assert [cut.heads for cut in cuts] == [((layer, 0), (layer, 1)) for layer in range(3)]
