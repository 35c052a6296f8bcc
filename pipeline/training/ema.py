"""The moving average's other half: batch-norm statistics, replicated on every rank beside the sharded weights.

The weights' average is optimizer state (AdamWWithEma). Statistics are small and equal on all ranks, so a plain
copy follows them with the same decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

Statistics = dict[str, torch.Tensor]


def statistics(model: nn.Module) -> Statistics:
    """The model's own running statistics by name; writing into them changes the model."""
    state, parameters = model.state_dict(), {name for name, _ in model.named_parameters()}
    return {name: values for name, values in state.items() if name not in parameters}


def clone(values: Statistics) -> Statistics:
    return {name: tensor.clone() for name, tensor in values.items()}


def update(average: Statistics, model: nn.Module, decay: float) -> None:
    """Moves an average of statistics towards the model's own, by 1 - decay."""
    for name, values in statistics(model).items():
        average[name].lerp_(values, 1 - decay)


def load(model: nn.Module, values: Statistics) -> None:
    """Gives the model these statistics."""
    for name, own in statistics(model).items():
        own.copy_(values[name])


@contextmanager
def swapped(model: nn.Module, average: Statistics) -> Iterator[None]:
    """Inside, the model has the average's statistics."""
    own = clone(statistics(model))
    load(model, average)
    try:
        yield
    finally:
        load(model, own)


def ema_decay(decay: float, step: int) -> float:
    """The decay of step `step` (from 0), warmed up so that a young average follows fast."""
    return min(decay, (1 + step) / (10 + step))


def of_kind(buffers: dict[str, np.ndarray], kind: str) -> Statistics:
    """A checkpoint's batch-norm statistics of one kind, `weight` or `ema`, by name."""
    prefix = f"{kind}:"
    return {name[len(prefix) :]: torch.from_numpy(v.copy()) for name, v in buffers.items() if name.startswith(prefix)}
