"""The checkpoints of a run as its training loop uses them: resume from the newest, save, roll back.

A save that fails, or is still being written when the next one is due, does not end the training: a warning says what is
at stake, and the next one is tried. After MAX_FAILURES in a row, or where the run's last step cannot be saved, it ends.
Ranks learn of each other when a save is due, so that all do the same.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint.attempts import trusted_checkpoints
from pipeline.checkpoint.reader import DamagedCheckpoint, step_name
from pipeline.checkpoint.restore import restore, warn_of_damage
from pipeline.checkpoint.rollback import load_rollbacks, roll_back
from pipeline.checkpoint.writer import CheckpointWriter, SaveFailed
from pipeline.config.schema import Config
from pipeline.distributed import signals
from pipeline.distributed.collectives import all_gather, from_rank_zero
from pipeline.distributed.environment import rank_and_world_size
from pipeline.distributed.heartbeat import pause
from pipeline.errors import RunFailed
from pipeline.lineage import lineage_entry
from pipeline.plan import Plan
from pipeline.run.events import Events, last_logged_step
from pipeline.training import ema
from pipeline.training.epoch_audit import EpochAudit
from pipeline.training.state import TrainState

MAX_FAILURES = 3
WRITING_SECONDS = 5.0
"""A write that takes no longer is waited for where the next save is due, so that short runs keep every checkpoint."""
Outcome = tuple[bool, RunFailed | None]
"""Whether a rank's writing has ended, and with which error."""


class Checkpointer:
    """Moves an engine's tensors and a TrainState to and from RUN/checkpoints; every rank calls every method."""

    def __init__(
        self, engine: Any, config: Config, plan: Plan, ancestors: list[dict[str, Any]], events: Events
    ) -> None:
        """`ancestors`: the entries (../lineage.py) of the runs that the initial weights come from."""
        self._engine, self._events, self._run = engine, events, Path(config.run.dir)
        self._train_set, self._train = plan.train, config.train
        entry = lineage_entry(config, plan.steps, ancestors)
        self._new_augmentations = entry["new_augmentations"]
        self._provenance = {
            "classes": plan.train.classes,
            "train_fingerprint": plan.train.fingerprint,
            "train_header_fingerprint": plan.train.header_fingerprint,
            "config": config.model_dump(mode="json"),
            "ancestry": [*ancestors, entry],
        }
        self._saved: int | None = None
        """The step of the newest good checkpoint."""
        self._writing: int | None = None
        """The step whose save has begun, and not yet been seen to end."""
        self._began, self._failures, self._reason = 0.0, 0, ""
        self._error: RunFailed | None = None
        self._writer = CheckpointWriter(
            self._run / "checkpoints", events.attempt, *rank_and_world_size(), config.checkpoint, events, self._warn
        )

    def resume(self) -> TrainState:
        """Loads the newest good checkpoint into the engine; returns its state, or without one that of a new run."""
        pause()
        if self._writer.rank == 0:
            self._writer.remove_leftovers()
        bn_ema = ema.clone(ema.statistics(self._engine.module)) if self._train.ema else None
        folders = from_rank_zero(lambda: trusted_checkpoints(self._run))
        saved = restore(self._engine, folders, bn_ema, self._train_set, self._report_damage)
        rollbacks = from_rank_zero(lambda: load_rollbacks(self._run, saved))
        audit = EpochAudit(self._train_set.samples, self._train.global_batch, saved["epochs"] if saved else None)
        made = rollbacks, bn_ema
        state = TrainState.from_json(saved, audit, *made) if saved else TrainState.begin(audit, *made)
        self._saved = state.step if saved else None
        event = "training_resumed" if saved else "training_started"
        lost = self._warn_of_lost_steps() if saved is None and self._writer.rank == 0 else {}
        self._events.write(event, step=state.step, **lost, new_augmentations=self._new_augmentations)
        return state

    def _report_damage(self, folder: Path, error: DamagedCheckpoint) -> None:
        self._events.write("damaged_checkpoint", checkpoint=folder.name, reason=str(error))
        warn_of_damage(folder, error)

    def _warn_of_lost_steps(self) -> dict[str, int]:
        """The steps that a run had done before it could save any, for the event; {} at a first start."""
        lost = last_logged_step(self._run)
        if lost:
            print(
                f"warning: {self._run} starts over: it had no checkpoint yet, and {lost} steps are lost",
                file=sys.stderr,
            )
        return {"steps_lost": lost} if lost else {}

    def save(self, state: TrainState) -> None:
        """Copies the state to the host and returns; a thread writes it. Nothing where this step is saved already, or
        the last save is still being written.

        RunFailed after too many saves that failed in a row. Collective.
        """
        if state.step in (self._saved, self._writing):
            return
        with self._stall(state.step):
            ended = self._settle(max(0.0, self._began + WRITING_SECONDS - time.monotonic()))
            if ended and self._failures < MAX_FAILURES:
                self._begin(state)
                self._writer.await_state()
                if self._failures == MAX_FAILURES - 1:  # so that no steps are trained for nothing
                    self._settle(WRITING_SECONDS)
        if self._failures >= MAX_FAILURES:
            raise self._failed()
        if not ended:
            self._warn_skipped(state.step)

    def finish(self, state: TrainState) -> None:
        """Returns once this step is in a durable checkpoint; RunFailed where it cannot be written. Collective."""
        pause()
        with self._stall(state.step):
            self._settle_at_last()
            if self._saved != state.step:
                self._begin(state)
                self._settle_at_last()
        if self._saved != state.step:
            raise self._failed()

    def wait(self) -> None:
        """Returns once this rank's writing has ended; no collective."""
        self._writer.wait()

    def close(self) -> None:
        """Returns once the last checkpoint is mirrored, and superseded ones are removed. Collective.

        All ranks wait for rank 0, which mirrors, since a launcher ends the others soon after the first one; and for
        moments only, since a collective that takes long fails.
        """
        pause()
        before = signals.count()
        with self._stall(self._saved):
            while not from_rank_zero(lambda: self._writer.is_mirrored(self._saved or 0, before)):
                pass

    def path(self, step: int) -> Path:
        return self._writer.root / step_name(step)

    def roll_back(self, state: TrainState, reason: str) -> None:
        """Abandons the last bad steps, and what was saved since: a new attempt, which `resume` then begins.

        RunFailed where there is no checkpoint before them, or where the same one was tried often enough.
        """
        pause()
        with self._stall(state.step):
            self._settle_at_last()
        bad_steps = state.guard.first_bad, state.step
        take = partial(roll_back, self._run, self._writer, self._events, state.rollbacks, *bad_steps, reason)
        self._events.attempt = self._writer.attempt = from_rank_zero(take)

    def _stall(self, step: int | None) -> AbstractContextManager[None]:
        """Records for how long training waits inside."""
        return self._events.timed("checkpoint_stall", step=step)

    def _begin(self, state: TrainState) -> None:
        self._writing, self._began = state.step, time.monotonic()
        self._writer.save(self._engine, state.bn_ema, {**state.to_json(), **self._provenance})

    def _settle(self, seconds: float) -> bool:
        """Whether the last save has ended on every rank, after so many seconds at most; then all know how. Collective.

        A rank that fails leaves rank 0 a note, and rank 0's end is the checkpoint's.
        """
        if self._writing is None:
            return True
        outcomes = self._gather_outcomes(seconds)
        if (lost := _errors(outcomes)) and not outcomes[0][0]:  # rank 0 has got no note, and waits for a part
            self._writer.give_up(str(lost[0]))
            outcomes = self._gather_outcomes(WRITING_SECONDS)
        for error in _errors(outcomes):
            if not isinstance(error, SaveFailed):  # a newer attempt has begun
                raise error
        if not all(ended for ended, _ in outcomes):
            return False
        step, self._writing, self._error, failure = self._writing, None, None, outcomes[0][1]
        if failure is None:
            self._saved, self._failures = step, 0
        else:
            self._failures, self._reason = self._failures + 1, str(failure)
            self._writer.remove_failed(step)
        return True

    def _gather_outcomes(self, seconds: float) -> list[Outcome]:
        try:
            ended = self._writer.wait(seconds)
        except RunFailed as error:  # kept until all have ended
            ended, self._error = True, error
        return all_gather([(ended, self._error)])

    def _settle_at_last(self) -> None:
        while not self._settle(WRITING_SECONDS):
            pass

    def _failed(self) -> RunFailed:
        begins = "starts over" if self._saved is None else f"resumes from step {self._saved}"
        many = f"{self._failures} checkpoints in a row failed, the last one: " if self._failures > 1 else ""
        return RunFailed(f"{many}{self._reason}, then the same command {begins}")

    def _at_stake(self) -> str:
        return f"no checkpoint has what was trained {'so far' if self._saved is None else f'since step {self._saved}'}"

    def _warn(self, step: int, error: SaveFailed) -> None:
        """Of a save that has just failed, from the writing thread of rank 0."""
        failures = self._failures + 1
        facts = {"step": step, "reason": str(error), "in_a_row": failures}
        end = f"the run ends after {MAX_FAILURES} failures in a row (this is number {failures})"
        self._events.warn("checkpoint_failed", f"{error}; {self._at_stake()}, and {end}", **facts)

    def _warn_skipped(self, step: int) -> None:
        if self._writer.rank == 0:
            seconds = round(time.monotonic() - self._began)
            why = f"the one of step {self._writing} is still being written after {seconds} s"
            facts = {"step": step, "writing": self._writing, "seconds": seconds}
            message = f"no checkpoint of step {step}, since {why}; {self._at_stake()}; training continues"
            self._events.warn("checkpoint_skipped", message, **facts)


def _errors(outcomes: list[Outcome]) -> list[RunFailed]:
    return [error for _, error in outcomes if error is not None]
