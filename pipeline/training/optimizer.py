"""The optimizer: the learning rate by step, which parameters decay, AdamW that keeps a moving average.

The learning rate is a function of the step, so there is no scheduler state to save. The average is kept as
optimizer state: whatever shards the moments shards it too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.init import decay_exempt
from pipeline.config.schema import Optim
from pipeline.training.zero import whole_shape


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up to the peak, then decay up to the last step."""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    fraction = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    remaining = {"cosine": 0.5 * (1 + math.cos(math.pi * fraction)), "linear": 1 - fraction, "none": 1.0}[optim.decay]
    return optim.final_learning_rate + (optim.learning_rate - optim.final_learning_rate) * remaining


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the parameters that decay, and those that are exempt."""
    named = [(parameter, decay_exempt(name, whole_shape(parameter))) for name, parameter in model.named_parameters()]
    return [
        {"params": [parameter for parameter, exempt in named if not exempt], "weight_decay": weight_decay},
        {"params": [parameter for parameter, exempt in named if exempt], "weight_decay": 0.0},
    ]


# Without the decorators, whose first call imports torch's compiler, a second and a half, to keep it out of these two.
_STEP = inspect.unwrap(torch.optim.AdamW.step)
_ADD_PARAM_GROUP = inspect.unwrap(torch.optim.AdamW.add_param_group)


class AdamWWithEma(torch.optim.AdamW):
    """AdamW whose step also moves `state[p]["ema"]` towards the new weights; no compiler needed (torch's fused kernel).

    Under ZeRO `p` is a rank's flat fp32 shard of a group, and step() is called once for each group: nothing may be
    counted in here. The average begins as the weights before the first step.
    """

    decay: float | None = None  # set for every step by the training loop; None: no average

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _ADD_PARAM_GROUP(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # AdamW initialises only an empty state, so a new average joins after its step.
        first = {p: p.detach().clone() for p in stepped if self.decay is not None and "ema" not in self.state[p]}
        loss = _STEP(self, closure)
        if self.decay is not None:
            for p in stepped:
                average = self.state[p].setdefault("ema", first.get(p))
                average.lerp_(p.detach(), 1 - self.decay)
        return loss
