"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere; standard error, rank 0 only.

Next: evaluate.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
console = Console(stderr=True, soft_wrap=True, highlight=False)


class Reporter:
    """Says lines, and shows rows of metrics as they come; all is kept in a log, rank 0's is on the terminal too."""

    def __init__(self, rank: int, log: TextIO, bar: Progress | None, steps: int) -> None:
        self._visible, self._log, self._bar, self._steps = rank == 0, log, bar, steps
        self._task = bar.add_task("", total=steps) if bar else None
        self._quiet_until = 0.0

    def say(self, line: str) -> None:
        if self._visible:
            console.print(line, markup=False)
        print(line, file=self._log, flush=True)

    def show(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl; as a line at most every few seconds, so that a cluster's logs stay readable."""
        facts = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row["step"], description=facts)
        if time.monotonic() < self._quiet_until and row["step"] < self._steps:
            return
        self._quiet_until = time.monotonic() + SECONDS_BETWEEN_LINES
        waiting, left = f"data wait {100 * row['data_wait']:.0f} %", (self._steps - row["step"]) * row["step_seconds"]
        line = f"step {row['step']}/{self._steps}  {facts}  {waiting}  {_duration(left)} left"
        if self._visible and self._bar is None:
            console.print(line, markup=False)
        print(line, file=self._log, flush=True)


@contextmanager
def reporter(rank: int, logs: Path, steps: int) -> Iterator[Reporter]:
    """A reporter that keeps what it says in LOGS/rank-N.log."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    logs.mkdir(exist_ok=True)
    with (logs / f"rank-{rank}.log").open("a") as log, ExitStack() as terminal:
        bar = Progress(*columns, TimeRemainingColumn(), console=console) if rank == 0 and console.is_terminal else None
        yield Reporter(rank, log, terminal.enter_context(bar) if bar else None, steps)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
