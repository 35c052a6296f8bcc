"""What is to be done about a loss or a gradient that went bad: a pure function of what all ranks see alike.

A step is bad if its loss or its gradient is not finite, or if its loss is far above the running level of the losses
before it. A bad step is not applied: DeepSpeed drops a gradient that is not finite, and one of a bad loss is made so
on the device (`gate`), before it is applied, without the host having seen it. One bad step is a bad batch. The
third in a row is no accident: the run rolls back to the last checkpoint before them, and then past them.

The same gradients would come again, so what is skipped must differ from what went wrong: the first time the bad
steps, the next time from the same checkpoint everything from there on. After that a person is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

BAD_IN_A_ROW = 3
"""Bad steps after which the run rolls back."""
TIMES_LEVEL, TIMES_DEVIATION = 2.0, 10.0
"""A loss is bad that is above so many times the level, and above it by so many times the usual deviation."""
JUDGED_AFTER = 20
"""Losses that make a level."""
MEMORY = 50
"""Losses that the level remembers, about."""
ATTEMPTS_FROM_A_CHECKPOINT = 2
"""How often a run rolls back to the same checkpoint."""


class Verdict(Enum):
    APPLY = "apply"
    SKIP = "skip"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Guard:
    """What has been seen: how many good losses, their level and deviation from it; how many steps in a row are bad,
    and the first of them (from 1)."""

    losses: int = 0
    level: float = 0.0
    deviation: float = 0.0
    bad: int = 0
    first_bad: int = 0

    @property
    def limit(self) -> float:
        """The highest loss that is good; infinite while too few were seen."""
        if self.losses < JUDGED_AFTER:
            return math.inf
        return self.level + max((TIMES_LEVEL - 1) * self.level, TIMES_DEVIATION * self.deviation)


@dataclass(frozen=True)
class RollbackRecord:
    """A rollback: to a checkpoint's step, and then past the steps from `first` to `last`, both included."""

    to: int
    first: int
    last: int


def gate(mean_loss: torch.Tensor, limit: float) -> torch.Tensor:
    """1 where a step of this mean loss may be applied, else NaN: its loss times that has a gradient that is dropped."""
    good = mean_loss.isfinite() & (mean_loss <= limit)
    return torch.where(good, 1.0, math.nan).float()


def update(guard: Guard, step: int, loss: float, applied: bool) -> tuple[Verdict, str, Guard]:
    """The verdict on a step by its mean loss and by whether it was applied, why, and what has been seen then."""
    if not math.isfinite(loss):
        why = "the loss is not finite"
    elif loss > guard.limit:
        why = f"the loss {loss:.4g} is above {guard.limit:.4g}, far from its level of {guard.level:.4g}"
    elif not applied:
        why = "the gradient is not finite"
    else:
        return Verdict.APPLY, "", _followed(guard, loss)
    first_bad = guard.first_bad if guard.bad else step
    seen = replace(guard, bad=guard.bad + 1, first_bad=first_bad)
    return Verdict.ROLLBACK if seen.bad >= BAD_IN_A_ROW else Verdict.SKIP, why, seen


def _followed(guard: Guard, loss: float) -> Guard:
    """The guard after a good loss; of few losses level and deviation are plain means."""
    weight = 1 / min(guard.losses + 1, MEMORY)
    level = guard.level + weight * (loss - guard.level)
    deviation = guard.deviation + weight * (abs(loss - level) - guard.deviation)
    return Guard(guard.losses + 1, level, deviation)


def last_checkpoint_before(checkpoints: Sequence[int], first: int) -> int:
    """The newest of the checkpoints' steps before a bad step, or where none is left the oldest; 0 is the beginning."""
    before = [step for step in checkpoints if step < first]
    return max(before) if before else min(checkpoints, default=0)


def plan_rollback(
    history: Sequence[RollbackRecord], checkpoints: Sequence[int], first: int, last: int
) -> RollbackRecord | None:
    """Where to go after the bad steps `first` to `last`: None where it was tried often enough."""
    to = last_checkpoint_before(checkpoints, first)
    tried = sum(each.to == to for each in history)
    if tried >= ATTEMPTS_FROM_A_CHECKPOINT:
        return None
    return RollbackRecord(to, to + 1 if tried else max(first, to + 1), last)
