"""A request to stop, as a flag that the loop reads as a step begins; no work is done inside a signal handler."""

from __future__ import annotations

import signal

_reason: str | None = None


def install_handlers() -> None:
    """From now on SIGTERM, SIGUSR2 and SIGINT ask for a stop in place of ending the process; a second SIGINT ends it.

    SIGUSR2 is what Slurm sends some time before a job's end, if asked to.
    """

    def note(number: int, _frame: object) -> None:
        global _reason
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _reason = _reason or signal.Signals(number).name

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, note)


def requested() -> str | None:
    """The signal by which this process was asked to stop, if it was."""
    return _reason
