"""One notebook through papermill: parameters judged first, success judged by what really ran."""

import errno
import os
import re
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mmflow_utils.params import Params
from workflow import run_notebook as execute
from workflow.graph import FACTUAL, FOR_PHOTOGRAPHS
from workflow.run_notebook import check_parameters, find_problems, main, run_notebook

pytestmark = pytest.mark.notebook

DECLARED = """
model: str = "mini"  # which
sharpness: float = 0.5  # only here
""".strip()
SETUP = """
import mmflow_utils as mm
params = mm.load_params(globals(), {"sharpness": float})
""".strip()
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a notebook whose parameters cell is followed by the given cells, and a parameter file for it."""
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    model = "model: tiny\ncheckpoint: tiny\nprompt: '<image> {question}'\nsharpness: 0.25\n"
    (tmp_path / "tiny.yaml").write_text(f"{model}outputs: {tmp_path}/out\n")

    def write(*cells: str, title="# 02 · Flow: who speaks?\n\nText.", declared=DECLARED):
        parameters = new_code_cell(declared, metadata={"tags": ["parameters"]})
        code = [new_code_cell(cell) for cell in cells]
        path = tmp_path / "02_flow.ipynb"
        nbformat.write(new_notebook(cells=[new_markdown_cell(title), parameters, *code], metadata=KERNEL), path)
        return path

    return write


def run(path, *more):
    return main([str(path), str(path.with_name("tiny.yaml")), *more])


def left_behind(tmp_path):
    return sorted(file.name for file in (tmp_path / "out").rglob("*") if file.is_file())


def test_a_good_run_leaves_one_titled_copy(tmp_path, write, capfd):
    path = write(SETUP, "print(params.model, params.window, params.sharpness)")
    before = path.read_bytes()
    assert run(path, "-p", "window", "7") == 0
    assert left_behind(tmp_path) == ["02_flow.ipynb"]
    done = nbformat.read(tmp_path / "out" / "tiny" / "02_flow.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text == "tiny 7 0.25\n"
    assert done.cells[0].source == "# 02 · Flow: who speaks? — tiny\n\nText."
    assert path.read_bytes() == before
    said = capfd.readouterr().err
    assert "TCP" not in said and "unknown parameter" not in said


def test_a_model_of_params_is_injected_by_its_name_alone(tmp_path, write):
    path = write(SETUP, "print(params.model, params.window, params.seed)", declared=f"{DECLARED}\nseed = 5")
    where = ("-p", "outputs", str(tmp_path / "out"))
    assert main([str(path), "planted", *where]) == 0
    assert left_behind(tmp_path) == ["02_flow.ipynb"]
    done = nbformat.read(tmp_path / "out" / "planted" / "02_flow.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text == "planted 1 5\n"
    assert set(done.metadata.papermill.parameters) == {"model", "outputs"}
    assert check_parameters(path, {"model": "planted"}) == Params.from_yaml("params/planted.yaml", seed=5)


def test_real_facts_are_passed_for_a_model_of_params_and_an_override_wins(write, monkeypatch):
    own = "\n".join(f"{name}: {type(value).__name__} = {value!r}" for name, value in FOR_PHOTOGRAPHS[FACTUAL].items())
    path = write(SETUP, declared=f"{DECLARED}\n{own}").rename
    path = path(execute.NOTEBOOKS / "12_facts.ipynb")
    passed = []
    monkeypatch.setattr(execute, "_execute", lambda *_, **__: passed.append(_[2]) or "no kernel here")
    for model, values in (("llava-1.5-7b", {}), ("llava-1.5-7b", {"aokvqa_questions": "mine.json"}), ("mini", {})):
        with pytest.raises(RuntimeError, match="no kernel here"):
            run_notebook(path, model, values)
    real = {"model": "llava-1.5-7b"} | FOR_PHOTOGRAPHS[FACTUAL]
    assert passed == [real, real | {"aokvqa_questions": "mine.json"}, {"model": "mini"}]


def test_a_file_that_gives_a_checkpoint_names_its_model(tmp_path, write, capsys):
    path = write("1")
    (tmp_path / "tiny.yaml").write_text("checkpoint: tiny\nprompt: '<image> {question}'\n")
    assert run(path) == 1
    assert capsys.readouterr().err == "mmflow: Parameter checkpoint = 'tiny' comes without model: give both.\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("windw", "7"), "Unknown parameter windw = 7: did you mean window?"),
        (("sharpnes", "1"), "Unknown parameter sharpnes = 1: did you mean sharpness?"),
        (("window", "many"), "window = 'many'"),
        (("window", "0"), "window = 0"),
    ],
)
def test_wrong_parameters_stop_before_a_kernel_starts(tmp_path, write, capsys, monkeypatch, override, said):
    monkeypatch.setattr(execute.papermill, "execute_notebook", pytest.fail)
    assert run(write("1"), "-p", *override) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shard_ends_with_the_last_cell_that_computes_in_parts(tmp_path, write):
    path = write(SETUP, "print(params.shard)  # measure_in_parts(", "raise ValueError('a figure of a share')")
    assert run(path, "-p", "shard", "2/4") == 0
    assert left_behind(tmp_path) == ["02_flow.2of4.ipynb"]
    done = nbformat.read(tmp_path / "out" / "tiny" / "shards" / "02_flow.2of4.ipynb", as_version=4)
    assert done.cells[-1].outputs[0].text == "2/4\n"
    assert run(path) == 1  # without a shard it goes on to its end


def test_a_shard_runs_what_its_measurements_need_and_no_figure_between_them(tmp_path, write):
    path = write(
        SETUP,
        "rows = []  # measure_in_parts(",
        "boot = 3\nmean = sum(rows) / len(rows)",  # a summary, of a share without rows
        "few = [n for n in range(2)]",
        "print(few, boot := 4)  # measure_in_parts(",
    )
    assert run(path, "-p", "shard", "2/4") == 0
    done = nbformat.read(tmp_path / "out" / "tiny" / "shards" / "02_flow.2of4.ipynb", as_version=4)
    said = [cell.source for cell in done.cells if cell.cell_type == "code"]
    assert not any("mean" in source for source in said) and any("few = [" in source for source in said)


def test_a_shard_ends_before_what_asks_by_all_samples(tmp_path, write):
    path = write(SETUP, "found = 1  # measure_in_parts(", "1 / 0  # measure_in_parts(")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].metadata["tags"] = ["all-samples"]
    nbformat.write(notebook, path)
    assert run(path, "-p", "shard", "2/4") == 0 and run(path) == 1


@pytest.mark.parametrize(
    ("shard", "said"),
    [("2/4", "computes nothing in parts"), ("0/4", "shard = '0/4'"), ("two", "shard = 'two'")],
)
def test_a_shard_of_what_has_no_parts_and_a_shard_that_is_none_are_refused(write, capsys, shard, said):
    assert run(write("1"), "-p", "shard", shard) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["02_no_such"], ["no/such.ipynb"], ["{notebook}", "minni"]])
def test_a_missing_notebook_or_model_is_one_sentence(write, capsys, arguments):
    assert main([argument.format(notebook=write("1")) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mmflow: There is no")
    assert said.count("\n") == 1


@pytest.mark.parametrize("place", ["elsewhere/02_flow.ipynb", "notebooks/../02_flow.ipynb", "notebooks/link.ipynb"])
@pytest.mark.parametrize("more", [[], ["--in-place"]])
def test_a_notebook_from_elsewhere_is_not_run(tmp_path, write, capsys, monkeypatch, place, more):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = write("1").rename(tmp_path / place)
    if place.endswith("link.ipynb"):
        path.rename(tmp_path / "elsewhere" / "real.ipynb")
        path.symlink_to(tmp_path / "elsewhere" / "real.ipynb")
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(execute.papermill, "execute_notebook", pytest.fail)
    assert main([str(path), str(tmp_path / "tiny.yaml"), *more]) == 1
    assert re.search(r"\.ipynb is not in .*notebooks: read it first, and copy it", capsys.readouterr().err)


def test_two_runs_of_one_notebook_do_no_harm(tmp_path, write):
    path = write("import time; time.sleep(1)", "print(sharpness)")
    (tmp_path / "out").mkdir()
    code = "import sys; from pathlib import Path; from workflow import run_notebook as execute; "
    code += "execute.NOTEBOOKS = Path(sys.argv[1]).parent; sys.exit(execute.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "tiny.yaml")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(run.communicate()[1].count("mmflow:"), run.returncode) for run in both] == [(0, 0), (0, 0)]
    assert left_behind(tmp_path) == ["02_flow.ipynb"]


def test_what_a_killed_run_left_goes_after_a_day(tmp_path, write):
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    for name, age_s in ((".02_flow.a-1.running.ipynb", 90_000), (".02_flow.a-2.running.ipynb", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    assert run(write("1")) == 0
    assert left_behind(tmp_path) == [".02_flow.a-2.running.ipynb", "02_flow.ipynb"]


@pytest.mark.parametrize("value", ["2026-02-30", "[1", "{a: b: c}", "!!python/name:os.system"])
def test_an_override_that_is_no_yaml_is_named(write, capsys, value):
    assert run(write("1"), "-p", "window", value) == 1
    assert capsys.readouterr().err.startswith(f"mmflow: Parameter window = {value!r} is not valid YAML")


def test_a_full_disk_is_one_sentence(write, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "02_flow.ipynb")

    monkeypatch.setattr(execute.papermill, "execute_notebook", full)
    assert run(write("1")) == 1
    assert capsys.readouterr().err == "mmflow: [Errno 28] No space left on device: '02_flow.ipynb'\n"


def test_a_notebook_whose_parameters_are_computed_is_refused(write, capsys):
    path = write("1")
    path.write_text(path.read_text().replace("sharpness: float = 0.5", "sharpness: float = len('a')"))
    assert run(path) == 1
    assert "02_flow.ipynb needs a cell tagged `parameters`" in capsys.readouterr().err


def test_an_error_keeps_the_half_run_copy_with_its_traceback(tmp_path, write, capsys):
    path = write("print('so far')", "1 / 0", "print('never')")
    assert run(path) == 1
    assert left_behind(tmp_path) == ["02_flow.failed.ipynb"]
    assert "02_flow failed for tiny: ZeroDivisionError: division by zero" in capsys.readouterr().err
    half = (tmp_path / "out" / "tiny" / "02_flow.failed.ipynb").read_text()
    assert "so far" in half
    assert "ZeroDivisionError" in half


def test_a_failure_leaves_the_last_good_copy_and_a_success_clears_the_failed_one(tmp_path, write):
    assert run(write("assert sharpness == 0.25")) == 0
    good = (tmp_path / "out" / "tiny" / "02_flow.ipynb").read_bytes()
    assert run(write("raise SystemError('later')")) == 1
    assert left_behind(tmp_path) == ["02_flow.failed.ipynb", "02_flow.ipynb"]
    assert (tmp_path / "out" / "tiny" / "02_flow.ipynb").read_bytes() == good
    assert run(write("1")) == 0
    assert left_behind(tmp_path) == ["02_flow.ipynb"]


def test_a_kernel_that_dies_is_a_failure(tmp_path, write, capsys):
    assert run(write("import os; os._exit(9)", "print('never')")) == 1
    assert "kernel died" in capsys.readouterr().err
    assert left_behind(tmp_path) == ["02_flow.failed.ipynb"]


def test_a_cell_that_takes_too_long_is_a_failure(tmp_path, write, capsys):
    assert run(write("import time; time.sleep(60)"), "--timeout-s", "2") == 1
    assert "longer than 2 s" in capsys.readouterr().err
    assert left_behind(tmp_path) == ["02_flow.failed.ipynb"]


def test_a_run_that_papermill_calls_a_success_is_still_judged(write, monkeypatch):
    monkeypatch.setattr(
        execute.papermill,
        "execute_notebook",
        lambda source, target, **rest: target.write_bytes(source.read_bytes()),
    )
    path = write("print('never ran')")
    with pytest.raises(RuntimeError, match=r"code cell 1 \(model: str.* never ran"):
        run_notebook(path, path.with_name("tiny.yaml"), progress=False)


def test_an_error_that_a_cell_announces_is_no_problem():
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="as shown", traceback=[])
    cell = new_code_cell("show()", execution_count=1, outputs=[error])
    assert find_problems(new_notebook(cells=[cell])) == ["code cell 1 (show()) raised ValueError: as shown"]
    cell.metadata["tags"] = ["raises-exception"]
    assert find_problems(new_notebook(cells=[cell])) == []


def test_refreshing_in_place_leaves_outputs_and_no_traces(write):
    bar = "from tqdm.auto import tqdm\nlist(tqdm(range(3), desc='Slowly'))"
    path = write("print(sharpness)", f"display('picture')\n{bar}")
    assert main([str(path), "--in-place"]) == 0
    text = path.read_text()
    done = nbformat.reads(text, as_version=4)
    assert [cell.get("execution_count") for cell in done.cells] == [None, 1, 2, 3]
    assert done.cells[2].outputs[0].text == "0.5\n"
    assert [output.data["text/plain"] for output in done.cells[3].outputs] == ["'picture'", "[0, 1, 2]"]
    assert done.metadata.kernelspec.name == "python3"
    assert not [trace for trace in ("papermill", "iopub", str(path.parent)) if trace in text]


def test_a_refresh_that_fails_changes_nothing(write, capsys):
    path = write("1 / 0")
    before = path.read_bytes()
    assert main([str(path), "--in-place"]) == 1
    assert path.read_bytes() == before
    assert "stays as it was" in capsys.readouterr().err
