"""What all ranks learn of each other in a step, by the one all-reduce that it makes beside those of gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pipeline.distributed.collectives import all_reduce_sum


class StepTotals(NamedTuple):
    """Of all ranks."""

    mean_loss: float
    bad_samples: int
    read_retries: int
    stop: bool
    """Whether any was asked to stop."""
    superseded: bool
    """Whether a newer attempt of the run has begun."""


class StepReport:
    """A rank's part of that, and after `all_reduce` the sums."""

    def __init__(
        self,
        device: torch.device,
        micro_batches: int,
        *,
        bad_samples: int,
        read_retries: int,
        stop: bool,
        superseded: bool,
    ) -> None:
        """`micro_batches` are the step's, on all ranks together."""
        parts = [0.0, bad_samples, read_retries, stop, superseded]
        self._sums, self._micro_batches = torch.tensor(parts, dtype=torch.float64, device=device), micro_batches

    def add_loss(self, loss: torch.Tensor) -> None:
        """Counts a micro batch's loss."""
        self._sums[0] += loss.detach()

    def all_reduce(self) -> torch.Tensor:
        """Sums up over all ranks; returns the step's mean loss on the device, for which no host waits."""
        return all_reduce_sum(self._sums)[0] / self._micro_batches

    def totals(self) -> StepTotals:
        """The sums on the host, which waits for them."""
        loss, bad_samples, read_retries, stop, superseded = self._sums.tolist()
        return StepTotals(loss / self._micro_batches, int(bad_samples), int(read_retries), stop > 0, superseded > 0)
