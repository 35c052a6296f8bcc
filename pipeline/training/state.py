"""What a checkpoint holds beside the engine's tensors: how far a run is, what it has seen of its data and losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.training.ema import Statistics
from pipeline.training.epoch_audit import EpochAudit
from pipeline.training.loss_guard import Guard, RollbackRecord


@dataclass
class TrainState:
    """The state of a training after `step` steps, of which `applied_steps` moved the weights."""

    step: int
    applied_steps: int
    guard: Guard
    audit: EpochAudit
    rollbacks: list[RollbackRecord]
    bn_ema: Statistics | None
    """The moving average of the batch-norm statistics; None without train.ema."""

    @classmethod
    def begin(cls, audit: EpochAudit, rollbacks: list[RollbackRecord], bn_ema: Statistics | None) -> TrainState:
        """Before the first step. A run that failed before it saved anything may have rollbacks all the same."""
        return cls(0, 0, Guard(), audit, rollbacks, bn_ema)

    @classmethod
    def from_json(
        cls, saved: Mapping[str, Any], audit: EpochAudit, rollbacks: list[RollbackRecord], bn_ema: Statistics | None
    ) -> TrainState:
        """As `to_json` saved it."""
        return cls(saved["step"], saved["applied_steps"], Guard(**saved["guard"]), audit, rollbacks, bn_ema)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's state.json. Collective: each rank counts its own samples."""
        return {
            "step": self.step,
            "samples": self.step * self.audit.global_batch,
            "applied_steps": self.applied_steps,
            "epochs": self.audit.state(),
            "guard": asdict(self.guard),
            "rollbacks": [asdict(rollback) for rollback in self.rollbacks],
        }

    def skipped_steps(self) -> set[int]:
        """The steps (from 0) that the rollbacks skip."""
        return {step for rollback in self.rollbacks for step in range(rollback.first - 1, rollback.last)}
