"""Results on disk: lossless, whole or absent, and never mistaken for those of another run."""

import errno
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from mmflow_utils.params import Params
from mmflow_utils.results import frames as store
from mmflow_utils.results.frames import load_frame, manifest, read_manifest, save_frame


@pytest.fixture
def frame():
    columns = {
        "sample_id": ["a", "b"],
        "layer": [0, 11],
        "p_base": [0.5, np.nan],
        "option_true": ["red", None],
    }
    return pd.DataFrame(columns)


@pytest.fixture
def params(tmp_path):
    """Parameters whose weights and data are two small files."""
    for name in ("model.safetensors", "questions.json", "graphs.json"):
        (tmp_path / name).write_text(name)
    return Params(
        checkpoint=str(tmp_path),
        questions=f"{tmp_path}/questions.json",
        scene_graphs=f"{tmp_path}/graphs.json",
    )


def test_a_frame_comes_back_as_it_went(tmp_path, frame, params):
    path = save_frame(frame, tmp_path / "deep" / "flow.parquet", manifest(params, max_check_diff=1e-7))
    back = load_frame(path, manifest(params))
    pd.testing.assert_frame_equal(back, frame)
    assert sorted(file.name for file in path.parent.iterdir()) == ["flow.json", "flow.parquet"]


def test_the_manifest_is_inside_and_beside(tmp_path, frame, params):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params, max_check_diff=1e-7))
    assert json.loads(path.with_suffix(".json").read_text()) == read_manifest(path)
    made_by = read_manifest(path)["made_by"]
    assert made_by["max_check_diff"] == 1e-7
    assert made_by["packages"]["torch"].startswith("2.")


@pytest.mark.parametrize("change", [{"window": 5}, {"seed": 1}, {"tasks": ["ChooseRel"]}, {"dtype": "float16"}])
def test_a_frame_of_other_parameters_is_refused_by_name(tmp_path, frame, params, change):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    other = params.model_copy(update=change)
    with pytest.raises(ValueError, match=rf"another run \({next(iter(change))} was .*run the notebook"):
        load_frame(path, manifest(other))


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"n_boot": 500}, {"outputs": "elsewhere"}])
def test_what_changes_no_number_is_no_reason_to_refuse(tmp_path, frame, params, change):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    assert len(load_frame(path, manifest(params.model_copy(update=change)))) == 2


@pytest.mark.parametrize(("file", "key"), [("model.safetensors", "weights_sha256"), ("graphs.json", "data_sha256")])
def test_other_weights_and_other_data_are_noticed(tmp_path, frame, params, file, key):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    (tmp_path / file).write_text("something else")
    with pytest.raises(ValueError, match=key):
        load_frame(path, manifest(params))


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tokenizer.json", "model.gguf"])
def test_what_is_read_beside_the_weights_is_noticed(tmp_path, frame, params, name):
    (tmp_path / name).write_text("before")
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    (tmp_path / name).write_text("rope_theta")
    with pytest.raises(ValueError, match="settings_sha256 was"):
        load_frame(path, manifest(params))
    (tmp_path / "training.json").write_text("a record, which nobody computes with")
    (tmp_path / name).write_text("before")
    assert load_frame(path, manifest(params)).equals(frame)


def test_another_language_model_in_a_folder_is_noticed(tmp_path, frame, params):
    other = tmp_path / "language"
    other.mkdir()
    (other / "weights.gguf").write_text("one")
    params = params.model_copy(update={"language_model": str(other)})
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    (other / "weights.gguf").write_text("two")
    with pytest.raises(ValueError, match="settings_sha256 was"):
        load_frame(path, manifest(params))


def test_a_result_from_before_settings_were_told_stays_valid(tmp_path, frame, params):
    (tmp_path / "config.json").write_text("{}")
    told = manifest(params)
    before = {**told, "depends_on": {k: v for k, v in told["depends_on"].items() if k != "settings_sha256"}}
    assert "settings_sha256" in told["depends_on"]
    assert load_frame(save_frame(frame, tmp_path / "flow.parquet", before), told).equals(frame)


def test_a_result_may_depend_on_fewer_parameters(tmp_path, frame, params):
    path = save_frame(frame, tmp_path / "samples.parquet", manifest(params, fields=["model", "seed"]))
    wider = params.model_copy(update={"window": 7})
    assert len(load_frame(path, manifest(wider, fields=["model", "seed"]))) == 2
    with pytest.raises(ValueError, match="seed"):
        load_frame(path, manifest(params.model_copy(update={"seed": 3}), fields=["model", "seed"]))


def test_a_write_that_fails_leaves_the_old_result_and_no_litter(tmp_path, frame, params, monkeypatch):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))

    def break_off(handle):
        raise OSError("disk full")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(store.os, "fsync", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_frame(frame.assign(layer=3), path, manifest(params))
    assert sorted(tmp_path.iterdir()) == before
    pd.testing.assert_frame_equal(load_frame(path), frame)


def test_missing_foreign_and_damaged_files_are_told_apart(tmp_path, frame):
    with pytest.raises(ValueError, match="no results at .*run the notebook"):
        load_frame(tmp_path / "flow.parquet")
    frame.to_parquet(tmp_path / "foreign.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    for name in ("foreign", "damaged"):
        with pytest.raises(ValueError, match=f"{name}.parquet.*not written by save_frame or is damaged"):
            load_frame(tmp_path / f"{name}.parquet")


def test_a_byte_changed_anywhere_is_noticed(tmp_path, frame, params):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    good = path.read_bytes()
    for where in range(0, len(good), 7):
        path.write_bytes(good[:where] + bytes([good[where] ^ 1]) + good[where + 1 :])
        with pytest.raises(ValueError, match="flow.parquet .*is damaged .*: delete it and run again"):
            load_frame(path)
    path.write_bytes(good)
    assert load_frame(path).equals(frame)


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_file_that_was_cut_short_is_noticed(tmp_path, frame, params, kept):
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is damaged"):
        load_frame(path)


def test_a_table_that_holds_what_looks_like_a_checksum_is_no_trouble(tmp_path, params):
    frame = pd.DataFrame({"text": ['"sha256": "' + 64 * digit for digit in "0a"]})
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params, note='"sha256": "' + 64 * "0"))
    assert load_frame(path, manifest(params)).equals(frame)


def test_equal_frames_make_equal_files(tmp_path, frame, params):
    made_from = manifest(params)
    one, two = (save_frame(frame, tmp_path / f"{name}.parquet", made_from) for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert read_manifest(one)["sha256"] != read_manifest(save_frame(frame[:1], one, made_from))["sha256"]


def test_storing_and_loading_needs_no_torch():
    code = "import mmflow_utils as mm, sys; mm.save_frame; mm.load_frame; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_that_one_notebook_alone_reads_counts_too(tmp_path, frame, params):
    class Own(Params):
        okvqa: str = str(tmp_path / "okvqa.json")
        pattern: str = "{image_id}.png"

    (tmp_path / "okvqa.json").write_text("one")
    own = Own(**params.model_dump())
    assert (
        manifest(own, fields=["model"])["depends_on"].keys() == manifest(params, fields=["model"])["depends_on"].keys()
    )  # what all notebooks share must not depend on what one of them reads
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(own))
    assert len(load_frame(path, manifest(own))) == 2
    (tmp_path / "okvqa.json").write_text("another")
    with pytest.raises(ValueError, match="okvqa_sha256 was"):
        load_frame(path, manifest(own))


def test_a_frame_of_another_run_goes_beside_and_each_is_found_again(tmp_path, frame, params):
    path, other = tmp_path / "flow.parquet", params.model_copy(update={"window": 5})
    assert save_frame(frame, path, manifest(params)) == path
    beside = save_frame(frame.assign(layer=7), path, manifest(other))
    assert re.fullmatch(r"flow\.[0-9a-f]{8}\.parquet", beside.name)
    assert save_frame(frame.assign(layer=8), path, manifest(other)) == beside
    assert load_frame(path, manifest(params)).equals(frame)
    assert load_frame(path, manifest(other)).layer.tolist() == load_frame(path).layer.tolist() == [8, 8]
    assert load_frame(beside).layer.tolist() == [8, 8]
    assert save_frame(frame, path, manifest(params.model_copy(update={"window": 7})), fresh=True) == path
    with pytest.raises(ValueError, match="window was 7, now 3"):
        load_frame(path, manifest(params))


def test_what_is_damaged_is_replaced(tmp_path, frame, params):
    path = tmp_path / "flow.parquet"
    path.write_bytes(b"PAR1")
    assert save_frame(frame, path, manifest(params)) == path
    assert load_frame(path).equals(frame)


def test_of_two_runs_that_end_at_once_none_is_lost(tmp_path, frame, params, monkeypatch):
    path, other = tmp_path / "flow.parquet", params.model_copy(update={"window": 5})
    place_for = store.place_for

    def place_and_wait(*args, **options):
        monkeypatch.setattr(store, "place_for", place_for)
        place = place_for(*args, **options)
        save_frame(frame.assign(layer=7), path, manifest(other))  # another run ends just here
        return place

    monkeypatch.setattr(store, "place_for", place_and_wait)
    assert save_frame(frame, path, manifest(params)) != path
    assert load_frame(path, manifest(params)).equals(frame)
    assert load_frame(path, manifest(other)).layer.tolist() == [7, 7]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_links_loses_nothing(tmp_path, frame, params, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no links here")

    monkeypatch.setattr(store.os, "link", refuse)
    path = save_frame(frame, tmp_path / "flow.parquet", manifest(params))
    assert load_frame(path, manifest(params)).equals(frame)
