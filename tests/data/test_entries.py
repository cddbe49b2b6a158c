"""Large files, entry by entry: what the standard library would read, in bounded memory, or one clear error."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmflow_utils.data import fields
from mmflow_utils.data.captions import add_captions
from mmflow_utils.data.fields import fetching, pictures_folder, read_entries, read_json, read_list
from mmflow_utils.data.gqa import read_gqa

INTEGERS = st.integers(-(2**62), 2**62)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(), JSON, min_size=1, max_size=5), st.sampled_from([None, 1]), st.booleans())
def test_entries_are_those_of_the_whole_file(tmp_path_factory, content, indent, ascii_only):
    file = tmp_path_factory.getbasetemp() / "entries.json"
    file.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), "utf-8")
    assert list(read_entries(file, "file")) == list(content.items())
    file.write_text(json.dumps([*content.values()], indent=indent, ensure_ascii=ascii_only), "utf-8")
    assert list(read_list(file, "file")) == [*content.values()]


def test_what_is_duplicated_comes_twice_and_whole_characters_stay(tmp_path):
    text = r'{"é": 1234567, "b" : -1.5e3,"b": "x\ud83e\udd70 \\ud83e \\\\ud83e"}'.replace(r"\\u", r"\\u")
    (tmp_path / "a.json").write_text(text, "utf-8")
    found = list(read_entries(tmp_path / "a.json", "file"))
    assert found == [("é", 1234567), ("b", -1500.0), ("b", json.loads(text)["b"])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"01": {"a": 1}, "02": {"a": "cut', "premature EOF after entry 1, '01'"),
        (b'{"01": {"a": 1}, "02"', "premature EOF after entry 1, '01'"),
        (b'{"01": {"a": 1}', "premature EOF after entry 0"),
        (b'{"01": 1} {"02": 2}', "trailing garbage after entry 1, '01'"),
        (b'{"01": 1, 02: 2}', "invalid object key .* after entry 0"),
        (b'{"01": 1,}', "invalid object key"),
        (b'{"\xc3\xa9": tru}', "invalid string in json text. after entry 0"),
        (b'{"01": NaN}', "invalid char in json text. after entry 0"),
        (b'{"01": 10000000000000000000000}', "integer overflow after entry 0"),
        (b'{"01": "a\xff"}', "invalid bytes in UTF8 string"),
        (b'{"01": "a\xc3', "invalid bytes in UTF8 string"),
        (b'{"01": 1, "02": "a\xed\xa0\xbd"}', "'utf-8' codec can't decode byte 0xed .* after entry 1"),
        (rb'{"01": 1, "02": "a\\\ud83e"}', "half a character at byte 20"),
        (rb'{"01": 1, "02": "\ud83ex\udd70"}', "half a character at byte 17"),
        (rb'{"01": 1, "02\udd70": 1}', "half a character at byte 13"),
        (b'{"01": ' + b"[" * 200_000, "nested more than 100 deep from byte 0 on"),
        (b'{"01": 1, "02": ' + b'{"a":[],"b":' * 100_000, "nested more than 100 deep"),
        (b"\0" * 300, "invalid char in json text"),
        (b"", "empty file"),
    ],
)
def test_a_damaged_file_is_one_clear_error_that_names_the_last_good_entry(tmp_path, content, said):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json isn't whole JSON .*{said}.*: download the questions again") as caught:
        list(read_entries(file, "questions"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("data/gqa/val_balanced_questions.json", "gqa"), ("/mnt/mmflow/data/gqa/images", "gqa"),
        ("data/gqa/region_descriptions.json", "captions"), ("data/okvqa/mscoco_val2014_annotations.json", "okvqa"),
        ("data/aokvqa/aokvqa_v1p0_val.json", "aokvqa"), ("data/coco/val2014", "okvqa"),
        ("data/coco/val2017", "aokvqa"),
    ],
)  # fmt: skip
def test_the_command_that_fetches_what_is_missing_is_named(tmp_path, path, data):
    assert fetching(path) == f"make data DATA={data}, or "
    there = tmp_path / "data" / path.split("data/")[1]
    with pytest.raises(
        ValueError, match=f"{there} .*: make data DATA={data}, or put it there, or change the parameters"
    ):
        list(read_entries(there, "question file"))
    with pytest.raises(ValueError, match=f"no images folder {there}: make data DATA={data}, or unpack them there"):
        pictures_folder(there)


@pytest.mark.parametrize("path", ["gqa/questions.json", "data/mine/questions.json", "database/gqa/images"])
def test_other_files_are_not_fetched_by_a_command(path):
    assert fetching(path) == ""


def test_captions_are_read_the_same_way(tmp_path):
    (tmp_path / "a.json").write_text(r'[{"id": 1, "regions": [{"phrase": "half \ud83e a character"}]}]')
    with pytest.raises(ValueError, match="a.json isn't whole JSON .half a character at byte 40"):
        add_captions([], tmp_path / "a.json") or list(read_list(tmp_path / "a.json", "captions"))


def question(i):
    steps = [
        {"operation": "select", "dependencies": [], "argument": f"jar ({i % 7})"},
        {"operation": "choose", "dependencies": [0], "argument": "empty|full"},
    ]
    kind = "chooseAttr" if i % 10 == 0 else "verifyAttr"
    return {
        "semantic": steps,
        "entailed": [f"{k:08d}" for k in range(i, i + 9)],
        "question": f"Is the jar that stands near the window in picture {i} full or empty?",
        "imageId": str(i // 10),
        "isBalanced": True,
        "groups": {"global": None, "local": "10c-jar_state"},
        "answer": "empty",
        "semanticStr": "select: jar->choose: empty|full" * 20,
        "annotations": {"answer": {}, "question": {"2": str(i % 7)}, "fullAnswer": {}},
        "types": {"structural": "choose", "semantic": "attr", "detailed": kind},
        "fullAnswer": "The jar is empty.",
    }


def graph(i):
    relations = [{"name": "to the left of", "object": str(k)} for k in range(20)]
    thing = {"name": "jar", "x": i % 9, "y": 1, "w": 5, "h": 6, "attributes": ["red"], "relations": relations}
    return {"width": 50, "height": 40, "objects": {str(k): thing for k in range(7)}}


def write_large(folder, n):
    for name, make, count in (("questions", question, n), ("graphs", graph, n // 10)):
        with open(folder / f"{name}.json", "w") as file:
            for i in range(count):
                file.write(("{" if i == 0 else ", ") + f'"{i}": {json.dumps(make(i))}')
            file.write("}")
    return folder / "questions.json", folder / "graphs.json"


def peak_bytes(work):
    tracemalloc.start()
    try:
        kept = work()
        return tracemalloc.get_traced_memory()[1], kept
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_doesn_t_grow_with_the_file(tmp_path):
    files = write_large(tmp_path, 2000)
    size = sum(file.stat().st_size for file in files)
    assert size > 3e6
    read_gqa(*files, tmp_path)  # what is imported on first use is no memory of the reading
    whole, _ = peak_bytes(lambda: [read_json(file, "file") for file in files])
    assert whole > 2 * size  # the measurement can tell
    streamed, (samples, _) = peak_bytes(lambda: read_gqa(*files, tmp_path, tasks=["ChooseAttr"]))
    assert streamed < 0.6 * size
    assert len(samples) == 200 and samples[7].objects[0].box.x == 7


@pytest.mark.parametrize("which", [0, 1])
def test_an_id_that_stands_twice_stops_the_reading(tmp_path, which):
    files = write_large(tmp_path, 20)
    text = files[which].read_text()
    files[which].write_text(text[:-1] + ', "1": ' + json.dumps((question, graph)[which](1)) + "}")
    with pytest.raises(ValueError, match=f"{files[which].name}: .* '1' is duplicated"):
        read_gqa(*files, tmp_path)


def test_a_bar_shows_the_bytes_of_a_large_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text('{"01": 1}')
    list(read_entries(tmp_path / "a.json", "GQA question file"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(fields, "NO_BAR_BELOW", 0)
    list(read_entries(tmp_path / "a.json", "GQA question file"))
    assert "GQA question file: 100%" in capsys.readouterr().err
