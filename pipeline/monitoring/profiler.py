"""A profiler's trace of a few steps of rank 0, where log.profile asks for it: RUN/profile/steps-100-105.json.gz.

It is a Chrome trace: open it at ui.perfetto.dev. A run that resumes after the first of the steps writes no trace, and
says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config.schema import profiled_steps


class Profiler:
    """Traces the steps that log.profile names; call `before` each step, and close it after the last."""

    def __init__(
        self, profile: str | None, folder: Path, rank: int, log: Callable[[str], None], first_step: int
    ) -> None:
        """For the steps after `first_step`."""
        self._steps = profiled_steps(profile) if rank == 0 else None
        self._folder, self._log = folder, log
        self._running: torch.profiler.profile | None = None
        if self._steps is not None and self._steps[0] <= first_step:
            log(f"log.profile={profile} begins before step {first_step + 1:,}, the next one: no trace is written")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Starts before the first of the steps, and stops before the one after the last."""
        if self._steps is None:
            return
        if step == self._steps[0] or step not in self._steps:
            self._stop()
        if step == self._steps[0]:
            self._running = torch.profiler.profile()  # of all that is there: CPU, and CUDA
            self._running.start()
        self._last = step

    def _stop(self) -> None:
        if self._running is None or self._steps is None:
            return
        self._running.stop()
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"steps-{self._steps[0]}-{self._last}.json.gz"
        self._running.export_chrome_trace(str(file))
        self._running = None
        self._log(f"rank 0's trace, from step {self._steps[0]} to the end of step {self._last}: {file}")
