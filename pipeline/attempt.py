"""Taking a run's folder for this start of it: rank 0 claims, compares, records; all learn the attempt's number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from pipeline.checkpoint.attempts import allocate
from pipeline.checkpoint.writer import clean_partial
from pipeline.config.parsing import to_yaml
from pipeline.config.schema import Config
from pipeline.distributed.collectives import from_rank_zero
from pipeline.distributed.environment import FILE, rank_and_world_size
from pipeline.errors import DataError, RunFailed, first_line
from pipeline.plan import Plan
from pipeline.run.events import Events
from pipeline.run.jsonl import write_whole
from pipeline.run.lock import RunLocked, acquire_lock

_held: list[TextIO] = []  # the lock lives as long as the process


def begin_attempt(run: Path, config: Config, plan: Plan) -> tuple[int, Events]:
    """The attempt's number (how often the run was started before) and its events. Collective; UsageError if alive."""

    def take() -> int:
        claimed = claim(run)
        _held.append(claimed.lock)
        clean_partial(run / "checkpoints")
        return claimed.attempt

    rank, world_size = rank_and_world_size()
    attempt = from_rank_zero(take)
    events = Events(run, attempt, rank)
    events.write("attempt_started", world_size=world_size, torch=torch.__version__, changed=plan.changed)
    if rank == 0:
        write_config(run, config)
    return attempt, events


@contextmanager
def record_exit_reason(run: Path) -> Iterator[None]:
    """Inside, what rank 0 fails with goes to events.jsonl as `failed`, and to its log, unless the file above has it."""
    from pipeline.checkpoint.attempts import latest_of_this_process
    from pipeline.run.events import Events  # it imports torch

    try:
        yield
    except (RunFailed, DataError) as error:
        if FILE not in os.environ and (attempt := latest_of_this_process(run)) is not None:
            Events(run, attempt, 0).write("failed", message=first_line(error))
            with (run / "logs" / "rank-0.log").open("a") as log:
                print(f"coatnet: {error}", file=log)
        raise


@dataclass(frozen=True)
class Claim:
    """A run's folder that this process holds, and the number of this start."""

    path: Path
    attempt: int
    lock: TextIO


def claim(path: Path) -> Claim:
    """The run's folder, held until this process ends, for a new attempt; RunLocked where another process holds it."""
    try:
        lock = acquire_lock(path)
    except RunLocked as error:
        if not error.holder.is_superseded():
            raise
    else:
        return Claim(path, allocate(path), lock)
    attempt = allocate(path)
    try:
        return Claim(path, attempt, acquire_lock(path))
    except RunLocked as error:
        print(f"{error}. It is an earlier start of this job, and what it does is not used any more: continuing")
        return Claim(path, attempt, (path / ".lock").open())


def write_config(path: Path, config: Config) -> None:
    """Writes RUN/config.yaml so that it is always whole."""
    write_whole(path / "config.yaml", to_yaml(config))
