"""The end of an attempt by an error: recorded once, by the rank that failed first, and soon, whatever else happens.

A rank that fails alone keeps the others waiting. What it has open (reading threads, an upload of metrics, a checkpoint
that is being written) is closed within CLEANUP_SECONDS, or left; an error of that does not hide the first one. Then the
process ends (cli.py), and with it its launcher's others.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from pipeline.attempt import begun, log_line
from pipeline.checkpoint.attempts import latest_attempt
from pipeline.distributed.collectives import lost_rank
from pipeline.distributed.environment import FILE
from pipeline.errors import Interrupted, explain
from pipeline.run.events import Events
from pipeline.run.failures import record_failure
from pipeline.run.jsonl import read_lines

CLEANUP_SECONDS = 60.0
"""Enough for what W&B is given, and for most checkpoints that are being written."""


class BoundedCleanup(ExitStack):
    """An ExitStack that an error leaves within CLEANUP_SECONDS, and as itself; `first` is then called first."""

    def __init__(self, run: Path, events: Events, first: Callable[[], object]) -> None:
        super().__init__()
        self._run, self._events, self._first = run, events, first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None:
        if not isinstance(error, Exception) or isinstance(error, Interrupted):
            return super().__exit__(kind, error, trace)
        timer = threading.Timer(CLEANUP_SECONDS, self._give_up, [error])
        timer.daemon = True
        timer.start()
        self.callback(self._first)
        try:
            super().__exit__(kind, error, trace)
        except Exception as second:
            if second is not error:
                print(f"warning: the cleanup failed too: {_describe(second)}", file=sys.stderr)
        timer.cancel()
        return False

    def _give_up(self, error: Exception) -> None:
        try:
            print(f"coatnet: {_describe(error)}; ended after {CLEANUP_SECONDS:.0f} s of cleanup", file=sys.stderr)
            if lost_rank(error) is None:
                record_failure(1, _describe(error))
                _record(self._run, self._events, error)
        finally:
            os._exit(1)


@contextmanager
def record_exit_reason(run: Path) -> Iterator[None]:
    """Inside, what a rank fails with goes to events.jsonl as `failed`, and of rank 0 to its log, unless FILE has it."""
    try:
        yield
    except Exception as error:
        if (events := begun()) is not None and lost_rank(error) is None:
            _record(run, events, error)
        raise


def _record(run: Path, events: Events, error: Exception) -> None:
    """Unless a newer attempt has begun, or this one's failure is recorded: ranks fail after the first, or with it."""
    if FILE in os.environ or latest_attempt(run) != events.attempt:
        return
    message, rank, file = _describe(error), events.rank, run / "events.jsonl"
    if not isinstance(error, Interrupted):
        with ExitStack() as held:
            with suppress(OSError):  # without locks, ranks that fail at the same moment each record it
                fcntl.flock(held.enter_context(file.open("ab")), fcntl.LOCK_EX)
            known = [row["attempt"] for row in read_lines(file, event=str, attempt=int) if row["event"] == "failed"]
            if events.attempt not in known:
                events.write("failed", by=rank, rank=rank, message=message.partition("\n")[0])
    if rank == 0:
        log_line(run, message)


def _describe(error: Exception) -> str:
    return explain(error) or f"{type(error).__name__}: {error}"
