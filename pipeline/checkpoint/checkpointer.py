"""The checkpoints of a run as its training loop uses them: resume from the newest, save, roll back."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reader import step_name
from pipeline.checkpoint.restore import restore
from pipeline.checkpoint.rollback import load_rollbacks, roll_back
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config.schema import Config
from pipeline.distributed.collectives import from_rank_zero
from pipeline.distributed.environment import rank_and_world_size
from pipeline.distributed.heartbeat import pause
from pipeline.lineage import lineage_entry
from pipeline.plan import Plan
from pipeline.run.events import Events, last_logged_step
from pipeline.training import ema
from pipeline.training.epoch_audit import EpochAudit
from pipeline.training.state import TrainState


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
            "config": config.model_dump(mode="json"),
            "ancestry": [*ancestors, entry],
        }
        root = self._run / "checkpoints"
        self._saved: int | None = None  # the last step that is in a checkpoint, or will be
        self._writer = CheckpointWriter(root, events.attempt, *rank_and_world_size(), config.checkpoint, events)

    def resume(self) -> TrainState:
        """Loads the newest good checkpoint into the engine; returns its state, or without one that of a new run."""
        pause()
        bn_ema = ema.clone(ema.statistics(self._engine.module)) if self._train.ema else None
        saved = restore(self._engine, self._run, bn_ema, self._train_set, self._events)
        rollbacks = from_rank_zero(lambda: load_rollbacks(self._run, saved))
        audit = EpochAudit(self._train_set.samples, self._train.global_batch, saved["epochs"] if saved else None)
        made = rollbacks, bn_ema
        state = TrainState.from_json(saved, audit, *made) if saved else TrainState.begin(audit, *made)
        self._saved = state.step if saved else None
        event = "training_resumed" if saved else "training_started"
        lost = self._warn_of_lost_steps() if saved is None and self._writer.rank == 0 else {}
        self._events.write(event, step=state.step, **lost, new_augmentations=self._new_augmentations)
        return state

    def _warn_of_lost_steps(self) -> dict[str, int]:
        """The steps that a run had done before it could save any, for the event; {} at a first start."""
        lost = last_logged_step(self._run)
        if lost:
            print(
                f"warning: {self._run} begins again: it had no checkpoint yet, {lost} steps are lost", file=sys.stderr
            )
        return {"steps_lost": lost} if lost else {}

    def save(self, state: TrainState) -> None:
        """Copies the state to the host and returns; a thread writes it. Nothing where this step is saved already."""
        if state.step != self._saved:
            self._writer.save(self._engine, state.bn_ema, {**state.to_json(), **self._provenance})
            self._saved = state.step

    def check(self) -> None:
        """Raises what the writing of the last checkpoint raised."""
        self._writer.check()

    def wait(self) -> None:
        """Returns once the last checkpoint is durable."""
        pause()
        self._writer.wait()

    def close(self) -> None:
        """Returns once the last checkpoint is durable and mirrored, and superseded ones are removed.

        All ranks wait for rank 0, which mirrors: a launcher ends the others soon after the first one.
        """
        pause()
        from_rank_zero(self._writer.close)

    def path(self, step: int) -> Path:
        return self._writer.root / step_name(step)

    def roll_back(self, state: TrainState, reason: str) -> None:
        """Abandons the last bad steps, and what was saved since: a new attempt, which `resume` then begins.

        RunFailed where there is no checkpoint before them, or where the same one was tried often enough.
        """
        self.wait()
        bad_steps = state.guard.first_bad, state.step
        take = partial(roll_back, self._run, self._writer, self._events, state.rollbacks, *bad_steps, reason)
        self._events.attempt = self._writer.attempt = from_rank_zero(take)
