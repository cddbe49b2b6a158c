"""Reading GQA's files and the authors' CSV: the true layout, and everything that may be wrong with a file."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from gqa_files import GRAPHS, QUESTIONS, ROW, step
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmflow_utils.data.authors import read_authors
from mmflow_utils.data.fields import clipped_box
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.data.sample import (
    Box,
    Sample,
    SceneObject,
    exchange_pictures,
    frame_to_samples,
    load_image,
    samples_to_frame,
)
from mmflow_utils.data.tasks import TASKS
from mmflow_utils.prompts.positions import find_objects, find_options

AUTHORS = Path(
    os.environ.get("MMFLOW_AUTHORS_CSV", Path(__file__).resolve().parents[3] / "shared" / "authors_csv_sample")
)
needs_authors = pytest.mark.skipif(not AUTHORS.is_dir(), reason=f"the authors' CSV files aren't at {AUTHORS}")


def write(folder, questions=QUESTIONS, graphs=GRAPHS):
    (folder / "images").mkdir(exist_ok=True)
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "graphs.json").write_text(json.dumps(graphs))
    return folder / "questions.json", folder / "graphs.json", folder / "images"


def changed(sample_id="01", **more):
    """Copy the questions with one entry changed: what isn't said stays true."""
    return QUESTIONS | {sample_id: copy.deepcopy(QUESTIONS[sample_id]) | more}


@pytest.fixture
def read(tmp_path):
    return lambda *files, **options: read_gqa(*write(tmp_path, *files), **options)


# GQA's true layout


def test_a_question_keeps_all_that_is_studied(read, tmp_path):
    samples, skipped = read()
    assert samples[0] == Sample(
        sample_id="01",
        image_id="23",
        image=tmp_path / "images" / "23.jpg",
        question="Is the jar full or empty?",
        answer="empty",
        task="ChooseAttr",
        structural="choose",
        semantic="attr",
        detailed="chooseAttr",
        option_true="empty",
        option_false="full",
        # the box reached 21 pixels below the picture
        objects=(SceneObject(name="jar", object_id="11", box=Box(x=253.0, y=291.0, w=60.0, h=84.0), words=(2, 3)),),
        full_answer="It is empty.",
        image_size=(500, 375),
    )
    assert [s.sample_id for s in samples] == list(QUESTIONS)
    assert skipped["sample_id"].tolist() == ["04"] and skipped["kept"].all()


def test_relations_give_options_and_objects_with_their_words(read):
    relation = read()[0][1]
    assert (relation.task, relation.option_true, relation.option_false) == ("ChooseRel", "right", "left")
    assert [(o.name, o.object_id, o.words) for o in relation.objects] == [
        ("jar", "11", (15, 16)),
        ("man", "12", (11, 12)),
        ("man", "13", (2, 3)),
    ]
    named = [(o.name, o.words) for o in relation.objects]
    assert len(find_objects(relation.question, named)[0]) == 3
    assert find_options(relation.question, "right", "left")[0]


def test_what_the_picture_lacks_has_no_id_and_no_box(read):
    logical = read()[0][2]
    assert logical.answer == "no"
    assert logical.objects[1] == SceneObject(name="mud")
    assert logical.option_true is None


def test_kinds_outside_the_six_tasks_are_kept_without_a_task(read):
    samples, _ = read()
    assert [s.task for s in samples[3:]] == [None, None]
    assert samples[3].objects[1].name == "_"  # asked for, not named
    assert samples[4].objects == () and samples[4].option_false == "outdoors"


def test_chosen_tasks_alone_are_read(read):
    samples, skipped = read(tasks=["ChooseRel", "LogicalObj"])
    assert [s.sample_id for s in samples] == ["02", "03"]
    assert skipped.empty
    with pytest.raises(ValueError, match="unknown task ChooseRle: the tasks are ChooseAttr"):
        read(tasks=["ChooseRle"])


def test_several_ids_are_several_objects(read):
    questions = changed(semantic=[step("select", "people (12,13)")], annotations={"question": {"2": "12,13"}})
    sample = read(questions)[0][0]
    assert [(o.object_id, o.words) for o in sample.objects] == [("12", (2, 3)), ("13", (2, 3))]


def test_without_scene_graphs_boxes_are_unknown(tmp_path):
    questions, _, images = write(tmp_path)
    samples, skipped = read_gqa(questions, None, images)
    assert len(samples) == 5 and skipped.empty
    assert {o.box for s in samples for o in s.objects} == {None}
    assert samples[0].image_size is None


def test_the_stored_pictures_ending_is_used(read, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "23.png").touch()
    assert read()[0][0].image.name == "23.png"


def test_each_kind_of_question_belongs_to_one_task():
    kinds = [kind for held in TASKS.values() for kind in held]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("behind", ("behind", "front")),
        ("front", ("front", "behind")),
        ("in front of", ("in front of", "behind")),
        ("left", (None, None)),
    ],
)
def test_relations_are_shortened_as_the_authors_do_unless_the_answer_is_longer(read, answer, options):
    relation = step("choose rel", "hut,behind|in front of,s (11)")
    sample = read(changed(answer=answer, semantic=[relation]))[0][0]
    assert (sample.option_true, sample.option_false) == options


# Boxes


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 5, 30, 40), (10, 5, 30, 40)),
        ((-5, -5, 15, 15), (0, 0, 10, 10)),
        ((90, 40, 30, 30), (90, 40, 10, 10)),
        ((-10, -10, 500, 500), (0, 0, 100, 50)),
        (("1", "2.5", "3", "4"), (1, 2.5, 3, 4)),
    ],
)
def test_boxes_are_clipped_to_the_picture(box, expected):
    clipped = clipped_box(dict(zip("xywh", box, strict=True)), width=100, height=50)
    assert (clipped.x, clipped.y, clipped.w, clipped.h) == expected


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 0, 10),
        (0, 0, 10, -1),
        (100, 0, 5, 5),
        (-10, 0, 10, 10),
        (0, 0, float("nan"), 5),
        (0, 0, True, 5),
        (0, None, 5, 5),
        (0, 0, 10**400, 5),
    ],
)
def test_boxes_that_leave_nothing_are_refused(box):
    with pytest.raises(ValueError):
        clipped_box(dict(zip("xywh", box, strict=True)), width=100, height=50)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(*[st.integers(-60, 160)] * 4)
def test_a_clipped_box_holds_just_the_pixels_inside(x, y, w, h):
    columns = [c for c in range(100) if x <= c < x + w]
    rows = [r for r in range(50) if y <= r < y + h]
    try:
        box = clipped_box({"x": x, "y": y, "w": w, "h": h}, width=100, height=50)
    except ValueError:
        assert not columns or not rows
    else:
        assert (box.x, box.y, box.w, box.h) == (columns[0], rows[0], len(columns), len(rows))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ({"x": 600, "y": 0, "w": 9, "h": 9}, "leave nothing"),
        ({"x": 1}, "number of pixels"),
        (7, "a box with x"),
    ],
)
def test_a_lost_box_is_recorded_and_the_sample_kept(read, box, reason):
    graphs = copy.deepcopy(GRAPHS)
    graphs["23"]["objects"]["11"] = box
    samples, skipped = read(QUESTIONS, graphs)
    assert samples[0].objects[0].box is None
    told = skipped[skipped["sample_id"] == "01"]
    assert told["kept"].tolist() == [True]
    assert "jar (11)" in told["reason"].iloc[0] and reason in told["reason"].iloc[0]


def test_an_object_that_the_graph_lacks_is_recorded(read):
    samples, skipped = read(changed(semantic=[step("select", "jar (99)")]))
    assert samples[0].objects[0].object_id == "99" and samples[0].objects[0].box is None
    assert "jar (99): the scene graph doesn't have it" in skipped["reason"].iloc[0]


# Single entries that can't be used


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"imageId": "99"}, "don't have image '99'"),
        ({"imageId": 23}, "imageId should be a text"),
        ({"question": "  "}, "question should be a text"),
        ({"answer": None}, "answer should be a text"),
        ({"types": {"structural": "choose"}}, "semantic should be a text"),
        ({"types": None}, "expected the fields question, imageId"),
        ({"semantic": "select: jar"}, "semantic should list operations"),
        ({"semantic": [{"operation": "select"}]}, "semantic should list operations"),
    ],
)
def test_a_single_bad_question_is_skipped_with_its_reason(read, more, reason):
    samples, skipped = read(changed("01", **more))
    assert [s.sample_id for s in samples] == ["02", "03", "04", "05"]
    told = skipped[~skipped["kept"]]
    assert told["sample_id"].tolist() == ["01"]
    assert reason in told["reason"].iloc[0]


@pytest.mark.parametrize(
    "image_id",
    ["../secret", "..", "/etc/passwd", "a/b", "a\\b", "C:x", ".hidden", "23.jpg", "a\0b", "x" * 400],
)
def test_no_image_id_leads_out_of_the_images_folder(read, image_id):
    samples, skipped = read(changed("01", imageId=image_id), GRAPHS | {image_id: GRAPHS["23"]})
    assert "01" not in [s.sample_id for s in samples]
    assert "plain name" in skipped["reason"].iloc[0]


@pytest.mark.parametrize("graph", [None, 7, {}, {"width": 0, "height": 9, "objects": {}}, {"width": 5, "height": 5}])
def test_a_broken_scene_graph_skips_its_questions_alone(read, graph):
    samples, skipped = read(changed("01", imageId="24"), GRAPHS | {"24": graph})
    assert len(samples) == 4
    assert "image '24'" in skipped["reason"].iloc[0]


@pytest.mark.parametrize("argument", ["red|blue", "empty|full|half", "empty|empty", "empty|"])
def test_options_that_the_answer_does_not_settle_are_recorded(read, argument):
    samples, skipped = read(changed(semantic=[step("select", "jar (11)"), step("choose", argument, 0)]))
    assert (samples[0].option_true, samples[0].option_false) == (None, None)
    assert "options not used" in skipped["reason"].iloc[0]


@pytest.mark.parametrize("annotations", [None, [], {"question": None}, {"question": {"x": "11", "1:2:3": "11"}}])
def test_unusable_annotations_are_as_none(read, annotations):
    samples, skipped = read(changed(annotations=annotations))
    assert samples[0].objects[0].words is None
    assert skipped["sample_id"].tolist() == ["04"]


# Files that are something else


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (json.dumps(QUESTIONS)[:-200], "isn't whole JSON.*download"),
        ("", "isn't whole JSON"),
        ("PK\x03\x04 a zip", "isn't whole JSON"),
        ("[" * 100_000, "isn't whole JSON"),
        ("[]", "has a list at the top: expected a GQA question file"),
        ("{}", "has nothing in it"),
        (
            json.dumps({"questions": [], "info": {}}),
            "no question of .* can be used .*entry 'questions'.*a list",
        ),
        (json.dumps(GRAPHS), "no question of .* can be used .*entry '23'.*width, height, objects"),
    ],
)
def test_another_file_gives_one_clear_error(tmp_path, content, match):
    questions, graphs, images = write(tmp_path)
    questions.write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        read_gqa(questions, graphs, images)
    assert str(questions) in str(error.value)


def test_bytes_that_are_no_text_give_one_clear_error(tmp_path):
    questions, graphs, images = write(tmp_path)
    graphs.write_bytes(b"\x1f\x8b\x08\xff\xfe")
    with pytest.raises(ValueError, match="isn't whole JSON.*scene graph"):
        read_gqa(questions, graphs, images)


def test_scene_graphs_of_another_split_are_named(tmp_path):
    questions, graphs, images = write(tmp_path, QUESTIONS, {"77": GRAPHS["23"]})
    with pytest.raises(ValueError, match="don't have image '23'.*same split") as error:
        read_gqa(questions, graphs, images)
    assert str(graphs) in str(error.value)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_file_or_folder_is_named(tmp_path, which):
    paths = list(write(tmp_path))
    paths[which] = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="nowhere"):
        read_gqa(*paths)


# Pictures


def sample_of(image, **more):
    types = {"structural": "choose", "semantic": "attr", "detailed": "chooseAttr", "task": "ChooseAttr"}
    return Sample(sample_id="01", image_id="23", image=image, question="q?", answer="a", **types, **more)


def test_a_picture_is_rgb_whatever_is_stored(tmp_path):
    Image.new("LA", (8, 6), (200, 10)).save(tmp_path / "23.png")
    picture = load_image(sample_of(tmp_path / "23.png", image_size=(8, 6)))
    # a gray of 200 that covers 10 of 255 parts of the white below it
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (8, 6), (253, 253, 253))


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match="sample 01: no picture .*23.jpg; unpack"):
        load_image(sample_of(tmp_path / "23.jpg"))


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_picture_cut_short_is_named(tmp_path, ending, share):
    file = tmp_path / f"23.{ending}"
    Image.effect_noise((64, 64), 50).save(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"sample 01: picture .*23.{ending} is broken"):
        load_image(sample_of(file))


def test_a_picture_of_another_size_than_its_boxes_is_refused(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "23.png")
    with pytest.raises(ValueError, match=r"is \(8, 6\) pixels, but its boxes refer to \(6, 8\)"):
        load_image(sample_of(tmp_path / "23.png", image_size=(6, 8)))


# Frames


def test_samples_survive_a_parquet_file(read, tmp_path):
    samples, _ = read()
    odd = sample_of(Path("a b/ü.jpg"), caption='"quoted", ½\nline', option_true="nan", option_false="None")
    samples = [*samples, odd]
    samples_to_frame(samples).to_parquet(tmp_path / "samples.parquet")
    assert frame_to_samples(pd.read_parquet(tmp_path / "samples.parquet")) == samples
    assert frame_to_samples(samples_to_frame([])) == []


@pytest.mark.parametrize("n", [1, 3])
def test_columns_without_a_single_value_survive(tmp_path, n):
    samples = [sample_of(Path("23.jpg"))] * n
    samples_to_frame(samples).to_parquet(tmp_path / "samples.parquet")
    assert frame_to_samples(pd.read_parquet(tmp_path / "samples.parquet")) == samples


def test_frames_of_another_layout_are_refused():
    frame = samples_to_frame([sample_of(Path("23.jpg"))])
    with pytest.raises(ValueError, match="lacks the columns answer"):
        frame_to_samples(frame.drop(columns="answer"))
    with pytest.raises(ValueError, match="sample 01: objects"):
        frame_to_samples(frame.assign(objects="[{"))
    with pytest.raises(ValueError, match="sample 01: objects"):
        frame_to_samples(frame.assign(objects='[{"name": "jar", "box": {"x": 1}}]'))


# The authors' CSV


def authors_file(folder, *rows):
    pd.DataFrame(rows).to_csv(folder / "authors.csv", index=False)
    return folder / "authors.csv"


def test_an_authors_row_is_the_gqa_sample_with_a_caption(read, tmp_path):
    gqa = read()[0][0]
    (sample,) = read_authors(authors_file(tmp_path, ROW), tmp_path / "images")[0]
    assert sample.objects[0].box == gqa.objects[0].box
    for name in ("image", "question", "answer", "task", "option_true", "option_false", "image_size"):
        assert getattr(sample, name) == getattr(gqa, name)
    assert sample.caption == "a jar."


def test_an_authors_box_that_leaves_nothing_is_told(tmp_path):
    (sample,), left_out = read_authors(authors_file(tmp_path, ROW | {"central object w": "0"}), tmp_path)
    assert sample.objects[0].box is None
    assert left_out["sample_id"].tolist() == ["1"] and left_out["kept"].all()
    assert left_out["reason"].iloc[0].startswith("no box for jar (11)")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"img_id": "../23"}, "row 3: .*plain name"),
        ({"image_w": "wide"}, "row 3: .*number of pixels"),
        ({"question": ""}, "row 3: question should be a text"),
    ],
)
def test_a_bad_authors_row_is_named(tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match):
        read_authors(authors_file(tmp_path, ROW, ROW | wrong), tmp_path)


def test_other_csv_files_are_refused(tmp_path):
    file = authors_file(tmp_path, {name: value for name, value in ROW.items() if name != "img_id"})
    with pytest.raises(ValueError, match="lacks the columns img_id"):
        read_authors(file, tmp_path)
    text = authors_file(tmp_path, ROW | {"captions": 'a "jar", brown'}).read_text()
    file.write_text(text[: text.index("brown")])
    with pytest.raises(ValueError, match="authors.csv"):
        read_authors(file, tmp_path)
    file.write_text(text[: text.index("500,375") + 7] + "\n")
    with pytest.raises(ValueError, match="row 2: expected a number of pixels, got ''"):
        read_authors(file, tmp_path)
    file.write_text("")
    with pytest.raises(ValueError, match="can't read .*authors.csv"):
        read_authors(file, tmp_path)
    with pytest.raises(ValueError, match="nowhere.csv"):
        read_authors(tmp_path / "nowhere.csv", tmp_path)[0]


@needs_authors
def test_the_authors_files_are_read_whole(tmp_path):
    files = sorted(AUTHORS.glob("*.csv"))
    read = {file.stem.rsplit("_", 1)[-1]: read_authors(file, tmp_path)[0] for file in files}
    assert len(read) == 6 and set(read) <= set(TASKS)
    for task, samples in read.items():
        assert {s.task for s in samples} == {task}
        assert all((s.option_true == s.answer) == task.startswith("Choose") for s in samples)
        assert all(o.box or task == "LogicalObj" for s in samples for o in s.objects)
    assert any(o.object_id is None for s in read["LogicalObj"] for o in s.objects)
    together = sum(read.values(), [])
    assert frame_to_samples(samples_to_frame(together)) == together


def test_exchanged_pictures_are_anothers_whoever_else_is_asked(tmp_path):
    shapes = {"a": (20, 10), "b": (10, 20), "c": (9, 9)}
    asked = []
    for name, size in shapes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        about = {"sample_id": f"{name}1", "image_id": name, "image": tmp_path / f"{name}.png", "image_size": size}
        said = {"question": "Is it?", "answer": "yes", "task": None, "structural": "", "semantic": "", "detailed": ""}
        thing = SceneObject(name="cup", box=Box(x=0.0, y=0.0, w=2.0, h=2.0))
        asked.append(Sample(**about, **said, objects=(thing,)))
    gone = dataclasses.replace(asked[0], image_id="bb", image=tmp_path / "gone.png")
    other = exchange_pictures(asked, [*asked, gone])
    assert [(s.sample_id, s.image_id) for s in other] == [(s.sample_id, s.image_id) for s in asked]
    assert all(load_image(new).size == new.image_size != old.image_size for old, new in zip(asked, other, strict=True))
    assert {thing.box for s in other for thing in s.objects} == {None}
    assert exchange_pictures(asked[1:2], asked) == other[1:2]
    with pytest.raises(ValueError, match="got 1 picture"):
        exchange_pictures(asked, asked[:1])
