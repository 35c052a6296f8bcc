"""Claiming a run's folder, and deciding what a start of it is: the first, resuming, done already, or refused.

A run is alive while rank 0 of it holds an exclusive lock on RUN/.lock; the kernel lets go of it when the process
ends, however it ends, so a killed run can be started again at once. Each start is an attempt with the next number
(../checkpoint/attempts.py).

Whoever wants to start a run that is alive is refused, but for the next start of the same Slurm job: Slurm has given the
start before up, whose rank 0 may live on where nobody reaches it. That one ends when it sees the new attempt's number.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from pipeline.distributed.environment import START
from pipeline.errors import UsageError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
LOCK_PATIENCE_SECONDS = 10.0
"""How long a killed process may take to disappear."""


class RunLocked(UsageError):
    """Another process holds the run."""


def acquire_lock(path: Path) -> TextIO:
    """The run's lock, until it is closed; RunLocked where another process has it for longer than it takes to end."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise UsageError(f"run.dir={path}: {error.strerror}; choose a folder that can be written") from None
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while not _locked(lock):
        if time.monotonic() > deadline:
            lock.seek(0)
            holder = lock.read().strip()
            raise RunLocked(f"run.dir={path}: this run is alive ({holder}); end it first, or choose another run.dir")
        time.sleep(0.1)
    lock.truncate(0)
    start = f", start {os.environ[START]}" if START in os.environ else ""
    lock.write(f"process {os.getpid()} on {os.uname().nodename}{start}\n")
    lock.flush()
    return lock


def _locked(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"{lock.name}: this file system has no locks, so a run that is alive elsewhere is not refused: the newer"
            " start continues, and the older one ends",
            file=sys.stderr,
        )
    return True
