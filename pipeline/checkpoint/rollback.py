"""Rollback to a checkpoint, and past the samples that made the loss bad.

A rollback begins a new attempt of the run, in the same processes. Its record has the steps that are skipped from now
on, and not the checkpoints after its target. So every later start skips the same steps and resumes
from none of those. They are moved to RUN/checkpoints/abandoned, until the next rollback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.checkpoint.attempts import allocate_next, recorded_rollbacks, trusted_checkpoints
from pipeline.checkpoint.reader import step_of
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.errors import RunFailed
from pipeline.run.events import Events
from pipeline.training.loss_guard import (
    ATTEMPTS_FROM_A_CHECKPOINT,
    RollbackRecord,
    last_checkpoint_before,
    plan_rollback,
)


def roll_back(
    run: Path, writer: CheckpointWriter, events: Events, history: list[RollbackRecord], first: int, last: int, why: str
) -> int:
    """Begins the next attempt, from before the bad steps `first` to `last`; returns its number. Only for rank 0.

    RunFailed where there is no checkpoint to roll back to, or where that was tried too often.
    """
    folders = trusted_checkpoints(run)
    saved = [step_of(folder) for folder in folders]
    back = plan_rollback(history, saved, first, last)
    if back is None:
        to = last_checkpoint_before(saved, first)
        allocate_next(run, writer.attempt, to, [asdict(each) for each in history])
        writer.abandon(to)  # what was saved since then is bad too
        raise RunFailed(
            f"steps {first} to {last}: {why}. {run} has rolled back to step {to} {ATTEMPTS_FROM_A_CHECKPOINT} times:"
            f" `coatnet replay {run} --step {first}` finds the sample and the layer; resume from there with a lower"
            " optim.learning_rate, or move its newest checkpoints away to resume from an earlier one"
        )
    attempt = allocate_next(run, writer.attempt, back.to, [asdict(each) for each in [*history, back]])
    events.write("rollback", reason=why, **asdict(back))
    writer.abandon(back.to)
    if not folders:
        raise RunFailed(
            f"steps {first} to {last}: {why}, and there is no checkpoint before them yet: the same command starts"
            f" over, and skips steps {back.first} to {back.last}"
        )
    return attempt


def load_rollbacks(run: Path, state: Mapping[str, Any] | None) -> list[RollbackRecord]:
    """All rollbacks of a run, in order: from its records, and from a checkpoint's state, which may come without."""
    of_checkpoint = state.get("rollbacks", []) if state else []
    return list(dict.fromkeys(RollbackRecord(**each) for each in [*of_checkpoint, *recorded_rollbacks(run)]))
