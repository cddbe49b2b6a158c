"""Intervals cover what they promise on clustered data, tests hold their level, sentences print stably."""

from zlib import crc32

import numpy as np
import pandas as pd
import pytest
from analysis_cells import load
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mmflow_utils.analysis import intervals, stats
from mmflow_utils.analysis import sentences as findings

TOLERANCE = 1e-12


def clustered(n_groups: int, n_images: int, *, seed: int = 0, effect: float = 0.0, share: float = 0.8) -> pd.DataFrame:
    """Independent repetitions of one experiment whose images hold 1 to 6 questions each; variance 1, of which
    `share` lies between images."""
    rng = np.random.default_rng(seed)
    sizes = np.resize([1, 2, 6], n_images)
    image = np.repeat(np.arange(n_images), sizes)
    between = rng.normal(size=(n_groups, n_images))[:, image] * np.sqrt(share)
    within = rng.normal(size=(n_groups, len(image))) * np.sqrt(1 - share)
    n = len(image)
    return pd.DataFrame(
        {
            "group": np.repeat(np.arange(n_groups), n),
            "image_id": np.tile(image, n_groups).astype(str),
            "sample_id": np.tile(np.arange(n), n_groups).astype(str),
            "y": (effect + between + within).ravel(),
        }
    )


def coverage(frame: pd.DataFrame, truth: float = 0.0, **options) -> float:
    table = stats.summarize(frame, "y", ["group"], **options)
    return float(((table["ci_low"] <= truth) & (truth <= table["ci_high"])).mean())


def sweep_frame(n_layers: int = 6, n_samples: int = 30, flows=("Question -> Last", "Image -> Last")) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [
        {"task": task, "flow": flow, "layer": layer, "sample_id": f"{task}{i}", "image_id": f"im{i // 2}"}
        for task in ("ChooseAttr", "QueryAttr")
        for flow in flows
        for layer in range(n_layers)
        for i in range(n_samples)
    ]
    frame = pd.DataFrame(rows)
    at = (frame["layer"] == 3) & (frame["flow"] == flows[0])
    frame["rel_change_pct"] = rng.normal(size=len(frame)) - 40 * at
    return frame


# --- intervals ---


@pytest.mark.parametrize("n_images", [12, 40])
def test_the_clustered_interval_covers_and_the_row_bootstrap_does_not(n_images):
    frame = clustered(600, n_images)
    assert 0.92 <= coverage(frame) <= 0.975
    assert coverage(frame, cluster="sample_id") < 0.85  # negative control: rows of an image go together
    assert coverage(frame, truth=2.0) < 0.05  # and the interval does not simply hold everything


def test_rows_that_do_not_share_images_need_no_clusters():
    frame = clustered(600, 40).drop_duplicates(["group", "image_id"])
    assert 0.92 <= coverage(frame, cluster=None) <= 0.975


@pytest.mark.slow
def test_a_simultaneous_band_covers_whole_curves_and_a_pointwise_one_does_not():
    frame = clustered(2400, 30).rename(columns={"group": "layer"})
    frame["curve"], frame["layer"] = frame["layer"] // 8, frame["layer"] % 8

    def whole_curves_inside(**options):
        table = stats.summarize(frame, "y", ["curve", "layer"], **options)
        inside = (table["ci_low"] <= 0) & (table["ci_high"] >= 0)
        return inside.groupby(table["curve"]).all().mean()

    assert whole_curves_inside() < 0.85
    assert whole_curves_inside(simultaneous_over="layer") >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("quiet", [0.0, 1e-7, 1e-4, 0.03, 0.3])
def test_a_band_covers_whole_curves_whatever_varies_hardly_at_all(quiet):
    """Of eight layers four vary by `quiet`: from nothing over rounding to a third of the others' spread."""
    frame = clustered(4800, 24).rename(columns={"group": "layer"})
    frame["curve"], frame["layer"] = frame["layer"] // 8, frame["layer"] % 8
    frame["y"] *= np.where(frame["layer"] < 4, 10 * quiet, 10.0)
    table = stats.summarize(frame, "y", ["curve", "layer"], n_boot=500, simultaneous_over="layer")
    inside = (table["ci_low"] <= 0) & (table["ci_high"] >= 0)
    whole = inside.groupby(table["curve"]).all().mean()
    assert 0.93 <= whole <= 0.985
    loud = table["layer"] >= 4  # and the quiet layers don't make the others' band wider than it must be
    alone = stats.summarize(frame[frame["layer"] >= 4], "y", ["curve", "layer"], n_boot=500, simultaneous_over="layer")
    width, needed = (t["ci_high"] - t["ci_low"] for t in (table[loud], alone))
    assert np.median(width / needed.to_numpy()) < (1.01 if quiet <= 1e-4 else 1.15)


@pytest.mark.parametrize(("value", "steps"), [("y", 120), pytest.param("rel_change_pct", 240, marks=pytest.mark.slow)])
def test_a_band_moves_no_more_than_its_data_do(value, steps):
    """A layer's spread grows from nothing past what counts: the others' band follows without a jump."""
    frame = sweep_frame(flows=("a",)).query("task == 'ChooseAttr'").drop(columns="task")
    edges = []
    for spread in np.geomspace(1e-6, 3, steps):
        scaled = frame["rel_change_pct"].where(frame["layer"] != 5, spread * frame["rel_change_pct"])
        table = stats.summarize(
            frame.assign(**{value: scaled}), value, ["layer"], simultaneous_over="layer", n_boot=500, smallest=0.1
        )
        edges.append(table["ci_high"] - table["mean"])
    steps = np.diff(np.array(edges)[:, :5], axis=0)
    assert np.abs(steps).max() < 0.02 * np.array(edges)[:, :5].max()


# --- intervals of what has limits ---


def asked(shares, n_images: int, *, alike: float = 0.0, sizes=(1,), n_groups: int = 500) -> pd.DataFrame:
    """Answers, right (100) or wrong (0), to `sizes` questions on each image, a part of which are answered alike."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(n_images), np.resize(sizes, n_images))
    groups = []
    for number, share in enumerate(shares):
        shape = (n_groups, n_images)
        together, which = rng.random(shape)[:, image], rng.random(shape)[:, image] < alike
        right = np.where(which, together, rng.random((n_groups, len(image)))) < share
        names = np.repeat(np.arange(n_groups) + number * n_groups, len(image))
        groups.append(pd.DataFrame({"group": names, "share": 100 * share, "correct_pct": 100.0 * right.ravel()}))
        groups[-1]["image_id"] = np.tile(image, n_groups).astype(str)
    return pd.concat(groups)


@pytest.mark.parametrize("n_images", [12, 24, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("alike", "sizes"), [(0.0, (1,)), (0.0, (1, 2, 6)), (0.5, (1, 2, 6)), (1.0, (1, 2, 6))])
def test_the_interval_of_a_share_covers_what_it_promises(n_images, alike, sizes):
    table = stats.summarize(
        asked([0.03, 0.3, 0.8, 0.97], n_images, alike=alike, sizes=sizes), "correct_pct", ["share", "group"]
    )
    inside = (table["ci_low"] <= table["share"]) & (table["share"] <= table["ci_high"])
    assert (inside.groupby(table["share"]).mean() >= 0.93).all()
    assert table["ci_low"].between(0, 100).all() and table["ci_high"].between(0, 100).all()
    assert (table["ci_high"] - table["ci_low"]).min() > 300 / (2 * len(np.resize(sizes, n_images)) + 3)  # never a point


def test_of_many_questions_on_as_many_images_it_is_wilsons():
    table = stats.summarize(asked([0.02, 0.3, 0.97], 2000, n_groups=3), "correct_pct", ["share", "group"])
    for row in table.to_dict("records"):
        exact = binomtest(round(20 * row["mean"]), 2000).proportion_ci(method="wilson")
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((100 * exact.low, 100 * exact.high), abs=0.01)


def test_that_the_simulation_can_fail():
    """The bootstrap's percentiles, which know no limits, leave out rare losses: what was used before."""
    frame = asked([0.03, 0.97], 24).rename(columns={"correct_pct": "y"})
    table = stats.summarize(frame, "y", ["share", "group"], n_boot=200)
    assert ((table["ci_low"] <= table["share"]) & (table["share"] <= table["ci_high"])).mean() < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 24, 200])
@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("flow_to_last", "rel_change_pct", "flow"),
        ("image_to_question", "rel_change_pct", "flow"),
        ("flow_to_last", "logprob_change", "flow"),
        ("logit_lens", "probability", "word"),
        ("module_knockout", "jaccard", "knockout"),
    ],
)
def test_intervals_of_stored_measures_cover_their_means(name, value, line, n):
    """What mini's 144 samples show is taken for the truth, and samples are drawn from them."""
    rng, n_draws = np.random.default_rng(0), 150
    for _, rows in load("mini", name).groupby(line):
        rows = rows[rows["protocol"] == "corrected"] if "protocol" in rows else rows
        truth = rows.pivot(index="sample_id", columns="layer", values=value).to_numpy()
        n_layers = truth.shape[1]
        frame = pd.DataFrame(
            {
                "draw": np.repeat(np.arange(n_draws), n * n_layers),
                "image_id": np.tile(np.repeat(np.arange(n), n_layers), n_draws).astype(str),
                "layer": np.tile(np.arange(n_layers), n_draws * n),
                value: truth[rng.integers(0, len(truth), (n_draws, n))].ravel(),
            }
        )
        for over in (None, "layer"):
            table = stats.summarize(frame, value, ["draw", "layer"], n_boot=200, simultaneous_over=over)
            mean = truth.mean(0)[table["layer"]]
            inside = (table["ci_low"] <= mean) & (mean <= table["ci_high"])
            covered = inside.groupby(table["draw"]).all() if over else inside
            assert covered.mean() >= 0.93
            assert (table["ci_low"] < table["ci_high"]).all()
            low, high = intervals.RANGES[value]
            assert table["ci_low"].min() >= min(low, truth.min()) and table["ci_high"].max() <= high


def test_a_rare_loss_that_a_few_samples_do_not_show_is_allowed_for():
    rows = pd.DataFrame({"layer": 0, "image_id": range(24), "rel_change_pct": -0.01 * np.arange(24)})
    assert stats.summarize(rows, by=["layer"])["ci_low"][0] < -100 * 3 / 24
    many = pd.DataFrame({"layer": 0, "image_id": range(400), "rel_change_pct": -0.01 * (np.arange(400) % 24)})
    assert -2 < stats.summarize(many, by=["layer"])["ci_low"][0] < -0.5


def test_means_are_plain_means_of_rows():
    frame = sweep_frame()
    table = stats.summarize(frame)
    expected = frame.groupby(["task", "flow", "layer"])["rel_change_pct"].mean()
    assert np.allclose(table["mean"], expected.to_numpy(), atol=TOLERANCE)
    assert list(table) == ["task", "flow", "layer", "mean", "ci_low", "ci_high", "n", "n_clusters", "interval"]
    assert set(table["n"]) == {30} and set(table["n_clusters"]) == {15}
    assert ((table["ci_low"] < table["mean"]) & (table["mean"] < table["ci_high"])).all()


def test_the_vectorized_bootstrap_equals_the_plain_one():
    frame = clustered(1, 9)
    names = np.sort(frame["image_id"].unique())
    rng = np.random.default_rng([3, crc32("\n".join(names).encode())])
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=200)
    by_image = {name: frame.loc[frame["image_id"] == name, "y"].to_numpy() for name in names}
    means = [
        np.concatenate([np.tile(by_image[name], int(times)) for name, times in zip(names, row, strict=True)]).mean()
        for row in weights
    ]
    tail = stats.ndtr(intervals.widened(0.05, np.resize([1.0, 2.0, 6.0], (1, 9))))[0]
    table = stats.summarize(frame, "y", ["group"], n_boot=200, seed=3, level=0.9)
    assert np.allclose(table[["ci_low", "ci_high"]].iloc[0], np.quantile(means, [tail, 1 - tail]), atol=TOLERANCE)


def test_order_of_rows_and_other_groups_do_not_matter():
    frame = sweep_frame()
    whole = stats.summarize(frame)
    shuffled = stats.summarize(frame.sample(frac=1, random_state=0))
    part = stats.summarize(frame[frame["task"] == "QueryAttr"])
    pd.testing.assert_frame_equal(whole, shuffled)
    pd.testing.assert_frame_equal(whole[whole["task"] == "QueryAttr"].reset_index(drop=True), part)
    resampled = frame.rename(columns={"rel_change_pct": "y"})
    first, other = (stats.summarize(resampled, "y", seed=seed) for seed in (0, 1))
    assert not np.allclose(first["ci_low"], other["ci_low"])


def test_curves_on_the_same_images_share_their_resamples():
    frame = sweep_frame(flows=("a",)).rename(columns={"rel_change_pct": "y"})
    twice = pd.concat([frame, frame.assign(flow="b", y=frame["y"] + 5)])
    table = stats.summarize(twice, "y")
    low = table.set_index(["task", "layer", "flow"])["ci_low"].unstack()
    assert np.allclose(low["b"] - low["a"], 5, atol=1e-9)


def test_nan_rows_are_left_out_and_an_empty_group_stays_visible():
    frame = sweep_frame()
    frame.loc[(frame["task"] == "QueryAttr"), "rel_change_pct"] = np.nan
    frame.loc[frame["sample_id"] == "ChooseAttr0", "rel_change_pct"] = np.nan
    table = stats.summarize(frame).set_index("task")
    assert set(table.loc["QueryAttr", "n"]) == {0} and table.loc["QueryAttr", "mean"].isna().all()
    assert set(table.loc["ChooseAttr", "n"]) == {29}


def test_a_single_image_gets_no_interval_and_a_constant_a_point():
    rows = pd.DataFrame({"task": "t", "image_id": "one", "y": [1.0, 3.0]})
    assert stats.summarize(rows, "y", ["task"])[["ci_low", "ci_high"]].isna().all(axis=None)
    same = pd.DataFrame({"task": "t", "layer": 0, "image_id": ["a", "b", "c"], "y": -100.0})
    by, ends = ["task", "layer"], ["ci_low", "ci_high"]
    assert np.allclose(stats.summarize(same, "y", by)[ends], -100)
    band = stats.summarize(same, "y", by, simultaneous_over="layer", smallest=0.5)
    assert np.allclose(band[ends], [[-100.5, -99.5]])  # no band is narrower than what counts
    lost = same.rename(columns={"y": "rel_change_pct"})
    for options in ({}, {"simultaneous_over": "layer"}):
        low, high = stats.summarize(lost, by=by, **options)[ends].iloc[0]
        assert low == -100  # none holds what can't be: less than nothing
        assert -100 + 100 * 3 / 6 < high < 0  # and three images don't show that all would lose everything


def test_a_group_that_spans_layers_counts_samples_not_rows():
    table = stats.summarize(sweep_frame(n_layers=6), by=["task", "flow"])
    assert set(table["n"]) == {30}


def test_samples_without_a_task_are_a_group():
    frame = sweep_frame().assign(task=None)
    assert len(stats.summarize(frame)) == 12


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f.rename(columns={"image_id": "image"}), {}, "no column 'image_id': did you mean 'image'"),
        (lambda f: f, {"value": "nonsense"}, "no column 'nonsense': it has task"),
        (lambda f: f[:0], {}, "empty frame"),
        (lambda f: f.assign(rel_change_pct=np.inf), {}, "infinite"),
        (lambda f: f.assign(image_id=None), {}, "rows have no 'image_id'"),
        (
            lambda f: pd.concat([f.assign(window=1), f.assign(window=9)]),
            {},
            "mixes several values of 'window'",
        ),
        (lambda f: f, {"level": 95.0}, "0 < level < 1"),
        (lambda f: f, {"n_boot": 5}, "n_boot >= 100"),
        (lambda f: f, {"simultaneous_over": "stage"}, "not one of the grouping columns"),
    ],
)
def test_refusals_say_what_to_do(change, options, message):
    with pytest.raises(ValueError, match=message):
        stats.summarize(change(sweep_frame()), **options)


# --- differences ---


def two_flows(n_groups: int, effect: float, n_images: int = 20) -> pd.DataFrame:
    a, b = clustered(n_groups, n_images, seed=1, effect=effect), clustered(n_groups, n_images, seed=2)
    frame = pd.concat([a.assign(flow="a"), b.assign(flow="b")])
    return frame.rename(columns={"group": "layer", "y": "rel_change_pct"}).assign(task="t")


def test_the_sign_flip_test_holds_its_level_and_finds_what_is_there():
    options = {"n_boot": 100, "n_flips": 999, "smallest": 0.0}
    nothing = stats.paired_difference(two_flows(600, 0.0), "a", "b", **options)
    assert 0.025 <= (nothing["p"] < 0.05).mean() <= 0.08
    rows_as_images = two_flows(600, 0.0).assign(image_id=lambda f: f["sample_id"])
    assert (stats.paired_difference(rows_as_images, "a", "b", **options)["p"] < 0.05).mean() > 0.12
    there = stats.paired_difference(two_flows(50, 3.0), "a", "b", **options)
    assert (there["p"] < 0.05).all() and np.isclose(there["mean"].mean(), 3, atol=0.2)


def test_swapping_the_conditions_mirrors_the_result():
    frame = two_flows(4, 1.0)
    ab, ba = (stats.paired_difference(frame, x, y) for x, y in (("a", "b"), ("b", "a")))
    assert np.allclose(ab["mean"], -ba["mean"]) and np.allclose(ab["ci_low"], -ba["ci_high"])
    assert np.allclose(ab["p"], ba["p"])
    assert ab["contrast"].unique().tolist() == ["a minus b"]


def test_pairing_drops_and_counts_rows_without_a_partner():
    frame = two_flows(3, 0.0)
    cut = frame[~((frame["flow"] == "b") & (frame["sample_id"] == "4"))]
    table = stats.paired_difference(cut, "a", "b")
    assert set(table["n_unpaired"]) == {3}
    assert set(table["n"]) == {frame["sample_id"].nunique() - 1}


def test_holm_is_taken_over_the_table_or_over_families():
    frame = pd.concat([two_flows(4, 0.6).assign(task=name) for name in ("t", "u")])
    whole = stats.paired_difference(frame, "a", "b", n_flips=999, smallest=0.1)
    by_task = stats.paired_difference(frame, "a", "b", n_flips=999, smallest=0.1, family=["task"])
    assert np.allclose(whole["p_holm"], stats.holm(whole["p"]))
    assert (by_task["p_holm"] <= whole["p_holm"]).all() and (by_task["p_holm"] < whole["p_holm"]).any()


def test_differences_refuse_what_cannot_be_paired():
    frame = two_flows(2, 0.0)
    with pytest.raises(ValueError, match="no row has flow == 'c'"):
        stats.paired_difference(frame, "a", "c")
    with pytest.raises(ValueError, match="not unique"):
        stats.paired_difference(pd.concat([frame, frame]), "a", "b")
    apart = frame.assign(sample_id=frame["sample_id"] + frame["flow"])
    with pytest.raises(ValueError, match="were both run on the same samples"):
        stats.paired_difference(apart, "a", "b")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=12))
def test_holm_never_lowers_p_keeps_order_and_equals_the_plain_rule(p):
    adjusted = stats.holm(p)
    tested = sorted(x for x in p if x == x)
    for raw, new in zip(p, adjusted.tolist(), strict=True):
        if raw != raw:
            assert new != new
            continue
        plain = max(min(1.0, (len(tested) - i) * q) for i, q in enumerate(tested) if q <= raw)
        assert new == pytest.approx(plain) and new >= raw


# --- sentences ---


def test_the_strongest_layer_is_the_planted_one():
    table = findings.strongest_layer(stats.summarize(sweep_frame()))
    hit = table[table["flow"] == "Question -> Last"]
    assert set(hit["layer"]) == {3} and set(hit["layers"]) == {"3"}
    assert all("3" in text for text in hit["dropped"])


def test_layers_that_differ_by_rounding_are_tied():
    base = {"task": "t", "flow": "f", "ci_low": -1.0, "ci_high": 0.5, "n": 2, "n_clusters": 2}
    means = [-1.0, -50.0, -50.0000001, -49.99, -3.0]
    summary = pd.DataFrame([base | {"layer": layer, "mean": mean} for layer, mean in enumerate(means)])
    row = findings.strongest_layer(summary).iloc[0]
    assert (row["layer"], row["layers"]) == (1, "1-3")
    assert findings.strongest_layer(summary, tie=0.0).iloc[0]["layer"] == 2


def test_findings_state_effect_unit_interval_and_n():
    summary = stats.summarize(sweep_frame(), simultaneous_over="layer")
    found = [text for text in findings.describe_strongest(summary) if "Question -> Last" in text]
    assert found[0].startswith("ChooseAttr, Question -> Last: largest drop at layer 3, -40.")
    assert " % (95 % simultaneous interval -5" in found[0] and "30 samples on 15 images" in found[0]
    assert found[0].endswith("; at least 0.5 % for sure in layer 3.")


def test_findings_claim_no_drop_where_the_interval_holds_zero_or_is_missing():
    row = {
        "task": "t",
        "flow": "f",
        "layer": 2,
        "mean": -1.0,
        "ci_low": -3.0,
        "ci_high": 1.0,
        "n": 9,
        "n_clusters": 9,
    }
    (text,) = findings.describe_strongest(pd.DataFrame([row]))
    assert "no drop that surely reaches 0.5 %" in text and "largest drop" not in text
    (text,) = findings.describe_strongest(pd.DataFrame([row | {"ci_low": np.nan, "ci_high": np.nan, "n_clusters": 1}]))
    assert "too few images" in text and "nan" not in text


def test_findings_of_a_difference_name_only_layers_that_pass_holm():
    frame = two_flows(4, 0.0)
    frame.loc[(frame["layer"] == 2) & (frame["flow"] == "a"), "rel_change_pct"] -= 5
    (text,) = findings.describe_differences(stats.paired_difference(frame, "a", "b"))
    assert text.startswith("t, a minus b: differs in layer 2 (Holm p < 0.05, by 0.5 or more); largest at layer 2, -")
    (text,) = findings.describe_differences(stats.paired_difference(two_flows(4, 0.0), "a", "b"))
    assert "no layer differs" in text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(-2000, 2000), st.floats(-1e-9, 1e-9))
def test_numbers_at_ties_print_the_same_whatever_the_rounding_noise(twentieths, noise):
    value = twentieths / 20  # every tie of one decimal, and every value between
    text = findings.format_number(value + noise)
    assert text == findings.format_number(value) and text != "-0.0"
    assert abs(float(text) - value) <= 0.05 + 1e-9


def test_ranges_of_layers():
    assert findings.layer_ranges([]) == ""
    assert findings.layer_ranges(np.array([7, 0, 1, 2, 9, 10])) == "0-2, 7, 9-10"


def test_the_highest_point_is_told_with_its_interval_and_where_the_curve_ends():
    rows = [
        {"task": task, "layer": layer, "mean": mean, "ci_low": mean - 2, "ci_high": mean + 2}
        for task, means in {"A": [1.0, 60.04, 60.0, 5.0], "B": [0.0, 1.0, 2.0, 99.0]}.items()
        for layer, mean in enumerate(means)
    ]
    table = pd.DataFrame(rows).assign(n=9, n_clusters=7, interval="95 % simultaneous interval")
    table = table.sample(frac=1, random_state=0)
    assert findings.describe_highest(table) == [
        "A: highest at layer 1, 60.0 % (95 % simultaneous interval 58.0 to 62.0, 9 samples on 7 images); "
        "5.0 % at layer 3.",
        "B: highest at layer 3, 99.0 % (95 % simultaneous interval 97.0 to 101.0, 9 samples on 7 images).",
    ]


@pytest.mark.parametrize(("scale", "claimed"), [(1e-5, False), (0.1, False), (1.0, True)])
def test_what_is_smaller_than_what_counts_is_not_claimed_however_sure_it_is(scale, claimed):
    rng = np.random.default_rng(0)
    rows = [
        {"sample_id": n, "image_id": n, "task": "T", "flow": flow, "layer": layer, "rel_change_pct": change}
        for n in range(30)
        for layer in range(2)
        for flow, change in (("A", -scale * (3 + rng.random())), ("B", 0.0))
    ]
    frame = pd.DataFrame(rows)
    table = stats.paired_difference(frame, "A", "B")
    assert (table.p_holm < 0.05).all() == claimed or scale == 0.1
    (difference,) = findings.describe_differences(table)
    assert ("differs in layers 0-1" in difference, "no layer differs" in difference) == (claimed, not claimed)
    band = stats.summarize(frame[frame.flow == "A"], simultaneous_over="layer")
    assert (band.ci_high <= -0.5).all() == claimed
    (drop,) = findings.describe_strongest(band)
    assert ("largest drop" in drop, "no drop that" in drop) == (claimed, not claimed)
