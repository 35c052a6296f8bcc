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

from models.norm import BatchNorm2d, apply_statistics, pop_statistics
from pipeline.distributed.collectives import all_reduce_sum

Statistics = dict[str, torch.Tensor]


def statistics(model: nn.Module) -> Statistics:
    """The model's own running statistics by their names in its state; writing into them changes the model."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm2d)}
    kinds = ("running_mean", "running_var")
    return {f"{name}.{kind}": norm.get_buffer(kind) for name, norm in norms.items() for kind in kinds}


def sync_batch_norm(model: nn.Module, apply: bool) -> None:
    """Sums up over all ranks what the last step's passes saw, and moves the running statistics by it, or drops it."""
    seen = all_reduce_sum(pop_statistics(model))
    if apply:
        apply_statistics(model, seen)


def clone(values: Statistics) -> Statistics:
    return {name: tensor.clone() for name, tensor in values.items()}


def update(average: Statistics | None, model: nn.Module, decay: float | None) -> None:
    """Moves an average of statistics towards the model's own, by 1 - decay; nothing without train.ema."""
    if average is None or decay is None or not average:
        return
    current = statistics(model)
    torch._foreach_lerp_(list(average.values()), [current[name] for name in average], 1 - decay)


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
