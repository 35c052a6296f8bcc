"""Where a run's time went, from its events: each second of its wall clock is of one kind. Pure.

An attempt starts up until its first step is done. The rest of it, without evaluations, stalls of checkpoints and a
hang, is steps: productive ones, and those that were lost, since a later attempt resumed from before them. Outside of
attempts a run starts up where Slurm has started its job, waits where Slurm is to start it, and else does not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.run.events import BEGIN_EVENTS, HANG_EVENTS
from pipeline.run.small_files import NUMBER, has

KINDS = (
    "productive steps", "steps done again", "evaluation", "checkpoint stalls", "start-up", "hung", "waiting for Slurm",
    "not running",
)  # fmt: skip
PRODUCTIVE, REPEATED, EVALUATION, STALL, START_UP, HUNG, WAITING, STOPPED = range(len(KINDS))
_PAUSES = {"evaluation": EVALUATION, "checkpoint_stall": STALL}
_ENDS = ("finished", "interrupted", "failed", "out_of_memory", "rollback", *HANG_EVENTS)
_LEFT = {"left_step": int, "left_time": NUMBER}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """A start of a Slurm job, in seconds since 1970; `ended` is None where it has not, or nobody knows when."""

    began: float
    ended: float | None = None
    cause: str | None = None
    again: bool = False
    """Whether Slurm was to start the job once more."""


@dataclass(frozen=True)
class Attempt:
    """A start of the run, or its continuation after a rollback: it did the steps after `first` up to `last`."""

    number: int
    ranks: int | None
    began: float
    trained: float
    """When its first step was done, `first_done`."""
    known: float
    """The time of its last record; it ended then, or soon after."""
    ended: float
    first: int
    first_done: int
    last: int
    end: Row | None
    """The event that it ended with; None where it was killed, or is alive."""
    cause: str | None
    """Of the end of its start, by Slurm."""
    seconds: Sequence[float] = field(default_factory=list)
    """Of each of KINDS."""


@dataclass(frozen=True)
class Accounts:
    """A run's attempts, and its seconds of each of KINDS, from its submission or first start to its last record."""

    attempts: Sequence[Attempt]
    seconds: Sequence[float]

    @property
    def wall(self) -> float:
        return sum(self.seconds)

    @property
    def goodput(self) -> float | None:
        """The share of productive steps in the time in which the run had its machines; None without such time."""
        had = sum(self.seconds[:WAITING])
        return self.seconds[PRODUCTIVE] / had if had else None


def account(
    events: Sequence[Row],
    rows: Sequence[Row],
    starts: Sequence[Start] = (),
    submitted: Sequence[float] = (),
    hang_timeout: float = 0.0,
    now: float | None = None,
) -> Accounts:
    """The accounts of a run with these events and rows of metrics; `now` where it is alive.

    `submitted`: when it was submitted to Slurm. What an older run's events lack (evaluations, stalls, first steps, what
    a crash left) counts as steps, or as not running.
    """
    attempts = _attempts(events, rows, starts, now)
    times = [*submitted, *(start.began for start in starts), *(attempt.began for attempt in attempts)]
    ends = [
        *times,
        *(attempt.ended for attempt in attempts),
        *filter(None, (start.ended for start in starts)),
        now or 0.0,
    ]
    if not times:
        return Accounts([], [0.0] * len(KINDS))
    # What is laid down later covers what was there.
    spans = [(min(times), max(ends), STOPPED, 0)]
    begins = [*sorted(start.began for start in starts), max(ends)]
    queued = [*submitted, *(start.ended for start in starts if start.ended and start.again)]
    spans += [(at, next(each for each in begins if each >= at), WAITING, 0) for at in queued]
    spans += [(start.began, start.ended or max(ends), START_UP, 0) for start in starts]
    for place, attempt in enumerate(attempts, start=1):
        spans += [
            (attempt.began, attempt.trained, START_UP, place),
            (attempt.trained, attempt.known, PRODUCTIVE, place),
        ]
        spans += [(max(attempt.known, attempt.trained), attempt.ended, REPEATED, place)]
    places = {attempt.number: (place, attempt) for place, attempt in enumerate(attempts, start=1)}
    for event in events:
        if event["event"] in (*_PAUSES, *HANG_EVENTS) and event.get("attempt") in places:
            place, attempt = places[event["attempt"]]
            kind = _PAUSES.get(event["event"], HUNG)
            length = event.get("seconds", 0.0) if kind != HUNG else min(hang_timeout, event["time"] - attempt.trained)
            spans += [(max(attempt.began, event["time"] - length), min(attempt.ended, event["time"]), kind, place)]
    laid = _seconds(spans, len(attempts) + 1)
    for row, attempt, later in zip(laid[1:], attempts, range(1, len(attempts) + 1), strict=True):
        resumed = min((each.first for each in attempts[later:]), default=attempt.last)
        done, kept = (max(0, step - attempt.first_done) for step in (attempt.last, min(attempt.last, resumed)))
        lost = row[PRODUCTIVE] * (1 - kept / done if done else resumed < attempt.last)
        row[PRODUCTIVE], row[REPEATED] = row[PRODUCTIVE] - lost, row[REPEATED] + lost
    counted = [replace(attempt, seconds=row.tolist()) for attempt, row in zip(attempts, laid[1:], strict=True)]
    return Accounts(counted, laid.sum(0).tolist())


def _seconds(spans: Sequence[tuple[float, float, int, int]], places: int) -> np.ndarray:
    """float64 [places, kinds]: what spans (begin, end, kind, place) last where no later one covers them."""
    edges = np.unique([edge for begin, end, _, _ in spans for edge in (begin, max(begin, end))])
    owners = np.zeros((2, len(edges) - 1), dtype=int)
    for begin, end, *owner in spans:
        first, last = np.searchsorted(edges, (begin, max(begin, end)))
        owners[:, first:last] = np.reshape(owner, (2, 1))
    seconds = np.zeros((places, len(KINDS)))
    np.add.at(seconds, (owners[1], owners[0]), np.diff(edges))
    return seconds


def _attempts(events: Sequence[Row], rows: Sequence[Row], starts: Sequence[Start], now: float | None) -> list[Attempt]:
    """The attempts by their numbers, none of which lasts into the next one."""
    numbers = sorted({event["attempt"] for event in events if isinstance(event.get("attempt"), int)})
    own = {number: [event for event in events if event.get("attempt") == number] for number in numbers}
    found: list[Attempt] = []
    for before, number, after in zip([None, *numbers], numbers, [*numbers[1:], None], strict=False):
        opening = _first(own[number], "attempt_started")
        if opening is None:
            opening = _first(own.get(before, ()), "rollback") or own[number][0]
        left: Row = rows[-1] if rows else {}
        if after is not None:
            noted = _first(own[after], "attempt_started") or {}
            left = {"step": noted["left_step"], "time": noted["left_time"]} if has(noted, _LEFT) else {}
        before_it = found[-1].ranks if found else None
        ranks = opening["world_size"] if has(opening, {"world_size": int}) else before_it
        found.append(_attempt(number, ranks, opening, own[number], left, starts))
    if found and now is not None:
        found[-1] = replace(found[-1], known=max(found[-1].known, now), ended=max(found[-1].ended, now))
    limits = [attempt.began for attempt in found[1:]] + [float("inf")]
    return [
        replace(each, trained=min(each.trained, limit), known=min(each.known, limit), ended=min(each.ended, limit))
        for each, limit in zip(found, limits, strict=False)
    ]


def _attempt(
    number: int, ranks: int | None, opening: Row, events: Sequence[Row], left: Row, starts: Sequence[Start]
) -> Attempt:
    """An attempt with these events; `left` has the last row of metrics that it wrote."""
    began, end = opening.get("began", opening["time"]), _first(events[::-1], *_ENDS)
    begun = _first(events, *BEGIN_EVENTS) or {}
    first = begun.get("step", 0)
    steps = [left.get("step", 0), *(event["last"] for event in events if event["event"] == "rollback")]
    steps += [event["step"] for event in events if isinstance(event.get("step"), int)]
    known = max(began, *(event["time"] for event in events), 0.0 if end else left.get("time", 0.0))
    within = next((start for start in starts if start.began <= known <= (start.ended or known)), Start(0.0))
    ended = known if end is not None or within.ended is None else within.ended
    trained = _first(events, "first_step") or {"time": begun.get("time", ended), "step": first}
    return Attempt(
        number, ranks, began, trained["time"], known, ended, first, trained["step"],
        max(first, *steps), end, within.cause,
    )  # fmt: skip


def _first(events: Iterable[Row], *names: str) -> Row | None:
    return next((event for event in events if event["event"] in names), None)
