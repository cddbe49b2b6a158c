"""`workflow/warm.py -m` is `python -m`: the same whether somebody serves or not, but that nothing is imported anew."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mmflow_utils.params import ROOT

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
WARM = str(ROOT / "workflow" / "warm.py")
# A server that has imported little, run by `python -c` with its command behind it.
SERVER = f"""
import sys
sys.argv[0] = {WARM!r}
sys.path[0] = {str(ROOT)!r}
from workflow import warm
warm.BY_BATCH, warm.BY_KERNEL = [], ["colorsys", "mmflow_utils.params"]
sys.exit(warm.main(sys.argv[1:]))
"""
PROBE = """
import json, os, signal, sys, time
sys.stdout.write(json.dumps({
    "pid": os.getpid(), "name": __name__, "argv": sys.argv[1:], "folder": os.getcwd(), "path": sys.path[0],
    "told": os.environ.get("TOLD"), "imported": "colorsys" in sys.modules, "said": sys.stdin.readline(),
}) + "\\n")
sys.stdout.flush()
print("beside", file=sys.stderr)
what = sys.argv[1] if len(sys.argv) > 1 else ""
if what == "wait":
    time.sleep(60)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(eval(what or "None"))
"""


@pytest.fixture
def run(tmp_path):
    """Run a command, where somebody serves and where nobody does."""
    (tmp_path / "probe.py").write_text(PROBE)

    def run(*command, served=True, **options):
        server = [sys.executable, "-c", SERVER, "serve"] if served else []
        environment = {name: value for name, value in os.environ.items() if name != "MMFLOW_WARM"} | {"TOLD": "größer"}
        options = {"cwd": tmp_path, "env": environment, "stdout": -1, "stderr": -1, "text": True} | options
        return subprocess.Popen([*server, *command], **options)

    return run


def said(text):
    return json.loads(text.splitlines()[0])


@pytest.mark.parametrize("served", [True, False])
def test_it_has_its_own_arguments_folder_environment_files_and_name(run, tmp_path, served):
    warm = (sys.executable, "-IS", WARM, "-m", "probe", "None", "two words")
    process = run(*warm, served=served, stdin=-1)
    out, beside = process.communicate("asked\n", timeout=60)
    found = said(out)
    assert found.pop("pid") and found.pop("imported") == served
    assert found == {
        "name": "__main__", "argv": ["None", "two words"], "folder": str(tmp_path), "path": str(tmp_path),
        "told": "größer", "said": "asked\n",
    }  # fmt: skip
    assert (process.returncode, beside) == (0, "beside\n")


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize(
    ("what", "code", "says"),
    [("3", 3, ""), ("True", 1, ""), ("'a reason'", 1, "a reason"), ("1 / 0", 1, "ZeroDivisionError"), ("die", 137, "")],
)
def test_it_ends_as_it_would(run, served, what, code, says):
    shell = f'{sys.executable} -IS {WARM} -m probe "{what}"; echo code $?'
    out, beside = run("bash", "-c", shell, served=served, stdin=subprocess.DEVNULL).communicate(timeout=60)
    assert f"code {code}" in out and says in beside


def test_a_module_that_is_missing_is_named(run):
    process = run(sys.executable, "-IS", WARM, "-m", "no_such_module")
    assert "No module named no_such_module" in process.communicate(timeout=60)[1] and process.returncode == 1


def test_another_project_is_not_served(run, tmp_path):
    (tmp_path / "workflow").mkdir()
    shutil.copy(WARM, tmp_path / "workflow")
    process = run(sys.executable, "-IS", tmp_path / "workflow" / "warm.py", "-m", "probe", stdin=subprocess.DEVNULL)
    assert not said(process.communicate(timeout=60)[0])["imported"]


@pytest.mark.parametrize(("name", "imported"), [("PYTHONPATH", False), ("OMP_NUM_THREADS", False), ("OTHER", True)])
def test_what_is_read_at_the_start_is_read_again_where_it_differs(run, name, imported):
    shell = f"{name}=7 {sys.executable} -IS {WARM} -m probe"
    out, _ = run("bash", "-c", shell, stdin=subprocess.DEVNULL).communicate(timeout=60)
    assert said(out)["imported"] == imported


def test_results_go_where_its_own_environment_says(run, tmp_path):
    """The regression's folder is made when the server has imported everything: what lies in outputs/ is no result."""
    (tmp_path / "where.py").write_text("""
import sys
before = "mmflow_utils.params" in sys.modules
from mmflow_utils.params import Params
print(before, Params().folder)
""")
    shell = f"MMFLOW_OUTPUTS={tmp_path} {sys.executable} -IS {WARM} -m where"
    out, beside = run("bash", "-c", shell, stdin=subprocess.DEVNULL).communicate(timeout=60)
    assert out.split() == ["True", str(tmp_path / "mini")], beside


def test_where_the_socket_has_too_long_a_name_nobody_serves(run, tmp_path, monkeypatch):
    (tmp_path / ("long" * 30)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 30)))
    process = run(sys.executable, "-IS", WARM, "-m", "probe", "6", stdin=subprocess.DEVNULL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 6 and not said(out)["imported"]


def test_who_goes_without_a_word_does_no_harm(run, tmp_path):
    goes = (
        "import os, socket; place = os.environ['MMFLOW_WARM'].rpartition(':')[2]; "
        "one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); one.connect(place)"
    )
    shell = f'{sys.executable} -c "{goes}; one.send(b\'?\')"; {sys.executable} -c "{goes}"; '
    shell += f"exec {sys.executable} -IS {WARM} -m probe 8"
    process = run("bash", "-c", shell, stdin=subprocess.DEVNULL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 8 and said(out)["imported"]


def test_many_are_served_at_once(run):
    shell = f"for n in 1 2 3 4 5; do {sys.executable} -IS {WARM} -m probe $n & done; wait"
    out, _ = run("bash", "-c", shell, stdin=subprocess.DEVNULL).communicate(timeout=60)
    found = [json.loads(line) for line in out.splitlines()]
    assert sorted(one["argv"] for one in found) == [[str(n)] for n in range(1, 6)]
    assert len({one["pid"] for one in found}) == 5


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_ends_who_asked_ends_the_fork(run, tmp_path, sent):
    shell = f"exec {sys.executable} -IS {WARM} -m probe wait"
    process = run("bash", "-c", f"({shell}) & echo $! >asked; wait $!; echo code $?", stdin=subprocess.DEVNULL)
    fork = said(process.stdout.readline())["pid"]
    asked = int((tmp_path / "asked").read_text())
    assert asked != fork
    os.kill(asked, sent)
    out, _ = process.communicate(timeout=30)
    assert ends(fork) and "code 0" not in out


def test_a_fork_ends_with_the_parent_of_who_asked(run):
    shell = f"bash -c '{sys.executable} -IS {WARM} -m probe wait & sleep 60' & echo $!; wait"
    process = run("bash", "-c", shell, stdin=subprocess.DEVNULL)
    lines = [process.stdout.readline(), process.stdout.readline()]
    parent = int(next(line for line in lines if re.fullmatch(r"\d+\n", line)))
    fork = json.loads(next(line for line in lines if line.startswith("{")))["pid"]
    os.kill(parent, signal.SIGKILL)
    assert ends(fork)
    process.kill()


def test_forks_end_with_the_command_whose_exit_code_is_given_back(run):
    process = run("bash", "-c", f"{sys.executable} -IS {WARM} -m probe wait & read; exit 5", stdin=-1)
    fork = said(process.stdout.readline())["pid"]
    process.communicate("now\n", timeout=30)
    assert process.returncode == 5 and ends(fork)


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_what_ends_the_server_ends_the_forks_and_leaves_no_folder(run, tmp_path, monkeypatch, sent):
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    heard = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    process = run(sys.executable, "-IS", WARM, "-m", "probe", "wait", stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGHUP, heard)
    fork = said(process.stdout.readline())["pid"]
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode and ends(fork)
    assert sent == signal.SIGKILL or not list((tmp_path / "t").iterdir())


def test_under_nohup_a_closed_terminal_ends_nothing(run):
    process = run("nohup", sys.executable, "-c", SERVER, "serve", "bash", "-c",
                  f"{sys.executable} -IS {WARM} -m probe 'time.sleep(1)'", served=False, stdin=subprocess.DEVNULL,
                  start_new_session=True)  # fmt: skip
    assert said(process.stdout.readline())["imported"]
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize("fault", ["warm.BY_KERNEL = ['no_such_library']", "warm.os.fork = lambda: open('/no/such')"])
def test_where_the_server_can_not_fork_the_command_goes_on(run, fault):
    faulty = SERVER.replace("sys.exit(", f"{fault}\nsys.exit(")
    shell = f"sleep 1; {sys.executable} -IS {WARM} -m probe 4"
    process = run(sys.executable, "-c", faulty, "serve", "bash", "-c", shell, served=False, stdin=subprocess.DEVNULL)
    out, beside = process.communicate(timeout=60)
    assert process.returncode == 4 and not said(out)["imported"], beside
    assert ("mmflow: notebooks import what they need by themselves" in beside) == ("library" in fault)
    assert "Traceback" not in beside


def test_a_fork_that_can_not_begin_leaves_the_server_be(run):
    faulty = SERVER.replace("sys.exit(", "warm.os.chdir = lambda folder: open('/no/such')\nsys.exit(")
    shell = f"for n in 1 2; do {sys.executable} -IS {WARM} -m probe 4; echo code $?; done; exit 7"
    process = run(sys.executable, "-c", faulty, "serve", "bash", "-c", shell, served=False, stdin=subprocess.DEVNULL)
    out, beside = process.communicate(timeout=60)
    assert (out, process.returncode) == ("code 1\ncode 1\n", 7) and beside.count("FileNotFoundError") == 2


def test_where_there_is_a_gpu_nobody_serves(run, tmp_path):
    without = SERVER.replace("sys.exit(", "warm.GPU = warm.Path('/dev/null')\nsys.exit(")
    process = run(sys.executable, "-c", without, "serve", sys.executable, "-IS", WARM, "-m", "probe", "4", served=False,
                  stdin=subprocess.DEVNULL)  # fmt: skip
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and not said(out)["imported"]


STATE = """
import json, logging, os, sys, warnings
imported = [name for name in ("torch", "transformers", "seaborn") if name in sys.modules]
import matplotlib, numpy, pandas, seaborn, torch, transformers
import tqdm.auto
from transformers import LlavaForConditionalGeneration
import mmflow_utils as mm
mm.set_style()
mm.load_params({"model": "mini"})
print(json.dumps({
    "pandas": str(pandas.DataFrame(numpy.arange(60).reshape(2, 30))),
    "numpy": repr(numpy.get_printoptions()),
    "bars": [tqdm.auto.tqdm.__module__, transformers.utils.logging.tqdm_lib.tqdm.__module__],
    "figures": [matplotlib.get_backend(), matplotlib.get_configdir(), str(matplotlib.rcParams)],
    "threads": torch.get_num_threads(),
    "logging": [logging.root.level, transformers.logging.get_verbosity(), len(logging.root.handlers)],
    "warnings": sorted(f for f in map(str, warnings.filters) if "urllib3" not in f and "requests" not in f),
    "python": [sys.executable, sys.path, sys.argv[0], sorted(map(str, sys.flags)), __name__, os.getcwd()],
    "environment": sorted(set(os.environ) - {"MMFLOW_WARM", "TORCHINDUCTOR_CACHE_DIR"}),
    "excepthook": str(sys.excepthook)[:20],
    "imported": imported,
}))
"""


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What a notebook finds around it: in a kernel that was started for it, and in a fork."""
    folder, found = tmp_path_factory.mktemp("notebooks"), {}
    (folder / "home").mkdir()
    parameters = new_code_cell('model: str = "mini"  # which', metadata={"tags": ["parameters"]})
    looks = new_code_cell(
        STATE + "torch.__file__ and print(json.dumps('imported' if 'colorsys' in sys.modules else ''))"
    )
    nbformat.write(new_notebook(cells=[parameters, looks], metadata=KERNEL), folder / "01_state.ipynb")
    runs = (
        "import sys; from pathlib import Path; from workflow import run_notebook; "
        f"run_notebook.NOTEBOOKS = Path({str(folder)!r}); sys.exit(run_notebook.main(sys.argv[1:]))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "MMFLOW", "JUPY"))}
    for way in ("cold", "warm"):
        (folder / f"{way}.yaml").write_text(f"model: mini\noutputs: {folder}/{way}\n")
        run = [sys.executable, "-c", runs, str(folder / "01_state.ipynb"), str(folder / f"{way}.yaml")]
        server = [sys.executable, WARM, "serve"] if way == "warm" else []
        subprocess.run([*server, *run], cwd=ROOT, env=environment | {"HOME": f"{folder}/home"}, check=True)
        executed = nbformat.read(folder / way / "mini" / "01_state.ipynb", as_version=4)
        found[way] = json.loads(executed.cells[-1].outputs[0].text.splitlines()[0])
    return found


WHATS = ["pandas", "numpy", "bars", "figures", "threads", "logging", "warnings", "python", "environment", "excepthook"]


@pytest.mark.slow
def test_a_notebook_finds_the_same_in_a_fork_as_in_a_kernel_of_its_own_but_what_it_needs_imported(states):
    assert [what for what in WHATS if states["warm"][what] != states["cold"][what]] == []
    assert states["warm"]["imported"] == ["torch", "transformers", "seaborn"] and states["cold"]["imported"] == []


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid):
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False
