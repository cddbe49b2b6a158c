"""The one schema of parameters, as YAML, papermill and a notebook opened by hand meet it."""

import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

from mmflow_utils import params as module
from mmflow_utils.data.tasks import TASKS
from mmflow_utils.params import ROOT, Params

FILES = sorted((ROOT / "params").glob("*.yaml"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"windw": 9}, "Unknown parameter windw = 9: did you mean window?"),
        ({"n_samples": "24"}, "n_samples = '24'.*valid integer"),
        ({"n_samples": True}, "n_samples = True.*valid integer"),
        ({"n_samples": 0}, "n_samples = 0.*greater than or equal to 1"),
        ({"n_samples": 100_001}, "n_samples = 100001.*less than or equal to 100000"),
        ({"window": 2.5}, "window = 2.5.*integer"),
        ({"seed": -1}, "seed = -1"),
        ({"dtype": "fp16"}, "dtype = 'fp16'.*'float32', 'bfloat16', 'float16', 'int8' or 'nf4'"),
        ({"device": "gpu"}, "device = 'gpu'.*cuda:N"),
        ({"tasks": []}, r"tasks = \[\].*at least 1"),
        ({"tasks": "ChooseAttr"}, "tasks = 'ChooseAttr'.*list"),
        ({"tasks": ["ChooseAtr"]}, "tasks = 'ChooseAtr'.*'ChooseAttr'"),
        ({"tasks": ["ChooseRel", "ChooseRel"]}, "each task once"),
        ({"prompt": "{question}"}, "once <image> or, for a text-only model, {caption}"),
        ({"prompt": "<image> {caption} {question}"}, "once <image> or"),
        ({"prompt": "{caption}{caption} {question}"}, "once <image> or"),
        ({"prompt": "<image><image> {question}"}, "once <image> or"),
        ({"prompt": "<image>"}, "expected {question} once"),
        ({"prompt": "<image> {question} {question}"}, "expected {question} once"),
        ({"model": "../mini"}, "model = '../mini'"),
    ],
)
def test_a_wrong_parameter_is_named_in_one_line(values, said):
    with pytest.raises(ValueError, match=said) as caught:
        Params(**values)
    assert "\n" not in str(caught.value)


def test_several_wrong_parameters_are_all_named():
    with pytest.raises(ValueError, match=r"(?s)dtype = 'half'.*window = 0"):
        Params(dtype="half", window=0)


@pytest.mark.parametrize("prompt", ["{question} <image>", "{caption} {question}"])
def test_a_prompt_shows_a_picture_or_its_captions(prompt):
    assert Params(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("window", [1, 2, 9, 1000])
def test_values_at_the_edge_are_taken(window):
    assert Params(window=window, n_samples=100_000).window == window


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_parameter_file_is_valid_complete_and_named_after_its_model(file):
    assert Params.from_yaml(file).model == file.stem
    assert list(yaml.safe_load(file.read_text())) == list(Params.model_fields)


def test_mini_yaml_says_what_a_notebook_opened_by_hand_does():
    assert Params.from_yaml(ROOT / "params" / "mini.yaml") == Params()


def test_overrides_win_over_the_file():
    assert Params.from_yaml(ROOT / "params" / "mini.yaml", seed=7).seed == 7


@pytest.mark.parametrize("text", ["- a\n", "", "a: [1\n"])
def test_a_file_that_holds_no_parameters_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match="p.yaml"):
        Params.from_yaml(tmp_path / "p.yaml")


def test_a_missing_file_names_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="mini"):
        Params.from_yaml(tmp_path / "minni.yaml")


def test_the_samples_module_knows_the_same_tasks():
    assert list(TASKS) == list(typing.get_args(module.Task))
    assert set(module.TASKS) <= set(TASKS)  # the paper's six, whatever else there is


def test_paths_start_at_the_project_not_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Params().path("images") == ROOT / "assets" / "miniature" / "images"
    assert Params(outputs=str(tmp_path)).folder == tmp_path / "mini"
    assert Path(ROOT, "pyproject.toml").is_file()


def test_the_environment_may_name_where_results_go_by_default(tmp_path):
    ask = "from mmflow_utils.params import Params as P; print(P().folder); print(P(outputs='here').folder)"
    said = {}
    for name, variables in {"unset": {}, "set": {"MMFLOW_OUTPUTS": str(tmp_path)}}.items():
        env = {k: v for k, v in os.environ.items() if k != "MMFLOW_OUTPUTS"} | variables
        command = [sys.executable, "-c", ask]
        said[name] = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert said["unset"] == [str(ROOT / "outputs" / "mini"), str(ROOT / "here" / "mini")]
    assert said["set"] == [str(tmp_path / "mini"), str(ROOT / "here" / "mini")]  # what is named wins


# What IPython's `In` holds when the validating cell runs: a notebook, then papermill's cell, then this cell.
IMPORTS = "import mmflow_utils as mm"
DECLARED = 'model: str = "mini"  # which\nthreshold: float = 0.5  # probability'
CALL = "params = mm.Params.from_notebook(globals(), {'threshold': float})"


def notebook(*injected: str, **values):
    return {"In": ["", IMPORTS, DECLARED, *injected, CALL], "model": "mini", "threshold": 0.5} | values


def test_a_notebook_gets_the_shared_parameters_and_its_own():
    params = Params.from_notebook(notebook("# Parameters\nthreshold = 0.25", threshold=0.25), {"threshold": float})
    assert (params.model, params.threshold, params.window) == ("mini", 0.25, Params().window)
    assert isinstance(params, Params)


def test_a_name_that_only_papermill_knows_stops_the_notebook():
    with pytest.raises(ValueError, match="treshold = 0.25: did you mean threshold"):
        Params.from_notebook(notebook("# Parameters\ntreshold = 0.25", treshold=0.25), {"threshold": float})


def test_an_own_parameter_that_was_not_declared_stops_the_notebook():
    with pytest.raises(ValueError, match="threshold = 0.5"):
        Params.from_notebook(notebook())


def test_a_number_that_yaml_took_for_text_is_explained():
    with pytest.raises(ValueError, match=r"threshold = '1e-4'.*1\.0e-4"):
        Params.from_notebook(notebook(threshold="1e-4"), {"threshold": float})


def test_an_own_parameter_without_a_value_is_missing():
    with pytest.raises(ValueError, match="threshold is missing"):
        Params.from_notebook({"In": [CALL]}, {"threshold": float})


def test_running_the_validating_cell_again_later_is_no_error():
    namespace = notebook("frame = mm.sweep()", "title = 'a figure'\nfigure = mm.plot(frame)", frame=1, title="a figure")
    namespace["In"].insert(3, CALL)
    assert Params.from_notebook(namespace, {"threshold": float}).model == "mini"


def test_outside_a_notebook_only_the_values_are_judged():
    with pytest.raises(ValueError, match="seed = 'x'"):
        Params.from_notebook({"seed": "x"})
