"""What a run prints while it trains: a progress bar on a terminal, plain lines elsewhere; standard error, rank 0 only.

step 1,200/93,800  loss 5.12  lr 1.2e-4  3,410 img/s  data 0.3 %  MFU 41 %  2 d 3 h left
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.formatting import format_duration, format_lr, format_number, format_percent
from pipeline.output import lost_output
from pipeline.run.appended import AppendedFile
from pipeline.run.events import Events

SECONDS_BETWEEN_LINES = 5.0
ROWS_FOR_SPEED = 10
terminal = rich.console.Console(stderr=True, soft_wrap=True, highlight=False)


class Console:
    """Prints lines, and rows of metrics as they come, to RUN/logs/rank-N.log; rank 0's go to the terminal too."""

    def __init__(self, rank: int, log: AppendedFile, bar: Progress | None, steps: int, events: Events) -> None:
        self._visible, self._log, self._bar, self._steps, self._events = rank == 0, log, bar, steps, events
        self._task = bar.add_task("", total=steps) if bar else None
        self._quiet_until, self._lost = 0.0, False
        self._recent_step_seconds: deque[float] = deque(maxlen=ROWS_FOR_SPEED)

    def print(self, line: str) -> None:
        if self._visible:
            terminal.print(line, markup=False)
        self._write(line)

    def _write(self, line: str) -> None:
        self._log.append(f"{line}\n".encode())
        if self._visible and not self._lost and (lost := lost_output()):
            self._lost = True
            self._events.write("output_lost", reason=lost)
            self._write(f"output is lost ({lost}): from here on it is only in this log")

    def at(self, step: int) -> str:
        """How a line about a step begins."""
        return f"step {step:,}/{self._steps:,}"

    def print_row(self, row: dict[str, Any]) -> None:
        """Prints a row of metrics.jsonl, at most every few seconds, so that a cluster's logs stay readable."""
        self._recent_step_seconds.append(row["step_seconds"])
        line = format_row(row, self._steps, eta_seconds(row["step"], self._steps, self._recent_step_seconds))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row["step"], description=line)
        if time.monotonic() < self._quiet_until and row["step"] < self._steps:
            return
        self._quiet_until = time.monotonic() + SECONDS_BETWEEN_LINES
        if self._visible and self._bar is None:
            terminal.print(line, markup=False)
        self._write(line)


@contextmanager
def open_console(rank: int, logs: Path, steps: int, events: Events) -> Iterator[Console]:
    """A console whose lines are kept in LOGS/rank-N.log."""
    with closing(AppendedFile(logs / f"rank-{rank}.log", events.warn_unwritten)) as log, ExitStack() as stack:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
        bar = Progress(*columns, console=terminal, expand=True) if rank == 0 and terminal.is_terminal else None
        yield Console(rank, log, stack.enter_context(bar) if bar else None, steps, events)


def eta_seconds(step: int, steps: int, speeds: Sequence[float]) -> float:
    """Of training, at the middle one of the last speeds (seconds a step); evaluations come on top."""
    return max(0, steps - step) * statistics.median(list(speeds)[-ROWS_FOR_SPEED:])


def format_row(row: dict[str, Any], steps: int, left: float) -> str:
    """A row of a step as a line."""
    facts = [
        f"step {row['step']:,}/{steps:,}",
        f"loss {format_number(row['loss'])}",
        f"lr {format_lr(row['lr'])}",
        f"{format_number(row['images_per_second'])} img/s",
        f"data {format_percent(row['data_wait'], 1)}",
    ]
    if "mfu" in row:
        facts.append(f"MFU {format_percent(row['mfu'])}")
    return "  ".join([*facts, f"{format_duration(left)} left"])
