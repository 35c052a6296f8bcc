"""Commands as forks of a server process that has imported what they need: Python's own forkserver.

They are real processes, with signals, exit codes, files, an environment and children of their own; only the imports,
seconds of CPU, were done before. Tests of starting itself, and of everything that may use a GPU, start a new
interpreter.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the console script does: the server may have only one thread
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["tests.preloaded"])
_lock = threading.Lock()
"""multiprocessing reaps all children whenever it starts one; two threads must not reap the same."""
WITH_GPU = Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


class Command:
    """`MODULE ARGUMENT...` in a fork, with what tests use of subprocess.Popen. Its output can be read at any time."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str], cwd: Path = ROOT) -> None:
        self.args = [module, *arguments]
        self.stdout, self.stderr = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        outputs = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (self.stdout, self.stderr)]
        self._process = forkserver.Process(target=_become, args=(self.args, dict(env), outputs, cwd))
        with _lock:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not wait([self._process.sentinel], left):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[str] | Command


def start(module: str, *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
    """`python -m MODULE ARGUMENT...`, with the project's packages."""
    words, environment = list(map(str, arguments)), os.environ if env is None else env
    if not WITH_GPU:
        return Command(module, *words, env=environment, cwd=cwd)
    return subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "coatnet_main.py"), module, *words], cwd=cwd, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(
    module: str, *arguments: object, timeout: float, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(module, *arguments, env=env, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def end_server() -> None:
    """Ends the server, for a test that needs all memory of the machine; the next command starts another."""
    receiver, sender = forkserver.Pipe(duplex=False)
    process = forkserver.Process(target=_tell_parent, args=(sender,))
    process.start()
    server = receiver.recv()
    process.join()
    os.kill(server, signal.SIGKILL)
    while Path("/proc", str(server), "stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


def _tell_parent(sender: Connection) -> None:
    sender.send(os.getppid())


def _become(command: Sequence[str], environment: Mapping[str, str], outputs: Sequence[str], cwd: Path) -> None:
    """Runs the command in this process."""
    from tests import preloaded

    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update({**preloaded.set_by_imports, **environment})
    sys.argv = list(command)
    importlib.import_module(command[0]).main()
