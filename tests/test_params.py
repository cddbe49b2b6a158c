"""The one schema of parameters, as YAML, papermill and a notebook opened by hand meet it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.reference import own_parameters
from mmflow_utils import params as params_module
from mmflow_utils.params import ROOT, Params, load_params, unknown_parameters

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
        ({"tasks": ["ChooseAtr"]}, "tasks = 'ChooseAtr'.*unknown task ChooseAtr: the tasks are ChooseAttr, "),
        ({"tasks": ["ChooseRel", "ChooseRel"]}, "each task once"),
        ({"prompt": "{question}"}, "once <image> or, for a text-only model, {caption}"),
        ({"prompt": "<image> {caption} {question}"}, "once <image> or"),
        ({"prompt": "{caption}{caption} {question}"}, "once <image> or"),
        ({"prompt": "<image><image> {question}"}, "once <image> or"),
        ({"prompt": "<image>"}, "expected {question} once"),
        ({"prompt": "<image> {question} {question}"}, "expected {question} once"),
        ({"model": "../mini"}, "model = '../mini'"),
        ({"device_map": "Auto"}, r"device_map = 'Auto': expected 'auto' \(auto spreads"),
        ({"shard": "9/8"}, r"shard = '9/8': expected one of 8 shares, 8/8 at most"),
        ({"shard": "0/8"}, r"shard = '0/8': should match"),
        ({"windows": [1, 3]}, r"Unknown parameter windows = \[1, 3\]: it belongs to 08_window_size alone: set it in "),
        ({"n_asked": 5}, "belongs to 07_efficiency_study, 11_unimodal_llm, 12_factual_tasks alone"),
    ],
)
def test_a_wrong_parameter_is_named_in_one_line(values, said):
    with pytest.raises(ValueError, match=said) as caught:
        Params(**values)
    assert "\n" not in str(caught.value)


def test_several_wrong_parameters_are_all_named():
    with pytest.raises(ValueError, match=r"(?s)dtype = 'half'.*window = 0"):
        Params(dtype="half", window=0)


@pytest.mark.parametrize("shard", ["1/1", "8/8", "2/10", "10/12"])
def test_a_share_is_one_of_those_that_there_are(shard):
    assert Params(shard=shard, device_map="auto").shard == shard


@pytest.mark.parametrize("prompt", ["{question} <image>", "{caption} {question}"])
def test_a_prompt_shows_a_picture_or_its_captions(prompt):
    assert Params(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("window", [1, 2, 9, 1000])
def test_values_at_the_edge_are_taken(window):
    assert Params(window=window, n_samples=100_000).window == window


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_parameter_file_is_valid_complete_and_named_after_its_model(file):
    assert Params.from_yaml(file).model == file.stem
    stated = list(yaml.safe_load(file.read_text()))
    assert stated == [name for name in Params.model_fields if name in stated]
    left_out = set(Params.model_fields) - set(stated)
    assert [name for name in left_out if Params.model_fields[name].default is not None] == []


def test_mini_yaml_says_what_the_schema_has_as_defaults():
    assert Params.from_yaml(ROOT / "params" / "mini.yaml") == Params()


def test_overrides_win_over_the_file():
    assert Params.from_yaml(ROOT / "params" / "mini.yaml", seed=7).seed == 7


@pytest.mark.parametrize("text", ["- a\n", "", "a: [1\n"])
def test_a_file_that_holds_no_parameters_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match="p.yaml"):
        Params.from_yaml(tmp_path / "p.yaml")


def test_a_missing_file_is_named_as_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"There is no parameter file {ROOT}/params/minni.yaml: did you mean mini"):
        Params.from_yaml("params/minni.yaml")
    with pytest.raises(ValueError, match=f"{tmp_path}/x.yaml: params/ holds .*mini, mini-after-text, mini-next, "):
        Params.from_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("model", ["model: mini\n", ""])
def test_a_file_of_params_bears_its_models_name_wherever_it_is_read(tmp_path, monkeypatch, model):
    monkeypatch.setattr(params_module, "ROOT", tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "copy.yaml").write_text(f"{model}window: 5\n")
    (tmp_path / "elsewhere.yaml").write_text(f"{model}window: 5\n")
    read = (
        lambda: Params.from_yaml("params/copy.yaml"),
        lambda: load_params({"model": "copy"}),
        lambda: load_params({"model": "params/copy.yaml"}),
    )
    for one in read:
        with pytest.raises(ValueError, match=r"params/copy.yaml gives model: .*named, model: copy\.$") as caught:
            one()
        assert "\n" not in str(caught.value)
    assert Params.from_yaml("elsewhere.yaml").window == 5


def test_a_files_path_starts_at_the_project_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Params.from_yaml("params/planted.yaml").model == "planted"


def test_paths_start_at_the_project_not_at_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Params().path("images") == ROOT / "assets" / "miniature" / "images"
    assert Params(outputs=str(tmp_path)).folder == tmp_path / "mini"
    assert Path(ROOT, "pyproject.toml").is_file()


def test_the_environment_may_name_where_results_go_by_default(tmp_path, monkeypatch):
    """It is asked each time: a kernel may be a fork of what had imported this in another environment."""
    here = ROOT / "here" / "mini"
    monkeypatch.delenv("MMFLOW_OUTPUTS", raising=False)
    assert [Params().folder, Params(outputs="here").folder] == [ROOT / "outputs" / "mini", here]
    monkeypatch.setenv("MMFLOW_OUTPUTS", str(tmp_path))
    assert [Params().folder, Params(outputs="here").folder] == [tmp_path / "mini", here]  # what is named wins


@pytest.mark.parametrize("written", ["~/here", "$HOME/here", "${HOME}/here"])
def test_a_path_may_begin_at_home(tmp_path, monkeypatch, written):
    monkeypatch.setenv("HOME", str(tmp_path))
    named = ("checkpoint", "questions", "images", "scene_graphs", "outputs")
    params = Params(**dict.fromkeys(named, written))
    assert {params.path(name) for name in named} == {tmp_path / "here"}
    (tmp_path / "here.yaml").write_text("window: 7\n")
    assert Params.from_yaml(f"{written}.yaml").window == 7


@pytest.mark.parametrize("written", ["~/here", "$HOME/here"])
def test_weights_are_looked_for_at_home(tmp_path, monkeypatch, written):
    from mmflow_utils.models.sources import find_checkpoint

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=f"a model in the folder {tmp_path}/here, but it has no "):
        find_checkpoint(written)


def test_the_environment_may_name_a_place_at_home(tmp_path):
    env = os.environ | {"HOME": str(tmp_path), "MMFLOW_OUTPUTS": "~/runs"}
    ask = "from mmflow_utils.params import Params as P; from workflow.graph import folder_of"
    command = [sys.executable, "-c", f"{ask}; print(P().folder, folder_of('mini'))"]
    said = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(tmp_path / "runs" / "mini")] * 2


def test_scene_graphs_may_be_missing():
    assert Params(scene_graphs=None).scene_graphs is None


# What IPython's `In` holds when the validating cell runs: a notebook, then papermill's cell, then this cell.
IMPORTS = "import mmflow_utils as mm"
DECLARED = 'model: str = "mini"  # which\nthreshold: float = 0.5  # probability'
CALL = "params = mm.load_params(globals(), {'threshold': float})"
OWN = {"threshold": float}


def notebook(*injected: str, declared=DECLARED, **values):
    """What `globals()` holds; values are those that cells computed."""
    return {"In": ["", IMPORTS, declared, *injected, CALL]} | values


def load(*injected: str, **more):
    return load_params(notebook(*injected, **more), OWN)


def test_a_notebook_gets_the_parameters_of_its_model_and_its_own():
    params = load()
    assert params.model_dump() == Params().model_dump() | {"threshold": 0.5}
    assert isinstance(params, Params)


def test_what_is_injected_wins_over_the_cell_and_the_cell_over_the_models_file():
    params = load(
        "# Parameters\nmodel = 'llava-1.5-7b'\nn_samples = 100\nthreshold = 0.25",
        declared=f"{DECLARED}\nn_samples = 5\nwindow = 1",
    )
    file = Params.from_yaml("params/llava-1.5-7b.yaml", n_samples=100, window=1)
    assert params.model_dump() == file.model_dump() | {"threshold": 0.25}


def test_a_cell_added_by_hand_is_as_one_of_papermills():
    assert load("# Parameters\nn_samples = 7", "n_samples: int = 5  # fewer\nseed = 1").n_samples == 5


def test_what_a_parameter_was_computed_from_does_not_matter():
    declared = f"{DECLARED}\nwindow = n_samples = 2 * 3\nseed, n_boot = 1, 100\nn_boot += 50"
    params = load(declared=declared, window=6, n_samples=6, seed=1, n_boot=150)
    assert (params.window, params.n_samples, params.seed, params.n_boot) == (6, 6, 1, 150)


def test_numbers_that_papermill_writes_as_calls_are_judged_too():
    cell = "# Parameters\nn_samples = 5\nwindow = float('inf')"
    with pytest.raises(ValueError, match="window = inf: expected a valid integer"):
        load(cell, n_samples=5, window=float("inf"))


@pytest.mark.parametrize("name", ["n_sample", "nsamples"])
def test_an_unknown_name_stops_the_notebook_however_it_came(tmp_path, name):
    (tmp_path / "own.yaml").write_text(f"{name}: 5\n")
    for namespace in (
        notebook(f"# Parameters\n{name} = 5"),
        notebook(declared=f"{DECLARED}\n{name} = 5"),
        notebook(f"# Parameters\nmodel = '{tmp_path}/own.yaml'"),
    ):
        with pytest.raises(ValueError, match=f"Unknown parameter {name} = 5: did you mean n_samples") as caught:
            load_params(namespace, OWN)
        assert "\n" not in str(caught.value)


def test_the_name_that_an_own_parameter_is_near_to_is_told():
    with pytest.raises(ValueError, match="treshold = 0.25: did you mean threshold"):
        load("# Parameters\ntreshold = 0.25")


def test_an_own_parameter_that_was_not_announced_stops_the_notebook():
    with pytest.raises(ValueError, match="threshold = 0.5"):
        load_params(notebook())


def test_an_own_parameter_without_a_value_is_missing():
    with pytest.raises(ValueError, match="threshold is missing"):
        load(declared='model: str = "mini"')


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("threshold = '1e-4'", r"threshold = '1e-4'.*as in 1\.0e-4"),
        ("tasks = 'X'", r"tasks = 'X'.*list .*write -y 'tasks: \[X\]'"),
        ("tasks = '[X, Y]'", r"tasks = '.*list .*write -y 'tasks: \[X, Y\]'"),
        ("do_pad = 'false'", "do_pad = 'false'.*boolean .*write -y 'do_pad: false'"),
        ("n_samples = '24'", "n_samples = '24'.*integer .*write -y 'n_samples: 24'"),
        ("revision = 1234567", "revision = 1234567.*string .*with -r revision 1234567"),
        ("model = 'mini'\ncheckpoint = 1.5", "checkpoint = 1.5.*string .*with -r checkpoint 1.5"),
        ("model = 7", "model = 7: expected a valid string .*with -r model 7"),
        ("n_samples = 'many'", r"n_samples = 'many': expected a valid integer \(correctly answered .*task\)$"),
    ],
)
def test_what_was_read_as_another_type_comes_with_its_remedy(written, said):
    with pytest.raises(ValueError, match=said):
        load(f"# Parameters\n{written}")


def test_a_model_is_a_file_in_params_or_the_path_of_another(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("model: planted\nn_samples: 5\nseed: 3\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    params = load("# Parameters\nmodel = '~/own.yaml'\nseed = 4")
    planted = Params.from_yaml("params/planted.yaml", n_samples=5, seed=4)
    assert params.model_dump() == planted.model_dump() | {"threshold": 0.5}
    (tmp_path / "own.yaml").write_text("n_samples: 5\n")
    assert load("# Parameters\nmodel = '~/own.yaml'").model == "mini"


def test_a_checkpoint_that_comes_without_its_model_is_not_taken_for_the_cells(tmp_path):
    said = "Parameter checkpoint = 'mine' comes without model: give both"
    (tmp_path / "own.yaml").write_text("checkpoint: mine\nprompt: '<image>{question}'\n")
    alone = "# Parameters\ncheckpoint = 'mine'\nprompt = '<image>{question}'"
    for cell in (alone, f"# Parameters\nmodel = '{tmp_path}/own.yaml'"):
        with pytest.raises(ValueError, match=said):
            load(cell)
    found = load(f"{alone}\nmodel = 'mini-next'", declared=f"{DECLARED}\nwindow = 2")
    assert (found.checkpoint, found.do_pad, found.window) == ("mine", False, 2)  # the rest is that model's
    assert load("n_samples = 5", declared=f"{DECLARED}\ncheckpoint = 'mine'").checkpoint == "mine"


def test_a_file_of_a_model_holds_what_all_notebooks_share(tmp_path):
    (tmp_path / "own.yaml").write_text("threshold: 0.75\n")  # the cell's 0.5 would win over it
    with pytest.raises(ValueError, match=r"own.yaml: Unknown parameter threshold = 0.75"):
        load(f"# Parameters\nmodel = '{tmp_path}/own.yaml'")


def test_each_notebooks_own_parameters_are_told_to_be_its():
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        for name, *_ in own_parameters(notebook):
            (said,) = unknown_parameters({name: 1}, Params.model_fields)
            assert notebook.stem in said and said.endswith(" alone: set it in the parameters cell there, or by -p.")


def test_a_model_of_another_name_comes_with_checkpoint_and_prompt():
    new = "# Parameters\nmodel = 'mini-nexd'\ncheckpoint = 'assets/mini'"
    with pytest.raises(ValueError, match=r"model = 'mini-nexd': expected a file of params/.*mean mini-next\?$"):
        load(new)
    assert load(f"{new}\nprompt = '<image>{{question}}'").model_dump() == {
        **Params(model="mini-nexd", prompt="<image>{question}").model_dump(),
        "threshold": 0.5,
    }


def test_running_the_validating_cell_again_later_changes_nothing():
    later = ["frame = mm.sweep()", "n_samples = 7", "title = 'a figure'\nfigure = mm.plot(frame)"]
    namespace = notebook("n_samples = 5", CALL, *later, n_samples=7, model=object(), figure=1)
    assert load_params(namespace, OWN).model_dump() == load("n_samples = 5").model_dump()


def test_of_a_cell_that_was_edited_and_run_again_the_last_text_counts():
    edited = [f"{DECLARED}\nn_samples = 5\nwindw = 1", f"{DECLARED}\nwindow = 1"]
    params = load(*edited, n_samples=5, windw=1, window=1)
    assert (params.n_samples, params.window) == (24, 1)


def test_outside_a_notebook_only_the_values_are_judged():
    assert load_params({"model": "planted", "seed": 1, "frame": 1}).model_dump() == {
        **Params.from_yaml("params/planted.yaml", seed=1).model_dump(),
    }
    with pytest.raises(ValueError, match="seed = 'x'"):
        load_params({"seed": "x"})
