"""Faults of a step that all ranks know of: samples that were replaced, and steps that were skipped.

Next: record.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from data.loader import Batch
from pipeline.engine import gathered
from pipeline.errors import RunFailed
from pipeline.record import Events


@dataclass(frozen=True)
class Replaced:
    """How many samples of an epoch have been replaced so far."""

    epoch: int
    count: int

    def and_more(self, epoch: int, count: int) -> Replaced:
        return Replaced(epoch, count + (self.count if epoch == self.epoch else 0))


def record_replaced(
    events: Events, step: int, batches: list[Batch], replaced: Replaced, samples: int, most: float
) -> None:
    """Writes each replaced sample of a step; RunFailed where more than this share of an epoch were. Collective."""
    for broken in gathered([broken for batch in batches for broken in batch.broken]):
        events.write("replaced", step=step, **asdict(broken))
    if replaced.count > most * samples:
        raise RunFailed(
            f"{replaced.count} of {samples} samples of epoch {replaced.epoch} are broken, more than"
            f" data.max_bad_fraction={most}; events.jsonl lists them:"
            " mend or pack the data again, or raise the fraction"
        )


def record_skipped(events: Events, step: int, batches: list[Batch], loss: float) -> None:
    """Writes that a step was not applied, with its samples. Collective."""
    keys = gathered([key for batch in batches for key in batch.keys])
    events.write("skipped", step=step, loss=loss, keys=keys)
