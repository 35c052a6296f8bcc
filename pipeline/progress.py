"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere; standard error, rank 0 only.

Next: evaluate.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0
console = Console(stderr=True, soft_wrap=True, highlight=False)


class Reporter:
    """Says lines, and shows rows of metrics as they come."""

    def __init__(self, bar: Progress | None, steps: int, first_step: int) -> None:
        self._bar, self._steps = bar, steps
        self._task = bar.add_task("", total=steps, completed=first_step) if bar else None
        self._quiet_until = 0.0

    def say(self, line: str) -> None:
        console.print(line, markup=False)

    def show(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        facts = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} images/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row["step"], description=facts)
            return
        if time.monotonic() < self._quiet_until and row["step"] < self._steps:
            return
        self._quiet_until = time.monotonic() + SECONDS_BETWEEN_LINES
        left = (self._steps - row["step"]) * row["step_seconds"]
        waiting = f"data wait {100 * row['data_wait']:.0f} %"
        self.say(f"step {row['step']}/{self._steps}  {facts}  {waiting}  {_duration(left)} left")


@contextmanager
def reporter(rank: int, steps: int, first_step: int) -> Iterator[Reporter]:
    """A reporter for rank 0; for the others one that is as silent as their log allows."""
    if rank > 0 or not sys.stderr.isatty():
        yield Reporter(None, steps, first_step)
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield Reporter(bar, steps, first_step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
