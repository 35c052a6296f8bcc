"""A profiler's trace of a few steps of rank 0, where log.profile asks for it: RUN/profile/steps-100-105.json.gz.

It is a Chrome trace: open it at ui.perfetto.dev. A run that resumes after the first of the steps writes no trace, and
says so. A trace that cannot be written is tried once more when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from pipeline.config.schema import profiled_steps
from pipeline.errors import first_line
from pipeline.run.events import Events


class Profiler:
    """Traces the steps that log.profile names; call `before` each step, and close it after the last."""

    def __init__(
        self, profile: str | None, folder: Path, events: Events, log: Callable[[str], None], first_step: int
    ) -> None:
        """For the steps after `first_step`."""
        self._steps = profiled_steps(profile) if events.rank == 0 else None
        self._folder, self._events, self._log = folder, events, log
        self._running: torch.profiler.profile | None = None
        self._trace: torch.profiler.profile | None = None
        if self._steps is not None and self._steps[0] <= first_step:
            log(f"log.profile={profile} begins before the next step, {first_step + 1:,}: no trace is written")

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._write()

    def before(self, step: int) -> None:
        """Starts before the first of the steps, and stops before the one after the last."""
        if self._steps is None:
            return
        if self._running is not None and step not in self._steps:
            self._stop()
            self._write()
        if step == self._steps[0]:
            self._running = torch.profiler.profile()  # of all that is there: CPU, and CUDA
            self._running.start()
        self._last = step

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._trace, self._running = self._running, None

    def _write(self) -> None:
        if self._trace is None or self._steps is None:
            return
        file = self._folder / f"steps-{self._steps[0]}-{self._last}.json.gz"
        partial = file.with_name(f".{file.name}")
        try:
            self._folder.mkdir(exist_ok=True)
            self._trace.export_chrome_trace(str(partial))
            partial.rename(file)
        except (OSError, RuntimeError) as error:  # torch writes its part of it in C++
            self._events.warn_unwritten(file, f"cannot be written: {first_line(error)}")
            with suppress(OSError):
                partial.unlink()
            return
        self._trace = None
        self._log(f"rank 0's trace, from step {self._steps[0]} to the end of step {self._last}: {file}")
