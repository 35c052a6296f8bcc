"""Marks of progress: what a rank finished last, so that one that hangs can be distinguished from one that is slow.

A mark is a few assignments: no I/O, no lock, no collective. Whatever may rightly take long marks its parts: a step its
micro batches, an evaluation its batches, a checkpoint its pieces. So `run.hang_timeout` bounds one such part only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple


class Beat(NamedTuple):
    number: int
    """Of this mark among the process's own; another number is progress."""
    what: str
    step: int | None
    """The last one that is done; None before the first of this start."""


_numbers = itertools.count(1)
_last: tuple[int, str, int | None] = (0, "nothing yet", None)
_step: int | None = None
_due = False


def beat(what: str) -> None:
    """Notes that something has been finished; any thread may."""
    global _last
    _last = (next(_numbers), what, _step)


def beat_step(done: int | None) -> None:
    """Notes that a step is done, or that the loop begins (None), from where on progress is due."""
    global _step, _due
    _step = done
    beat("nothing yet" if done is None else "a step")
    _due = True  # last: who sees it sees the mark


def pause() -> None:
    """Notes that what follows may rightly take hours: no progress is due until the next step is done."""
    global _due
    _due = False


def is_expected() -> bool:
    """Whether progress is to be expected."""
    return _due


def last_beat() -> Beat:
    return Beat(*_last)


class HeartbeatMonitor:
    """When other ranks last gave a heartbeat, and when any rank last had a new mark.

    Time in which this process itself hung counts as two intervals at most: nobody is judged for it.
    """

    def __init__(self, patience: float, interval: float, others: Iterable[int], now: float) -> None:
        """Seconds, all of them; `tick` is to be called every interval."""
        self._patience, self._interval = patience, interval
        self._lived, self._at = 0.0, now
        self._signs = dict.fromkeys(others, 0.0)
        self._marks: dict[int, int] = {}
        self._progress = 0.0

    def tick(self, now: float) -> None:
        """Lets time pass."""
        self._lived, self._at = self._time(now), now

    def observe(self, rank: int, mark: int, now: float) -> None:
        """Takes note of a new sign of another rank, or of this one, and of the number of its last mark."""
        time = self._time(now)
        woke = time - self._signs.get(rank, time) > self._patience / 2  # all have waited for it
        if woke or self._marks.get(rank) != mark:
            self._progress = time
        self._marks[rank] = mark
        if rank in self._signs:
            self._signs[rank] = time

    def lost_ranks(self) -> list[int]:
        """The ranks that have given no sign for too long."""
        return [rank for rank, time in self._signs.items() if self._lived - time > self._patience]

    def is_hung(self) -> bool:
        """Whether nobody has made progress for too long; not yet where a rank may turn out to be silent."""
        all_speak = all(self._lived - time <= 3 * self._interval for time in self._signs.values())
        return all_speak and self._lived - self._progress > self._patience

    def _time(self, now: float) -> float:
        return self._lived + min(now - self._at, 2 * self._interval)
