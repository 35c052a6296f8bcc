"""What follows from a bad loss or gradient: a pure function of values that are equal on all ranks.

A step is bad if its loss or its gradient is not finite, or if its loss is far above the running mean of the losses
before it. A bad step is not applied: DeepSpeed drops a gradient that is not finite, and one of a bad loss is made so
on the device (`Guard.gate`), before it is applied, without the host having seen it. One bad step is a bad batch. After
the third in a row the run rolls back to the last checkpoint before them and skips them.

The same gradients would come again, so what is skipped must differ from what went wrong: the first time the bad
steps, the next time from the same checkpoint every step after it. The third time the run stops for a person to look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

BAD_IN_A_ROW = 3
"""Bad steps after which the run rolls back."""
TIMES_MEAN, TIMES_DEVIATION = 2.0, 10.0
"""A loss is bad if it is above so many times the running mean, and above it by so many mean deviations."""
WARMUP_LOSSES = 20
"""Losses after which there is a limit."""
WINDOW = 50
"""Losses that the running mean remembers, about."""
ATTEMPTS_FROM_A_CHECKPOINT = 2
"""How often a run rolls back to the same checkpoint."""


class Verdict(Enum):
    APPLY = "apply"
    SKIP = "skip"
    ROLLBACK = "rollback"


@dataclass(frozen=True)
class Guard:
    """The good losses so far: their number, running mean and mean deviation from it; and how many of the last steps
    were bad, of which `first_bad` (from 1) was the first."""

    losses: int = 0
    running_mean: float = 0.0
    deviation: float = 0.0
    bad_in_a_row: int = 0
    first_bad: int = 0

    @property
    def limit(self) -> float:
        """The highest good loss; infinite during the first losses."""
        if self.losses < WARMUP_LOSSES:
            return math.inf
        return self.running_mean + max((TIMES_MEAN - 1) * self.running_mean, TIMES_DEVIATION * self.deviation)

    def gate(self, mean_loss: torch.Tensor) -> torch.Tensor:
        """1 where a step of this mean loss may be applied, else NaN: the loss times NaN has a gradient that is dropped.

        It stays on the device: no host waits for it.
        """
        good = mean_loss.isfinite() & (mean_loss <= self.limit)
        return torch.where(good, 1.0, math.nan).float()

    def update(self, step: int, loss: float, applied: bool) -> tuple[Verdict, str, Guard]:
        """The verdict on a step by its mean loss and whether it was applied, why if it is bad, and the next guard."""
        if not math.isfinite(loss):
            reason = "the loss is not finite"
        elif loss > self.limit:
            reason = (
                f"the loss {loss:.4g} is above {self.limit:.4g}, far from its running mean of {self.running_mean:.4g}"
            )
        elif not applied:
            reason = "the gradient is not finite"
        else:
            return Verdict.APPLY, "", self._with_good_loss(loss)
        first_bad = self.first_bad if self.bad_in_a_row else step
        guard = replace(self, bad_in_a_row=self.bad_in_a_row + 1, first_bad=first_bad)
        return Verdict.ROLLBACK if guard.bad_in_a_row >= BAD_IN_A_ROW else Verdict.SKIP, reason, guard

    def _with_good_loss(self, loss: float) -> Guard:
        weight = 1 / min(self.losses + 1, WINDOW)  # of the first losses the plain mean
        mean = self.running_mean + weight * (loss - self.running_mean)
        deviation = self.deviation + weight * (abs(loss - mean) - self.deviation)
        return Guard(self.losses + 1, mean, deviation)


@dataclass(frozen=True)
class RollbackRecord:
    """A rollback to the checkpoint of step `to`, after which steps `first` to `last`, both included, are skipped."""

    to: int
    first: int
    last: int


def last_checkpoint_before(checkpoints: Sequence[int], first: int) -> int:
    """The newest of the checkpoints' steps before a bad step, or where none is left the oldest; 0 is the beginning."""
    before = [step for step in checkpoints if step < first]
    return max(before) if before else min(checkpoints, default=0)


def plan_rollback(
    history: Sequence[RollbackRecord], checkpoints: Sequence[int], first: int, last: int
) -> RollbackRecord | None:
    """The rollback after the bad steps `first` to `last`; None where the same checkpoint was tried often enough."""
    to = last_checkpoint_before(checkpoints, first)
    tried = sum(each.to == to for each in history)
    if tried >= ATTEMPTS_FROM_A_CHECKPOINT:
        return None
    return RollbackRecord(to, to + 1 if tried else max(first, to + 1), last)
