"""Rollback to a checkpoint and then past the samples that spoiled the run: written down so that it stays so.

It is a new attempt of the run, in the same processes. The record of the attempt says what is skipped from now on,
and no longer knows the checkpoints of the abandoned stretch, so that whatever resumes later, after whatever end, passes
over the same and never begins from those. They are set aside in RUN/checkpoints/abandoned, until the next rollback.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.checkpoint.attempts import allocate_next, recorded_rollbacks, trusted_checkpoints
from pipeline.checkpoint.reader import checkpoints, step_of
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
    """Takes the next attempt, which begins before the bad steps `first` to `last`; returns its number. For rank 0.

    RunFailed where there is no checkpoint to resume from in these processes, or where it was tried often enough.
    """
    folders = trusted_checkpoints(run)
    saved = [step_of(folder) for folder in folders]
    back = plan_rollback(history, saved, first, last)
    if back is None:
        to = last_checkpoint_before(saved, first)
        _discard(writer, to)  # what was saved since then has the same fault in it
        raise RunFailed(
            f"steps {first} to {last}: {why}. {run} has rolled back to step {to} {ATTEMPTS_FROM_A_CHECKPOINT} times and"
            " past what followed: look at events.jsonl (step_skipped, rollback), then resume from there with a lower"
            " optim.learning_rate, or move its newest checkpoints away to resume from an earlier one"
        )
    attempt = allocate_next(run, writer.attempt, back.to, [asdict(each) for each in [*history, back]])
    events.write("rollback", reason=why, **asdict(back))
    _discard(writer, back.to)
    if not folders:
        raise RunFailed(
            f"steps {first} to {last}: {why}, and there is no checkpoint before them yet: the same command begins"
            f" again, and skips steps {back.first} to {back.last}"
        )
    return attempt


def load_rollbacks(run: Path, state: Mapping[str, Any] | None) -> list[RollbackRecord]:
    """All rollbacks of a run, in order: what its records say, and a checkpoint's state, which may have come alone."""
    of_checkpoint = state.get("rollbacks", []) if state else []
    return list(dict.fromkeys(RollbackRecord(**each) for each in [*of_checkpoint, *recorded_rollbacks(run)]))


def skipped_steps(history: Iterable[RollbackRecord]) -> set[int]:
    """The numbers (from 0) of the steps that are not done."""
    return {step for each in history for step in range(each.first - 1, each.last)}


def _discard(writer: CheckpointWriter, after: int) -> None:
    """Sets the checkpoints of later steps aside, and removes their copies at the mirror."""
    quarantine(writer.root, after)
    if writer.mirror is not None:
        writer.mirror.forget(after)


def quarantine(root: Path, after: int) -> None:
    """Moves the checkpoints of later steps out of the way, in place of those that were moved before."""
    later: Sequence[Path] = [folder for folder in checkpoints(root) if step_of(folder) > after]
    aside = root / "abandoned"
    shutil.rmtree(aside, ignore_errors=True)
    for folder in later:
        aside.mkdir(exist_ok=True)
        folder.rename(aside / folder.name)
