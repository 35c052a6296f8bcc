"""`coatnet report`: where a run's time went, and a page that a browser shows whole, of runs in any state."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report.accounting import (
    EVALUATION,
    HUNG,
    KINDS,
    PRODUCTIVE,
    REPEATED,
    STALL,
    START_UP,
    STOPPED,
    WAITING,
    Start,
    account,
)

# ----------------------------------------------------------------------------------------------------------------- time

SECONDS = st.floats(0.05, 500)


class Simulated:
    """A run whose seconds of each kind are known, and what it writes of them."""

    def __init__(self, by_slurm: bool) -> None:
        self.now, self.step, self.saved, self.attempt = 1e9, 0, 0, -1
        self.events: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.starts: list[Start] = []
        self.submitted = [self.now] if by_slurm else []
        self.seconds = [0.0] * len(KINDS)

    def spend(self, kind: int, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.now += seconds

    def event(self, event: str, **facts: Any) -> None:
        self.events.append({"time": self.now, "attempt": self.attempt, "event": event, **facts})

    def begin(self, before: float, start_up: float) -> None:
        """A start, `before` which it waits, or nobody starts it."""
        if self.submitted:
            self.spend(WAITING, before)
            self.starts.append(Start(self.now))
            self.spend(START_UP, start_up)
        elif self.attempt >= 0:
            self.spend(STOPPED, before)
        began, self.attempt = self.now, self.attempt + 1
        self.spend(START_UP, start_up)
        left = {"left_step": self.rows[-1]["step"], "left_time": self.rows[-1]["time"]} if self.rows else {}
        self.event("attempt_started", began=began, world_size=2, **left)

    def train(self, start_up: float, steps: int, each: float, pauses: dict[int, float]) -> None:
        self.step, first = self.saved, self.saved
        self.rows = [row for row in self.rows if row["step"] <= self.step]
        self.event("training_resumed" if self.step else "training_started", step=self.step)
        self.spend(START_UP, start_up)
        self.event("first_step", step=first + 1)
        for self.step in range(first + 1, first + steps + 1):
            if self.step > first + 1:
                self.spend(PRODUCTIVE, each)
            self.rows.append({"step": self.step, "loss": 1.0, "time": self.now})
            for kind, event, every in ((STALL, "checkpoint_stall", 3), (EVALUATION, "evaluation", 5)):
                if self.step % every == 0:
                    self.spend(kind, pauses[kind])
                    self.event(event, step=self.step, seconds=pauses[kind])
                    self.saved = self.step if kind == STALL else self.saved
        self.lost = (self.step - max(self.saved, first + 1)) * each if steps else 0.0

    def end(self, how: str, after: float) -> None:
        if how == "killed":
            self.spend(REPEATED if self.starts else STOPPED, after)
        elif how == "hang":
            self.spend(HUNG, after)
            self.event("hang", ranks=[])
        elif how == "rollback":
            self.event("rollback", to=self.saved, first=self.saved + 1, last=self.step, reason="")
            self.attempt += 1
        else:
            self.saved, self.lost = self.step, 0.0
            self.event(how, step=self.step)
        self.seconds[PRODUCTIVE] -= self.lost
        self.seconds[REPEATED] += self.lost
        if self.starts and how != "rollback":
            self.starts[-1] = Start(self.starts[-1].began, self.now, "crash", again=True)


LIVES = st.lists(
    st.tuples(st.sampled_from(["killed", "hang", "rollback", "interrupted"]), st.integers(1, 40), SECONDS, SECONDS),
    max_size=6,
)


@given(st.booleans(), LIVES, st.integers(1, 40), st.sampled_from(["finished", "alive"]), st.tuples(SECONDS, SECONDS))
def test_each_second_of_a_run_is_of_the_kind_that_it_was_spent_on(
    by_slurm: bool, lives: list[tuple[str, int, float, float]], steps: int, how: str, pauses: tuple[float, float]
) -> None:
    run, hang_timeout, follows_rollback = Simulated(by_slurm), 77.0, False
    for end, count, other, each in [*lives, (how, steps, 3.0, 2.0)]:
        if not follows_rollback:
            run.begin(other, other / 3)
        run.train(other / 2, count, each, {STALL: pauses[0], EVALUATION: pauses[1]})
        if end == "alive":
            break
        run.end(end, hang_timeout if end == "hang" else other)
        follows_rollback = end == "rollback"
    now = run.now if how == "alive" else None
    found = account(run.events, run.rows, run.starts, run.submitted, hang_timeout, now)
    assert found.seconds == pytest.approx(run.seconds, rel=1e-3, abs=0.01)
    assert found.wall == pytest.approx(run.now - 1e9, rel=1e-6, abs=1e-3)
    assert found.goodput == pytest.approx(run.seconds[PRODUCTIVE] / sum(run.seconds[:WAITING]), rel=1e-3)


def test_of_an_older_run_all_is_accounted_for_that_its_events_tell() -> None:
    run = [(0, "attempt_started", {}), (1, "training_started", {"step": 0}), (21, "checkpoint", {"step": 20})]
    run += [(30, "attempt_started", {}), (32, "training_resumed", {"step": 10}), (52, "finished", {"step": 30})]
    events = [{"time": at, "attempt": at // 30, "event": event, **facts} for at, event, facts in run]
    found = account(events, [])
    assert found.wall == 52 and found.seconds[STOPPED] == 9
    assert (found.seconds[PRODUCTIVE], found.seconds[REPEATED], found.seconds[START_UP]) == (30, 10, 3)
    assert account([], []).goodput is None
