"""A request to stop, as a flag that the loop reads at a step's end; no work is done inside a signal handler.

Next: train.py.
"""

from __future__ import annotations

import signal

_requested = False


def listen() -> None:
    """From now on SIGTERM and SIGINT ask for a stop in place of ending the process; a second SIGINT ends it."""

    def note(number: int, _frame: object) -> None:
        global _requested
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _requested = True

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested
