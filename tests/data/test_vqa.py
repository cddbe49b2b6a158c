"""Factual questions: OKVQA's and A-OKVQA's true layouts, what may be wrong with them, and soft accuracy."""

import copy
import json
from itertools import combinations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vqa_files import ANNOTATIONS, AOKVQA, PONY, QUESTIONS

from mmflow_utils.data.sample import Sample, frame_to_samples, samples_to_frame
from mmflow_utils.data.vqa import read_aokvqa, read_okvqa, vqa_accuracy


def pictures(folder, *names):
    (folder / "images").mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 3)).save(folder / "images" / name)
    return folder / "images"


@pytest.fixture
def okvqa(tmp_path):
    images = pictures(tmp_path, "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000008.jpg")

    def read(questions=QUESTIONS, annotations=ANNOTATIONS, **options):
        (tmp_path / "questions.json").write_text(json.dumps(questions))
        (tmp_path / "annotations.json").write_text(json.dumps(annotations))
        return read_okvqa(tmp_path / "questions.json", tmp_path / "annotations.json", images, **options)

    return read


@pytest.fixture
def aokvqa(tmp_path):
    images = pictures(tmp_path, "000000000042.jpg", "000000000043.jpg")

    def read(entries=AOKVQA, **options):
        (tmp_path / "aokvqa.json").write_text(json.dumps(entries))
        return read_aokvqa(tmp_path / "aokvqa.json", images, **options)

    return read


def with_first(content, key, **changes):
    """Copy a file's content with its first entry changed; a field set to ... is taken out."""
    content = copy.deepcopy(content)
    entries = content[key] if key else content
    entries[0] = {k: v for k, v in (entries[0] | changes).items() if v is not ...}
    return content


# The true layouts


def test_okvqa_as_it_is_published(okvqa, tmp_path):
    samples, left_out = okvqa()
    assert samples[0] == Sample(
        sample_id="425",
        image_id="42",
        image=tmp_path / "images" / "COCO_val2014_000000000042.jpg",
        question="What is the hairstyle called?",
        answer="pony tail",
        task="OKVQA",
        structural="query",
        semantic="fact",
        detailed="Sports and Recreation",
        answers=tuple(PONY),
    )
    # the annotations stand in another order than the questions
    assert [(s.sample_id, s.answer) for s in samples] == [
        ("425", "pony tail"),
        ("427", "a girl"),
        ("85", "pony tail"),
    ]
    assert left_out.columns.tolist() == ["sample_id", "reason", "kept"] and left_out.empty


def test_aokvqa_as_it_is_published(aokvqa, tmp_path):
    (sample,), left_out = aokvqa()
    assert (sample.task, sample.sample_id, sample.image_id) == ("A-OKVQA", "22MexNkBPpdZGX6sxbxVBH", "42")
    assert sample.image == tmp_path / "images" / "000000000042.jpg"
    assert sample.answer == "taxi" and len(sample.answers) == 10  # three taxis in two spellings, two rides
    assert sample.option_true is None  # four choices, none of them offered
    assert left_out.sample_id.tolist() == ["2aaaaaaaaaaaaaaaaaaaaa"]
    assert "too difficult" in left_out.reason[0] and not left_out.kept[0]


def test_the_files_subtype_names_the_pictures(okvqa, tmp_path):
    pictures(tmp_path, "COCO_train2014_000000000042.jpg")
    (first, *_), left_out = okvqa(QUESTIONS | {"data_subtype": "train2014"})
    assert first.image.name == "COCO_train2014_000000000042.jpg"
    assert left_out.sample_id.tolist() == ["85"]


def test_a_question_without_its_picture_is_left_out_and_counted(okvqa, tmp_path):
    (tmp_path / "images" / "COCO_val2014_000000000042.jpg").unlink()
    samples, left_out = okvqa()
    assert [s.sample_id for s in samples] == ["85"]
    assert left_out.sample_id.tolist() == ["425", "427"]
    assert set(left_out.reason) == {"no picture COCO_val2014_000000000042.jpg"}
    (tmp_path / "images" / "COCO_val2014_000000000008.jpg").unlink()
    with pytest.raises(ValueError, match="no question of 3 can be asked .no picture COCO_val2014_.*042.jpg in"):
        okvqa()


def test_pictures_of_another_name_are_found_by_their_pattern(okvqa, aokvqa, tmp_path):
    pictures(tmp_path, "00042.png")
    for read in (okvqa, aokvqa):
        samples, _ = read(image_pattern="{image_id:05d}.png")
        assert {s.image.name for s in samples} == {"00042.png"}


@pytest.mark.parametrize("pattern", ["{id}.jpg", "picture.jpg", "{image_id:q}.jpg", "{image_id", "{0}.jpg", ""])
def test_a_pattern_that_tells_no_pictures_apart_is_refused(okvqa, aokvqa, pattern):
    with pytest.raises(ValueError, match="image_pattern .* should hold {image_id}, {data_subtype} and no other"):
        okvqa(image_pattern=pattern)
    with pytest.raises(ValueError, match="image_pattern .* should hold {image_id} and no other"):
        aokvqa(image_pattern=pattern)


def test_answers_survive_a_parquet_file(okvqa, tmp_path):
    samples, _ = okvqa()
    samples_to_frame(samples).to_parquet(tmp_path / "samples.parquet")
    assert frame_to_samples(pd.read_parquet(tmp_path / "samples.parquet")) == samples
    with pytest.raises(ValueError, match="sample 425: .*answers or another column can't be read"):
        frame_to_samples(samples_to_frame(samples).assign(answers="["))


# What may be wrong with a file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(question=...), "question should be a text, got None"),
        (dict(question=" "), "question should be a text"),
        (dict(image_id="42"), "image_id should be a whole number, got '42'"),
        (dict(image_id=True), "image_id should be a whole number, got True"),
        (dict(image_id=-1), "image_id should be a whole number, got -1"),
        (dict(image_id=7), "no annotation of this question_id and image_id in .*annotations.json"),
        (dict(question_id=5), "no annotation of this question_id"),
        (dict(question_id=None), "question_id should be a number or a name, got None"),
        (dict(question_id=427), "question_id is duplicated"),
    ],
)
def test_a_malformed_question_stops_with_its_file_entry_and_field(okvqa, changes, message):
    with pytest.raises(ValueError, match=rf"questions\.json, questions\[[01]\].*: {message}.*; fetch the official"):
        okvqa(with_first(QUESTIONS, "questions", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(answers=...), "answers should hold what ten people answered"),
        (dict(answers="pony tail"), "answers should hold what ten people answered"),
        (dict(answers=[{"answer": "one"}]), "answers should hold what ten people answered"),
        (dict(answers=[{"answer": "one"}, {"answer": 2}]), "answers should hold what ten people answered"),
        (dict(answers=[{"answer": "one"}, {"answer": ""}]), "answers should be a text, got ''"),
        (dict(answers=[{"answer": "one"}, {"answer": "\ud800"}]), "answers holds half a character"),
        (dict(question_type=...), "question_type should be a text"),
        (dict(image_id=1.5), "image_id should be a whole number"),
    ],
)
def test_a_malformed_annotation_stops_with_its_file_entry_and_field(okvqa, changes, message):
    where = r"annotations\.json, annotations\[0\] \(question_id 85\)"
    with pytest.raises(ValueError, match=f"{where}: {message}.*; fetch the official"):
        okvqa(annotations=with_first(ANNOTATIONS, "annotations", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(direct_answers=...), r"direct_answers should hold .* \(a test split has none\)"),
        (dict(difficult_direct_answer=...), "difficult_direct_answer should be true or false, got None"),
        (dict(difficult_direct_answer="no"), "difficult_direct_answer should be true or false"),
        (dict(image_id=None), "image_id should be a whole number"),
        (dict(question=3), "question should be a text, got 3"),
    ],
)
def test_a_malformed_aokvqa_entry_stops_with_its_file_entry_and_field(aokvqa, changes, message):
    with pytest.raises(ValueError, match=rf"aokvqa\.json, questions\[0\] \(question_id '22M\w+'\): {message}"):
        aokvqa(with_first(AOKVQA, None, **changes))


def test_files_of_another_layout_are_refused(okvqa, aokvqa):
    for wrong in ([], QUESTIONS["questions"], "text"):
        with pytest.raises(ValueError, match=r"questions.json has a \w+ at the top: .* OKVQA question file"):
            okvqa(wrong)
    with pytest.raises(ValueError, match="aokvqa.json has a dict at the top"):
        aokvqa(QUESTIONS)
    for entries in (None, {}, []):
        with pytest.raises(ValueError, match="questions.json: questions should be a list of entries"):
            okvqa(QUESTIONS | {"questions": entries})
    with pytest.raises(ValueError, match=r"aokvqa.json, questions\[0\]: expected an entry with fields, got 3"):
        aokvqa([3])
    for subtype in (None, "../val", ""):
        with pytest.raises(ValueError, match="questions.json: data_subtype should be a name such as val2014"):
            okvqa(QUESTIONS | {"data_subtype": subtype})


def test_files_that_are_missing_or_cut_short_are_named(aokvqa, tmp_path):
    aokvqa()
    images, cut = tmp_path / "images", tmp_path / "cut.json"
    with pytest.raises(ValueError, match="can't read the A-OKVQA question file .*none.json .No such file"):
        read_aokvqa(tmp_path / "none.json", images)
    cut.write_text((tmp_path / "aokvqa.json").read_text()[:-9])
    with pytest.raises(ValueError, match="cut.json isn't whole JSON"):
        read_aokvqa(cut, images)
    with pytest.raises(ValueError, match="no images folder .*nowhere"):
        read_aokvqa(tmp_path / "aokvqa.json", tmp_path / "nowhere")


# Soft accuracy


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [("pony tail", 1.0), ("braid", 0.9), ("a braid", 0.9), ("ponytail", 0.3), ("tail", 0.3), ("hair", 0.0)],
)
def test_accuracy_by_hand(predicted, expected):
    # By hand for "braid", said by three: without one of them min(2/3, 1), three times; else 3/3, seven times.
    assert vqa_accuracy(predicted, PONY) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.sampled_from("xyz"), min_size=2, max_size=12), st.sampled_from("xyzw"))
def test_accuracy_is_the_mean_over_leaving_one_person_out(answers, predicted):
    subsets = list(combinations(answers, len(answers) - 1))
    scores = [min(1, subset.count(predicted) / 3) for subset in subsets]
    assert vqa_accuracy(predicted, answers) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The Cat.", "cat"),
        ("an  apple\n", "apple"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("ten", "10"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("black-and-white", "black and white"),
        ("yes, it is", "yes it is"),
        ('"stop"', "stop"),
        ("U.S.", "us"),
        ("what?", "what"),
        ("salt & pepper", "Salt & Pepper"),
    ],
)
def test_answers_that_are_the_same(one, other):
    assert vqa_accuracy(one, [other] * 10) == vqa_accuracy(other, [one] * 10) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cat", "cats"),
        ("3.5", "35"),
        ("eleven", "11"),  # only the numbers up to ten
        ("theater", "ater"),  # an article within a word stays
        ("its", "it's"),
        ("well", "we'll"),
        ("salt & pepper", "salt pepper"),  # no mark that VQA takes out
        ("t-shirt", "tshirt"),
        ("", "cat"),
    ],
)
def test_answers_that_differ(one, other):
    assert vqa_accuracy(one, [other] * 10) == vqa_accuracy(other, [one] * 10) == 0


def test_one_person_is_not_enough_to_judge():
    for answers in ((), ("cat",)):
        with pytest.raises(ValueError, match=f"two or more people, officially ten, got {len(answers)}"):
            vqa_accuracy("cat", answers)
