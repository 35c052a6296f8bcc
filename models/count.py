"""Parameters and multiply-adds of a network, counted on the modules themselves, without memory for weights.

Two counts of multiply-adds. `multiply_adds` are those of convolutions and matrix products, exactly. With overhead it is
what the paper's figures seem to be: a graph counter's view, which charges pointwise work too. Its four coefficients
were fitted to the 17 rows of CoAtNet-0 to -4; every one of them then comes out as printed, and CoAtNet-5, which was
held out, within 0.1 %. A hypothesis about the authors' counter, and no cost of any machine.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .attention import RelativeAttention
from .blocks import FeedForward, MBConv
from .coatnet import CoAtNet, ConvolutionStem, coatnet
from .variants import Layout, StridePlace

PER_CONVOLUTION_ACTIVATION = 5.26
"""Of every output of a norm with GELU in stem and MBConv."""
PER_HIDDEN_ACTIVATION = 2.74
"""Of a feed-forward's hidden layer."""
PER_LOGIT = 6.14
PER_LOGIT_AND_TABLE_ROW = 0.084
"""The bias is looked up by one-hot products on a TPU, whose cost grows with the table's 2h-1 rows."""


@dataclass(frozen=True)
class Count:
    """Trainable parameters, and multiply-adds of the forward of one image."""

    parameters: int
    multiply_adds: int
    multiply_adds_with_overhead: int


def count(layout: str | Layout, resolution: int = 224, stride: StridePlace | None = None, classes: int = 1000) -> Count:
    """The counts of a network of `coatnet` at a resolution; parameters with the bias tables of that resolution."""
    with torch.device("meta"):
        model = coatnet(layout, classes, resolution, stride=stride, normal=_nothing)
    return count_network(model)


def count_network(model: CoAtNet) -> Count:
    """The counts of a network at its resolution; it may be on the meta device, and stays as it is.

    No image goes through zeros that take no memory, and past attention, where they would, so nothing is computed; in
    bfloat16, which linear layers don't take for convolutions, whose weights are copied. (Shapes could be had on the
    meta device itself, but there torch imports its compiler for them, which takes seconds.)
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    exact: list[int] = []
    overhead: list[float] = []

    def see(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        exact.append(_multiply_adds(module, output))

    def charge(per_element: float, module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        overhead.append(per_element * output.shape[1:].numel())

    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.enter_context(module.register_forward_hook(see))
            for charged, per_element in _overheads(module):
                undo.enter_context(charged.register_forward_hook(partial(charge, per_element)))
            if isinstance(module, RelativeAttention):
                undo.callback(delattr, module, "forward")
                module.forward = partial(_nothing_attended, module)
        undo.callback(model.train, model.training)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        zeros = {name: torch.zeros((), dtype=torch.bfloat16).expand(tensor.shape) for name, tensor in tensors}
        functional_call(model.eval(), zeros, torch.empty(0, 3, *model.resolution, dtype=torch.bfloat16))
    return Count(parameters, sum(exact), round(sum(exact) + sum(overhead)))


def _multiply_adds(module: nn.Module, output: Tensor) -> int:
    """Of a module's own work for an image, apart from that of the modules that it runs."""
    elements = output.shape[1:].numel()
    if isinstance(module, nn.Conv2d | nn.Linear):
        return elements * module.weight[0].numel()
    if isinstance(module, RelativeAttention):  # q, k, v; q k^T, and its product with v; the output
        tokens = module.grid[0] * module.grid[1]
        return elements * (3 * module.query.in_features + 2 * tokens + module.output.in_features)
    return 0


def _overheads(module: nn.Module) -> list[tuple[nn.Module, float]]:
    """Modules within this one whose outputs are charged, and how much each element is."""
    if isinstance(module, ConvolutionStem):
        return [(norm, PER_CONVOLUTION_ACTIVATION) for norm in module.norms]
    if isinstance(module, MBConv):
        return [(norm, PER_CONVOLUTION_ACTIVATION) for norm in (module.expand_norm, module.depthwise_norm)]
    if isinstance(module, FeedForward):
        return [(module.expand, PER_HIDDEN_ACTIVATION)]
    if isinstance(module, RelativeAttention):
        height, width = module.grid
        logits_per_element = height * width / module.head_size
        return [(module, logits_per_element * (PER_LOGIT + PER_LOGIT_AND_TABLE_ROW * (2 * height - 1)))]
    return []


def _nothing_attended(layer: RelativeAttention, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:3], layer.output.out_features)


def _nothing(name: str, shape: torch.Size) -> Tensor:
    return torch.empty(shape)
