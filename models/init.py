"""Initial weights as a function of a parameter's name and shape, and layers that wait for them.

Layers come without values, so that nothing is drawn twice; `initialize` is the one place that gives them any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn

from .linear import Linear

Normal = Callable[[str, torch.Size], Tensor]
Layer = TypeVar("Layer", bound=nn.Module)


def linear(inputs: int, width: int) -> Linear:
    """A linear layer with bias, without values, on torch's current default device."""
    return allocate(Linear(inputs, width, device="meta"), torch.get_default_device())


def convolution(inputs: int, width: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps size / stride, without values, on torch's current default device."""
    padding = 0 if kernel == stride else kernel // 2  # patches do not overlap
    made = nn.Conv2d(inputs, width, kernel, stride, padding, groups=groups, bias=bias, device="meta")
    return allocate(made, torch.get_default_device())


@torch.no_grad()
def allocate(layer: Layer, device: torch.device) -> Layer:
    """Gives a layer's own tensors memory on a device, without values; returns the layer.

    nn.Module.to_empty does this through `empty_like` of a meta tensor, which imports sympy: half a second.
    """
    for name, parameter in list(layer.named_parameters(recurse=False)):
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        layer.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        setattr(layer, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return layer


def from_torch(name: str, shape: torch.Size) -> Tensor:
    """Standard normal numbers from torch's own generator, whatever the name."""
    return torch.randn(shape)


@torch.no_grad()
def initialize(model: nn.Module, normal: Normal) -> None:
    """Sets every parameter to its initial value."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, normal))


def initial_value(name: str, shape: torch.Size, normal: Normal) -> Tensor:
    """Of a parameter: 0 for biases, 1 for scales of norms, for all else `normal(name, shape)` times a deviation."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return normal(name, shape).mul_(_deviation(shape))


def _deviation(shape: torch.Size) -> float:
    """Of linear layers and bias tables 0.02, as in google-research/maxvit; of convolutions sqrt(2 / fan-out)."""
    if len(shape) != 4:
        return 0.02
    # maxvit has 0.02 here too, but a stem, a depthwise kernel and a shortcut's projection carry the signal: at the
    # widths of small networks 0.02 shrinks it at every such layer, a fan-out scale keeps its size at any width.
    # A depthwise [width, 1, 3, 3] has one output per channel, hence fan-out 9.
    width, inputs, *kernel = shape
    return sqrt(2 / (prod(kernel) * (1 if inputs == 1 else width)))


def decay_exempt(name: str, shape: Sequence[int]) -> bool:
    """Whether weight decay leaves a parameter alone: biases, scales of norms, and relative-position bias tables."""
    return len(shape) <= 1 or name.endswith("bias_table")
