"""The epochs that are under way: what all ranks took of them, and that each complete one had every sample once.

Next: exactly_once.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data.loader import Batch
from data.order import Order, positions_of_step
from pipeline.engine import gathered
from pipeline.errors import RunFailed
from pipeline.exactly_once import each_once, fingerprint_of_range, from_json, line, of_samples, to_json, together
from pipeline.launch import rank_and_world_size
from pipeline.record import Events


class EpochCount:
    """Each rank counts what it took; rank 0 also has what all ranks took before this start (`state`)."""

    def __init__(self, samples: int, global_batch: int, state: dict[str, Any] | None) -> None:
        self._samples, self._global_batch = samples, global_batch
        self._own = from_json(state) if state and rank_and_world_size()[0] == 0 else {}

    def add(self, batches: list[Batch], applied: bool) -> None:
        """Counts this rank's micro batches of a step."""
        taken = [of_samples(b.positions // self._samples, b.numbers, b.replaced, applied) for b in batches]
        self._own = together([self._own, *taken])

    def pass_over(self, order: Order, step: int) -> None:
        """Counts the samples of a step (from 0) that is not done as skipped."""
        if rank_and_world_size()[0] == 0:
            positions = positions_of_step(step, self._global_batch)
            numbers, none_replaced = order.samples_at(positions), np.zeros(len(positions), bool)
            skipped = of_samples(positions // self._samples, numbers, none_replaced, applied=False)
            self._own = together([self._own, skipped])

    def state(self) -> dict[str, dict[str, int]]:
        """What all ranks took, for a checkpoint and for the next start. Collective."""
        return to_json(together(gathered([self._own])))

    def replaced(self) -> dict[int, int]:
        """How many samples of each epoch were replaced. Collective."""
        return {epoch: used.replaced for epoch, used in together(gathered([self._own])).items()}

    def completed(self, done: int, events: Events) -> list[str]:
        """A line for each epoch that the last of `done` steps completed, which events.jsonl keeps too.

        RunFailed where not each sample was taken once. Collective where an epoch is complete.
        """
        epochs = [(step * self._global_batch) // self._samples for step in (done - 1, done)]
        if epochs[0] == epochs[1]:
            return []
        totals = together(gathered([self._own]))
        own, world_size = rank_and_world_size()
        stripe = fingerprint_of_range(self._samples * own // world_size, self._samples * (own + 1) // world_size)
        all_samples = sum(gathered([stripe])) % 2**64
        lines = []
        for epoch in range(*epochs):
            self._own.pop(epoch, None)
            used, once = totals[epoch], each_once(totals[epoch], self._samples, all_samples)
            counts = {"samples": used.used, "of": self._samples, "skipped": used.skipped, "replaced": used.replaced}
            events.write("epoch", epoch=epoch, each_once=once, **counts)
            if not once:
                raise RunFailed(
                    f"epoch {epoch}: {used.used + used.skipped:,} samples were taken, and not each of"
                    f" {self._samples:,} once: a fault of this program, or data.train was changed in place;"
                    " log.samples=true records which are taken"
                )
            lines.append(line(epoch, used, self._samples))
        return lines
