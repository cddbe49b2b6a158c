"""The miniature's factual questions: official layouts, true answers, and the pictures of the split."""

import json

import pytest

from miniature.dataset import write_split
from miniature.facts import IMAGE_PATTERN, write_factual
from miniature.questions.extras import FACTS
from mmflow_utils.data.sample import load_image
from mmflow_utils.data.vqa import read_aokvqa, read_okvqa, vqa_accuracy

N = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    write_split(folder, n_scenes=N, seed=3)
    write_factual(folder, n_scenes=N, seed=3)
    return folder


def load(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def read(folder):
    """The samples of both files, by their readers."""
    files = [folder / name for name in ("okvqa_questions.json", "okvqa_annotations.json")]
    ours, left_out = read_okvqa(*files, folder / "images", image_pattern=IMAGE_PATTERN)
    theirs, none = read_aokvqa(folder / "aokvqa.json", folder / "images", image_pattern=IMAGE_PATTERN)
    assert left_out.empty and none.empty
    return ours, theirs


def test_the_readers_find_every_question_and_its_picture(read, folder):
    ours, theirs = read
    assert {s.task for s in ours} == {"OKVQA"} and {s.task for s in theirs} == {"A-OKVQA"}
    assert N - 2 <= len(ours) <= N and 0.8 * N <= len(theirs) <= len(ours)
    for sample in (*ours, *theirs):
        assert load_image(sample).size == (224, 224)
        assert vqa_accuracy(sample.answer.capitalize(), sample.answers) == 1 and len(sample.answers) == 10
    ids = [s.sample_id for s in (*ours, *theirs)]
    assert len(set(ids)) == len(ids)


def test_answers_are_true_to_the_fact_and_to_the_picture(read, folder):
    graphs = load(folder, "val_sceneGraphs.json")
    for sample in (*read[0], *read[1]):
        (fact,) = (f for f in FACTS if sample.question == f"Which of the things in the picture {f}?")
        shown = [thing["name"] for thing in graphs[f"{int(sample.image_id):05d}"]["objects"].values()]
        assert [name for name in shown if name in FACTS[fact]] == [sample.answer]


def test_the_two_data_sets_ask_different_questions(read):
    asked = {(s.image_id, s.question) for s in read[0]}
    assert not asked & {(s.image_id, s.question) for s in read[1]}


def test_the_layouts_are_the_official_ones(folder):
    questions, annotations = load(folder, "okvqa_questions.json"), load(folder, "okvqa_annotations.json")
    head = {"info", "license", "task_type", "data_type", "data_subtype"}
    assert set(questions) == head | {"questions"}
    assert set(annotations) == head | {"annotations", "question_types"}
    assert set(questions["questions"][0]) == {"image_id", "question", "question_id"}
    fields = {"image_id", "question_id", "answer_type", "question_type", "answers"}
    for entry in annotations["annotations"]:
        assert set(entry) == fields and entry["question_type"] in annotations["question_types"]
        assert [a["answer_id"] for a in entry["answers"]] == list(range(1, 11))
        assert set(entry["answers"][0]) == {"answer_id", "raw_answer", "answer_confidence", "answer"}
    choices = {"choices", "correct_choice_idx", "direct_answers", "difficult_direct_answer", "rationales"}
    for entry in load(folder, "aokvqa.json"):
        assert set(entry) == choices | {"split", "image_id", "question_id", "question"}
        assert len(set(entry["choices"])) == 4 and len(entry["rationales"]) == 3
        assert entry["choices"][entry["correct_choice_idx"]] == entry["direct_answers"][0]


def test_the_right_choice_is_not_given_away_by_its_place(folder, tmp_path):
    write_factual(tmp_path, n_scenes=200, seed=0)
    places = [entry["correct_choice_idx"] for entry in load(tmp_path, "aokvqa.json")]
    assert all(0.15 < places.count(place) / len(places) < 0.35 for place in range(4))


def test_the_same_seed_gives_the_same_files_and_another_seed_others(folder, tmp_path):
    for seed, same in ((3, True), (4, False)):
        write_factual(tmp_path, n_scenes=N, seed=seed)
        for name in ("okvqa_questions.json", "okvqa_annotations.json", "aokvqa.json"):
            assert ((tmp_path / name).read_bytes() == (folder / name).read_bytes()) is same, name
