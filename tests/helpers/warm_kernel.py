"""Kernels for the notebooks' regression that begin with the libraries imported: each is forked from one that did that.

Importing torch and transformers takes a kernel four seconds, and there is a kernel for each notebook. Nothing else is
shared: what a notebook makes dies with its process.
"""

import multiprocessing
import os
import sys
from typing import Any

from jupyter_client.provisioning import local_provisioner

MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llama", "llava", "llava_next")]
IMPORTED = ["ipykernel.kernelapp", "seaborn", "mmflow_utils.explorer", "mmflow_utils.analysis.claims", *MODELS]


def fork_kernels() -> None:
    """From now on fork each kernel that this process starts; where that can't be done, leave all as it is."""
    if sys.platform != "linux":  # elsewhere system libraries don't survive a fork
        return
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # read when matplotlib is imported
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    local_provisioner.launch_kernel = lambda cmd, **options: ForkedKernel(server, cmd, **options)


class ForkedKernel:
    """What `subprocess.Popen` is to a kernel that was started by a command."""

    stdin = stdout = stderr = None

    def __init__(self, server: Any, cmd: list[str], *, env: dict[str, str], cwd: str | None = None, **_: Any):
        ready, here = server.Pipe(duplex=False)
        self._process = server.Process(target=_run, args=(cmd[cmd.index("-f") + 1 :][:1], env, cwd, here), daemon=False)
        self._process.start()
        ready.recv()  # signals go to the kernel's group of processes, which must be its own by then
        self.pid = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


def _run(connection: list[str], env: dict[str, str], cwd: str | None, ready: Any) -> None:
    os.setsid()
    ready.send(True)
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))
    os.chdir(cwd or os.getcwd())
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=["-f", *connection])
