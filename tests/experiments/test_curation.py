"""Only correctly answered samples are kept, always the same ones, and what is left out has its reason."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_sample, tiny_vlm

from miniature.dataset import write_split
from mmflow_utils.data.sample import Sample
from mmflow_utils.engine.reference import run_reference
from mmflow_utils.experiments import curation
from mmflow_utils.experiments.curation import (
    answer,
    ask_questions,
    curate,
    load_samples,
    read_questions,
    stratified_sample,
)
from mmflow_utils.params import Params
from mmflow_utils.prompts.encoding import encode
from mmflow_utils.prompts.flows import Variant
from mmflow_utils.results.frames import differences, load_frame, manifest
from mmflow_utils.results.resume import measure_in_parts

TASKS = ["ChooseAttr", "QueryAttr"]


@cache
def model():
    return tiny_vlm(n_layers=2)


def a_sample(number, **fields):
    given = dict(sample_id=f"q{number:03d}", image_id=f"i{number // 2}", image=Path("none.png"))
    given |= dict(question="Is it red or blue?", answer="red", task="ChooseAttr")
    return Sample(**given | dict(structural="choose", semantic="attr", detailed="chooseAttr") | fields)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gqa")
    write_split(folder, n_scenes=8, seed=1)
    return folder


@pytest.fixture
def params(split, tmp_path):
    return Params(
        model="tiny",
        checkpoint=str(tmp_path / "no-weights"),
        questions=str(split / "val_balanced_questions.json"),
        scene_graphs=str(split / "val_sceneGraphs.json"),
        images=str(split / "images"),
        tasks=TASKS,
        n_samples=3,
        outputs=str(tmp_path / "outputs"),
    )


@pytest.fixture
def asked(monkeypatch):
    """Let the model answer every second question (by its id) as labeled; note which were asked."""
    heard = []

    def knows(model, prompts, prefix):
        samples = [encoded.sample for encoded in prompts]
        heard.extend(sample.sample_id for sample in samples)
        return [sample.answer.capitalize() if int(sample.sample_id) % 2 else "Nonsense" for sample in samples]

    monkeypatch.setattr(curation, "_ask", knows)
    return heard


# ---- the order -----------------------------------------------------------------------------------------


def test_a_draw_depends_neither_on_its_size_nor_on_other_kinds():
    reds, blues = ([a_sample(100 * k + i, task=t) for i in range(9)] for k, t in enumerate(TASKS))
    by = dict(seed=0, by=lambda s: s.task)
    every = stratified_sample(reds + blues, n=None, **by)
    assert {s.sample_id for s in every} == {s.sample_id for s in reds + blues}
    for n in (1, 4, 9, 20):
        assert stratified_sample(reds + blues, n=n, **by) == every[:9][:n] + every[9:][:n]
        assert stratified_sample(reds, n=n, **by) == every[:9][:n]
        assert stratified_sample(blues, n=n, **by) == every[9:][:n]
    assert stratified_sample(reversed(reds + blues), n=None, **by) == every  # nor on the file's order
    assert stratified_sample(reds, n=None, seed=1, by=lambda s: s.task) != every[:9] != reds


# ---- answers -------------------------------------------------------------------------------------------


def test_the_answer_is_the_greedy_one(tmp_path):
    encoded = encode(model(), tiny_sample(tmp_path))
    inputs = dict(encoded.inputs)
    tokens = []
    for _ in range(3):
        with torch.inference_mode():
            token = model().hf(**inputs).logits[0, -1].argmax()
        tokens.append(int(token))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token.view(1, 1)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model().tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert answer(model(), encoded, max_new_tokens=3) == expected != ""


def test_a_record_has_every_question_and_every_reason(params, asked, split, tmp_path):
    samples, _ = read_questions(params, tasks=TASKS)
    right = next(s for s in samples if int(s.sample_id) % 2)
    wrong = next(s for s in samples if int(s.sample_id) % 2 == 0)
    cut_short = tmp_path / "cut.png"
    cut_short.write_bytes(right.image.read_bytes()[:200])
    gone = replace(right, sample_id="1", image=tmp_path / "gone.png")
    record = ask_questions(model(), iter([right, wrong, gone, replace(gone, image=cut_short)]), progress=False)
    assert record.correct.tolist() == [True, False, False, False]
    assert record.prediction.tolist()[:2] == [right.answer.capitalize(), "Nonsense"]
    assert record.prediction.isna().tolist() == [False, False, True, True]
    assert pd.isna(record.reason[0]) and "Nonsense" in record.reason[1]
    assert "gone.png" in record.reason[2] and "cut.png" in record.reason[3]
    assert record.structural[0] == right.structural and record.task[0] == right.task


def test_without_scene_graphs_the_sets_that_need_boxes_are_missing_with_their_reason(params, split):
    samples, left_out = read_questions(without := params.model_copy(update={"scene_graphs": None}))
    with_boxes, _ = read_questions(params)
    assert [s.sample_id for s in samples] == [s.sample_id for s in with_boxes] and left_out.empty
    assert {thing.box for sample in samples for thing in sample.objects} == {None}
    positions = encode(model(), samples[0]).positions
    assert "image" in positions and "objects" in positions
    for name in ("image_related", "image_other"):
        with pytest.raises(KeyError, match="no object of the question has a box in the picture"):
            positions[name]
    made = [manifest(some)["depends_on"] for some in (params, without)]
    assert made[0]["data_sha256"] != made[1]["data_sha256"] is not None
    captioned, _ = read_questions(without.model_copy(update={"prompt": "{caption}\n{question}"}))
    assert all(sample.caption for sample in captioned)


# ---- curation ------------------------------------------------------------------------------------------


def test_curation_stops_when_it_has_enough(params, asked):
    samples, _ = read_questions(params, tasks=TASKS)
    kept, record = curate(model(), iter(samples), tasks=TASKS, n_samples=3, seed=0)
    assert [s.task for s in kept] == [task for task in TASKS for _ in range(3)]
    assert sorted(record.sample_id) == sorted(asked) and len(set(asked)) == len(asked)
    assert record[record.correct].sample_id.tolist() == [s.sample_id for s in kept]
    for task in TASKS:
        mine = record[record.task == task]
        assert mine.correct.sum() == 3 and mine.correct.iloc[-1]  # not one question more than needed
        order = [s.sample_id for s in stratified_sample(samples, n=None, seed=0, by=lambda s: s.task) if s.task == task]
        assert mine.sample_id.tolist() == order[: len(mine)]


def test_curation_gives_what_there_is_where_there_is_too_little(params, asked):
    samples, _ = read_questions(params, tasks=TASKS)
    kept, record = curate(model(), samples, tasks=TASKS[:1], n_samples=10_000, seed=0)
    mine = [s for s in samples if s.task == TASKS[0]]
    assert len(record) == len(mine) and len(kept) == sum(int(s.sample_id) % 2 for s in mine)


def test_unusable_pictures_are_rows_with_a_reason(params, asked):
    samples, _ = read_questions(params, tasks=TASKS)
    broken = samples[0].image_id
    samples = [replace(s, image=Path("nowhere.png")) if s.image_id == broken else s for s in samples]
    kept, record = curate(model(), samples, tasks=TASKS, n_samples=10_000, seed=0)
    mine = record[record.image_id == broken]
    assert len(mine) and mine.prediction.isna().all() and mine.reason.str.contains("nowhere.png").all()
    assert broken not in {s.image_id for s in kept} and len(kept)


def test_every_notebook_reads_the_same_samples(params, asked):
    first = load_samples(model(), params)
    n_asked = len(asked)
    assert load_samples(model(), params) == first
    assert load_samples(model(), params, TASKS[1]) == [s for s in first if s.task == TASKS[1]]
    # What can't change an answer doesn't lead to asking again.
    assert load_samples(model(), params.model_copy(update=dict(window=1, n_boot=100))) == first
    assert len(asked) == n_asked
    record = pd.read_parquet(params.folder / "samples" / f"{TASKS[0]}_asked.parquet")
    assert record.correct.sum() == 3
    assert record.loc[~record.correct, "reason"].str.contains("Nonsense").all()


def test_samples_are_found_again_where_the_pictures_lie_now(params, asked, tmp_path):
    first, n_asked = load_samples(model(), params), len(asked)
    moved = tmp_path / "pictures"
    moved.mkdir()
    for sample in first:
        (moved / sample.image.name).write_bytes(sample.image.read_bytes())
    again = load_samples(model(), params.model_copy(update={"images": str(moved)}))
    assert again == [replace(sample, image=moved / sample.image.name) for sample in first] and len(asked) == n_asked
    nowhere = load_samples(model(), params.model_copy(update={"images": str(tmp_path / "nowhere")}))
    assert nowhere == first


def test_fresh_chooses_anew_and_leaves_another_runs_answers(params, asked, monkeypatch):
    other = params.folder / "samples" / "00000000" / "asked" / "asked_0.parquet"
    other.parent.mkdir(parents=True)
    other.write_text("of a run that asks right now")
    first, n_asked = load_samples(model(), params), len(asked)
    assert other.is_file() and [file.name for file in other.parents[2].iterdir() if file.is_dir()] == ["00000000"]
    monkeypatch.setenv("FRESH", "1")
    assert load_samples(model(), params) == first and len(asked) == n_asked  # a notebook that reads them
    assert load_samples(model(), params, fresh=None) == first and len(asked) == 2 * n_asked  # the one that makes them


def test_a_task_can_come_first_and_the_rest_later(params, asked):
    one = load_samples(model(), params, TASKS[1])
    both = load_samples(model(), params)
    assert [s for s in both if s.task == TASKS[1]] == one and len(both) == 6
    assert len(set(asked)) == len(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        *(dict(n_samples=4), dict(seed=1), dict(prompt="<image>{question}"), dict(do_pad=False)),
        *(dict(checkpoint="another"), dict(language_model="another")),
    ],
)
def test_other_parameters_curate_anew(params, asked, change):
    before = load_samples(model(), params)
    n_asked = len(asked)
    after = load_samples(model(), params.model_copy(update=change))
    assert len(asked) > n_asked
    if "n_samples" in change:
        for task in TASKS:  # a larger set begins with the smaller one
            small, large = ([s for s in some if s.task == task] for some in (before, after))
            assert (len(small), len(large)) == (3, 4) and large[:3] == small
    n_asked = len(asked)
    assert load_samples(model(), params) == before and len(asked) == n_asked  # the first ones were kept


@pytest.mark.slow
@pytest.mark.parametrize("n_before", [1, 3, 5])
def test_a_killed_curation_asks_on_where_it_stopped(params, asked, monkeypatch, n_before):
    expected, whole = load_samples(model(), params), asked.copy()
    record = load_frame(params.folder / "samples" / f"{TASKS[0]}_asked.parquet")
    again = params.model_copy(update={"outputs": f"{params.outputs}-again"})
    asked.clear()

    def parts_of_one(*arguments, **options):
        return measure_in_parts(*arguments, **options, part_size=1)

    def killed(model, prompts, prefix, knows=curation._ask):
        if len(asked) == n_before:
            raise KeyboardInterrupt
        return knows(model, prompts, prefix)

    monkeypatch.setattr(curation, "measure_in_parts", parts_of_one)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(curation, "_ask", killed)
        load_samples(model(), again)
    assert load_samples(model(), again) == expected and asked == whole  # each once, in the same order
    assert load_frame(again.folder / "samples" / f"{TASKS[0]}_asked.parquet").equals(record)
    assert not [path for path in (again.folder / "samples").iterdir() if path.is_dir()]
    load_samples(model(), again.model_copy(update={"shard": "2/2", "outputs": f"{params.outputs}-shard"}))
    assert asked == whole * 2  # a share of a sweep needs all of its samples


def test_only_samples_that_need_the_picture_are_kept_where_that_is_asked(params, asked, monkeypatch):
    every = load_samples(model(), params)
    needs = params.model_copy(update={"needs_picture": True})
    monkeypatch.setattr(curation, "needs_picture", lambda model, encoded, _: int(encoded.sample.sample_id) % 3 == 0)
    some = load_samples(model(), needs)
    assert {s.task for s in some} == set(TASKS) and some != every
    assert all(int(s.sample_id) % 3 == 0 for s in some)
    folder = params.folder / "samples"
    record = load_frame(folder / f"{TASKS[0]}_asked.parquet", manifest(needs, model(), fields=curation.DEPENDS_ON))
    assert list(record) == [*curation.COLUMNS, "answered_without_picture"]
    assert record.answered_without_picture.isna().equals(~record.correct)
    kept = record[record.correct & record.answered_without_picture.eq(False)]
    assert kept.sample_id.tolist() == [s.sample_id for s in some if s.task == TASKS[0]]
    n_asked = len(asked)
    assert load_samples(model(), params) == every and load_samples(model(), needs) == some
    assert len(asked) == n_asked  # both are kept
    monkeypatch.setattr(curation, "needs_picture", lambda *_: False)
    with pytest.raises(ValueError, match="correctly, and needs the picture for it: leave"):
        load_samples(model(), needs.model_copy(update={"seed": 5}))


def test_a_parameter_that_came_later_leaves_earlier_results_what_they_were(params):
    needs = params.model_copy(update={"needs_picture": True})
    before, after = manifest(params)["depends_on"], manifest(needs)["depends_on"]
    assert "needs_picture" not in before and after == before | {"needs_picture": True}
    for a, b in ((params, needs), (needs, params)):
        assert differences(manifest(a), manifest(b)) and not differences(manifest(a), manifest(a))


def test_the_picture_is_needed_where_the_answer_changes_without_it(split, params):
    samples, _ = read_questions(params, tasks=TASKS)
    vlm = model()
    for sample in samples[:4]:
        encoded = encode(vlm, sample)
        image, after = (encoded.positions[name] for name in ("image", "after_image"))
        run = run_reference(vlm, encoded, [Variant(layers=range(vlm.n_layers), source=image, target=after)])
        first, second = run.variants[0].softmax(-1).topk(2).values
        stays = run.base.argmax() == run.variants[0].argmax() and bool(first - second > 1e-4)
        assert curation.needs_picture(vlm, encoded) == (not stays)
    record = ask_questions(vlm, samples[:4], without_picture=True, progress=False)
    assert list(record)[-1] == "answered_without_picture" and len(record) == 4
    with pytest.raises(ValueError, match="shows no picture"):
        curation.needs_picture(
            tiny_vlm("llama", prompt="{question}"), encode(tiny_vlm("llama", prompt="{question}"), samples[0])
        )


def test_another_file_of_questions_curates_anew(params, asked, tmp_path):
    before = load_samples(model(), params)
    entries = json.loads(params.path("questions").read_text())
    fewer = tmp_path / "questions.json"
    gone = before[0].sample_id
    fewer.write_text(json.dumps({key: entry for key, entry in entries.items() if key != gone}))
    after = load_samples(model(), params.model_copy(update=dict(questions=str(fewer))))
    assert gone not in {s.sample_id for s in after} and len(after) == len(before)


def test_a_task_without_a_correct_answer_says_so(params, monkeypatch):
    monkeypatch.setattr(curation, "_ask", lambda model, prompts, prefix: ["Nonsense"] * len(prompts))
    for _ in range(2):  # from the model, and from what was kept
        with pytest.raises(ValueError, match="tiny answers none of the ChooseAttr questions .* notebook 01"):
            load_samples(model(), params)
    record = pd.read_parquet(params.folder / "samples" / "ChooseAttr_asked.parquet")
    assert len(record) and not record.correct.any() and record.reason.notna().all()


def test_the_seed_alone_decides_the_order():
    some = [a_sample(i) for i in range(30)]
    np.random.seed(1)
    first = stratified_sample(some, n=10, seed=3, by=lambda s: s.task)
    np.random.seed(2)
    assert stratified_sample(some, n=10, seed=3, by=lambda s: s.task) == first
