"""Fuzzing of all that reads what others wrote: only the documented error comes out, and it names the file.

Always the same examples, so that no run differs from another. For the counts:

    pytest -q -rP tests/data/test_fuzz.py
"""

import copy
import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from gqa_files import GRAPHS, QUESTIONS, ROW
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_sample
from vqa_files import ANNOTATIONS, AOKVQA
from vqa_files import QUESTIONS as OKVQA

from mmflow_utils.data.authors import read_authors
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.data.sample import frame_to_samples, load_image, samples_to_frame
from mmflow_utils.data.vqa import read_aokvqa, read_okvqa
from mmflow_utils.params import ROOT, Params
from mmflow_utils.params import read_yaml as read_parameters

pytestmark = pytest.mark.slow

fuzz = settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

ODD = [None, True, -1, 0, 2.5, 10**400, -(10**30), float("nan"), float("inf"), 5e-324, [], {}, [[]], {"a": 1}]
ODD += [
    "",
    " ",
    "-",
    "x",
    "a|b",
    "a|b|c",
    "x (1,2)",
    "../../secret",
    "C:\\x",
    "\0",
    "\ud800",
    "\n",
    "9" * 5000,
]
ODD += ["\U0001f408 \u05d7\u05ea\u05d5\u05dc", "<script>alert(1)</script>", "{image_id}", "%s", "1e999"]


class Twin(str):
    """A key that is equal to none, so that a dict can hold it twice, and JSON too."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def spoil(draw, node):
    """Spoil one place of nested lists and dicts: another value, none, or one more under the same name."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        if not (isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3))):
            break
        node = node[key]
    value, how = (
        copy.deepcopy(draw(st.sampled_from([*ODD, node[key]]))),
        draw(st.sampled_from(["set", "drop", "twice"])),
    )
    if how == "set":
        node[key] = value
    elif how == "drop" and len(node) > 1:
        del node[key]
    elif isinstance(node, dict):
        node[Twin(key)] = value
    else:
        node.append(value)


@st.composite
def spoiled(draw, whole, most=2):
    """A document with some places spoiled."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(0, most))):
        spoil(draw, whole)
    return whole


@st.composite
def damaged(draw, content):
    """Bytes, sometimes cut short, overwritten or with something in between."""
    where, more = draw(st.integers(0, len(content))), draw(st.binary(max_size=8))
    how = draw(st.sampled_from([*["whole"] * 6, "cut", "overwrite", "insert"]))
    return {
        "whole": content,
        "cut": content[:where],
        "overwrite": content[:where] + more + content[where + len(more) :],
        "insert": content[:where] + more + content[where:],
    }[how]


def spoiled_json(whole):
    return spoiled(whole).map(lambda value: json.dumps(value).encode()).flatmap(damaged)


class Tally(Counter):
    """Counts what came of each example: read, or refused by a one-line `ValueError` that names the file."""

    def of(self, read, *named):
        try:
            result = read()
        except ValueError as error:
            said = str(error)
            assert any(str(name) in said for name in named), f"names none of {named}: {said}"
            assert "\n" not in said and len(said) < 2000, said
            self["refused"] += 1
            return None
        self["read"] += 1
        return result

    def show(self, what):
        assert min(self["read"], self["refused"]) > 5, self  # a fuzzer that sees one side alone sees nothing
        print(f"{what}: {self.total()} examples, {self['read']} read, {self['refused']} refused, 0 other")


def check_samples(samples, images):
    """What is read can be used: asked, found in its folder, stored and read again."""
    for sample in samples:
        assert sample.sample_id and sample.question.strip() and sample.answer.strip()
        assert sample.image.resolve().is_relative_to(images.resolve())
        width, height = sample.image_size or (float("inf"),) * 2
        assert width > 0 and height > 0
        for box in filter(None, (thing.box for thing in sample.objects)):
            assert 0 <= box.x < box.x + box.w <= width and 0 <= box.y < box.y + box.h <= height
    assert len({sample.sample_id for sample in samples}) == len(samples)
    frame = samples_to_frame(samples)
    frame.to_parquet(io.BytesIO())
    assert frame_to_samples(frame) == list(samples)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["23.jpg", "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000008.jpg", "000000000042.jpg"]
    for name in names:
        Image.new("RGB", (4, 3)).save(folder / name)
    return folder


def test_gqa(tmp_path, images):
    questions, graphs, tally = tmp_path / "questions.json", tmp_path / "graphs.json", Tally()

    @fuzz
    @given(spoiled_json(QUESTIONS), spoiled_json(GRAPHS))
    def look(asked, seen):
        questions.write_bytes(asked)
        graphs.write_bytes(seen)
        found = tally.of(lambda: read_gqa(questions, graphs, images), questions, graphs)
        if found:
            check_samples(found[0], images)

    look()
    tally.show("GQA's questions and scene graphs")


def test_okvqa(tmp_path, images):
    questions, annotations, tally = tmp_path / "questions.json", tmp_path / "annotations.json", Tally()

    @fuzz
    @given(spoiled_json(OKVQA), spoiled_json(ANNOTATIONS))
    def look(asked, judged):
        questions.write_bytes(asked)
        annotations.write_bytes(judged)
        found = tally.of(lambda: read_okvqa(questions, annotations, images), questions, annotations, images)
        if found:
            check_samples(found[0], images)

    look()
    tally.show("OKVQA's questions and annotations")


def test_aokvqa(tmp_path, images):
    file, tally = tmp_path / "aokvqa.json", Tally()

    @fuzz
    @given(spoiled_json(AOKVQA))
    def look(content):
        file.write_bytes(content)
        found = tally.of(lambda: read_aokvqa(file, images), file, images)
        if found:
            check_samples(found[0], images)

    look()
    tally.show("A-OKVQA's questions")


def written(rows):
    """Write rows as CSV, each value as Python shows it: a table knows no other types than text."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(ROW)
    for row in rows:
        table.writerow(row.values() if isinstance(row, dict) else [row])
    return text.getvalue().encode(errors="surrogatepass")


def test_the_authors_csv(tmp_path, images):
    (tmp_path / "csv").mkdir()
    file, tally = tmp_path / "csv" / "authors.csv", Tally()

    @fuzz
    @given(spoiled([ROW, ROW | {"question_id": "2"}]).map(written).flatmap(damaged))
    def look(content):
        file.write_bytes(content)
        found = tally.of(lambda: read_authors(file.parent, images), file)
        if found:
            check_samples(found[0], images)

    look()
    tally.show("the authors' CSV")


def yaml_of(values):
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


LINES = ["", "1: 2", "on: off", "? [a]\n: b", "a: &a [*a]", "a: &a [1]\nb: *a", "\tx: 1", "seed: 2026-02-30"]
LINES += [
    "seed: !!python/object/apply:os.system [exit]",
    "seed: !!int x",
    "<<: {seed: 3}",
    "seed: 1_0",
    "...",
]
LINES += ["seed: 0x10", "window: 3", "---\nseed: 1", "seed: !!binary x", "%YAML 9.9", "seed: !!set {1, 2}"]


def test_parameters(tmp_path):
    file, tally = tmp_path / "p.yaml", Tally()
    whole = read_parameters(ROOT / "params" / "mini.yaml")

    @fuzz
    @given(spoiled(whole, most=1).map(yaml_of), st.sampled_from([*[""] * 20, *LINES]), st.data())
    def look(text, line, data):
        file.write_bytes(data.draw(damaged(f"{text}{line}\n".encode())))
        params = tally.of(lambda: Params.from_yaml(file), file, "Parameter ", "Unknown parameter ")
        if params:
            assert params.folder.parent == params.path("outputs") and params.folder.name == params.model

    look()
    tally.show("parameters in YAML")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_pictures(tmp_path, kind):
    file, tally, content = tmp_path / f"q1.{kind.lower()}", Tally(), io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise).save(content, kind, **({} if kind == "GIF" else {"exif": exif}))
    sample = tiny_sample(tmp_path, image=file)

    @fuzz
    @given(damaged(content.getvalue()).flatmap(damaged))
    def look(content):
        file.write_bytes(content)
        picture = tally.of(lambda: load_image(sample), file)
        if picture:
            assert picture.mode == "RGB" and np.asarray(picture).shape == (*picture.size[::-1], 3)

    look()
    tally.show(f"pictures, {kind}")
