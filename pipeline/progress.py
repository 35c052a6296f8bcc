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
    """Says lines, and shows rows of metrics as they come; rank 0's are kept in RUN/logs/rank-0.log as well."""

    def __init__(self, bar: Progress | None, log: TextIO | None, steps: int, first_step: int) -> None:
        self._bar, self._log, self._steps = bar, log, steps
        self._task = bar.add_task("", total=steps, completed=first_step) if bar else None
        self._quiet_until = 0.0

    def say(self, line: str) -> None:
        console.print(line, markup=False)
        self._keep(line)

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
        if self._bar is None:
            console.print(line, markup=False)
        self._keep(line)

    def _keep(self, line: str) -> None:
        if self._log is not None:
            print(line, file=self._log, flush=True)


@contextmanager
def reporter(rank: int, log: Path, steps: int, first_step: int) -> Iterator[Reporter]:
    """A reporter for rank 0; for the others, whose standard error is their log, one that writes there."""
    if rank > 0:
        yield Reporter(None, None, steps, first_step)
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file, ExitStack() as terminal:
        bar = Progress(*columns, TimeRemainingColumn(), console=console) if console.is_terminal else None
        yield Reporter(terminal.enter_context(bar) if bar else None, file, steps, first_step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
