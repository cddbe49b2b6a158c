"""Start `python -m MODULE` at once: as a fork of one process that has imported what takes seconds.

python workflow/warm.py -m MODULE …     as `python -m MODULE …`, and that itself where nobody serves
python workflow/warm.py serve COMMAND…  run a command, and serve all that it starts in this way

A report is twenty notebooks of two processes each, which would import torch, transformers or papermill each anew.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
SERVED_AT = "MMFLOW_WARM"  # names a project, and a socket that only this user can open
BY_BATCH = ["papermill"]
BY_KERNEL = ["ipykernel.kernelapp", "mmflow_utils.models.load", "accelerate", "seaborn"]
GPU = Path("/dev/nvidiactl")  # its driver doesn't survive a fork once an import has woken it
MOST = 1 << 20  # bytes of a request: arguments and environment
# Variables that Python and the libraries read when they start: where these differ, a process starts by itself.
READ_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "HF_", "TRANSFORMERS_", "TOKENIZERS_")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG, of prctl


def serve(command: Sequence[str]) -> int:
    """Run a command, be asked for forks until it ends, and return its exit code."""
    if sys.platform != "linux" or GPU.exists():
        return subprocess.run(command).returncode
    folder, environment = tempfile.mkdtemp(), dict(os.environ)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"{folder}/socket")
    except OSError:  # too long a name for a socket
        os.rmdir(folder)
        return subprocess.run(command).returncode
    listener.listen()
    running = subprocess.Popen(command, env=os.environ | {SERVED_AT: f"{ROOT}:{folder}/socket"})
    for signum in _ending():
        signal.signal(signum, lambda *_: running.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)  # from a keyboard it comes to the command, too
    try:
        _serve_until_it_ends(running, listener, environment)
    finally:  # whatever went wrong here: who asks from now on starts by itself
        listener.close()
        running.wait()
        shutil.rmtree(folder, ignore_errors=True)
    return running.returncode


def _serve_until_it_ends(running: subprocess.Popen, listener: socket.socket, environment: Mapping[str, str]) -> None:
    """Import, fork for all who ask while the command runs, and end what is left of the forks."""
    try:
        _import()  # while the command starts
    except Exception as error:
        return print(f"mmflow: notebooks import what they need by themselves: {error!r}", file=sys.stderr)
    forks: dict[socket.socket, int] = {}
    try:
        while running.poll() is None:
            for ready in select.select([listener, *forks], [], [], 0.02)[0]:
                if ready is listener:
                    _fork(listener, forks, environment)
                else:  # who asked is gone, and so goes what was asked for
                    os.kill(forks[ready], signal.SIGKILL)
            for asked in list(forks):
                _tell_its_end(asked, forks)
    finally:
        for asked, pid in forks.items():
            os.kill(pid, signal.SIGKILL)
            asked.close()


def _ending() -> Sequence[signal.Signals]:
    """Name the signals that end a run; under nohup a closed terminal is none."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signum for signum in FORWARDED if signum != signal.SIGHUP or not ignored]


def _import() -> None:
    """Import what a batch needs, then what a kernel needs, each as if it were there: some libraries look around."""
    sys.path[0] = str(ROOT)
    from unittest.mock import patch

    from workflow.kernel import keep_caches_here

    keep_caches_here()
    for name in BY_BATCH:
        import_module(name)
    for name in ("tqdm.auto", "tqdm.autonotebook"):  # whose bars are a terminal's by now
        sys.modules.pop(name, None)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    with patch("builtins.get_ipython", lambda: SimpleNamespace(kernel=None), create=True):  # pandas asks for it
        for name in BY_KERNEL:
            import_module(name)
    gc.freeze()  # forks share what they never look through


def _fork(listener: socket.socket, forks: dict[socket.socket, int], environment: Mapping[str, str]) -> None:
    """Fork for who asks next; who asks with another start than this process had is turned away."""
    asked, _ = listener.accept()
    try:
        content, files, *_ = socket.recv_fds(asked, MOST, 3)
        request = json.loads(content)
    except (OSError, ValueError):  # gone before it could say what it wants
        return asked.close()
    server, pid = os.getpid(), None
    if _read_at_start(request["environment"]) == _read_at_start(environment):
        with suppress(OSError):  # no room for another process
            pid = os.fork()
    if pid is None:
        asked.close()
    elif pid:
        forks[asked] = pid
        with suppress(OSError):
            asked.send(b"%d" % pid)
    else:
        try:
            for one in (listener, asked, *forks):
                one.close()
            become(request, files, server)
        except BaseException:
            traceback.print_exc()
        finally:  # what ends the server's own work is no fork's to do
            os._exit(1)
    for file in files:
        os.close(file)


def _read_at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


def _tell_its_end(asked: socket.socket, forks: dict[socket.socket, int]) -> None:
    ended, status = os.waitpid(forks[asked], os.WNOHANG)
    if ended:
        del forks[asked]
        with asked, suppress(OSError):
            asked.send(b"%d" % os.waitstatus_to_exitcode(status))


def become(request: dict[str, Any], files: Sequence[int], server: int) -> NoReturn:
    """Be the process that was asked for, with its files, folder and arguments, as long as the server is."""
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != server:  # it ended just now
        os._exit(1)
    os.setsid()
    for signum in FORWARDED:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    module, *arguments = request["arguments"]
    sys.argv, sys.path[0] = [module, *arguments], request["folder"]
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # What the interpreter does at its end, but for taking every module apart, which takes a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def ask(arguments: Sequence[str]) -> int:
    """Have a fork made, stand for it until it ends, and return its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        project, _, place = os.environ.get(SERVED_AT, "").rpartition(":")
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        parent = os.getppid()
        try:
            server.connect(place if project == str(ROOT) else "")
            socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
            pid = int(server.recv(64))
        except (OSError, ValueError):  # nobody serves, or turns away
            os.execv(sys.executable, [sys.executable, "-Xfrozen_modules=off", "-m", *arguments])
        for signum in _ending():
            signal.signal(signum, lambda number, _: os.kill(pid, number))
        while not select.select([server], [], [], 1.0)[0]:
            if os.getppid() != parent:  # a kernel ends with who started it
                return 1
        code = int(server.recv(64) or -signal.SIGKILL)
    return code if code >= 0 else 128 - code


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; returns the exit code."""
    what, *rest = arguments
    return {"-m": ask, "serve": serve}[what](rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
