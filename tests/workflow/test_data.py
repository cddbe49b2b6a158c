"""The real data: the authors' questions, downloads that go on after a cut."""

import ast
import hashlib
import io
import json
import os
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from tiny import tiny_vlm

from mmflow_utils.data.authors import compare_with_authors, read_authors
from mmflow_utils.data.gqa import read_gqa
from mmflow_utils.experiments.curation import ask_questions, read_questions
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.results.frames import manifest
from workflow import download
from workflow.download import Archive, fetch

AUTHORS = Path(
    os.environ.get("MMFLOW_AUTHORS_CSV", Path(__file__).resolve().parents[3] / "shared" / "authors_csv_sample")
)
needs_authors = pytest.mark.skipif(not AUTHORS.is_dir(), reason=f"the authors' CSV files aren't at {AUTHORS}")


# ---- the authors' questions ----------------------------------------------------------------------------


def raw_gqa(folder):
    """Write the authors' rows in GQA's layout: what their files hold of a question, and of a scene graph.

    Options and objects are read from GQA's operations, which the rows quote; their own columns say them
    again. The sides of the boxes are the rows' own: that they are the scene graphs' can't be seen here.
    """
    asked, graphs = {}, {}
    for file in sorted(AUTHORS.glob("*.csv")):
        for row in pd.read_csv(file, dtype=str, keep_default_na=False).to_dict("records"):
            asked[row["question_id"]] = {
                "question": row["question"],
                "imageId": row["img_id"],
                "answer": row["answer"],
                "semantic": ast.literal_eval(row["operations"]),
                "types": {kind: row[f"type_{kind}"] for kind in ("structural", "semantic", "detailed")},
            }
            size = {"width": int(row["image_w"]), "height": int(row["image_h"])}
            objects = graphs.setdefault(row["img_id"], size | {"objects": {}})["objects"]
            for column in [name.removesuffix(" id") for name in row if name.endswith(" id")]:
                if row[f"{column} x"] != "-":
                    objects[row[f"{column} id"]] = {side: int(row[f"{column} {side}"]) for side in "xywh"}
    (folder / "questions.json").write_text(json.dumps(asked))
    (folder / "graphs.json").write_text(json.dumps(graphs))
    return folder / "questions.json", folder / "graphs.json"


@pytest.fixture
def both(tmp_path):
    """Both readings of the authors' real rows."""
    if not AUTHORS.is_dir():
        pytest.skip(f"the authors' CSV files aren't at {AUTHORS}")
    ours, left_out = read_gqa(*raw_gqa(tmp_path), tmp_path)
    authors, lost = read_authors(AUTHORS, tmp_path)
    assert left_out.empty and lost.empty
    return ours, authors


def test_curation_reads_from_gqa_what_the_authors_files_hold(both):
    compared = compare_with_authors(*both)
    assert len(both[1]) == 360
    assert compared.field.unique().tolist() == ["question", "answer", "options", "objects", "boxes"]
    assert compared[~compared.equal].empty


def test_each_difference_is_found(both):
    ours, authors = both
    chosen, related = (next(i for i, s in enumerate(ours) if s.task == t) for t in ("ChooseAttr", "ChooseRel"))
    wrong = list(ours)
    wrong[chosen] = replace(ours[chosen], option_true=ours[chosen].option_false, option_false="x")
    first, *rest = ours[related].objects
    shifted = replace(first, box=replace(first.box, x=first.box.x + 1))
    wrong[related] = replace(ours[related], objects=(shifted, *rest))
    lost = wrong.pop()
    different = compare_with_authors(wrong, authors).query("~equal")
    assert different[["sample_id", "field"]].to_dict("split")["data"] == sorted(
        [[ours[chosen].sample_id, "options"], [ours[related].sample_id, "boxes"], [lost.sample_id, "found"]],
        key=lambda row: [s.sample_id for s in authors].index(row[0]),
    )
    assert different.ours.ne(different.authors).all()


def test_the_sides_of_an_object_and_its_name_count(both):
    ours, authors = both
    one = ours[0]
    other = replace(one, objects=(replace(one.objects[0], name="other"), *one.objects[1:]))
    different = compare_with_authors([other], authors[:1]).query("~equal")
    assert different.field.tolist() == ["objects", "boxes"]


@needs_authors
def test_a_folder_of_the_authors_files_is_a_source_of_samples(tmp_path):
    every, left_out = read_authors(AUTHORS, tmp_path)
    files = [read_authors(file, tmp_path)[0] for file in sorted(AUTHORS.glob("*.csv"))]
    assert every == sum(files, []) and left_out.empty
    some, _ = read_authors(AUTHORS, tmp_path, tasks=["ChooseRel"])
    assert some == [s for s in every if s.task == "ChooseRel"] != []


@needs_authors
def test_what_stands_twice_or_lost_its_box_is_told(tmp_path):
    (file,) = AUTHORS.glob("*_ChooseAttr.csv")
    frame = pd.read_csv(file, dtype=str, keep_default_na=False).head(3)
    frame.loc[1, "central object w"] = "0"
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.head(1).to_csv(tmp_path / "b.csv", index=False)
    samples, left_out = read_authors(tmp_path, tmp_path)
    assert [s.sample_id for s in samples] == frame.question_id.tolist()
    assert left_out.sample_id.tolist() == [frame.question_id[1], frame.question_id[0]]
    assert left_out.kept.tolist() == [True, False]
    assert left_out.reason[1] == "the question is duplicated"


@needs_authors
def test_the_authors_questions_become_the_samples_of_a_run(tmp_path):
    sizes = {s.image_id: s.image_size for s in read_authors(AUTHORS, tmp_path, tasks=["ChooseRel"])[0]}
    for image_id, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{image_id}.jpg")
    params = Params(
        model="tiny",
        checkpoint="no-weights",
        prompt="USER: {caption}\n{question} ASSISTANT:",
        questions=str(AUTHORS),
        scene_graphs=str(tmp_path / "none.json"),
        images=str(tmp_path),
        outputs=str(tmp_path / "outputs"),
        n_samples=2,
    )
    samples, left_out = read_questions(params, tasks=["ChooseRel"])
    assert len(samples) == 60 and left_out.empty
    assert all(s.caption for s in samples)  # theirs: Visual Genome's file isn't needed
    model = tiny_vlm(n_layers=2)
    for sample in samples[:8]:
        spans = encode(model, sample).positions
        assert spans["image_related"] and spans["options"]
    record = ask_questions(model, samples[:2], progress=False)
    assert record.prediction.notna().all()


def test_samples_of_other_csv_files_are_of_another_run(tmp_path):
    params = Params(checkpoint="no-weights", questions=str(tmp_path), scene_graphs="none.json")
    assert manifest(params)["depends_on"]["data_sha256"] is None
    seen = []
    for name, content in (("a.csv", "one"), ("a.csv", "other"), ("b.csv", "more"), ("notes.txt", "no data")):
        (tmp_path / name).write_text(content)
        seen.append(manifest(params)["depends_on"]["data_sha256"])
    assert len(set(seen)) == 3 and None not in seen and seen[2] == seen[3]


def test_a_folder_without_csv_files_says_where_they_come_from(tmp_path):
    with pytest.raises(ValueError, match="no CSV file in .*docs/data.md"):
        read_authors(tmp_path, tmp_path)


# ---- downloads -----------------------------------------------------------------------------------------


def zipped(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/").replace("_json", ".json"), text)
    return content.getvalue()


PACKED = zipped(a__val_json="the questions " * 20_000, train_json="not needed", __MACOSX___val_json="x")


class Server(BaseHTTPRequestHandler):
    """Serves `content` in ranges; breaks off after `cut` bytes; `asked` keeps the ranges."""

    content, cut, ranges, asked = PACKED, None, True, []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if self.ranges and asked else 0
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        rest = self.content[start:]
        self.send_response(206 if self.ranges and asked else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    kind = type("Served", (Server,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    kind.archive = Archive(url=f"http://127.0.0.1:{server.server_port}/a.zip", members="val.json", to="gqa", size="")
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_needed_of_an_archive_is_put_where_it_belongs(served, tmp_path):
    told = fetch(served.archive, tmp_path, progress=False)
    assert [f.name for f in (tmp_path / "gqa").iterdir()] == ["val.json"]
    assert (tmp_path / "gqa" / "val.json").read_text() == "the questions " * 20_000
    assert "1 files in" in told and "written down" in told
    noted = json.loads((tmp_path / "checksums.json").read_text())[served.archive.url]
    assert noted["sha256"] == hashlib.sha256(PACKED).hexdigest() and not noted["published"]


def test_a_second_run_downloads_nothing(served, tmp_path):
    fetch(served.archive, tmp_path, progress=False)
    assert fetch(served.archive, tmp_path, progress=False) == "there already"
    assert len(served.asked) == 1
    (tmp_path / "gqa" / "val.json").unlink()  # the archive is still there
    fetch(served.archive, tmp_path, progress=False)
    assert len(served.asked) == 1 and (tmp_path / "gqa" / "val.json").exists()


def test_a_connection_that_breaks_is_taken_up_again(served, tmp_path):
    served.cut = 100_000
    fetch(served.archive, tmp_path, progress=False)
    assert (tmp_path / "downloads" / "a.zip").read_bytes() == PACKED
    assert served.asked == [f"bytes={n}-" for n in range(0, len(PACKED) - 100_000 + 2**16, 2**16)]


def test_a_later_run_goes_on_where_this_one_stopped(served, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_ATTEMPTS", 1)
    served.cut = 100_000
    with pytest.raises(ValueError, match="65,536 bytes are here.*same command again"):
        fetch(served.archive, tmp_path, progress=False)
    served.cut = None
    fetch(served.archive, tmp_path, progress=False)
    assert served.asked == ["bytes=0-", "bytes=65536-"]
    assert (tmp_path / "downloads" / "a.zip").read_bytes() == PACKED


@pytest.mark.parametrize("there", [PACKED, PACKED + b"too much", b"something else"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_that_is_whole_too_long_or_not_continued(served, tmp_path, there, ranges):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "a.zip.part").write_bytes(there)
    served.ranges = ranges
    archive = replace(served.archive, sha256=hashlib.sha256(PACKED).hexdigest())
    if there == b"something else" and ranges:
        with pytest.raises(ValueError, match="another checksum"):
            fetch(archive, tmp_path, progress=False)
    fetch(archive, tmp_path, progress=False)
    assert (tmp_path / "downloads" / "a.zip").read_bytes() == PACKED


def test_another_checksum_than_published_or_noted_is_refused(served, tmp_path):
    with pytest.raises(ValueError, match="a.zip has another checksum than 0000.*checksums.json"):
        fetch(replace(served.archive, sha256="0" * 64), tmp_path, progress=False)
    assert not (tmp_path / "gqa").exists()
    fetch(served.archive, tmp_path, progress=False)
    for left in (tmp_path / "gqa" / "val.json", tmp_path / "downloads" / "a.zip"):
        left.unlink()
    served.content = zipped(val_json="other questions")
    with pytest.raises(ValueError, match="another checksum than " + hashlib.sha256(PACKED).hexdigest()):
        fetch(served.archive, tmp_path, progress=False)


def test_a_broken_archive_is_not_taken_for_data(served, tmp_path):
    broken = bytearray(PACKED)
    broken[60] ^= 1
    served.content = bytes(broken)
    with pytest.raises(ValueError, match="a.zip is broken .*delete it"):
        fetch(served.archive, tmp_path, progress=False)
    assert not list((tmp_path / "gqa").glob("*.json")) and not (tmp_path / "checksums.json").exists()
    (tmp_path / "downloads" / "a.zip").unlink()
    served.content = zipped(train_json="x")
    with pytest.raises(ValueError, match="holds no val.json"):
        fetch(served.archive, tmp_path, progress=False)


def test_what_another_command_fetches_is_left_to_it(served, tmp_path):
    with download._alone(tmp_path / "downloads" / "a.zip.lock"):
        with pytest.raises(ValueError, match="another command fetches a.zip just now: wait"):
            fetch(served.archive, tmp_path, progress=False)
        assert not served.asked and not (tmp_path / "gqa").exists()
    fetch(served.archive, tmp_path, progress=False)


def test_checksums_that_another_command_noted_meanwhile_stay(served, tmp_path, monkeypatch):
    unpack = download._unpack

    def meanwhile(*arguments):
        (tmp_path / "checksums.json").write_text('{"another": {"sha256": "1"}}')
        return unpack(*arguments)

    monkeypatch.setattr(download, "_unpack", meanwhile)
    fetch(served.archive, tmp_path, progress=False)
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == {"another", served.archive.url}


def test_no_server_is_one_clear_error(tmp_path):
    archive = Archive(url="http://127.0.0.1:9/a.zip", members="val.json", to="gqa", size="")
    with pytest.raises(ValueError, match="a.zip wasn't fetched whole, 0 bytes are here"):
        fetch(archive, tmp_path, progress=False)


def test_the_command_tells_what_failed_and_what_is_left_to_do(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        download, "DATA", {"good": (served.archive,), "bad": (replace(served.archive, members="no", to="b"),)}
    )
    assert download.main(["good", "--to", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "a.zip" in told and "By hand:" in told and "data/authors/" in told
    assert download.main(["--to", str(tmp_path)]) == 1
    assert "failed: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        download.main(["gqua"])


def test_files_land_where_the_parameter_files_look_for_them():
    params = Params.from_yaml(ROOT / "params" / "llava-1.5-7b.yaml")
    landed = {f"data/{archive.to}/{archive.members}" for archive in download.DATA["gqa"]}
    assert landed == {params.questions, params.scene_graphs, f"{params.images}/*.jpg"}
