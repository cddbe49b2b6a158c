"""The text-only miniature (App. G): trained on captions, stored as a plain language model, and swept."""

import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from tiny import tiny_sample, tiny_vlm
from transformers import AutoProcessor, LlamaForCausalLM

from miniature.build import PROMPT, build_model
from miniature.packing import pack
from miniature.save import save_text_miniature
from miniature.score import task_accuracy
from miniature.train import Recipe, Trainer
from miniature.world import caption, sample_scene
from mmflow_utils.data.captions import add_captions
from mmflow_utils.data.sample import Sample
from mmflow_utils.data.tasks import TASKS
from mmflow_utils.experiments.curation import read_questions
from mmflow_utils.experiments.knockout import knockout_sweep
from mmflow_utils.models.load import load_model
from mmflow_utils.params import ROOT, Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import CAPTIONS_TO_LAST, FLOW_TO_LAST, Flow
from mmflow_utils.results.frames import manifest

SHORT = Recipe(text_steps=2, read_steps=2, batch=2, joint_questions=7, eval_every=1, eval_scenes=2)
TEXT_PROMPT = PROMPT.replace("<image>", "{caption}")


@cache
def processor():
    return AutoProcessor.from_pretrained(ROOT / "assets" / "mini", backend="pil")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of both stages with captions; the text stage's checkpoint is there when `read` begins."""
    folder = tmp_path_factory.mktemp("training")
    trainer = Trainer(build_model(processor().tokenizer, seed=0, n_layers=2), processor(), SHORT, folder)
    trainer.text()
    trainer.read()
    return trainer


@pytest.fixture(scope="module")
def stored(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini-text")
    return folder, save_text_miniature(trained, folder, n_scenes=50)


def params(folder, **changes):
    return Params(model="mini-text", checkpoint=str(folder), prompt=TEXT_PROMPT, device="cpu", **changes)


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reading_goes_on_from_the_text_stage_and_leaves_it_alone(trained, tmp_path):
    losses = [(row["stage"], row["step"]) for row in trained.curves if row["metric"] == "loss"]
    assert losses == [("text", 1), ("text", 2), ("read", 1), ("read", 2)]
    again = Trainer(build_model(processor().tokenizer, seed=5, n_layers=2), processor(), SHORT, trained.folder)
    again.text()  # both are at their end: their checkpoints are loaded, and nothing is trained
    text = again.model.lm_head.weight.clone()
    again.read()
    assert torch.equal(again.model.lm_head.weight, trained.model.lm_head.weight)
    assert not torch.equal(text, again.model.lm_head.weight)
    untrained = build_model(processor().tokenizer, seed=0, n_layers=2).model.vision_tower.state_dict()
    tower = trained.model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], untrained[name]) for name in untrained)


@pytest.mark.slow
def test_reading_asks_for_descriptions_and_the_text_stage_does_not(trained, monkeypatch):
    asked = []

    def noted(*args, **options):
        asked.append(pack(*args, **options))
        return asked[-1]

    monkeypatch.setattr("miniature.train.pack", noted)
    trained._caption_loss(np.random.default_rng(0))
    trained._reading_loss(np.random.default_rng(0))
    described = [any(d.detailed == "describe" for drafts in b.drafts for d in drafts) for b in asked]
    assert described == [False, True]
    assert all((b.ids != trained.model.config.image_token_id).all() for b in asked)


def test_another_scenes_caption_is_told_of_the_same_questions():
    scenes = [sample_scene(np.random.default_rng(n), n_things=2) for n in (1, 2)]
    options = dict(n_questions=6, n_image_tokens=None)
    own, other = (
        pack(processor().tokenizer, scenes, np.random.default_rng(3), told=told, **options)
        for told in (None, scenes[::-1])
    )
    assert [d.text for drafts in own.drafts for d in drafts] == [d.text for drafts in other.drafts for d in drafts]
    for n, about in enumerate(scenes[::-1]):
        said = processor().tokenizer.decode(other.ids[n, other.segment[n] == 0])
        assert all(f"{thing.shape} {thing.category} made of {thing.material}" in said for thing in about.things)


@pytest.mark.slow
def test_accuracy_is_also_taken_with_another_scenes_caption(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "miniature.score.packed_logits",
        lambda model, batch, pictures, *, half: (
            seen.append(batch) or torch.nn.functional.one_hot(batch.ids.roll(-1, 1), 440).float()
        ),
    )
    shown = dict(n_scenes=4, seed=0, captions=True)
    assert set(task_accuracy(trained.model, processor(), **shown).values()) == {100.0}
    task_accuracy(trained.model, processor(), shuffled=True, **shown)
    own, other = seen
    prefix = [processor().tokenizer.decode(b.ids[0, b.segment[0] == 0]) for b in seen]
    assert own.drafts[0] == other.drafts[0] and prefix[0] != prefix[1]


# ---- stored and loaded -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_stored_as_a_plain_language_model(stored, trained):
    folder, record = stored
    assert json.loads((folder / "training.json").read_text()) == json.loads(json.dumps(record))
    assert {row["stage"] for row in record["curves"]} == {"text", "read"}
    assert record["recipe"]["read_steps"] == SHORT.read_steps
    for shown in ("intact", "shuffled"):
        assert set(record["accuracy_pct"][shown]) == {*TASKS, "other"}
    assert record["accuracy_pct"]["intact"] != record["accuracy_pct"]["shuffled"]
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.float32
    ids = processor().tokenizer("USER: it is indoors.", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, trained.model(input_ids=ids).logits)


@pytest.mark.slow
def test_the_library_finds_the_same_tokenizer_for_it(stored):
    model = load_model(params(stored[0]))
    rng = np.random.default_rng(0)
    texts = [caption(sample_scene(rng), rng) for _ in range(20)]
    texts.append(TEXT_PROMPT.format(caption=texts[0], question="Is the cup triangular?"))
    for text in texts:
        assert model.tokenizer(text).input_ids == processor().tokenizer(text).input_ids
    assert model.processor is None and model.n_layers == 2


@pytest.mark.slow
def test_the_prompt_of_a_sample_is_the_one_it_was_trained_on(stored):
    scene, rng = sample_scene(np.random.default_rng(0)), np.random.default_rng(3)
    batch = pack(processor().tokenizer, [scene], rng, n_questions=6, n_image_tokens=None)
    draft, prefix = batch.drafts[0][0], batch.segment[0] == 0
    told = processor().tokenizer.decode(batch.ids[0, prefix]).split("USER: ")[1]
    sample = Sample(
        sample_id="1",
        image_id="1",
        image=stored[0] / "none.png",
        question=draft.text,
        answer=draft.answer,
        task="ChooseAttr",
        structural="choose",
        semantic="attr",
        detailed=draft.detailed,
        caption=told,
    )
    model = load_model(params(stored[0]))
    ids = encode(model, sample).inputs["input_ids"][0]
    trained_on = batch.ids[0, prefix | ((batch.segment[0] == 1) & (batch.answer[0] == 0))][:-1]  # but </s>
    assert ids.tolist() == trained_on.tolist()
    other = encode(model, replace(sample, caption=told.replace("it is", "it was"))).inputs["input_ids"][0]
    assert other.tolist() != trained_on.tolist()


# ---- captions --------------------------------------------------------------------------------------------


def regions(*entries):
    return json.dumps([{"id": key, "regions": [{"phrase": p} for p in phrases]} for key, phrases in entries])


def sample(image_id="7", **changes):
    fields = dict(sample_id="1", image_id=image_id, image=ROOT / "none.png", question="Is it red?", answer="yes")
    return Sample(**fields, task=None, structural="verify", semantic="attr", detailed="verifyAttr", **changes)


def test_phrases_become_sentences_as_in_the_authors_files(tmp_path):
    # Phrases have white space and full stops of their own; ids are numbers in Visual Genome, texts in GQA.
    path = tmp_path / "region_descriptions.json"
    path.write_text(regions((8, ["A hat"]), (7, ["Red plaid blanket ", "a jar of honey.", "  ", "it's 3.5 m"])))
    (found,) = add_captions([sample()], path)
    assert found.caption == "red plaid blanket. a jar of honey. it's 3.5 m."


def test_the_layout_of_visual_genomes_documentation_is_read_too(tmp_path):
    path = tmp_path / "region_descriptions.json"
    path.write_text('[{"image_id": 7, "regions": [{"region_id": 1, "x": 2.5, "phrase": "a cat."}]}]')
    assert [s.caption for s in add_captions([sample()], path)] == ["a cat."]


def test_a_caption_that_is_there_stays_and_a_picture_without_one_has_none(tmp_path):
    path = tmp_path / "region_descriptions.json"
    path.write_text(regions((7, ["a hat"]), (9, [])))
    asked = [sample("7"), sample("7", caption="of the authors."), sample("8"), sample("9")]
    assert [s.caption for s in add_captions(asked, path)] == ["a hat.", "of the authors.", None, None]
    assert add_captions(asked[1:2], tmp_path / "nowhere.json") == asked[1:2]  # nothing is wanted of it


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't read the captions file region_descriptions.json of Visual Genome .*: put it there"),
        (regions((7, ["a hat"]))[:-9], "isn't whole JSON"),
        (b"[\xff", "isn't whole JSON"),
        (regions((8, ["a hat"])), "describes none of the 1 pictures"),
        ('{"7": ["a hat"]}', "describes none of the 1 pictures"),
        ('[{"image": 7}]', "entry 0: expected an id and regions"),
        ('[{"id": 8}, {"id": 7, "regions": [{"words": "a hat"}]}]', "entry 1: expected an id and regions"),
        ('[{"id": 7, "regions": [{"phrase": 3}]}]', "entry 0"),
        ('[{"id": 7, "regions": 3}]', "entry 0"),
        ("[7]", "entry 0"),
    ],
)
def test_a_file_that_is_not_visual_genomes_says_so_in_one_sentence(tmp_path, content, said):
    path = tmp_path / "region_descriptions.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as caught:
        add_captions([sample()], path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_only_model_gets_its_captions_with_the_questions_and_no_other_does():
    here = Params(prompt=TEXT_PROMPT)
    told, _ = read_questions(here, tasks=["QueryAttr"])
    seen, _ = read_questions(Params(), tasks=["QueryAttr"])
    assert [s.sample_id for s in told] == [s.sample_id for s in seen]
    assert {s.caption for s in seen} == {None}
    for s in told[:40]:  # all that is asked of the drawn world stands in its captions
        (thing,) = s.objects
        assert re.search(rf" {thing.name} made of \w+ on the {s.answer} side\.", s.caption)
    assert set(manifest(here)["depends_on"]) == set(manifest(Params())["depends_on"])
    assert manifest(here)["depends_on"]["data_sha256"] != manifest(Params())["depends_on"]["data_sha256"]


# ---- flows -----------------------------------------------------------------------------------------------


def test_captions_flow_to_the_question_and_to_the_last_position(tmp_path):
    """Both engines agree, and the ends of a chain of layers are where they must be."""
    model = tiny_vlm("llama", prompt="USER: {caption}\n{question} ASSISTANT:")
    flows = (*CAPTIONS_TO_LAST, Flow(source="captions", target="question"))
    result = knockout_sweep(model, [tiny_sample(tmp_path)], flows, window=1, n_check=1, progress=False)
    assert result.max_check_diff < 1e-5 and result.skipped == []
    frame = result.frame
    changed = frame.assign(changed=frame.rel_change_pct.abs() > 1e-3).pivot(
        index="flow", columns="layer", values="changed"
    )
    assert changed.loc["Captions -> Last"].all() and changed.loc["Question -> Last"].all()
    # What the question takes up in the last layer reaches nobody any more.
    assert changed.loc["Captions -> Question"].tolist() == [True, True, True, False]


def test_a_picture_flows_nowhere_in_a_text_only_model(tmp_path):
    model = tiny_vlm("llama", prompt="USER: {caption}\n{question} ASSISTANT:")
    result = knockout_sweep(model, [tiny_sample(tmp_path)], FLOW_TO_LAST, window=1, progress=False)
    assert "Image -> Last" not in set(result.frame.flow)
    assert [note["reason"] for note in result.skipped] == ["image: the prompt shows no picture"]
