"""Stages and claims on curves whose answer is known, and on curves that must not pass."""

import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from miniature.planted import ANSWER, PICK_UP
from mmflow_utils.analysis.claim_measures import _valley
from mmflow_utils.analysis.claims import CLAIMS, POOLED, VERDICTS, check_claims, describe_claims, tally_claims
from mmflow_utils.analysis.collect import HELD, LEAD, REMOVED, WRITTEN_BY, collect_effects, read_results
from mmflow_utils.analysis.flow_stages import find_stages, resample, stage_layers, tabulate_stages
from mmflow_utils.analysis.stats import summarize
from mmflow_utils.experiments.curation import read_questions
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.models.load import load_model
from mmflow_utils.params import ROOT, Params, load_params
from mmflow_utils.plots.curves import plot_curves
from mmflow_utils.plots.flow_stages import plot_stages
from mmflow_utils.prompts.flows import FLOW_TO_LAST, IMAGE_TO_QUESTION
from mmflow_utils.results.frames import manifest, save_frame

L = 20
OTHER, RELATED = "Other image patches -> Question", "Related image patches -> Question"
QUICK = {"n_boot": 200}


def bump(center: float, height: float, width: float = 1.2) -> np.ndarray:
    return height * np.exp(-(((np.arange(L) - center) / width) ** 2))


def as_drawn(curves: dict, *, noise: float = 3.0, n_images: int = 24, model="m", task="T") -> pd.DataFrame:
    """Effects of 24 images with the given mean curves and noise of a given spread."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "model": model,
            "task": task,
            "sample_id": f"s{i}",
            "image_id": f"i{i}",
            "line": line,
            "layer": layer,
        }
        | {"n_layers": L, "effect": effect + noise * rng.standard_normal()}
        for i in range(n_images)
        for line, curve in curves.items()
        for layer, effect in enumerate(curve)
    ]
    return pd.DataFrame(rows)


LOWER, CAPITALS = bump(11, 60, 2), bump(18, 90, 3)
AS_IN_THE_PAPER = {
    "Image -> Question": bump(2, 60) + bump(8, 35),
    "Question -> Last": bump(11, 45, 2),
    "Image -> Last": bump(11, 1),
    "Last -> Last": np.zeros(L),
    OTHER: bump(2, 50),
    RELATED: bump(8, 35),
    "Noncapitalized answer": LOWER,
    "Capitalized answer": CAPITALS,
    LEAD: LOWER - CAPITALS,
    "MLP": np.linspace(90, 25, L),
    "Attention": np.linspace(60, 10, L),
    REMOVED: np.where(np.arange(L) < 10, 50.0, 0.0),
    f"{HELD}Question": bump(9, 80, 3),
}
# The same, each claim turned into its opposite.
CONTRARY = {
    "Image -> Question": bump(15, 60),
    "Question -> Last": bump(2, 35),
    "Image -> Last": bump(2, 80),
    "Last -> Last": bump(2, 30),
    OTHER: bump(12, 50),
    RELATED: bump(3, 35),
    "Noncapitalized answer": bump(18, 60),
    "Capitalized answer": bump(5, 90, 3) + 10,
    LEAD: -bump(5, 90, 3) - 10,
    "MLP": np.full(L, 10.0),
    "Attention": np.full(L, 30.0),
    REMOVED: np.full(L, 30.0),
    f"{HELD}Question": bump(9, 10, 3),
}
NOTHING = dict.fromkeys(AS_IN_THE_PAPER, np.zeros(L))
MANY = {"n_images": 300}  # a share of 5 % that loses everything isn't missed


def judged(curves: dict, **options) -> dict[str, str]:
    """Check claims on curves of one task: claim -> verdict."""
    table = check_claims(as_drawn(curves, **options), **QUICK)
    return dict(table.loc[table["task"] == POOLED, ["claim", "verdict"]].itertuples(index=False))


# --- where a stage is ---


def test_a_stage_is_found_where_it_was_put():
    box = np.where((np.arange(L) >= 4) & (np.arange(L) <= 7), 40.0, 0.0)
    box[6] = 60
    (row,) = find_stages(as_drawn({"a": box}), **QUICK).to_dict("records")
    assert (row["layers"], row["begins"], row["strongest"], row["ends"]) == ("4-7", 4, 6, 7)
    assert (row["begins_low"], row["begins_high"], row["ends_low"], row["ends_high"]) == (4, 4, 7, 7)
    assert row["ci_low"] < 60 < row["ci_high"] and (row["n"], row["n_clusters"], row["n_layers"]) == (
        24,
        24,
        L,
    )


def test_the_table_gives_layers_with_their_intervals_and_nothing_where_there_is_none():
    found = find_stages(as_drawn({"a": bump(5, 50), "b": np.zeros(L)}, noise=0.1), **QUICK)
    table = tabulate_stages(found)
    assert table.loc[("m", "a"), ["layers", "begins", "strongest"]].tolist() == [
        "4-6",
        "4 (4 to 4)",
        "5 (5 to 5)",
    ]
    assert table.loc[("m", "a"), "effect"].startswith("50.0 (43.0 to 57.") and table.loc[("m", "a"), "n"] == 24
    assert table.loc[("m", "b"), ["layers", "begins", "ends"]].tolist() == ["", "", ""]


def test_the_rule_is_the_one_that_is_stated():
    curve = np.zeros(L)
    curve[[2, 3, 10, 15]] = 100, 19, 21, 4  # a share of 0.2 is 20
    effects = as_drawn({"a": curve}, noise=0.5, **MANY)
    for rule, layers in (
        ({}, [2, 10]),
        ({"share": 0.0}, [2, 3, 10]),
        ({"share": 0.0, "negligible": 2.0}, [2, 3, 10, 15]),
    ):
        table = stage_layers(effects, **rule, **QUICK)
        assert table.loc[table.in_stage, "layer"].tolist() == layers
    rare = as_drawn({"a": np.zeros(L)}, noise=0.0, n_images=50)
    rare.loc[(rare["layer"] == 4) & rare["sample_id"].isin([f"s{n}" for n in range(4)]), "effect"] = 100.0
    (found,) = stage_layers(rare, **QUICK).query("layer == 4").to_dict("records")
    assert found["mean"] == 8 and 0 < found["ci_low"] < 5 and not found["in_stage"]  # there, but perhaps negligible


def test_noise_is_no_stage():
    table = find_stages(as_drawn({"a": np.zeros(L), "b": np.full(L, 6.0)}, noise=30), **QUICK)
    assert table["layers"].tolist() == ["", ""] and table["begins"].isna().all()


def test_a_rise_of_probability_is_no_stage():
    assert find_stages(as_drawn({"a": -bump(5, 50)}), **QUICK)["layers"].tolist() == [""]


def test_an_edge_that_is_unsure_has_a_wide_interval():
    slope = np.clip(40 - 3 * np.abs(np.arange(L) - 9.0), 0, None)
    (row,) = find_stages(as_drawn({"a": slope}, noise=15), **QUICK).to_dict("records")
    assert row["begins_low"] < row["begins_high"] and row["begins_low"] <= row["begins"] <= row["begins_high"]


def test_curves_stay_apart_and_keep_their_names_with_and_without_a_task():
    two = pd.concat(
        [
            as_drawn({"a": bump(3, 50)}, task=None, model="x"),
            as_drawn({"a": bump(15, 50)}, task="T", model="x"),
            as_drawn({"a": bump(9, 50)}, task="T", model="y"),
        ]
    )
    table = find_stages(two, by=["model", "task", "line"], **QUICK)
    found = table[["model", "task", "strongest"]].fillna("-").to_numpy().tolist()
    assert found == [["x", "T", 15], ["x", "-", 3], ["y", "T", 9]]


def test_images_are_resampled_not_rows():
    # One image asked a hundred times: rows would give a narrow interval, one cluster gives none.
    rows = as_drawn({"a": bump(5, 50)}, n_images=1)
    many = pd.concat([rows.assign(sample_id=f"s{i}") for i in range(100)])
    (row,) = find_stages(many, **QUICK).to_dict("records")
    assert row["n"] == 100 and row["n_clusters"] == 1 and row["layers"] == ""


def test_draws_are_means_of_drawn_images():
    frame = as_drawn({"a": bump(5, 50)}, n_images=3)
    draws = resample(frame, n_boot=50, seed=0)
    means = frame.pivot_table(index="image_id", columns="layer", values="effect").to_numpy()
    assert draws.shape == (51, L) and draws[0] == pytest.approx(means.mean(0))
    drawn = np.linalg.lstsq(means.T, draws[1], rcond=None)[0] * 3  # how often each image was drawn
    assert drawn == pytest.approx(drawn.round()) and drawn.sum() == pytest.approx(3)
    assert resample(frame, images=["i0", "i1", "i2", "z"], n_boot=9, seed=0)[0] == pytest.approx(draws[0])


@pytest.mark.parametrize("options", [{"share": 1.1}, {"share": -0.1}, {"negligible": -1.0}])
def test_a_rule_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match="share of 0 to 1"):
        stage_layers(as_drawn({"a": bump(5, 50)}), **options)


# --- claims ---


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, str]]:
    made = {"hold": AS_IN_THE_PAPER, "fail": CONTRARY, "lack": NOTHING}
    return {name: judged(curves, noise=1.0, **MANY) for name, curves in made.items()}


@pytest.mark.parametrize("claim", [claim.text for claim in CLAIMS])
def test_each_claim_can_hold_fail_and_not_apply(verdicts, claim):
    assert verdicts["hold"][claim] == "holds"
    assert verdicts["fail"][claim] == "does not hold"
    assert verdicts["lack"][claim] == "not applicable"


def test_nothing_is_claimed_from_noise():
    assert "holds" not in judged(NOTHING, noise=60).values()


def test_a_dozen_samples_without_an_effect_show_no_absence():
    few, many = (judged(AS_IN_THE_PAPER, noise=0.1, n_images=n)["Last -> Last is negligible"] for n in (12, 300))
    assert (few, many) == ("undecided", "holds")


@pytest.mark.parametrize(("apart", "verdict"), [(0.02, "does not hold"), (0.9, "does not hold"), (3.0, "holds")])
def test_an_order_needs_a_layer_between(apart, verdict):
    curves = AS_IN_THE_PAPER | {"Image -> Question": bump(5, 60, 2), "Question -> Last": bump(5 + apart, 60, 2)}
    assert judged(curves, noise=1.0, **MANY)["Image -> Question acts before Question -> Last"] == verdict


def test_lower_case_that_never_leads_does_not_come_first():
    """Its center lies seven layers before that of capitals, which are likelier everywhere."""
    low, high = bump(9, 20, 2), bump(16, 90, 4) + 25
    curves = AS_IN_THE_PAPER | {"Noncapitalized answer": low, "Capitalized answer": high, LEAD: low - high}
    table = check_claims(as_drawn(curves, noise=1.0, **MANY), **QUICK)
    (row,) = table[(table["task"] == POOLED) & table["claim"].str.contains("lower case")].to_dict("records")
    assert row["verdict"] == "does not hold" and row["why"].startswith(f"{LEAD}: at most -")


def test_numbers_are_those_computed_by_hand():
    table = check_claims(as_drawn(AS_IN_THE_PAPER, noise=0), **QUICK)
    table = table[table["task"] == POOLED]
    values = dict(zip([claim.measure.__name__ for claim in CLAIMS], table["value"], strict=True))
    assert values["depth"] == pytest.approx(100 * 11.5 / 20)
    assert values["stronger"] == pytest.approx(44)
    assert values["largest"] == 0
    assert values["at_both_ends"] == pytest.approx(15) and values["in_second_half"] == 0
    lowest = AS_IN_THE_PAPER["Image -> Question"][2:9].min()
    assert values["two_drops"] == pytest.approx(35 - lowest)
    here = table.set_index("claim").loc["Question -> Last is strongest in the middle layers", "here"]
    assert here.startswith("Question -> Last 45.0 (") and here.endswith(") at layer 11 of 20, depth 0.58")


@pytest.mark.parametrize(
    "curve, fall",
    [([60, 10, 21, 0], 11), ([0, 5, 9, 5], -4), ([9, 8, 7], -1), ([3, 1, 5, 0, 4], 4), ([5, 5, 5], 0)],
)
def test_the_fall_between_two_peaks(curve, fall):
    curve = np.array(curve, dtype=float)
    assert _valley(curve, curve) == fall


def test_a_stage_that_is_surely_absent_makes_a_claim_void_and_one_that_is_unsure_does_not():
    flat = AS_IN_THE_PAPER | {OTHER: np.zeros(L)}
    first = as_drawn(flat, noise=1.0, **MANY)
    unsure = pd.concat([first[first["line"] != OTHER], as_drawn({OTHER: np.zeros(L)}, noise=90, **MANY)])
    for effects, verdict in ((first, "not applicable"), (unsure, "undecided")):
        table = check_claims(effects, **QUICK)
        (row,) = table[(table["task"] == POOLED) & (table["paper"] == "§6, Fig. 5")].to_dict("records")
        assert row["verdict"] == verdict and OTHER in row["why"] and np.isnan(row["value"])


def test_what_is_not_stored_is_not_measured_and_says_what_to_run():
    table = check_claims(as_drawn({"Question -> Last": AS_IN_THE_PAPER["Question -> Last"]}), **QUICK)
    table = table[table["task"] == POOLED]
    found = dict(zip(table["claim"], zip(table["verdict"], table["why"], table["n"], strict=True), strict=True))
    assert found[CLAIMS[2].text] == ("holds", "", 24)
    assert found[CLAIMS[1].text] == ("not measured", "run notebook 03 for this model", 0)
    assert [row[0] for row in found.values()].count("not measured") == len(CLAIMS) - 1


def test_models_and_tasks_are_judged_apart_and_counted():
    shown = [name for name in AS_IN_THE_PAPER if "->" in name]
    made = [(model, task, {name: curves[name] for name in shown}) for model, task, curves in (
        ("a", "T", AS_IN_THE_PAPER), ("a", "U", CONTRARY), ("b", "T", CONTRARY)
    )]  # fmt: skip
    effects = pd.concat([as_drawn(curves, model=model, task=task) for model, task, curves in made])
    table = check_claims(effects, **QUICK)
    middle = table[table["claim"] == CLAIMS[2].text].set_index(["model", "task"])["verdict"]
    assert middle.loc[[("a", "T"), ("a", "U"), ("b", "T")]].tolist() == ["holds", "does not hold", "does not hold"]
    assert set(table["task"]) == {"T", "U", POOLED} and set(table["verdict"]) <= set(VERDICTS)
    tally = tally_claims(table)
    assert tally.loc[("a", CLAIMS[2].text), "tasks"] == "holds in 1 of 2 tasks (T), does not hold in 1 (U)"
    assert tally.loc[("b", CLAIMS[2].text), "tasks"] == "holds in 0 of 1 task, does not hold in 1 (T)"
    assert tally.loc[("a", CLAIMS[2].text), POOLED] == "differs by task"
    assert tally.loc[("b", CLAIMS[2].text), POOLED] == "does not hold"


def test_no_order_is_claimed_of_all_tasks_together_that_one_of_them_contradicts():
    """Many samples of one task would decide what all say together."""
    late = AS_IN_THE_PAPER | {"Image -> Question": bump(15, 60, 2)}
    made = [as_drawn(AS_IN_THE_PAPER, task="T", noise=1.0, **MANY), as_drawn(late, task="U", noise=1.0)]
    order, table = "Image -> Question acts before Question -> Last", check_claims(pd.concat(made), **QUICK)
    found = table[table["claim"] == order].set_index("task")["verdict"].to_dict()
    assert found == {"T": "holds", "U": "does not hold", POOLED: "differs by task"}


def test_findings_say_tasks_first_then_number_interval_and_n_then_the_papers_number():
    first, *_, last = describe_claims(check_claims(as_drawn(AS_IN_THE_PAPER, noise=0)[lambda f: f.line != REMOVED]))
    assert first.startswith("m: The picture enters the question in two separate stages: holds in ")
    assert "; all together: " in first and "24 samples on 24 images; Image -> Question 60.0 (" in first
    assert first.endswith("ChooseCat, ChooseRel and QueryAttr, less in the other two.")
    assert ": not measured; all together: not measured (run notebook 07 for this model). Paper (App. F" in last


def test_an_empty_table_has_the_columns():
    assert {"model", "claim", "verdict"} <= set(check_claims(collect_effects({})))


def test_a_claim_names_results_that_are_read_and_lines_that_differ():
    assert {name for claim in CLAIMS for name in claim.lines.values()} == set(WRITTEN_BY)
    assert all(1 <= len(c.lines) <= 2 and c.holds[0] < c.holds[1] for c in CLAIMS)


def test_every_number_of_the_paper_is_quoted_with_its_place():
    assert all(claim.says and claim.paper.startswith(("§", "App.")) and "Fig" in claim.paper for claim in CLAIMS)


# --- from stored results ---


def stored_flows(flow="Question -> Last", source="question", layers=3) -> pd.DataFrame:
    shared = {"sample_id": "q", "image_id": "i", "task": "T", "flow": flow, "source": source}
    return pd.DataFrame([shared | {"layer": n, "rel_change_pct": -10.0 * n} for n in range(layers)])


def test_results_of_every_model_are_read_and_brought_to_one_form(tmp_path):
    made_by = manifest(Params())
    save_frame(stored_flows(), tmp_path / "a" / "flow_to_last.parquet", made_by)
    save_frame(stored_flows(layers=5), tmp_path / "b" / "flow_to_last.parquet", made_by)
    save_frame(stored_flows(), tmp_path / "b" / "window_size.parquet", made_by)
    results = read_results(tmp_path)
    assert list(results) == ["flow_to_last"]
    effects = collect_effects(results)
    assert effects.groupby("model")["n_layers"].first().to_dict() == {"a": 3, "b": 5}
    assert effects.loc[effects.model == "a", "effect"].tolist() == [0, 10, 20]


def test_what_is_held_counts_its_own_pictures_and_leaves_other_lines_as_they_were():
    flow = as_drawn({"Question -> Last": bump(11, 45, 2)})
    row = {"sample_id": "p", "task": "T", "layer": 0, "recovery_pct": 105.0, "model": "m"}
    cells = [(n, name, layer) for n in range(40) for name in ("Question", "Options") for layer in (0, L - 1)]
    held = pd.DataFrame([row | {"image_id": f"p{n}", "positions": name, "layer": at} for n, name, at in cells])
    effects = collect_effects({"patching": held})
    assert set(effects.line) == {f"{HELD}Question"} and set(effects.effect) == {100.0} and set(effects.n_layers) == {L}
    alone, both = (check_claims(e, **QUICK).set_index(["task", "claim"]) for e in (flow, pd.concat([flow, effects])))
    others = alone.verdict != "not measured"
    assert alone[others].equals(both[others])
    (mine,) = both[both.measured.str.contains("another picture")].loc["T"].to_dict("records")
    assert mine["verdict"] == "holds" and mine["value"] == 100


def test_of_several_runs_the_latest_is_read_and_said(tmp_path, capsys):
    path = tmp_path / "a" / "flow_to_last.parquet"
    save_frame(stored_flows(), path, manifest(Params(window=3)))
    beside = save_frame(stored_flows(layers=5), path, manifest(Params(window=5)))
    assert len(read_results(tmp_path)["flow_to_last"]) == 5
    assert capsys.readouterr().out == f"a has 2 runs of flow_to_last: {beside.name} is the latest, and read.\n"
    os.utime(path)  # as a notebook does that loads it
    assert len(read_results(tmp_path)["flow_to_last"]) == 3


def test_where_nothing_is_stored_there_is_nothing(tmp_path):
    assert read_results(tmp_path) == {} and read_results(tmp_path / "none") == {}
    assert collect_effects({}).empty


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "logit_lens.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"m/logit_lens.parquet.*run again"):
        read_results(tmp_path)


def test_the_control_of_random_patches_is_no_line():
    frame = pd.concat([stored_flows(), stored_flows("Image random 1 -> Question", "image_random_1")])
    assert set(collect_effects({"image_patch_knockout": frame.assign(model="m")})["line"]) == {"Question -> Last"}


def test_modules_and_lens_become_percent_of_what_is_lost_or_shown():
    shared = {"model": "m", "sample_id": "q", "image_id": "i", "task": "T", "layer": [0, 1]}
    modules = pd.DataFrame(shared | {"knockout": "MLP", "jaccard": [0.25, 1.0]})
    assert collect_effects({"module_knockout": modules})["effect"].tolist() == [75, 0]
    lens = pd.DataFrame(shared | {"word": "Capitalized answer", "protocol": "paper", "probability": [0.5, 1]})
    assert collect_effects({"logit_lens": lens}, protocol="paper")["effect"].tolist() == [50, 100]
    assert collect_effects({"logit_lens": lens}, protocol="corrected").empty


def test_removal_is_the_loss_of_accuracy_against_the_intact_model():
    rows = [
        (0, REMOVED, 20, 100),
        (0, "Smaller picture", 20, 0),
        (10, REMOVED, 10, 0),
        (10, "FastV", 10, 100),
        (5, REMOVED, 15, 100),
    ]
    frame = pd.DataFrame(rows, columns=["n_layers_without", "way", "from_layer", "correct_pct"])
    frame = frame.assign(model="m", sample_id="q", image_id="i", task="T")
    effects = collect_effects({"efficiency_removed": frame})
    assert effects[["layer", "effect", "n_layers"]].to_numpy().tolist() == [[10, 100, 20], [15, 0, 20]]


def test_a_result_of_another_kind_and_a_missing_column_are_refused():
    with pytest.raises(ValueError, match="got window_size"):
        collect_effects({"window_size": stored_flows()})
    with pytest.raises(ValueError, match="rel_change_pct"):
        collect_effects({"flow_to_last": stored_flows().assign(model="m").drop(columns="rel_change_pct")})


@pytest.mark.slow
def test_the_comparison_loads_no_torch(tmp_path):
    save_frame(stored_flows(), tmp_path / "a" / "flow_to_last.parquet", manifest(Params()))
    code = (
        "import sys, mmflow_utils as mm\n"
        "from mmflow_utils.analysis.flow_stages import stage_layers\n"
        f"effects = mm.collect_effects(mm.read_results({str(tmp_path)!r}))\n"
        "stages, layers = mm.find_stages(effects, n_boot=100), stage_layers(effects, n_boot=100)\n"
        "mm.plot_stages(layers, stages), mm.check_claims(effects, n_boot=100)\n"
        "assert mm.Params and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_notebook_loads_no_model():
    text = (ROOT / "notebooks" / "14_compare_models.ipynb").read_text()
    assert not [name for name in ("load_model", "load_samples", "encode(", "_sweep(") if f"mm.{name}" in text]


# --- the positive control ---


def test_the_control_has_its_two_stages_at_exactly_their_layers():
    known = {"Image -> Question": str(PICK_UP), "Question -> Last": str(ANSWER)}
    stages = find_stages(collect_effects(read_results(ROOT / "assets" / "control")), **QUICK).set_index("line")
    assert stages.layers[stages.layers != ""].drop("Related image patches -> Question").to_dict() == known
    for name, at in known.items():
        ends = stages.loc[name, ["begins_low", "begins_high", "strongest_low", "strongest_high", "ends_high"]]
        assert set(ends) == {int(at)}
    assert str(known)[:-1] in (ROOT / "notebooks" / "14_compare_models.ipynb").read_text().replace('\\"', "'")


@pytest.mark.slow
@pytest.mark.parametrize("flows", [FLOW_TO_LAST, IMAGE_TO_QUESTION], ids=["flow_to_last", "image_to_question"])
def test_the_control_is_what_planted_does(flows, request):
    params = load_params({"model": "planted"})
    stored = read_results(ROOT / "assets" / "control")[request.node.callspec.id]
    samples = [s for s in read_questions(params, tasks=params.tasks)[0] if s.sample_id in set(stored.sample_id[:30])]
    anew = knockout_sweep(load_model(params), samples[:2], flows, window=params.window, progress=False).frame
    both = anew.merge(stored, on=["sample_id", "flow", "layer"])
    assert len(both) == len(anew) and np.allclose(both["p_knockout_x"], both["p_knockout_y"], atol=1e-5)


# --- the drawing ---


def drawn(curves, **options):
    effects = as_drawn(curves, **options)
    return plot_stages(stage_layers(effects, **QUICK), find_stages(effects, **QUICK), title="Stages")


def arrows(axis) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for patch in axis.patches:
        found.setdefault(patch.get_label(), []).append(round(patch._posA_posB[0][1]))
    return found


def test_there_is_an_arrow_for_each_layer_of_a_stage_and_none_elsewhere():
    (axis,) = drawn(AS_IN_THE_PAPER, noise=0.1).axes
    assert arrows(axis) == {OTHER: [1, 2, 3], RELATED: [7, 8, 9], "Question -> Last": [9, 10, 11, 12, 13]}
    assert "−35 % at 8" in [text.get_text() for text in axis.texts]


def test_the_whole_image_stands_where_its_parts_were_not_measured():
    (axis,) = drawn({"Image -> Question": bump(2, 60), "Question -> Last": bump(9, 50)}).axes
    assert set(arrows(axis)) == {"Image -> Question", "Question -> Last"}


def test_what_has_no_stage_is_said():
    (axis,) = drawn({OTHER: np.zeros(L), RELATED: bump(8, 25)}).axes
    assert set(arrows(axis)) == {RELATED}
    assert any("no stage" in text.get_text() and "Other image" in text.get_text() for text in axis.texts)


def test_numbers_and_words_of_stages_that_end_together_do_not_meet():
    together = {OTHER: bump(8, 60), RELATED: bump(8, 50), "Question -> Last": bump(8, 40), "Image -> Last": bump(8, 30)}
    figure = drawn(together | {"Noncapitalized answer": bump(8, 50), "Capitalized answer": bump(9, 60)})
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 3 + 4 + 2 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_each_model_has_a_panel_and_its_own_depth():
    effects = pd.concat([as_drawn(AS_IN_THE_PAPER, model=name) for name in "abcd"])
    figure = plot_stages(stage_layers(effects, **QUICK), find_stages(effects, **QUICK))
    assert [axis.get_title("left") for axis in figure.axes] == [f"{name} · {L} layers" for name in "abcd"]


def test_a_line_that_stands_twice_can_not_be_drawn():
    stages = find_stages(as_drawn({OTHER: bump(3, 50)}), **QUICK)
    layers = stage_layers(as_drawn({OTHER: bump(3, 50)}), **QUICK)
    with pytest.raises(ValueError, match="duplicated"):
        plot_stages(layers, pd.concat([stages, stages]))


def test_a_task_that_a_model_was_not_asked_leaves_its_panel_empty():
    asked = [("a", "ChooseAttr"), ("a", "ChooseCat"), ("b", "ChooseAttr")]
    effects = pd.concat([as_drawn({OTHER: bump(3, 50)}, model=model, task=task) for model, task in asked])
    summary = summarize(effects, "effect", by=["model", "task", "line", "layer"], n_boot=100)
    figure = plot_curves(summary, line="line", across="model")
    drawn_in = {axis.get_title("left"): bool(axis.collections) for axis in figure.axes}
    assert drawn_in == {
        "ChooseAttr · a": True,
        "ChooseAttr · b": True,
        "ChooseCat · a": True,
        "ChooseCat · b": False,
    }


def test_what_a_model_has_nothing_of_is_read_from_the_next_folder(tmp_path):
    for place, model, n in (("here", "a", 1), ("there", "a", 2), ("there", "b", 3)):
        frame = pd.DataFrame({"layer": range(n)})
        save_frame(frame, tmp_path / place / model / "flow_to_last.parquet", {"depends_on": {}})
    (tmp_path / "here" / "b").mkdir()
    # Of each result by itself, where it is of the same run as what the model has.
    for model, name, window in (("a", "logit_lens", 3), ("a", "patching", 5), ("b", "patching", 5)):
        save_frame(frame, tmp_path / "there" / model / f"{name}.parquet", {"depends_on": {"window": window}})
    for place, model in (("here", "a"), ("there", "b")):
        path = tmp_path / place / model / "flow_to_last.parquet"
        save_frame(pd.read_parquet(path), path, {"depends_on": {"window": 3 if model == "a" else 5}})
    found = read_results(tmp_path / "here", tmp_path / "there")
    assert found["flow_to_last"].groupby("model").size().to_dict() == {"a": 1, "b": 3}
    assert found["logit_lens"].model.unique().tolist() == ["a"] and found["patching"].model.unique().tolist() == ["b"]
