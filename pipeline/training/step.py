"""The one all-reduce of a step beside those of gradients: its mean loss, and what ranks must know of each other."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from data.loader import Batch
from data.pinned import ToHost, to_device
from data.storage.remote import ReadError
from pipeline.distributed.collectives import all_reduce_sum


class StepTotals(NamedTuple):
    """Of a step, over all ranks."""

    mean_loss: float
    bad_samples: int
    read_retries: int
    stop: bool
    """Whether any rank received a signal to stop."""
    superseded: bool
    """Whether a newer attempt of the run has begun."""


class StepReport:
    """A rank's part of a step's totals, and after `all_reduce` the sums over all ranks."""

    def __init__(
        self,
        device: torch.device,
        micro_batches: list[Batch],
        micro_batches_per_step: int,
        read_errors: list[ReadError],
    ) -> None:
        """`micro_batches` are this rank's; all ranks together have `micro_batches_per_step`."""
        self.micro_batches, self.read_errors = micro_batches, read_errors
        self._micro_batches_per_step = micro_batches_per_step
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Counts a micro batch's loss."""
        self._sums[0] += loss.detach()

    def all_reduce(self, stop: bool, superseded: bool) -> torch.Tensor:
        """Sums up over all ranks; returns the step's mean loss on the device, for which no host waits.

        `stop` is whether this rank received a signal, `superseded` whether it has seen a newer attempt.
        """
        bad_samples = sum(len(batch.broken) for batch in self.micro_batches)
        facts = np.array([bad_samples, len(self.read_errors), stop, superseded], np.float64)
        self._sums[1:] = to_device(facts, self._sums.device)
        self._summed = ToHost(all_reduce_sum(self._sums))
        return self._sums[0] / self._micro_batches_per_step

    @cached_property
    def totals(self) -> StepTotals:
        """The sums on the host. It does not wait for them once the engine has stepped, which waits for later work."""
        loss, bad_samples, read_retries, stop, superseded = self._summed.tolist()
        mean_loss = loss / self._micro_batches_per_step
        return StepTotals(mean_loss, int(bad_samples), int(read_retries), stop > 0, superseded > 0)
