"""Figures are tested through their data and Axes: what stands in the summary must be what is drawn."""

import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from miniature.plots import plot_learning_curves
from mmflow_utils.plots.curves import plot_curves, plot_flow
from mmflow_utils.plots.maps import plot_map
from mmflow_utils.plots.pictures import plot_accuracy, plot_contact_sheet, plot_sample
from mmflow_utils.plots.prompt import plot_prompt
from mmflow_utils.plots.style import (
    FLOW_COLORS,
    MODULE_COLORS,
    SET_COLORS,
    TASK_COLORS,
    TASK_ORDER,
    WORD_COLORS,
    flow_color,
    set_style,
)
from mmflow_utils.prompts import flows
from mmflow_utils.prompts.positions import PositionSets

TASKS = TASK_ORDER
TO_LAST = [str(flow) for flow in flows.FLOW_TO_LAST]


def summary(tasks=TASKS, names=TO_LAST, n_layers: int = 12, n: int = 24) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {"task": task, "flow": name, "layer": layer} for task in tasks for name in names for layer in range(n_layers)
    ]
    frame = pd.DataFrame(rows).assign(mean=lambda f: -60 * rng.random(len(f)), n=n, n_clusters=n // 2)
    return frame.assign(ci_low=frame["mean"] - 5 * rng.random(len(frame)), ci_high=frame["mean"] + 4)


def curves(axis: plt.Axes) -> dict[str, mpl.lines.Line2D]:
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def bands(axis: plt.Axes) -> dict[str, mpl.collections.Collection]:
    return {band.get_label(): band for band in axis.collections}


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text())


# --- curves over layers ---


def test_panels_stand_in_the_papers_order_whatever_the_order_of_rows():
    figure = plot_flow(summary().sample(frac=1, random_state=0), model="mini", window=3)
    assert [axis.get_title("left") for axis in figure.axes] == list(TASKS)
    assert {axis.get_title("right") for axis in figure.axes} == {"n = 24"}
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (-(-len(TASKS) // 3), 3)
    assert figure.get_size_inches()[0] == 10
    assert "mini · window of 3 layers · bands: 95 % intervals over images" in texts(figure)


def test_curves_and_bands_are_the_summary():
    frame = summary()
    figure = plot_flow(frame.sample(frac=1, random_state=1))
    for axis, task in zip(figure.axes, TASKS, strict=True):
        assert list(curves(axis)) == ["Question → Last", "Image → Last", "Last → Last"]
        for name in TO_LAST:
            rows = frame[(frame["task"] == task) & (frame["flow"] == name)].sort_values("layer")
            shown = name.replace("->", "→")
            assert np.allclose(curves(axis)[shown].get_xydata(), rows[["layer", "mean"]])
            corners = bands(axis)[shown].get_paths()[0].vertices
            for end in ("ci_low", "ci_high"):
                drawn = {(int(x), round(float(y), 9)) for x, y in corners}
                assert {(x, round(y, 9)) for x, y in zip(rows["layer"], rows[end], strict=True)} <= drawn


def test_a_flow_has_one_color_in_curve_band_legend_and_every_figure():
    pair, alone = plot_flow(summary()), plot_flow(summary(TASKS[:1], TO_LAST[1:2]))
    seen = {to_hex(curves(axis)["Image → Last"].get_color()) for axis in (*pair.axes, *alone.axes)}
    seen |= {to_hex(bands(axis)["Image → Last"].get_facecolor()[0][:3]) for axis in pair.axes}
    handles = dict(zip([t.get_text() for t in pair.legends[0].texts], pair.legends[0].legend_handles, strict=True))
    assert seen | {to_hex(handles["Image → Last"].get_color())} == {flow_color("Image -> Last").lower()}
    assert len(pair.legends) == 1 and len(handles) == 3


@pytest.mark.parametrize(
    "figure_flows",
    [value for name, value in vars(flows).items() if name.isupper() and "_TO_" in name],
    ids=lambda value: str(value[0]),
)
def test_each_flow_of_the_paper_is_told_apart_in_its_figure(figure_flows):
    names = [str(flow) for flow in figure_flows]
    assert set(names) <= set(FLOW_COLORS)
    lines = curves(plot_flow(summary(TASKS[:1], names)).axes[0]).values()
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in lines}) == len(names)


def test_two_flows_of_one_color_differ_by_their_dashes():
    names = ["Image -> True option", "Related image patches -> True option"]
    lines = list(curves(plot_flow(summary(TASKS[:1], names)).axes[0]).values())
    assert lines[0].get_color() == lines[1].get_color()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_an_unknown_flow_keeps_its_color():
    assert flow_color("Cats -> Dogs") == flow_color("Cats -> Dogs")
    assert curves(plot_flow(summary(TASKS[:1], ["Cats -> Dogs"])).axes[0])


# How the eye's receptors of people with a strong deficiency mix linear RGB (Machado et al. 2009, severity 1).
DEFICIENCY = {
    "none": np.eye(3),
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def lab(color: str, deficiency: str) -> np.ndarray:
    linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in to_rgb(color)]
    seen = np.clip(np.array(DEFICIENCY[deficiency]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(to_xyz @ seen / [0.9505, 1, 1.089], 0.00886))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCY)
def test_colors_stay_apart_under_color_blindness(deficiency):
    main = [flow_color(flow) for flow in (*flows.FLOW_TO_LAST, *flows.IMAGE_TO_QUESTION)]
    patches = [flow_color(flow) for flow in flows.IMAGE_PATCHES_TO_QUESTION]
    parts = [flow_color(flow) for flow in flows.PARTS_TO_LAST]
    words, events = list(WORD_COLORS.values())[:3], list(WORD_COLORS.values())[-2:]
    modules = list(MODULE_COLORS.values())
    for group in (main, patches, parts, list(TASK_COLORS.values()), words, events, modules):
        for a, b in combinations(group, 2):
            assert np.linalg.norm(lab(a, deficiency) - lab(b, deficiency)) > 14, (a, b)
    assert np.linalg.norm(lab("#D55E00", "protan") - lab("#8B8B00", "protan")) < 14  # the check can fail


def test_two_columns_of_panels_stand_side_by_side_each_with_its_own_curves():
    lenses = [summary(TASKS[:3]).assign(lens=lens) for lens in ("paper", "normed")]
    lenses[1]["mean"] /= 2
    frame = pd.concat(lenses)
    figure = plot_curves(frame, across="lens")
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (3, 2)
    titles = [f"{task} · {lens}" for task in TASKS[:3] for lens in ("paper", "normed")]
    assert [axis.get_title("left") for axis in figure.axes] == titles
    for axis in figure.axes:
        task, lens = axis.get_title("left").split(" · ")
        rows = frame[(frame["task"] == task) & (frame["lens"] == lens) & (frame["flow"] == TO_LAST[0])]
        assert np.allclose(curves(axis)["Question → Last"].get_xydata(), rows[["layer", "mean"]])
    with pytest.raises(ValueError, match="several rows have the same task, flow and layer"):
        plot_curves(frame)
    with pytest.raises(ValueError, match="lense"):
        plot_curves(frame, across="lense")


def test_the_words_of_the_lens_keep_their_colors_and_order():
    words = list(WORD_COLORS)[:4]
    frame = summary(TASKS[:1], sorted(words)).rename(columns={"flow": "word"})
    lines = curves(plot_curves(frame, line="word", colors=WORD_COLORS).axes[0])
    assert list(lines) == words
    assert [to_hex(line.get_color()).upper() for line in lines.values()] == [WORD_COLORS[word] for word in words]
    assert lines["False option"].get_linestyle() != lines["Capitalized false option"].get_linestyle()


@pytest.mark.parametrize("n_tasks", [1, 2, 3, 4, 5])
def test_missing_tasks_leave_no_empty_panel_and_every_column_has_a_labeled_foot(n_tasks):
    figure = plot_flow(summary(TASKS[:n_tasks]))
    assert [axis.get_title("left") for axis in figure.axes] == list(TASKS[:n_tasks])
    columns = figure.axes[0].get_subplotspec().get_gridspec().ncols
    labeled = [axis for axis in figure.axes if axis.get_xlabel() == "Layer"]
    assert len(labeled) == min(columns, n_tasks)
    assert figure.axes[0].get_ylabel() == "Change in probability (%)"


@pytest.mark.parametrize("n_layers", [1, 4, 12, 40])
def test_the_layer_axis_is_whole_numbers_from_zero(n_layers):
    figure = plot_flow(summary(n_layers=n_layers))
    figure.canvas.draw()
    for axis in figure.axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert (low, high) == (-0.5, n_layers - 0.5)
        assert ticks[0] == 0 and all(float(tick).is_integer() for tick in ticks)
        assert len(ticks) >= min(n_layers, 4)


def test_all_panels_share_one_range_that_holds_zero_and_a_zero_line():
    figure = plot_flow(summary())
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    for axis in figure.axes:
        assert axis.get_ylim()[0] < 0 < axis.get_ylim()[1]
        assert any(line.get_label() == "_zero" and set(line.get_ydata()) == {0} for line in axis.lines)


def test_the_floor_of_each_task_is_a_dashed_level_within_every_panels_range():
    floor = pd.DataFrame({"task": TASKS[:3], "flow": "No picture at all", "mean": [-97.0, -80.0, -96.5]})
    figure = plot_flow(summary(TASKS[:2]), floor=floor)
    for axis, level in zip(figure.axes, (-97, -80), strict=True):
        (line,) = [line for line in axis.lines if line.get_label() == "_No picture at all"]
        assert set(line.get_ydata()) == {level} and line.get_linestyle() == "--"
        assert axis.get_ylim()[0] < -97
    assert figure.legends[0].texts[-1].get_text() == "No picture at all"


def test_a_change_in_percent_is_seen_on_at_least_ten_percent_up_and_down():
    frame = summary(TASKS[:1]).assign(mean=-2.0, ci_low=-2.5, ci_high=-1.5)
    low, high = plot_flow(frame).axes[0].get_ylim()
    assert low < -10 and high > 10
    assert plot_flow(frame, y_label="Change in log-probability (nats)").axes[0].get_ylim()[0] > -3
    assert plot_curves(frame).axes[0].get_ylim()[0] > -3


def test_tasks_in_which_nothing_happens_are_a_line_of_text_unless_there_is_nothing_else():
    frame = summary()
    still = frame["task"].isin(TASKS[1:3])
    frame.loc[still, "mean"] /= 100
    figure = plot_flow(frame)
    assert [axis.get_title("left") for axis in figure.axes] == [TASKS[0], *TASKS[3:]]
    said = " ".join(texts(figure).split())
    assert f"means within 1 % of 0 in all layers: {TASKS[1]}, {TASKS[2]}" in said
    rows = [(task, flow, -level - k) for task in TASKS for k, (flow, level) in enumerate((("A", 50.4), ("B", 80)))]
    floor = pd.DataFrame(rows, columns=["task", "flow", "mean"])
    floor.loc[floor["task"] == TASKS[2], "mean"] = -0.3
    said = " ".join(texts(plot_flow(frame, floor=floor)).split())
    assert f"in all layers, in brackets the dashed level: {TASKS[1]} (−50 %), {TASKS[2]} |" in said
    assert len(plot_flow(frame, y_label="Change in log-probability (nats)").axes) == len(TASKS)
    assert [axis.get_title("left") for axis in plot_flow(frame[still]).axes] == list(TASKS[1:3])


def test_the_title_names_the_flows_where_they_are_few():
    assert "blocking Image → Last" in texts(plot_flow(summary(names=TO_LAST[1:2])))
    assert "blocking Question → Last, Image → Last, Last → Last" in " ".join(texts(plot_flow(summary())).split())
    many = plot_flow(summary(TASKS[:1], [str(flow) for flow in flows.PARTS_TO_LAST]))
    assert "blocking a flow of information" in texts(many)


def test_missing_and_boundless_intervals_do_not_swallow_the_curves():
    frame = summary()
    frame.loc[0, ["ci_low", "ci_high"]] = [np.nan, np.nan]
    frame.loc[1, ["ci_low", "ci_high"]] = [-np.inf, np.inf]
    frame.loc[2, "ci_high"] = 1e6
    low, high = plot_flow(frame).axes[0].get_ylim()
    assert -140 < low < frame["mean"].min() and 0 < high < 80


def test_n_is_a_range_where_flows_differ():
    frame = summary(TASKS[:1])
    frame.loc[frame["flow"] == "Image -> Last", "n"] = 20
    assert plot_flow(frame).axes[0].get_title("right") == "n = 20 to 24"


def test_numbers_as_lines_get_an_ordered_scale():
    frame = pd.concat([summary(TASKS[:1], TO_LAST[:1]).assign(window=w) for w in (9, 1, 15)])
    figure = plot_curves(frame, line="window", panel="flow")
    assert [text.get_text() for text in figure.legends[0].texts] == ["window 1", "window 9", "window 15"]
    lightness = [lab(to_hex(line.get_color()), "none")[0] for line in curves(figure.axes[0]).values()]
    assert lightness == sorted(lightness)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="ci_low"), "expected the columns ci_low"),
        (lambda f: f[:0], "empty frame"),
        (lambda f: f.assign(mean=np.nan), "every mean in the summary is NaN"),
        (lambda f: pd.concat([f, f]), "select one model and one setting"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        plot_flow(change(summary()))


# --- learning curves, accuracy ---


def training_log(restart: bool = True) -> pd.DataFrame:
    rows = []
    for start, stage in ((0, "text"), (0 if restart else 40, "together")):
        for step in range(0, 41, 10):
            rows.append((stage, start + step, "loss", None, 2.0 - step / 40))
            rows += [(stage, start + step, "accuracy_pct", task, 20.0 + step) for task in TASKS]
    return pd.DataFrame(rows, columns=["stage", "step", "metric", "task", "value"])


@pytest.mark.parametrize("restart", [True, False])
def test_learning_curves_lay_stages_end_to_end(restart):
    figure = plot_learning_curves(training_log(restart))
    loss, accuracy = figure.axes
    assert [loss.get_title("left"), accuracy.get_title("left")] == ["Loss", "Accuracy (%)"]
    assert set(curves(loss)) == {"all"} and list(curves(accuracy)) == list(TASKS)
    parts = [line for line in loss.lines if line.get_label() == "all"]
    assert [list(line.get_xdata()) for line in parts] == [[0, 10, 20, 30, 40], [40, 50, 60, 70, 80]]
    assert np.allclose(parts[1].get_ydata(), [2, 1.75, 1.5, 1.25, 1])
    assert {text.get_text() for text in loss.texts} == {"text", "together"}
    assert [line.get_xdata()[0] for line in loss.lines if line.get_label() == "_stage"] == [40]


def test_names_of_short_stages_do_not_meet():
    lengths = {"tower": 1000, "text": 1000, "align": 100, "joint": 15_000}
    rows = [(stage, step, "loss", None, 1.0) for stage, n in lengths.items() for step in (0, n)]
    figure = plot_learning_curves(pd.DataFrame(rows, columns=["stage", "step", "metric", "task", "value"]))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_accuracy_prints_each_group_once_with_n():
    frame = pd.DataFrame(
        {
            "structural": ["Query", "choose", "compare"],
            "semantic": ["attr", "obj", "attr"],
            "accuracy_pct": [71.25, 90.17, np.nan],
            "n": [1200, 24, 0],
        }
    )
    figure = plot_accuracy(frame, title="Accuracy")
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["Object", "Attribute"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["Query", "Choose", "Compare"]
    cells = {(text.get_position()[0], round(text.get_position()[1])): [] for text in axis.texts}
    for text in axis.texts:
        cells[text.get_position()[0], round(text.get_position()[1])].append(text.get_text())
    assert cells == {(1, 0): ["71.3 %", "n = 1,200"], (0, 1): ["90.2 %", "n = 24"], (1, 2): ["–", "n = 0"]}
    with pytest.raises(ValueError, match="is duplicated"):
        plot_accuracy(pd.concat([frame, frame]))


# --- pictures ---

PICTURE = np.full((60, 80, 3), 200, dtype=np.uint8)


def test_a_sample_shows_each_box_where_it_is_and_names_what_is_absent():
    boxes = [
        SimpleNamespace(name="cup", box=SimpleNamespace(x=10, y=20, w=30, h=15)),
        SimpleNamespace(name="tree", box=None),
    ]
    figure = plot_sample(PICTURE, boxes, title="Is it $5 or $6?", subtitle="left")
    (patch,) = figure.axes[0].patches
    assert patch.get_label() == "cup" and patch.get_bbox().bounds == (9.5, 19.5, 30, 15)
    assert "not in the picture: tree" in texts(figure) and "Is it $5 or $6?" in texts(figure)
    figure.canvas.draw()  # a lone "$" would be read as the start of a formula


def test_labels_of_boxes_on_one_spot_do_not_cover_each_other():
    box = SimpleNamespace(x=5, y=20, w=9, h=9)
    figure = plot_sample(PICTURE, [SimpleNamespace(name=name, box=box) for name in "abc"])
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_a_contact_sheet_keeps_pictures_and_captions_together():
    pictures = [np.full((20, 20, 3), i, dtype=np.uint8) for i in range(5)]
    figure = plot_contact_sheet(pictures, [f"picture {i}" for i in range(5)], columns=3)
    drawn = [(int(a.images[0].get_array()[0, 0, 0]), a.texts[0].get_text()) for a in figure.axes if a.images]
    assert drawn == [(i, f"picture {i}") for i in range(5)]
    (axis,) = plot_contact_sheet(pictures[:1], ["red square cup\nblue round car"]).axes
    assert axis.texts[0].get_text() == "red square cup\nblue round car"
    with pytest.raises(ValueError, match="got 5 and 2"):
        plot_contact_sheet(pictures, ["one", "two"])
    with pytest.raises(ValueError, match="expected pictures"):
        plot_contact_sheet([])


# --- the prompt ---


class Page(HTMLParser):
    """Chips (text, title, style) of a prompt, and every tag and attribute met."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.chips, self.text, self.stack = set(), set(), [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "wbr":
            self.stack.append(dict(attrs))
        if "title" in dict(attrs):
            self.chips.append(["", dict(attrs)["title"], dict(attrs)["style"]])

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, data):
        self.text += data
        if any("title" in attrs for attrs in self.stack):
            self.chips[-1][0] += data


def prompt_positions(n_image: int = 16, **more) -> tuple[list[str], PositionSets]:
    tokens = ["<s>", "▁USER", ":", *["<image>"] * n_image, "<0x0A>", "▁red", "Ġor", " blue", "?", "\n", ":"]
    q = 4 + n_image
    sets = {"image": range(3, 3 + n_image), "question": range(q, q + 4), "option_true": [q], "last": [q + 5]}
    return tokens, PositionSets(n_tokens=len(tokens), sets=sets | more)


def test_tokens_have_the_color_of_the_smallest_set_that_holds_them():
    tokens, positions = prompt_positions(question_without_options=[21, 23], options=[20, 22], option_false=[22])
    chips = {text: (title, style) for text, title, style in Page(plot_prompt(tokens, positions).data).chips}
    assert chips["·red"][0] == "position 20: True option" and SET_COLORS["option_true"] in chips["·red"][1]
    assert chips["·or"][0] == "position 21: Question" and SET_COLORS["question"] in chips["·or"][1]
    assert chips["·blue"][0] == "position 22: False option"
    assert chips["<s>"][0] == "position 0" and "background" not in chips["<s>"][1]


def test_a_long_run_of_image_tokens_is_one_chip_with_its_count():
    tokens, positions = prompt_positions(
        image_related=[5, 6, 9], image_other=[p for p in range(3, 19) if p not in (5, 6, 9)]
    )
    page = Page(plot_prompt(tokens, positions).data)
    image = [text for text, *_ in page.chips if "image" in text]
    assert image == ["16 image tokens = 13 other image patches + 3 related image patches"]
    assert len(page.chips) == len(tokens) - 16 + 1
    assert "Related image patches (3)" in page.text and "Image (16)" in page.text
    few = Page(plot_prompt(*prompt_positions(n_image=2)).data)
    assert [text for text, *_ in few.chips].count("<image>") == 2


def test_hostile_text_stays_text():
    hostile = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "&amp;",
        "\x1b[31m",
        "\u202e",
        "",
    ]
    positions = PositionSets(
        n_tokens=6, sets={"question": [0, 1], '"><b onclick="x': [2]}, missing={"image": "<iframe src='//x'>"}
    )
    page = Page(plot_prompt(hostile, positions).data)
    shown = [hostile[0], hostile[1].replace(" ", "·"), "&amp;", "\\u001b[31m", "\\u202e", "∅"]
    assert page.tags == {"div", "span", "wbr"} and page.attributes == {"class", "style", "title"}
    assert [chip[0] for chip in page.chips] == shown
    assert "<iframe src='//x'>" in page.text and not page.stack


def test_text_keeps_the_pages_own_color():
    html = plot_prompt(*prompt_positions()).data
    assert ";color:" not in html and '"color:' not in html


def test_the_prompt_refuses_positions_it_does_not_have():
    with pytest.raises(ValueError, match="position 9, but there are 3 tokens"):
        plot_prompt(["a", "b", "c"], {"question": [9]})


# --- manners ---


def test_drawing_leaves_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    plot_flow(summary())
    with pytest.raises(ValueError, match="empty"):
        plot_flow(summary()[:0])
    assert dict(mpl.rcParams) == before and plt.get_fignums() == []
    with mpl.rc_context():
        set_style()
        assert not mpl.rcParams["axes.spines.top"]


@pytest.mark.slow
def test_plots_and_stats_never_import_torch():
    code = "import sys, mmflow_utils.plots.curves, mmflow_utils.analysis.stats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_map_shows_every_cell_and_prints_the_large_ones():
    frame = pd.DataFrame(
        [
            (flow, layer, change)
            for flow in ("Image -> Last", "Question -> Last")
            for layer, change in ((0, -1.0), (1, -80.0))
        ],
        columns=["flow", "layer", "rel_change_pct"],
    )
    axis = plot_map(frame, title="T").axes[0]
    assert [text.get_text() for text in axis.texts] == ["", "−80", "", "−80"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Question → Last", "Image → Last"]
    assert axis.collections[0].get_array().ravel().tolist() == [-1.0, -80.0, -1.0, -80.0]
    with pytest.raises(ValueError, match="layer"):
        plot_map(frame.drop(columns="layer"))
