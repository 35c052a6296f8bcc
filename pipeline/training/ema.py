"""Batch-norm statistics and their moving average, replicated on every rank beside the sharded weights.

The weights' average is optimizer state (AdamWWithEma). Statistics are small and equal on all ranks, so a plain
copy follows them with the same decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from models.norm import apply_statistics, pop_statistics
from pipeline.distributed.collectives import all_reduce_sum

Statistics = dict[str, torch.Tensor]


def statistics(model: nn.Module) -> Statistics:
    """The model's own running statistics by name; writing into them changes the model."""
    state, parameters = model.state_dict(), {name for name, _ in model.named_parameters()}
    return {name: values for name, values in state.items() if name not in parameters}


def sync_batch_norm(model: nn.Module, apply: bool) -> None:
    """Sums up over all ranks what the last step's passes saw, and moves the running statistics by it, or drops it."""
    seen = all_reduce_sum(pop_statistics(model))
    if apply:
        apply_statistics(model, seen)


def clone(values: Statistics) -> Statistics:
    return {name: tensor.clone() for name, tensor in values.items()}


def update(average: Statistics | None, model: nn.Module, decay: float | None) -> None:
    """Moves an average of statistics towards the model's own, by 1 - decay; nothing without train.ema."""
    if average is None or decay is None:
        return
    for name, values in statistics(model).items():
        average[name].lerp_(values, 1 - decay)


def load(model: nn.Module, values: Statistics) -> None:
    """Gives the model these statistics."""
    for name, current in statistics(model).items():
        current.copy_(values[name])


@contextmanager
def swapped(model: nn.Module, average: Statistics) -> Iterator[None]:
    """Inside, the model has the average's statistics."""
    current = clone(statistics(model))
    load(model, average)
    try:
        yield
    finally:
        load(model, current)


def ema_decay(decay: float, step: int) -> float:
    """The decay of step `step` (from 0), warmed up so that a young average follows fast."""
    return min(decay, (1 + step) / (10 + step))


def of_kind(buffers: dict[str, np.ndarray], kind: str) -> Statistics:
    """A checkpoint's batch-norm statistics of one kind, `weight` or `ema`, by name."""
    prefix = f"{kind}:"
    return {name[len(prefix) :]: torch.from_numpy(v.copy()) for name, v in buffers.items() if name.startswith(prefix)}
