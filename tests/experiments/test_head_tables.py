"""Tables of heads say what the logits say, the screen is a derivative, and known agreement is found."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from mmflow_utils.analysis.heads import DIFFERENT, SAME, head_agreement, judge_agreement
from mmflow_utils.engine import sweep
from mmflow_utils.engine.attribution import attribute_heads
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments.heads import head_screen, head_sets, head_sweep
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.plots.maps import plot_heads
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION, Flow, Variant

FLOWS = (FLOW_TO_LAST[0], *IMAGE_TO_QUESTION)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = tiny_vlm(n_layers=3, n_heads=4, n_kv_heads=2)
    folder = tmp_path_factory.mktemp("pictures")
    return model, [tiny_sample(folder, sample_id=f"q{n}", seed=n) for n in range(2)]


def test_a_table_has_each_head_of_each_layer_and_says_what_its_logits_say(world):
    model, samples = world
    result = head_sweep(model, samples, FLOWS, progress=False)
    frame = result.frame
    assert len(frame) == 2 * len(FLOWS) * 3 * 4 and result.max_check_diff < 1e-5
    assert not frame.duplicated(["sample_id", "flow", "layer", "head"]).any()
    encoded = encode(model, samples[1])
    source, target = (encoded.positions[name] for name in ("image", "question"))
    cut = Variant(layers=range(1, 2), heads=((1, 3),), source=source, target=target)
    run = run_reference(model, encoded, [cut])
    (row,) = frame.query("sample_id == 'q1' and flow == 'Image -> Question' and layer == 1 and head == 3").to_dict(
        "records"
    )
    assert np.isclose(row["p_knockout"], run.variants[0].softmax(-1)[run.base.argmax()], atol=1e-5)


def test_all_heads_of_a_layer_as_a_set_are_the_knockout_of_that_layer(world):
    model, samples = world
    every = [{"name": layer, "heads": [(layer, head) for head in range(4)]} for layer in range(3)]
    together = head_sweep(model, samples, FLOWS, sets=every, n_check=0, progress=False).frame
    whole = knockout_sweep(model, samples, FLOWS, window=1, n_check=0, progress=False).frame
    assert together.name.tolist() == whole.layer.tolist()
    assert np.allclose(together.p_knockout, whole.p_knockout, atol=1e-5)


def test_a_wrong_sweep_is_caught_among_the_few_edits_that_are_checked(world, monkeypatch):
    model, samples = world
    right = sweep.run_sweep

    def wrong(model, encoded, variants, **options):
        other = [Variant(layers=v.layers, target=v.target, source=v.source) for v in variants]  # all heads
        return right(model, encoded, other, **options)

    monkeypatch.setattr(sweep, "run_sweep", wrong)
    with pytest.raises(ValueError, match="differ by"):
        head_sweep(model, samples, FLOWS, progress=False)


@pytest.mark.parametrize("family", ("llava", "llava_next"))
def test_the_screen_is_the_derivative_of_cutting_a_little(family, tmp_path):
    model = tiny_vlm(family, n_layers=3, n_kv_heads=2, dtype=torch.float64)
    encoded = encode(model, tiny_sample(tmp_path))
    source, target = (encoded.positions[name] for name in ("image", "question"))
    screen = attribute_heads(model, encoded, source=source, target=target)
    # By hand: one head's values at the targets are moved a small step towards those of the knockout, and back.
    token = int(run_reference(model, encoded, []).base.argmax())
    for layer, head in ((0, 0), (1, 3)):
        own, seen, found = slice(head * 8, head * 8 + 8), [], []
        cut = Variant(layers=range(layer, layer + 1), heads=((layer, head),), source=source, target=target)
        with model.output_proj(layer).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].clone())
        ):
            run_reference(model, encoded, [cut])
        for step in (0.01, -0.01):

            def move(_, args, own=own, way=step * (seen[1] - seen[0])):
                moved = args[0].clone()
                moved[..., own] += way[..., own]
                return (moved,)

            with model.output_proj(layer).register_forward_pre_hook(move), torch.no_grad():
                logits = model.hf(**encoded.inputs, logits_to_keep=1).logits[0, -1]
            found.append(logits.log_softmax(-1)[token].item())
        assert screen[layer, head].item() == pytest.approx((found[0] - found[1]) / 0.02, rel=0.02, abs=3e-5)
    assert screen[:2].abs().min() > 0 and not screen[2].any()  # what the question reads last, nobody reads


def test_a_screen_has_the_rows_of_a_table_and_leaves_nothing_behind(world):
    model, samples = world
    flows = (*FLOWS, Flow(source="last", target="question"))
    result = head_screen(model, samples, flows, progress=False)
    assert len(result.frame) == 2 * len(FLOWS) * 3 * 4 and len(result.skipped) == 2
    assert not any(model.output_proj(n)._forward_pre_hooks or model.layers[n]._forward_pre_hooks for n in range(3))


def test_one_flow_is_taken_as_it_is(world):
    model, samples = world
    sets = [{"heads": [(1, 0)]}]
    assert len(head_sweep(model, samples, FLOWS[0], sets=sets, n_check=0, progress=False).frame) == 2
    assert len(head_screen(model, samples[:1], FLOWS[0], progress=False).frame) == 3 * 4


def test_sets_without_heads_and_sizes_that_no_model_has_are_refused(world):
    model, samples = world
    with pytest.raises(ValueError, match="got none in {'name': 'b'}"):
        sets = [{"name": "a", "heads": [(0, 0)]}, {"name": "b", "heads": []}]
        head_sweep(model, samples, FLOWS, sets=sets, progress=False)
    for sizes in ((0, 1), (1, 99)):
        with pytest.raises(ValueError, match="sizes of 1 to 2 heads"):
            head_sets(made_up({"A": [-3.0, 0.0]}, noise=0.0), sizes)


def made_up(weights: dict[str, list[float]], *, noise: float, n_images: int = 40) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for task, effects in weights.items():
        for n in range(n_images):
            changes = np.array(effects) + noise * rng.standard_normal(len(effects))
            labels = {"task": task, "sample_id": f"{task}{n}", "image_id": f"i{n}"}
            rows += [labels | {"layer": h // 4, "head": h % 4, "logprob_change": c} for h, c in enumerate(changes)]
    return pd.DataFrame(rows)


def test_agreement_is_found_where_it_is_and_held_against_what_noise_leaves():
    rng = np.random.default_rng(1)
    one, other = rng.standard_normal(48), rng.standard_normal(48)
    same = head_agreement(made_up({"A": one, "B": 3 * one}, noise=2.0), n_boot=100).set_index("task").rho
    apart = head_agreement(made_up({"A": one, "B": other}, noise=2.0), n_boot=100).set_index("task")
    assert same[SAME] > 0.6 and abs(same[SAME] - same[DIFFERENT]) < 0.1
    assert apart.rho[SAME] > 0.6 and apart.ci_low[DIFFERENT] < 0.2 and apart.ci_high[DIFFERENT] < apart.ci_low[SAME]
    assert head_agreement(made_up({"A": one}, noise=0.1), n_boot=100).task.tolist() == ["A", SAME]


def test_tasks_share_their_heads_only_where_halves_of_a_task_agree_for_sure():
    rng = np.random.default_rng(1)
    one, other, flat = rng.standard_normal(48), rng.standard_normal(48), np.zeros(48)

    def judged(weights, noise, n_images=40):
        return judge_agreement(head_agreement(made_up(weights, noise=noise, n_images=n_images), n_boot=100))[1]

    assert judged({"A": one, "B": 3 * one}, 0.5) is True
    assert judged({"A": one, "B": other}, 0.5) is False
    assert judged({"A": flat, "B": flat}, 1.0, 8) is None  # equal gaps, and nothing behind them
    assert judged({"A": one, "B": 3 * one}, 9.0, 8) is None
    # One task that can't be seen is enough, though on average halves agree.
    assert judged({"A": one, "B": other, "C": 3 * other}, 0.5) is False
    assert judged({"A": one, "B": other, "C": flat}, 0.5) is None


def test_sets_are_nested_and_in_the_order_of_their_effects():
    table = made_up({"A": [-3.0, 0.0, -1.0, 2.0, 0.1, -0.2, 0.3, 0.4]}, noise=0.0)
    sets = head_sets(table, (1, 2, 8), n_random=2)
    heads = {(one["choice"], one["draw"], one["n_heads"]): one["heads"] for one in sets}
    assert heads["strongest", 0, 2] == [[0, 0], [0, 2]] and heads["weakest", 0, 2] == [[0, 1], [1, 0]]
    assert heads["random", 0, 2][:1] == heads["random", 0, 1] and heads["random", 0, 8] != heads["random", 1, 8]
    assert all(sorted(found) == sorted(heads["random", 0, 8]) for key, found in heads.items() if key[2] == 8)


def test_a_map_has_one_scale_about_zero_and_names_its_strongest_cells():
    table = made_up({"ChooseAttr": [-30.0, 1, 2, 0], "ChooseRel": [0.0, 12, 0, -8]}, noise=0.0)
    cells = table.groupby(["task", "layer", "head"], as_index=False).logprob_change.mean()
    figure = plot_heads(cells, value="logprob_change", title="Heads")
    panels = [axis for axis in figure.axes if axis.get_xlabel() == "Layer"]
    assert [axis.get_title(loc="left") for axis in panels] == ["ChooseAttr", "ChooseRel"]
    assert {axis.collections[0].get_clim() for axis in panels} == {(-30.0, 30.0)}
    assert [[text.get_text() for text in axis.texts] for axis in panels] == [["−30"], ["12", "−8"]]
    assert {axis.get_ylabel() for axis in panels} == {"Head"}
