"""A request to stop, as a flag that the loop reads before each step; signal handlers do nothing else."""

from __future__ import annotations

import signal

_reason: str | None = None


def install_handlers() -> None:
    """SIGTERM, SIGUSR2 and SIGINT then request a stop instead of ending the process; a second SIGINT ends it.

    Slurm can send SIGUSR2 some time before a job's time limit.
    """

    def record(number: int, _frame: object) -> None:
        global _reason
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _reason = _reason or signal.Signals(number).name

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, record)


def requested() -> str | None:
    """The signal that requested a stop, if any."""
    return _reason
