"""The one all-reduce of a step beside those of gradients: its mean loss, and what ranks must know of each other."""

from __future__ import annotations

import math
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
    given_up: bool
    """Whether any rank has no batch for it, and stops: then it is not applied."""


class StepReport:
    """A rank's part of a step's totals, and after `all_reduce` the sums over all ranks."""

    def __init__(
        self,
        device: torch.device,
        micro_batches: list[Batch],
        micro_batches_per_step: int,
        read_errors: list[ReadError],
    ) -> None:
        """`micro_batches` are this rank's, none where it gives the step up; `micro_batches_per_step` those of all."""
        self.micro_batches, self.read_errors = micro_batches, read_errors
        self._micro_batches_per_step = micro_batches_per_step
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Counts a micro batch's loss."""
        self._sums[0] += loss.detach()

    def all_reduce(self, stop: bool, superseded: bool) -> torch.Tensor:
        """Sums up over all ranks; returns the step's mean loss on the device, for which no host waits.

        `stop` is whether this rank received a signal, `superseded` whether it has seen a newer attempt.
        """
        bad_samples, given_up = sum(len(batch.broken) for batch in self.micro_batches), not self.micro_batches
        facts = np.array([bad_samples, len(self.read_errors), stop, superseded, given_up], np.float64)
        if given_up:
            self._sums[0] = math.nan  # so that no rank applies it
        self._sums[1:] = to_device(facts, self._sums.device)
        self._summed = ToHost(all_reduce_sum(self._sums))
        return self._sums[0] / self._micro_batches_per_step

    @cached_property
    def totals(self) -> StepTotals:
        """The sums on the host. It does not wait for them once the engine has stepped, which waits for later work."""
        loss, bad_samples, read_retries, *flags = self._summed.tolist()
        mean_loss = loss / self._micro_batches_per_step
        return StepTotals(mean_loss, int(bad_samples), int(read_retries), *(flag > 0 for flag in flags))
