"""The graph of the notebooks: which a model is asked follows from its file, and never from its name."""

import subprocess
import sys

import pandas as pd
import pytest

import conftest
import mmflow_utils as mm
from mmflow_utils.models import sources
from mmflow_utils.params import ROOT
from workflow import graph
from workflow.download import DATA
from workflow.graph import describe_left_out, folder_of, left_out, main, notebooks_of, reads, stages

MODELS = sorted(file.stem for file in (ROOT / "params").glob("*.yaml"))


def numbers(model):
    return [name[:2] for name in notebooks_of(model)]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the real notebooks and weights; a call writes a parameter file, one of the real ones changed."""
    for folder in ("notebooks", "assets"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "params").mkdir()
    for model in MODELS:
        (tmp_path / "params" / f"{model}.yaml").write_text((ROOT / "params" / f"{model}.yaml").read_text())
    monkeypatch.setattr(graph, "ROOT", tmp_path)
    graph.read_params.cache_clear()

    def like(model, name, /, **changes):
        lines = (ROOT / "params" / f"{model}.yaml").read_text()
        changes = {"model": name} | changes
        lines = "".join(f"{line}\n" for line in lines.splitlines() if line.split(":")[0] not in changes)
        lines += "".join(f"{key}: {value}\n" for key, value in changes.items())
        (tmp_path / "params" / f"{name}.yaml").write_text(lines)

    yield like
    graph.read_params.cache_clear()


def test_each_notebook_of_the_miniature_is_in_its_batch_after_those_it_reads():
    batch = notebooks_of("mini")
    others = {"91_train_llava"}
    assert {*batch} | others == {*graph.names()} and not others & {*batch} and batch[0] == "01_dataset_curation"
    for name in batch:
        assert set(reads(name)) <= set(batch[: batch.index(name)])
    assert [name[:2] for name in reads("11_unimodal_llm")] == ["01", "02", "03"]
    assert [name[:2] for name in reads("14_compare_models")] == ["02", "03", "04", "05", "06", "07", "16", "17"]
    assert reads("01_dataset_curation") == []


def test_what_can_run_at_once_reads_nothing_of_one_another():
    sets = stages(graph.names())
    assert sorted(name for some in sets for name in some) == graph.names()
    for n, some in enumerate(sets):
        earlier = {name for before in sets[:n] for name in before}
        assert all(set(reads(name)) <= earlier for name in some)


def test_what_measures_sample_by_sample_can_be_shared_among_runs():
    others = [name[:2] for name in graph.names() if not graph.in_parts(name)]
    assert others == ["00", graph.COMPARISON, "15", "90"]  # the tour of one sample, comparison, timings, training


def test_each_model_is_asked_what_it_can_be():
    everything = [name[:2] for name in notebooks_of("mini")]
    assert numbers("mini-next") == everything
    assert numbers("mini-text") == numbers("smollm2-captions") == numbers("vicuna-13b-v1.5") == ["01", "11"]
    assert numbers("planted") == [number for number in everything if number not in ("11", "12", "90")]
    assert sorted(numbers("llava-smollm2")) == sorted({*everything, "91"} - {"90"})
    for model in ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"):
        asked = [number for number in everything if number not in ("11", "18", "90")]
        assert [n for n in numbers(model) if n != "12"] == [n for n in asked if n != "12"]  # 12 takes more than GQA


def test_a_model_that_sees_photographs_is_asked_real_facts_where_they_are(project):
    fetched = [f"data/{a.to}/{a.members}".removesuffix("/*.jpg") for name in ("okvqa", "aokvqa") for a in DATA[name]]
    for file in sorted(fetched, key=lambda file: (not file.endswith(".json"), "aokvqa" in file, "annotations" in file)):
        said = f'there is no {file}: make data DATA="okvqa aokvqa", or run it by hand (docs/data.md)'
        assert left_out("llava-1.5-7b")["12_factual_tasks"] == said
        (graph.ROOT / file).mkdir(parents=True)
    assert "12" in numbers("llava-1.5-7b")
    given = graph.given_by_batch("12_factual_tasks", graph.read_params("llava-1.5-7b"))
    assert set(given) == {name for name in given if graph.own_parameter("12_factual_tasks", name)} and len(given) == 4
    assert graph.given_by_batch("12_factual_tasks", graph.read_params("mini")) == {}
    assert graph.given_by_batch("02_flow_to_last", graph.read_params("llava-1.5-7b")) == {}


@pytest.mark.parametrize(("name", "number"), [("07_efficiency_study", "n_asked"), ("09_last_subword", "n_long")])
def test_a_model_that_sees_photographs_answers_so_often_that_a_claim_of_no_difference_can_be_met(name, number):
    given = graph.given_by_batch(name, graph.read_params("llava-1.5-7b"))
    assert given.keys() == {number} and graph.given_by_batch(name, graph.read_params("mini")) == {}
    assert reach(given[number]) < 5 < reach(graph.own_parameter(name, number))


def reach(n):
    """How far from 0 the interval of n samples lies that differ in nothing (percentage points)."""
    alike = pd.DataFrame({"image_id": range(n), "layer": 0, "change": 0.0, "task": "t", "flow": "f"})
    return mm.summarize(alike, "change", simultaneous_over="layer", limits=(-100.0, 100.0)).ci_high.max()


def test_a_copied_file_that_still_names_the_other_model_is_refused(project, capsys):
    project("llava-1.5-7b", "my-llava", model="llava-1.5-7b")
    assert main(["my-llava"]) == 1
    said = "gives model: 'llava-1.5-7b': name the model as its file is named, model: my-llava.\n"
    assert capsys.readouterr().err == f"mmflow: params/my-llava.yaml {said}"


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ("mini", {"11", "18", "91"}),
        ("planted", {"11", "12", "18", "90", "91"}),
        ("llava-smollm2", {"11", "18", "90"}),
        ("llava-1.5-13b", {"11", "12", "18", "90", "91"}),
    ],
)
def test_another_name_changes_nothing_but_the_pair_that_names_it(project, model, missing):
    project(model, "nobody-knows-me")
    assert {name[:2] for name in left_out("nobody-knows-me")} == missing
    project("mini-text", "nobody-reads-me")
    assert numbers("nobody-reads-me") == ["01"]


def test_tasks_weights_and_pairs_decide(project):
    project("mini", "few", tasks="[ChooseAttr, ChooseRel]")
    assert "12" not in numbers("few")
    project("mini", "more", tasks="[ChooseAttr, QueryAttr]")
    assert "12" in numbers("more")
    project("mini", "elsewhere", checkpoint="someone/model")
    assert "90" not in numbers("elsewhere")
    assert "11" not in numbers("llava-1.5-13b")
    project("vicuna-13b-v1.5", "vicuna-13b-v1.5", checkpoint="assets/mini-text")
    graph.read_params.cache_clear()
    assert "11" in numbers("llava-1.5-13b")


def test_the_reasons_are_sentences(capsys):
    said = describe_left_out("planted")
    assert [line.split(", since ")[0] for line in said] == [
        "Not run for planted: 11_unimodal_llm",
        "Not run for planted: 12_factual_tasks",
        "Not run for planted: 90_train_miniature, 91_train_llava",
    ]
    assert describe_left_out("planted", but=["11_unimodal_llm"]) == said[1:]
    (text_only,) = describe_left_out("mini-text")
    assert "00_tour, 02_flow_to_last" in text_only and text_only.endswith("there is no picture to follow.")
    assert main(["planted", "--stages"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split()[0] == "notebooks/01_dataset_curation.ipynb"
    assert printed.err.splitlines() == [f"mmflow: {line}" for line in said]


def test_each_notebook_opens_with_the_model_that_it_is_about():
    for name in graph.names():
        other = {graph.AROUND: "llava-smollm2"}.get(name[:2], "mini")
        assert graph.opens_with(name) == (graph.SUBJECT if name.startswith(graph.OF_SUBJECT) else other)


def test_all_notebooks_can_be_listed(capsys):
    assert main(["--all"]) == 0
    printed = capsys.readouterr()
    assert sorted(printed.out.split()) == [f"notebooks/{name}.ipynb" for name in graph.names()] and not printed.err


@pytest.mark.parametrize("text", ["- a\n", "a: [", "just words\n"])
def test_a_file_that_holds_no_parameters_is_one_sentence(project, capsys, text):
    (graph.ROOT / "params" / "broken.yaml").write_text(text)
    for model in ("broken", "nope"):
        assert main([model]) == 1
        assert capsys.readouterr().err.startswith(
            ("mmflow: params/broken.yaml ", "mmflow: There is no params/nope.yaml")
        )


def test_results_lie_where_the_parameters_say(project, monkeypatch):
    monkeypatch.delenv("MMFLOW_OUTPUTS", raising=False)
    assert str(folder_of("mini")) == "outputs/mini"
    monkeypatch.setenv("MMFLOW_OUTPUTS", "/scratch")
    assert str(folder_of("mini")) == "/scratch/mini"
    project("mini", "there", outputs="there")
    assert str(folder_of("there")) == "there/there"


def test_it_needs_no_more_than_yaml():
    code = "import sys, workflow.graph; sys.exit(bool({'pydantic', 'pandas', 'nbformat', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_notebook_whose_model_cannot_be_had_is_skipped_with_the_reason(monkeypatch):
    def refuse(_):
        raise ValueError("no index here")

    monkeypatch.setattr(sources, "find_checkpoint", refuse)
    lacking = conftest._lacking.__wrapped__
    assert lacking("91_train_llava") == "no index here" and lacking("07_efficiency_study") == ""
