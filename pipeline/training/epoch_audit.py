"""Epochs: what all ranks took of those that are under way, and that each complete one had every sample once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.loader import Batch
from data.order import Order, positions_of_step
from pipeline.distributed.collectives import all_gather
from pipeline.distributed.environment import rank_and_world_size
from pipeline.errors import RunFailed
from pipeline.run.events import Events


class EpochAudit:
    """Each rank counts what it took; rank 0 also what all ranks took before this attempt (`state`, of a checkpoint)."""

    def __init__(self, samples: int, global_batch: int, state: dict[str, Any] | None) -> None:
        self._samples, self.global_batch = samples, global_batch
        self._usage = from_json(state) if state and rank_and_world_size()[0] == 0 else {}

    def add(self, batches: list[Batch], applied: bool) -> None:
        """Counts this rank's micro batches of a step."""
        taken = [usage_of(b.positions // self._samples, b.numbers, b.replaced, applied) for b in batches]
        self._usage = merge([self._usage, *taken])

    def skip(self, order: Order, step: int) -> None:
        """Counts the samples of a step (from 0) that a rollback skips."""
        if rank_and_world_size()[0] == 0:
            positions = positions_of_step(step, self.global_batch)
            numbers, none_replaced = order.samples_at(positions), np.zeros(len(positions), bool)
            skipped = usage_of(positions // self._samples, numbers, none_replaced, applied=False)
            self._usage = merge([self._usage, skipped])

    def state(self) -> dict[str, dict[str, int]]:
        """What all ranks took, for a checkpoint and for the next start. Collective."""
        return to_json(merge(all_gather([self._usage])))

    def replaced(self) -> dict[int, int]:
        """How many samples of each epoch were replaced. Collective."""
        return {epoch: used.replaced for epoch, used in merge(all_gather([self._usage])).items()}

    def completed(self, done: int, events: Events) -> list[str]:
        """A line for each epoch that the last of `done` steps completed, which events.jsonl keeps too.

        RunFailed where not each sample was taken once. Collective where an epoch is complete.
        """
        epochs = [(step * self.global_batch) // self._samples for step in (done - 1, done)]
        if epochs[0] == epochs[1]:
            return []
        totals = merge(all_gather([self._usage]))
        rank, world_size = rank_and_world_size()
        stripe = fingerprint_of_range(self._samples * rank // world_size, self._samples * (rank + 1) // world_size)
        all_samples = sum(all_gather([stripe])) % 2**64
        lines = []
        for epoch in range(*epochs):
            self._usage.pop(epoch, None)
            used, once = totals[epoch], is_exactly_once(totals[epoch], self._samples, all_samples)
            counts = {"samples": used.used, "of": self._samples, "skipped": used.skipped, "replaced": used.replaced}
            events.write("epoch_finished", epoch=epoch, each_once=once, **counts)
            if not once:
                raise RunFailed(
                    f"epoch {epoch}: {used.used + used.skipped:,} samples were taken, but not each of"
                    f" {self._samples:,} exactly once: a bug in this program, or data.train was changed in place;"
                    " log.samples=true records which are taken"
                )
            lines.append(summary_line(epoch, used, self._samples))
        return lines


_CHUNK = 2**20
_MODULUS = 2**64


@dataclass(frozen=True)
class EpochUsage:
    """Samples of an epoch that training took: `used` by steps that were applied, `skipped` with those that were not.

    `fingerprint` is that of both, modulo 2^64; `replaced` counts those that another sample replaced.
    """

    used: int = 0
    skipped: int = 0
    replaced: int = 0
    fingerprint: int = 0

    def __add__(self, other: EpochUsage) -> EpochUsage:
        return EpochUsage(
            self.used + other.used,
            self.skipped + other.skipped,
            self.replaced + other.replaced,
            (self.fingerprint + other.fingerprint) % _MODULUS,
        )


Epochs = Mapping[int, EpochUsage]


def usage_of(
    epochs: NDArray[np.int64], numbers: NDArray[np.int64], replaced: NDArray[np.bool_], applied: bool
) -> dict[int, EpochUsage]:
    """A step's usage by epoch, from each sample's epoch, number, and whether another replaced it."""
    usage = {}
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        count = int(here.sum())
        used, skipped = (count, 0) if applied else (0, count)
        usage[epoch] = EpochUsage(used, skipped, int(replaced[here].sum()), fingerprint(numbers[here]))
    return usage


def merge(parts: Iterable[Epochs]) -> dict[int, EpochUsage]:
    """The usage of several ranks, steps or attempts together, by epoch."""
    usage: dict[int, EpochUsage] = {}
    for part in parts:
        for epoch, used in part.items():
            usage[epoch] = usage.get(epoch, EpochUsage()) + used
    return usage


def is_exactly_once(used: EpochUsage, samples: int, all_samples: int) -> bool:
    """Whether all of an epoch's samples, whose fingerprint is `all_samples`, were taken, and each once."""
    return used.used + used.skipped == samples and used.fingerprint == all_samples


def summary_line(epoch: int, used: EpochUsage, samples: int) -> str:
    """The line that reports a complete epoch."""
    return (
        f"epoch {epoch}: {used.used:,} of {samples:,} samples, 0 repeated, {used.skipped:,} skipped,"
        f" {used.replaced:,} replaced"
    )


def fingerprint(numbers: NDArray[np.int64]) -> int:
    """The sum of a hash of each sample number, modulo 2^64 (the hash: SplitMix64, Steele et al. 2014, figure 17)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return int((mixed ^ mixed >> np.uint64(31)).sum(dtype=np.uint64))


@cache
def fingerprint_of_range(first: int, end: int) -> int:
    """The fingerprint of the samples first .. end - 1."""
    parts = range(first, end, _CHUNK)
    return sum(fingerprint(np.arange(part, min(part + _CHUNK, end))) for part in parts) % _MODULUS


def to_json(epochs: Epochs) -> dict[str, dict[str, int]]:
    """For a checkpoint's state.json."""
    return {str(epoch): asdict(used) for epoch, used in epochs.items()}


def from_json(state: Mapping[str, Mapping[str, int]]) -> dict[int, EpochUsage]:
    return {int(epoch): EpochUsage(**used) for epoch, used in state.items()}
