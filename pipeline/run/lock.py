"""The lock of a run's folder: one process trains a run at a time.

Rank 0 holds an exclusive lock on RUN/.lock for as long as it lives, and the file's only line names it. The kernel
releases the lock when the process ends, however it ends, so a killed run can be resumed at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pipeline.distributed.environment import START
from pipeline.errors import UsageError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
LOCK_TIMEOUT_SECONDS = 10.0
"""How long a killed process may take to disappear."""


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a run: `process 17 on n1, start 4711.0`."""

    pid: int
    host: str
    start: str
    """JOB.RESTART where a batch script started it, else empty."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", start {self.start}" if self.start else "")

    def is_superseded(self) -> bool:
        """Whether it is an earlier start of the job whose start this process is: Slurm has given it up."""
        job, _, restart = self.start.rpartition(".")
        our_job, _, our_restart = os.environ.get(START, "").rpartition(".")
        return job != "" and job == our_job and int(restart) < int(our_restart)


class RunLocked(UsageError):
    """Another process holds the run."""

    def __init__(self, run: Path, holder: LockHolder) -> None:
        super().__init__(f"run.dir={run}: already running ({holder}); end it first, or choose another run.dir")
        self.run, self.holder = run, holder

    def __reduce__(self) -> tuple[type[RunLocked], tuple[Path, LockHolder]]:  # rank 0 sends it to the others
        return RunLocked, (self.run, self.holder)


def lock_holder(run: Path) -> LockHolder | None:
    """The living process that holds a run; None where there is none, or the file system has no locks.

    It looks for a moment only, and acquire_lock tries again: it keeps no start from its lock.
    """
    try:
        with (run / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(run)
    except OSError:
        return None
    return None


def check_folder(run: Path, to_write: bool = False) -> None:
    """UsageError where a run's folder can be none, or, `to_write`, cannot be made or written."""
    place = next(each for each in (run, *run.absolute().parents) if os.path.lexists(each))
    why = "is not a folder" if not place.is_dir() else "cannot be written"
    if not place.is_dir() or (to_write and not os.access(place, os.W_OK | os.X_OK)):
        raise UsageError(f"run.dir={run}: {place} {why}; choose a folder that can be written")


def wait_for_holder(run: Path) -> None:
    """RunLocked where another process holds the run for longer than it takes to end; says at once that it waits."""
    deadline = None
    while (holder := lock_holder(run)) is not None and not holder.is_superseded():
        if deadline is None:
            deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
            print(f"{run}: held by {holder}; waiting {LOCK_TIMEOUT_SECONDS:.0f} s for it to end", file=sys.stderr)
        if time.monotonic() > deadline:
            raise RunLocked(run, holder)
        time.sleep(0.1)


def acquire_lock(run: Path) -> TextIO:
    """The run's lock, until it is closed; RunLocked where another process has it for longer than it takes to end."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a+")
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise UsageError(f"run.dir={run}: {run}/.lock, a file of the program, is a folder: remove it") from None
        what = f"{run}: .lock" if run.is_dir() else str(run)
        raise UsageError(f"run.dir={what}: {error.strerror}; choose a folder that can be written") from None
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while not try_lock(lock):
        if time.monotonic() > deadline:
            raise RunLocked(run, _read_holder(run))
        time.sleep(0.1)
    with suppress(OSError):  # on a full disk the lock holds all the same, and its holder is unknown to others
        lock.truncate(0)
        holder = LockHolder(os.getpid(), os.uname().nodename, os.environ.get(START, ""))
        os.write(lock.fileno(), f"{holder}\n".encode())
    return lock


def _read_holder(run: Path) -> LockHolder:
    text = (run / ".lock").read_text(errors="replace").partition("\n")[0]
    match = re.fullmatch(r"process (\d+) on (\S+?)(?:, start (\S+\.\d+))?", text)
    return LockHolder(int(match[1]), match[2], match[3] or "") if match else LockHolder(0, "an unknown host", "")


def try_lock(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"{lock.name}: this file system has no locks, so a run can be started while it runs elsewhere: the newer"
            " start continues, and the older one ends",
            file=sys.stderr,
        )
    return True
