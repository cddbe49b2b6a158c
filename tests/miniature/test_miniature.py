"""The drawn world says what it shows, its answers follow from the scene graphs and from nothing else."""

import json
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from gqa_operations import MEMBERS, evaluate
from PIL import Image
from transformers import AutoTokenizer

from miniature.build import IMAGE_SIZE, MEAN, STD
from miniature.dataset import write_split
from miniature.drawing import draw_scene
from miniature.facts import write_factual
from miniature.next import build_next_processor
from miniature.questions import GENERATORS, ask
from miniature.questions.draft import gqa_record
from miniature.questions.extras import describe, factual
from miniature.questions.tasks import TASK_GENERATORS
from miniature.score import held_out
from miniature.tower import HEADS, patch_truth
from miniature.views import look_at, windows_of
from miniature.world import ATTRIBUTES, CATEGORIES, COLORS, FRAMES, SIZE, beside, sample_scene, scene_graph
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.data.tasks import TASKS
from mmflow_utils.params import ROOT

pytestmark = pytest.mark.slow

ASSETS = ROOT / "assets/miniature"


@cache
def scenes(n=120, seed=7):
    rng = np.random.default_rng(seed)
    return tuple(sample_scene(rng, scene_id=f"{i:04d}") for i in range(n))


@cache
def framed(n=16, seed=9):
    """Scenes in each of the frames, in turns."""
    rng = np.random.default_rng(seed)
    return tuple(sample_scene(rng, frames=(frame,)) for _ in range(n) for frame in FRAMES)


@cache
def asked():
    """One question of every generator about each scene: (generator's name, record, scene)."""
    rng = np.random.default_rng(8)
    drafts = ((g.__name__, ask(g, scene, rng), scene) for scene in scenes() for g in GENERATORS)
    return [(name, gqa_record(draft, scene), scene) for name, draft, scene in drafts if draft]


# ---- the world -----------------------------------------------------------------------------------------


def painted(scene, things):
    """Where the picture with some of the scene's things differs from the one with none."""
    empty, some = (np.asarray(draw_scene(replace(scene, things=t)), int) for t in ((), things))
    return (empty != some).any(-1)


def spread(where):
    rows, columns = np.nonzero(where)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def edges(box):
    x, y, w, h = box
    return x, y, x + w, y + h


def test_things_are_painted_inside_their_boxes_and_fill_them():
    for scene in (*scenes()[:60], *framed()):
        width, height = scene.frame
        for thing in scene.things:
            where = painted(scene, (thing,))
            assert where.shape == (height, width)
            left, top, right, bottom = edges(thing.box)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            outside = where.copy()
            outside[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = False
            assert not outside.any(), thing  # but for the two pixels of a thick line
            x0, y0, x1, y1 = spread(where)
            assert min(x1 - x0, y1 - y0) >= 0.85 * thing.size
            assert min(left - x0, top - y0, x1 - right, y1 - bottom) > -0.4 * thing.size


def test_things_neither_overlap_nor_touch():
    for scene in (*scenes(), *framed()):
        assert 2 <= len(scene.things) <= 4
        assert len({t.category for t in scene.things}) == len(scene.things)
        for one, other in combinations(scene.things, 2):
            (a, b, c, d), (p, q, r, s) = edges(one.box), edges(other.box)
            assert max(p - c, a - r, q - d, b - s) >= 4  # pixels between them, in one direction at least
        alone = sum(painted(scene, (t,)).astype(int) for t in scene.things)
        assert alone.max() == 1


def test_the_scene_graph_is_true_to_the_picture():
    for scene in (*scenes()[:60], *framed()):
        picture, graph = np.asarray(draw_scene(scene)), scene_graph(scene)
        assert picture.shape == (graph["height"], graph["width"], 3)
        middles = {}
        for thing in scene.things:
            told = graph["objects"][thing.object_id]
            where = painted(scene, (thing,))
            shown = Counter(map(tuple, picture[where].tolist()))
            (color,) = set(told["attributes"]) & set(COLORS)
            assert max(COLORS, key=lambda name: shown[COLORS[name]]) == color
            x0, _, x1, _ = edges([told[side] for side in "xywh"])
            assert np.nonzero(where.any(0))[0].mean() == pytest.approx((x0 + x1) / 2, abs=0.2 * thing.size)
            middles[thing.object_id] = (x0 + x1) / 2
        for one, told in graph["objects"].items():
            for relation in told["relations"]:
                is_left = middles[one] < middles[relation["object"]]
                assert relation["name"] == ("to the left of" if is_left else "to the right of")


def test_every_fact_can_be_seen():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, n_things=1)
    (thing,) = scene.things
    kinds = {**ATTRIBUTES, "category": CATEGORIES}
    for kind, values in kinds.items():
        variants = [replace(scene, things=(replace(thing, **{kind: value}),)) for value in values]
        shown = [np.asarray(draw_scene(variant), int) for variant in variants]
        for one, other in combinations(shown, 2):
            assert (np.abs(one - other).max(-1) > 40).sum() > 100, kind  # pixels
    indoors, outdoors = (draw_scene(replace(scene, place=place)) for place in ("indoors", "outdoors"))
    assert indoors.getpixel((0, 0)) != outdoors.getpixel((0, 0))


def test_a_patch_is_taught_what_stands_there():
    some = list(scenes()[:40])
    truth = patch_truth(some, 8)
    assert {name: tuple(t.shape) for name, t in truth.items()} == {
        **dict.fromkeys(HEADS, (40, 64)),
        "center": (40, 64, 2),
    }
    shares = {True: [], False: []}  # what is painted, of patches that are taught a thing and of the others
    for i, scene in enumerate(some):
        taught = truth["category"][i].reshape(8, 8)
        for thing in scene.things:
            here = int(thing.y * 8 / SIZE), int(thing.x * 8 / SIZE)
            assert taught[here] == 1 + CATEGORIES.index(thing.category)
            assert truth["color"][i].reshape(8, 8)[here] == list(COLORS).index(thing.color)
            assert torch.allclose(truth["center"][i].reshape(8, 8, 2)[here] * SIZE, torch.tensor([thing.x, thing.y]))
        share = painted(scene, scene.things).reshape(8, 28, 8, 28).mean((1, 3))  # of each patch
        shares[False] += share[taught.numpy() == 0].tolist()
        shares[True] += share[taught.numpy() > 0].tolist()
    assert max(shares[False]) < 0.7 and np.mean(shares[False]) < 0.1 and np.mean(shares[True]) > 0.4


def test_frames_are_equally_likely_and_alike_in_area_and_number_of_things():
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng, frames=FRAMES) for _ in range(1000)]
    counts = Counter(scene.frame for scene in drawn)
    assert set(counts) == set(FRAMES) and min(counts.values()) > 150
    assert {w * h for w, h in FRAMES} <= set(range(49_000, 52_000))
    for frame in FRAMES:
        here = [scene for scene in drawn if scene.frame == frame]
        assert np.mean([len(scene.things) for scene in here]) == pytest.approx(3, abs=0.25)
        sides = Counter(thing.side for scene in here for thing in scene.things)
        assert min(sides["left"], sides["right"]) > 0.3 * sides.total()


def test_things_of_any_frame_can_be_beside_one_another():
    for frame in FRAMES:
        pairs = [p for s in framed() if s.frame == frame for p in combinations(s.things, 2)]
        assert np.mean([beside(*pair) for pair in pairs]) > 0.4, frame


# ---- what a model with tiles is shown -----------------------------------------------------------------


@cache
def tiles():
    """LLaVA-NeXT's image processor, as mini-next has it."""
    return build_next_processor(AutoTokenizer.from_pretrained(ROOT / "assets" / "mini")).image_processor


def places_shown(frame):
    """Send a picture whose colors are its coordinates through the processor: x, y, and whether there."""
    width, height = frame
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[:, :, 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    picture[:, :, 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    pixels = tiles()(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0].numpy()
    shown = pixels * np.reshape(STD, (3, 1, 1)) + np.reshape(MEAN, (3, 1, 1))
    return shown[:, 0] * width, shown[:, 1] * height, shown[:, 2] > 0.999


@pytest.mark.parametrize("frame", FRAMES)
def test_windows_are_where_the_processor_looks(frame):
    xs, ys, there = places_shown(frame)
    windows = windows_of(frame, tiles().image_grid_pinpoints, IMAGE_SIZE)
    assert len(windows) == len(xs) > 2
    middles = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE

    def farthest(windows):
        """From where the colors say, of all pixels but those that blend with the edge: in pixels."""
        off = []
        for (left, top, width, height), x, y, shown in zip(windows, xs, ys, there, strict=True):
            a, b = left + middles * width, top + middles * height
            inside = np.ix_((b > 3) & (b < frame[1] - 3), (a > 3) & (a < frame[0] - 3))
            assert shown[inside].all()
            off += [np.abs(x - a)[inside].max(), np.abs(y - b[:, None])[inside].max()]
        return max(off)

    assert farthest(windows) < 2  # colors have 256 steps
    if len(windows) > 3:
        with pytest.raises(AssertionError):  # control: tiles in another order
            assert farthest([windows[0], *windows[:0:-1]]) < 2


def test_a_patch_of_a_tile_is_taught_what_stands_there():
    some = list(framed(6))
    views = look_at(some, tiles())
    truth = patch_truth(views.scenes, 8, views.windows)
    found = 0
    for i, (scene, (left, top, width, height)) in enumerate(zip(views.scenes, views.windows, strict=True)):
        taught = truth["category"][i].reshape(8, 8)
        for thing in scene.things:
            x, y = (thing.x - left) / width, (thing.y - top) / height
            if min(x, y) > 0 and max(x, y) < 1:
                here = int(y * 8), int(x * 8)
                assert taught[here] == 1 + CATEGORIES.index(thing.category)
                center = truth["center"][i].reshape(8, 8, 2)[here]
                assert torch.allclose(center, torch.tensor([x, y], dtype=torch.float32))
                found += 1
    assert found == 2 * sum(len(scene.things) for scene in some)  # once as a whole, once in a tile


# ---- the questions -------------------------------------------------------------------------------------


def test_answers_follow_from_the_scene_graphs():
    for name, record, scene in asked():
        assert evaluate(record, scene_graph(scene)) == record["answer"], (name, record["question"])
    counts = Counter(name for name, *_ in asked())
    assert set(counts) == {g.__name__ for g in GENERATORS} and min(counts.values()) > 20


def test_other_facts_give_other_answers():
    # The check above can fail: with every color another one, no question for a color keeps its answer.
    after = dict(zip(COLORS, [*list(COLORS)[1:], "red"], strict=True))
    tried = 0
    for name, record, scene in asked():
        if name == "directOf" and record["answer"] in COLORS:
            things = tuple(replace(t, color=after[t.color]) for t in scene.things)
            assert evaluate(record, scene_graph(replace(scene, things=things))) == after[record["answer"]]
            tried += 1
    assert tried > 20


def test_questions_are_of_the_type_they_say():
    task_of = {g.__name__: task for task, group in TASK_GENERATORS.items() for g in group}
    groups = set()
    for name, record, _ in asked():
        types = record["types"]
        inside = [task for task, kinds in TASKS.items() if types["detailed"] in kinds]
        assert inside == [task_of[name]] if name in task_of else inside == [], name
        assert types["detailed"] == name or name in (
            *("existThatOr", "directOf", "directOfRelated"),
            "verifyAttrThat",
        )
        groups.add((types["structural"], types["semantic"]))
        last = record["semantic"][-1]["operation"].split()[0]
        assert (
            types["structural"]
            in {
                **dict(query=["query"], choose=["choose"], common=["compare"], same=["compare"]),
                **{"or": ["logical"], "and": ["logical"], "verify": ["verify"], "exist": ["verify"]},
            }[last]
        )
    assert len(groups) >= 12


def test_annotations_point_at_the_words_of_the_things():
    for name, record, scene in asked():
        words = [re.sub(r"\W", "", word) for word in record["question"].split()]
        things = {t.object_id: t for t in scene.things}
        marked = record["annotations"]["question"]
        for index, object_id in marked.items():
            category = things[object_id].category
            kinds = {kind for kind, members in MEMBERS.items() if category in members}
            plural = "fish" if category == "fish" else f"{category}s"
            assert words[int(index)] in {category, plural, "thing", *kinds}, (name, record["question"])
        # And no thing of the picture is named without a mark, but for the false option of two names.
        false = name in ("categoryThatChoose", "categoryThisChoose")
        named = {w for w in words if any(w.rstrip("s") == t.category.rstrip("s") for t in scene.things)}
        assert false or len(named) <= len(marked), (name, record["question"], marked)
        assert len(set(marked.values())) == len(marked)


def test_questions_are_good_english_as_far_as_a_rule_can_tell():
    for _, record, _ in asked():
        text = record["question"]
        assert text[0].isupper() and text.endswith("?") and "  " not in text and "{" not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|fishs", text), text
        assert record["answer"] == record["answer"].lower()


def test_factual_questions_have_one_answer_in_the_picture():
    rng = np.random.default_rng(3)
    drafts = [(draft, s) for s in scenes() if (draft := ask(factual, s, rng))]
    assert len(drafts) > 60
    for draft, scene in drafts:
        assert [t.category for t in scene.things].count(draft.answer) == 1
        assert draft.answer not in draft.text.split()


def test_descriptions_tell_everything():
    for scene in scenes()[:20]:
        row, *each = describe(scene)
        assert row.answer.split(", ") == [t.category for t in sorted(scene.things, key=lambda t: t.x)]
        assert [draft.text for draft in each] == [f"Describe the {t.category}." for t in scene.things]
        for draft, thing in zip(each, scene.things, strict=True):
            told = f"a {thing.category} {thing.color} {thing.shape} {thing.material}"
            assert draft.answer.startswith(told)
            assert draft.answer.endswith(f"on the {thing.side}" if thing.side else "in the middle")
            assert draft.detailed == "describe"


# ---- nothing in a question's words tells its answer ------------------------------------------------------


@cache
def six_tasks(n=1000):
    """{task: [(words, options in the order of the text, answer)]}, one question of each for each scene."""
    rng = np.random.default_rng(21)
    found = {task: [] for task in TASK_GENERATORS}
    for _ in range(n):
        scene = sample_scene(rng)
        for task, group in TASK_GENERATORS.items():
            draft = ask(group[int(rng.integers(len(group)))], scene, rng)
            if draft:
                found[task].append((words_of(draft.text), options_of(draft), draft.answer))
    return found


def words_of(text):
    return re.sub(r"[^\w ]", "", text).split()


def options_of(draft):
    choices = [argument for operation, _, argument in draft.operations if operation.startswith("choose")]
    if not choices:
        return None
    options = ["left", "right"] if "," in choices[0] else choices[0].split("|")
    words = words_of(draft.text)
    return tuple(sorted(options, key=words.index))


def target(options, answer):
    """What a guesser must tell: which of two options, or the answer itself."""
    return options.index(answer) if options else answer


def accuracy_of_guessers(questions):
    """Fit three blind guessers to one half of the questions; give their accuracy (%) on the other."""
    learn, test = questions[::2], questions[1::2]
    return {
        name: 100 * np.mean([guess(words, options) == target(options, a) for words, options, a in test])
        for name, guess in dict(template=by_template(learn), words=by_words(learn), option=by_option(learn)).items()
    }


def by_template(learn):
    """The most frequent target among questions that differ in names and values alone."""
    content = {*CATEGORIES, *(f"{c}s" for c in CATEGORIES)}.union(*ATTRIBUTES.values())

    def template(words):
        return " ".join("_" if word in content else word for word in words)

    seen = {}
    for words, options, answer in learn:
        seen.setdefault(template(words), Counter())[target(options, answer)] += 1
    every = sum(seen.values(), Counter())
    return lambda words, options: seen.get(template(words), every).most_common(1)[0][0]


def by_words(learn):
    """Naive Bayes on each word together with its place."""
    seen, targets = {}, Counter(target(options, answer) for _, options, answer in learn)
    for words, options, answer in learn:
        for feature in enumerate(words):
            seen.setdefault(feature, Counter())[target(options, answer)] += 1

    def score(words, t):
        terms = [(seen.get(f, Counter())[t] + 1) / (targets[t] + 2) for f in enumerate(words)]
        return np.log(targets[t]) + np.log(terms).sum()

    return lambda words, options: max(targets, key=lambda t: score(words, t))


def by_option(learn):
    """The option that was more often true; without options, the most frequent answer."""
    true, offered = (
        Counter(a for *_, a in learn),
        Counter(o for _, options, _ in learn for o in options or ()),
    )
    often = {o: true[o] / offered[o] for o in offered}
    most = true.most_common(1)[0][0]
    return lambda _, options: target(options, max(options, key=lambda o: often.get(o, 0))) if options else most


@pytest.mark.parametrize("task", TASK_GENERATORS)
def test_a_blind_guesser_stays_near_chance(task):
    questions = six_tasks()[task]
    counts = Counter(target(options, answer) for _, options, answer in questions)
    n, most = len(questions), 100 * max(counts.values()) / len(questions)
    assert n > 600
    if task == "CompareAttr":
        # Not quite even: a scene is tried again until it has a pair, and most pairs share their shape.
        assert set(counts) == set(ATTRIBUTES) and most < 46 and min(counts.values()) > 0.2 * n
    else:
        assert len(counts) == 2 and most < 50 + 350 * 0.5 / np.sqrt(n), counts
    for name, accuracy in accuracy_of_guessers(questions).items():
        assert accuracy < most + 350 * 0.5 / np.sqrt(n / 2), name  # 3.5 standard errors on half of them


def test_the_guessers_would_find_a_bias():
    questions = six_tasks()["ChooseAttr"]
    first = [q for q in questions if q[1].index(q[2]) == 0]
    assert accuracy_of_guessers(first)["template"] == 100
    red = [q for q in questions if ("red" in q[1]) <= (q[2] == "red")]  # red is true whenever it is offered
    assert accuracy_of_guessers([q for q in red if "red" in q[1]])["option"] == 100
    early = [q for q in questions if any(c in q[0] for c in CATEGORIES[:6]) == (q[1].index(q[2]) == 0)]
    assert accuracy_of_guessers(early)["words"] > 90


# ---- the evaluation split --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write_split(folder, n_scenes=300, seed=0)
    write_factual(folder, n_scenes=300, seed=0)
    return folder


def test_the_committed_split_is_what_the_code_writes(split):
    written = {file.relative_to(split) for file in split.rglob("*") if file.is_file()}
    stored = {file.relative_to(ASSETS) for file in ASSETS.rglob("*") if file.is_file()}
    assert written == {name for name in stored if name.parts[0] != "pairs"}  # those are test_pairs' matter
    for name in written:
        if name.suffix == ".png":  # zlib's versions pack the same pixels differently
            mine, theirs = (np.asarray(Image.open(folder / name)) for folder in (split, ASSETS))
            assert np.array_equal(mine, theirs), name
        else:
            assert (split / name).read_bytes() == (ASSETS / name).read_bytes(), name


def test_the_split_reads_as_gqa(split):
    samples, skipped = read_gqa(split / "val_balanced_questions.json", split / "val_sceneGraphs.json", split / "images")
    assert len(skipped) == 0
    assert len({s.sample_id for s in samples}) == len(samples) > 3000
    assert len({(s.image_id, s.question) for s in samples}) == len(samples)  # none asked twice
    assert set(TASKS) < {s.task for s in samples}
    for sample in samples:
        words = sample.question.split()
        for thing in sample.objects:
            assert thing.words is None or thing.words[1] <= len(words)
        assert (sample.option_true == sample.answer) if sample.option_true else sample.structural != "choose"
    regions = json.loads((split / "region_descriptions.json").read_text())
    assert len(regions) == 300 and all(len(entry["regions"]) >= 4 for entry in regions)


def test_no_picture_is_both_learnt_and_asked_about(split):
    boxes = json.loads((split / "val_sceneGraphs.json").read_text()).values()
    places = [{(o["x"], o["y"], o["w"]) for o in graph["objects"].values()} for graph in boxes]
    places += [{t.box[:3] for t in scene.things} for scene in held_out(100, 0) + held_out(50, 1)]
    for stage, step in [(0, 0), (1, 0), (3, 0), (3, 1), (3, 1000)]:
        rng = np.random.default_rng([0, stage, step])
        places += [{t.box[:3] for t in sample_scene(rng).things} for _ in range(16)]
    assert len(set(map(frozenset, places))) == len(places)
