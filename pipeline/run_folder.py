"""Claiming a run's folder, and deciding what a start of it is: the first, going on, done already, or refused.

A run is alive while rank 0 of it holds an exclusive lock on RUN/.lock; the kernel lets go of it when the process
ends, however it ends, so a killed run can be started again at once. Each start is an attempt with the next number
(attempts.py).

Whoever wants to start a run that is alive is refused, but for the next start of the same Slurm job: Slurm has given the
start before up, whose rank 0 may live on where nobody reaches it. That one ends when it sees the new attempt's number.

Next: train.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.attempts import take_number, trusted
from pipeline.checkpoint import step_of
from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.failures import START
from pipeline.json_lines import write_whole
from pipeline.overrides import changes, read_resolved, to_yaml

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
LOCK_PATIENCE_SECONDS = 10.0
"""How long a killed process may take to disappear."""


class Alive(BadRequest):
    """Another process holds the run."""


@dataclass(frozen=True)
class Claim:
    """A run's folder that this process holds, and the number of this start."""

    path: Path
    attempt: int
    lock: TextIO


def claim(path: Path) -> Claim:
    """The run's folder, held until this process ends, for a new attempt; Alive where another process holds it."""
    try:
        lock = hold(path)
    except Alive:
        if not _is_of_our_job(path):
            raise
    else:
        return Claim(path, take_number(path), lock)
    attempt = take_number(path)
    try:
        return Claim(path, attempt, hold(path))
    except Alive as error:
        print(f"{error}. It is an earlier start of this job, and what it does is not used any more: going on")
        return Claim(path, attempt, (path / ".lock").open())


def hold(path: Path) -> TextIO:
    """The run's lock, until it is closed; Alive where another process has it for longer than it takes to end."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise BadRequest(f"run.dir={path}: {error.strerror}; choose a folder that can be written") from None
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while not _locked(lock):
        if time.monotonic() > deadline:
            lock.seek(0)
            holder = lock.read().strip()
            raise Alive(f"run.dir={path}: this run is alive ({holder}); end it first, or choose another run.dir")
        time.sleep(0.1)
    lock.truncate(0)
    start = f", start {os.environ[START]}" if START in os.environ else ""
    lock.write(f"process {os.getpid()} on {os.uname().nodename}{start}\n")
    lock.flush()
    return lock


def newest_step(path: Path) -> int | None:
    """The step of the newest checkpoint in a run's folder."""
    folders = trusted(path)
    return step_of(folders[-1]) if folders else None


def compare(path: Path, config: Config, command: str) -> dict[str, Any]:
    """What differs from the configuration that the run was started with, as recorded changes; {} at the first start.

    Raises BadRequest with the keys where something differs that defines the run.
    """
    resolved = path / "config.yaml"
    if not resolved.exists():
        return {}
    differing = changes(read_resolved(resolved), config)
    refused = [f"{name} was {old!r}, now {new!r}" for name, (kind, old, new) in differing.items() if kind == "fixed"]
    if refused:
        raise BadRequest(
            f"run.dir={path}: this run was started with another configuration: {'; '.join(refused)}."
            f" These keys define a run: put them back, or {command} into another folder with run.dir=..."
        )
    return {name: [old, new] for name, (_, old, new) in differing.items()}


def write_config(path: Path, config: Config) -> None:
    """Writes RUN/config.yaml so that it is always whole."""
    write_whole(path / "config.yaml", to_yaml(config))


def _is_of_our_job(path: Path) -> bool:
    """Whether the holder of the lock is an earlier start, as 4711.0, of the Slurm job whose start this process is."""
    job, _, restart = os.environ.get(START, "").rpartition(".")
    found = re.search(r", start (.+)\.(\d+)$", (path / ".lock").read_text().strip())
    return found is not None and found[1] == job and int(found[2]) < int(restart)


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
            " start goes on, and the older one ends",
            file=sys.stderr,
        )
    return True
