"""Beats: what a rank finished last, so that one that hangs can be distinguished from one that is slow.

A beat is a few assignments: no I/O, no lock, no collective. What may take long beats for its parts: a step for its
micro batches, an evaluation for its batches, a checkpoint for its blocks. So `run.hang_timeout` bounds one such part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple


class Beat(NamedTuple):
    number: int
    """Counts the process's beats; another number is progress."""
    what: str
    step: int | None
    """The last finished step; None before the first of this start."""


_numbers = itertools.count(1)
_last: tuple[int, str, int | None] = (0, "nothing yet", None)
_step: int | None = None
_expected = False


def beat(what: str) -> None:
    """Records that something has been finished; any thread may."""
    global _last
    _last = (next(_numbers), what, _step)


def beat_step(done: int | None) -> None:
    """Records that a step is done, or that the loop begins (None); from then on progress is expected."""
    global _step, _expected
    _step = done
    beat("nothing yet" if done is None else "a step")
    _expected = True  # last: a thread that sees it sees the beat


def pause() -> None:
    """Records that what follows may take hours: no progress is expected until the next step is done."""
    global _expected
    _expected = False


def is_expected() -> bool:
    """Whether the watchdog may expect progress."""
    return _expected


def last_beat() -> Beat:
    return Beat(*_last)


class HeartbeatMonitor:
    """When other ranks last sent a heartbeat, and when any rank last made progress.

    Time in which this process itself hung counts as two intervals at most, so that no rank is blamed for it.
    """

    def __init__(self, timeout: float, interval: float, others: Iterable[int], now: float) -> None:
        """`timeout`, `interval` and `now` in seconds; `tick` is to be called every interval."""
        self._timeout, self._interval = timeout, interval
        self._clock, self._at = 0.0, now
        self._heard = dict.fromkeys(others, 0.0)
        self._beats: dict[int, int] = {}
        self._progress = 0.0

    def tick(self, now: float) -> None:
        """Lets time pass."""
        self._clock, self._at = self._time(now), now

    def observe(self, rank: int, beat: int, now: float) -> None:
        """Records a new heartbeat of another rank, or of this one, with the number of its last beat."""
        time = self._time(now)
        woke = time - self._heard.get(rank, time) > self._timeout / 2  # all have waited for it
        if woke or self._beats.get(rank) != beat:
            self._progress = time
        self._beats[rank] = beat
        if rank in self._heard:
            self._heard[rank] = time

    def lost_ranks(self) -> list[int]:
        """The ranks without a heartbeat for longer than the timeout."""
        return [rank for rank, time in self._heard.items() if self._clock - time > self._timeout]

    def is_hung(self) -> bool:
        """Whether no rank has made progress for longer than the timeout; not yet where a rank may prove to be lost."""
        all_heard = all(self._clock - time <= 3 * self._interval for time in self._heard.values())
        return all_heard and self._clock - self._progress > self._timeout

    def _time(self, now: float) -> float:
        return self._clock + min(now - self._at, 2 * self._interval)
