"""Minimal pairs differ in one fact about one thing, and their question has two answers that follow from it."""

import json
from functools import cache

import numpy as np
import pytest
from gqa_operations import evaluate
from PIL import Image

from miniature.pairs import TASKS, write_pairs
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.data.tasks import task_of
from mmflow_utils.experiments.patching import find_pairs
from mmflow_utils.params import ROOT

PAIRS = ROOT / "assets/miniature/pairs"
FILES = ("val_balanced_questions.json", "val_sceneGraphs.json")
N_PAIRS = 30


@cache
def read(folder=PAIRS):
    questions, graphs = (json.loads((folder / file).read_text()) for file in FILES)
    return list(questions.values()), graphs


def pairs_of(task):
    """Give the pairs of a task as they stand in the file: two records and two graphs."""
    questions, graphs = read()
    mine = [one for one in questions if task_of(one["types"]["detailed"]) == task]
    return [(*both, *(graphs[one["imageId"]] for one in both)) for both in zip(mine[::2], mine[1::2], strict=True)]


def facts(graph):
    """List what a scene graph says, one fact at a time."""
    for i, entry in graph["objects"].items():
        yield from {(i, "name", entry["name"]), (i, "place", entry["x"], entry["y"])}
        yield from {(i, kind, value) for kind, value in zip("csm", entry["attributes"], strict=True)}
        yield from {(i, relation["object"], relation["name"]) for relation in entry["relations"]}


@pytest.mark.parametrize("task", TASKS)
def test_a_pair_differs_in_one_fact_about_one_thing(task):
    for one, other, graph, changed in pairs_of(task):
        ours, theirs = set(facts(graph)) - set(facts(changed)), set(facts(changed)) - set(facts(graph))
        kinds = sorted(fact[1] for fact in ours)
        assert kinds == sorted(fact[1] for fact in theirs)
        objects = [*graph["objects"]]
        if task == "ChooseRel":  # a relation is told from both ends
            assert len(kinds) == 3 and kinds[-1] == "place" and set(kinds[:2]) <= set(objects)
        else:
            expected = {"QueryAttr": {"place"}, "ChooseCat": {"name"}}.get(task, {"c", "s", "m"})
            assert len(kinds) == 1 and set(kinds) <= expected
        assert {key: graph[key] for key in ("width", "height", "location")} == {
            key: changed[key] for key in ("width", "height", "location")
        }
        assert one["question"] == other["question"] and one["answer"] != other["answer"]
        for record, graph_of_it in ((one, graph), (other, changed)):
            assert evaluate(record, graph_of_it) == record["answer"]


def test_pictures_of_a_pair_are_alike_but_for_the_thing():
    for task in TASKS:
        for one, other, graph, changed in pairs_of(task)[::4]:
            pixels = [np.asarray(Image.open(PAIRS / "images" / f"{x['imageId']}.png"), int) for x in (one, other)]
            differ = (pixels[0] != pixels[1]).any(-1)
            assert differ.any()
            things = [(g["objects"][i], h["objects"][i]) for g, h in ((graph, changed),) for i in g["objects"]]
            (mine,) = [both for both in things if {**both[0], "relations": 0} != {**both[1], "relations": 0}]
            for thing in mine:
                left, top = max(0, thing["x"] - 3), max(0, thing["y"] - 3)
                differ[top : thing["y"] + thing["h"] + 3, left : thing["x"] + thing["w"] + 3] = False
            assert not differ.any()


def test_every_pair_is_found_again_and_either_answer_comes_first():
    samples, left_out = read_gqa(*(PAIRS / file for file in FILES), PAIRS / "images")
    pairs = find_pairs(samples)
    assert left_out.empty and len(pairs) == N_PAIRS * len(TASKS) and len(samples) == 2 * len(pairs)
    assert all(pair.image_id[:-1] == pair.other.image_id[:-1] and pair.image_size for pair in pairs)
    yes = [pair.answer == "yes" for pair in pairs if pair.task == "LogicalObj"]
    assert 0.3 < np.mean(yes) < 0.7


def test_the_same_seed_gives_the_same_files(tmp_path):
    write_pairs(tmp_path, n_pairs=1)
    for file in FILES:
        ours, kept = (json.loads((folder / file).read_text()) for folder in (tmp_path, PAIRS))
        assert ours == {key: kept[key] for key in ours} and len(ours) == 2 * len(TASKS)
    for picture in (tmp_path / "images").glob("*.png"):
        assert picture.read_bytes() == (PAIRS / "images" / picture.name).read_bytes()
