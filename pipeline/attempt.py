"""An attempt: one start of a run. It joins the process group, takes the run's folder and a number, and is watched."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from data.storage.durable import remove_partials, write_atomically
from data.urls import without_secrets
from pipeline.checkpoint.attempts import SupersededCheck, allocate, latest_step, raise_if_superseded
from pipeline.config.parsing import to_yaml
from pipeline.config.schema import Config
from pipeline.distributed import signals
from pipeline.distributed.collectives import all_gather, from_rank_zero
from pipeline.distributed.environment import FILE, command_began, rank_and_world_size
from pipeline.monitoring.mfu import device_name
from pipeline.monitoring.progress import Console, open_console
from pipeline.plan import Plan
from pipeline.run.appended import AppendedFile
from pipeline.run.events import Events, last_record
from pipeline.run.identity import settle
from pipeline.run.lock import RunLocked, acquire_lock
from pipeline.run.small_files import take_damaged
from pipeline.training.engine import start_process_group
from pipeline.watchdog.watchdog import start_watchdog

_held: list[TextIO] = []  # the lock lives as long as the process
_begun: list[Events] = []
"""Those of the attempt that this process has begun, if it has."""


@dataclass
class Attempt:
    """What a rank has of its attempt: the device that it computes on, and where it reports to."""

    run: Path
    rank: int
    world_size: int
    device: torch.device
    events: Events
    console: Console
    _superseded: SupersededCheck

    @property
    def number(self) -> int:
        """How often the run was started before, or rolled back."""
        return self.events.attempt

    def is_stop_requested(self) -> bool:
        """Whether this rank received a signal to stop; from the first time on this is how one is served."""
        return signals.requested() is not None

    def would_lose_steps(self) -> bool:
        """Whether this rank received one that must save first: it waits for no batch any more."""
        return signals.costs_steps()

    def serve_stops_at_once(self) -> None:
        """Until the loop asks again, a signal ends this rank: nothing that it has done is not in a checkpoint."""
        signals.serve_at_once()

    def is_superseded(self) -> bool:
        """Whether rank 0, which looks every few seconds, has seen a newer attempt of the run."""
        return self.rank == 0 and self._superseded.is_superseded(self.number)

    def asked(self) -> tuple[bool, bool]:
        """Both: whether this rank is to stop, and whether the attempt is superseded."""
        return self.is_stop_requested(), self.is_superseded()

    def raise_if_superseded(self) -> None:
        """RunFailed where a newer attempt has begun. Collective."""
        from_rank_zero(lambda: raise_if_superseded(self.run, self.number))

    def record_interruption(self, step: int) -> None:
        """Records after which step the attempt stops, and by which rank's signal. Collective."""
        reasons = all_gather([reason] if (reason := signals.requested()) else [])
        self.events.write("interrupted", step=step, reason=reasons[0])


@contextmanager
def begin_attempt(config: Config, plan: Plan) -> Iterator[Attempt]:
    """Inside, this process is a rank of a new attempt, which the watchdog ends where it hangs. Collective.

    UsageError where the run is alive elsewhere.
    """
    run, (rank, world_size) = Path(config.run.dir), rank_and_world_size()
    device = start_process_group(config.run.hang_timeout)

    def take() -> tuple[int, str]:
        claimed = claim(run)
        _held.append(claimed.lock)
        for folder in (run, run / "attempts", run / "slurm"):
            remove_partials(folder)
        return claimed.attempt, settle(run).id

    number, identity = from_rank_zero(take)
    events = Events(run, number, rank)
    _begun[:] = [events]
    facts: dict[str, Any] = {}
    if rank == 0:
        facts = {"began": round(command_began(), 3), "command": list(map(without_secrets, sys.argv[1:]))}
        facts |= last_record(run)
    computes = {"world_size": world_size, "device": device_name(device), "torch": torch.__version__}
    events.write("attempt_started", run=identity, **computes, changed=plan.changed, **facts)
    for file, reason, instead in take_damaged(run):
        events.write("damaged_file", file=file, reason=reason, instead=instead)
    if rank == 0:
        write_config(run, config)
        signals.before_end(partial(record_stop, run, events))
    stacks = run / "logs" / f"stacks-attempt-{number}.txt"
    watchdog = start_watchdog(config.run.hang_timeout, events, stacks)
    with closing(events), watchdog, open_console(rank, run / "logs", plan.steps, events) as console:
        yield Attempt(run, rank, world_size, device, events, console, SupersededCheck(run))


def begun() -> Events | None:
    """The events of the newest attempt that this process has begun, if it has."""
    return _begun[-1] if _begun else None


def record_stop(run: Path, events: Events, reason: str) -> None:
    """Records a stop that saved nothing, unless the file of failures has it."""
    if FILE not in os.environ:
        events.write("interrupted", step=latest_step(run) or 0, reason=reason)
        log_line(run, f"stopped by {reason}, with no step to save")


def log_line(run: Path, message: str) -> None:
    """Adds to rank 0's log what else is only on standard error."""
    AppendedFile(run / "logs" / "rank-0.log").append(f"coatnet: {message}\n".encode())


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
        print(f"{error}. That is an earlier start of this job, and its work is no longer used: continuing")
        return Claim(path, attempt, (path / ".lock").open())


def write_config(path: Path, config: Config) -> None:
    """Writes RUN/config.yaml so that it is always whole."""
    write_atomically(path / "config.yaml", to_yaml(config))
