"""Ranks: N processes of this machine started by `--procs N`, or this process as one rank of torchrun's or srun's.

A launched rank runs the same command line again with RANK, WORLD_SIZE ... set, as torchrun would: in a fork of the
launcher, or, where a fork could not do all that a new process can, in a new interpreter (preload.py). When the launcher
ends, however it ends, the kernel kills its ranks; when a rank ends with an error, the launcher kills the others.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Protocol

from pipeline.distributed.environment import LAUNCHER, cpus_per_rank, is_rank
from pipeline.distributed.preload import preload
from pipeline.distributed.signals import STOPPED, STOPPING, stopping

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "pipeline.cli"
"""The module of which a rank runs `main`."""
GRACE_SECONDS = 10.0
"""How long the other ranks may take to end after one has failed, before they are killed."""


def module_command(module: str, python: str = sys.executable, code: Path = ROOT) -> list[str]:
    """The words that run a module of ours in a new interpreter, whatever the current folder has (coatnet_main.py)."""
    return [python, "-P", str(code / "coatnet_main.py"), module]


COATNET = module_command(COMMANDS)


def die_with_parent() -> None:
    """Asks the kernel to kill this rank when its launcher's process ends, ours or torchrun's."""
    if not is_rank():
        return
    prctl_set_parent_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(prctl_set_parent_death_signal, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and os.getppid() != int(launcher):  # it ended before we asked
        sys.exit(1)


class Rank(Protocol):
    """A rank's process, with the methods of subprocess.Popen."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


Start = Callable[[str, list[str], dict[str, str], Path | None], Rank]
"""Starts a rank: a module's `main` with these arguments and more environment, its output appended to a file."""


def launch(
    arguments: list[str],
    ranks: int,
    logs: Path,
    imports: Callable[[], None],
    module: str = COMMANDS,
    start: Start | None = None,
) -> int:
    """Runs `coatnet ARGUMENTS` as `ranks` processes; returns the exit status of the first that failed, or 0.

    `imports` imports what they need, so that they can be forks of this process; `start` replaces the way to start them.

    Rank 0 has the terminal; the others write to LOGS/rank-N.log, if they can. Requests to stop are forwarded to the
    ranks; a second Ctrl-C kills them.
    """
    processes: list[Rank] = []
    interrupted, signalled = False, 0

    def forward(number: int, _frame: object) -> None:
        nonlocal interrupted, signalled
        again = interrupted and number == signal.SIGINT
        interrupted = interrupted or number == signal.SIGINT
        # Ctrl-C has reached the ranks too: a second SIGINT would end them.
        signalled = signal.SIGKILL if again else signal.SIGTERM if interrupted else number
        for process in processes:
            process.send_signal(signalled)

    os.environ.setdefault("OMP_NUM_THREADS", str(cpus_per_rank(ranks)))  # read by libraries when they are imported
    if start is None:
        start = fork if preload(imports) else spawn
    port = free_port()
    for number in stopping():
        signal.signal(number, forward)
    try:
        for rank in range(ranks):
            processes.append(start(module, arguments, _environment(rank, ranks, port), _log_of(rank, logs)))
            if signalled:  # while this one was being started
                processes[-1].send_signal(signalled)
        return _wait(processes, logs)
    except BaseException:
        for process in processes:
            process.kill()
        raise


def _log_of(rank: int, logs: Path) -> Path | None:
    """Where a rank's output goes; None for rank 0, and where it cannot be written: to this process's."""
    if rank == 0:
        return None
    log = logs / f"rank-{rank}.log"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        log.open("ab").close()
    except OSError as error:
        print(f"warning: {log} cannot be written: {error.strerror}; rank {rank} prints here instead", file=sys.stderr)
        return None
    return log


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set, gloo's network interface, and the launcher's process id."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        LAUNCHER: str(os.getpid()),
    }


def spawn(module: str, arguments: list[str], environment: dict[str, str], log: Path | None) -> Rank:
    """Starts a rank as a new interpreter."""
    output = None if log is None else log.open("ab")
    process = subprocess.Popen(
        [*module_command(module), *arguments], env={**os.environ, **environment},
        stdout=output, stderr=output and subprocess.STDOUT,
    )  # fmt: skip
    if output is not None:
        output.close()
    return process


def fork(module: str, arguments: list[str], environment: dict[str, str], log: Path | None) -> Rank:
    """Starts a rank as a fork of this process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # else the fork may get one as if it were the launcher
    try:
        process = ForkedRank(target=_in_fork, args=(module, arguments, environment, log, mask))
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


class ForkedRank(ForkProcess):
    """A fork that multiprocessing makes, with the names of subprocess.Popen."""

    def poll(self) -> int | None:
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.exitcode is None and self.pid is not None:
            with suppress(ProcessLookupError):  # it ended, which this process may not have noticed yet
                os.kill(self.pid, number)


def _in_fork(
    module: str, arguments: list[str], environment: dict[str, str], log: Path | None, mask: set[signal.Signals]
) -> None:
    """Gives this fork the state of a new process, and runs the module's `main` in it."""
    for number in stopping():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.environ.update(environment)
    sys.argv[1:] = arguments
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.close(descriptor)
    threads, torch = os.environ["OMP_NUM_THREADS"].partition(",")[0], sys.modules.get("torch")
    # torch may have been imported before the variable was set; OpenMP, too, ignores what is not a number.
    if torch is not None and threads.isdecimal() and torch.get_num_threads() != int(threads):
        torch.set_num_threads(int(threads))
    importlib.import_module(module).main()


def _wait(processes: Sequence[Rank], logs: Path) -> int:
    deadline = None
    first_failed: int | None = None
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed and deadline is None:
            first_failed, deadline = failed[0], time.monotonic() + GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    statuses = [process.poll() or 0 for process in processes]
    if first_failed is None:
        first_failed = next((rank for rank, status in enumerate(statuses) if status), None)
    if first_failed is None:
        return 0
    if statuses[0] == statuses[first_failed] > 1:  # an error of all ranks, which rank 0 has printed
        return statuses[0]
    return _report(first_failed, statuses[first_failed], logs)


def _report(rank: int, status: int, logs: Path) -> int:
    if status < 0:
        number = signal.Signals(-status)
        asked = number in STOPPING  # before there was anything to save
        print(
            f"rank {rank} was stopped by {number.name}; run the same command to resume"
            if asked
            else f"rank {rank} was killed by {number.name};"
            " the same command resumes from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        return STOPPED if asked else 1
    if rank > 0 and (logs / f"rank-{rank}.log").is_file():
        log = logs / f"rank-{rank}.log"
        print(f"rank {rank} ended with status {status}: {_last_message(log)} (see {log})", file=sys.stderr)
    return status


def _last_message(log: Path) -> str:
    """The last line of a log; where it is indented, back to the line that it belongs to."""
    message: list[str] = []
    for line in reversed(log.read_text(errors="replace").splitlines()):
        message.insert(0, line)
        if not line.startswith(" "):
            break
    return "\n".join(message)


def free_port() -> int:
    """A port that nothing on this machine has."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
