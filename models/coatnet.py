"""CoAtNet (Dai et al. 2021, arXiv 2106.04803): convolution stem, MBConv stages, relative-attention stages, head.

What the paper leaves open follows google-research/maxvit, which was built on CoAtNet's code, and of the remaining
readings the one whose parameters and FLOPs agree with the published ones. Next: blocks.py.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import get_args

import torch
from torch import Tensor, nn

from .blocks import MBConv, Norm, StridePlace, TransformerBlock, gelu
from .family import FAMILY, Layout, Stage, Stem
from .initial import Normal, convolution, from_torch, initialize, linear
from .norm import BatchNorm2d

Block = MBConv | TransformerBlock
Grid = tuple[int, int]


def coatnet(
    layout: str | Layout,
    classes: int = 1000,
    resolution: int | Grid = 224,
    *,
    stride: StridePlace = "expand",
    head_size: int | None = None,
    batch_norm_momentum: float = 0.01,
    batch_norm_eps: float = 1e-3,
    batch_norm_group: int | None = None,
    normal: Normal = from_torch,
) -> "CoAtNet":
    """A CoAtNet with initial weights, for images of `resolution` (a side, or height and width).

    `layout` is a name of the family ("coatnet_0" to "coatnet_7") or a `Layout`. `classes=0` leaves the classifier out.
    `stride`: the convolution of an MBConv that has the stride. `head_size` None: the layout's. Batch norm constants
    are maxvit's; of `batch_norm_group` see norm.py. ValueError where a name or value does not exist.
    """
    if isinstance(layout, str):
        if layout not in FAMILY:
            raise ValueError(f"model {layout!r} does not exist; the family is {', '.join(FAMILY)}")
        layout = FAMILY[layout].layout
    if stride not in get_args(StridePlace):
        raise ValueError(f"stride is {stride!r}; it must be 'expand' or 'depthwise'")
    if head_size is not None:
        layout = replace(layout, head_size=head_size)
    grid = (resolution, resolution) if isinstance(resolution, int) else (resolution[0], resolution[1])
    norm = partial(BatchNorm2d, eps=batch_norm_eps, momentum=batch_norm_momentum, group=batch_norm_group)
    model = CoAtNet(layout, classes, grid, norm, stride)
    initialize(model, normal)
    return model


class CoAtNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, classes]; made by `coatnet`. `branches` residual branches can be dropped."""

    def __init__(self, layout: Layout, classes: int, resolution: Grid, norm: Norm, stride_place: StridePlace) -> None:
        super().__init__()
        self.resolution = resolution
        self.stem = ConvolutionStem(layout.stem, norm)
        self.stages = nn.ModuleList()
        width, grid = layout.stem.width, _divide(resolution, layout.stem.stride)
        for stage in layout.stages:
            grid = _divide(grid, stage.stride)
            self.stages.append(_stage(stage, width, grid, layout.head_size, norm, stride_place))
            width = stage.width
        self.head = Head(width, classes)
        self.branches = sum(block.branches for block in self.blocks())

    def forward(self, images: Tensor, survival: Tensor | None = None) -> Tensor:
        """Logits [n, classes]. `survival` [n, branches] multiplies each residual branch (0, or 1 / probability).

        ValueError for images of another size than the model was made for.
        """
        return self.head(deque(self._maps(images, survival), maxlen=1).pop())

    def forward_features(self, images: Tensor, survival: Tensor | None = None) -> list[Tensor]:
        """The maps [n, width, h, w] of the stem and of every stage, in order, channels-last."""
        return list(self._maps(images, survival))

    def blocks(self) -> Iterator[Block]:
        """All residual blocks in the order of the forward."""
        return (module for module in self.modules() if isinstance(module, MBConv | TransformerBlock))

    def _maps(self, images: Tensor, survival: Tensor | None) -> Iterator[Tensor]:
        self._check(images, survival)
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        yield x
        branches = [block.branches for block in self.blocks()]
        factors = repeat(None) if survival is None else iter(survival.split(branches, dim=1))
        for stage in self.stages:
            for block in stage.children():
                x = block(x, next(factors))
            yield x

    def _check(self, images: Tensor, survival: Tensor | None) -> None:
        if images.shape[-2:] != self.resolution:
            height, width = images.shape[-2:]
            wanted = " x ".join(map(str, self.resolution))
            raise ValueError(f"images are {height} x {width}; the model was made for {wanted}: resize them to that")
        if survival is not None and survival.shape != (len(images), self.branches):
            raise ValueError(f"survival is {list(survival.shape)}; it must be {[len(images), self.branches]}")


class ConvolutionStem(nn.Module):
    """S0: 3x3 convolutions with norm and GELU between them, none after the last: the next block starts with a norm."""

    def __init__(self, stem: Stem, norm: Norm) -> None:
        super().__init__()
        self.first = convolution(3, stem.width, 3, stride=stem.stride)
        self.norms = nn.ModuleList(norm(stem.width) for _ in range(stem.blocks - 1))
        self.convolutions = nn.ModuleList(convolution(stem.width, stem.width, 3) for _ in range(stem.blocks - 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for norm, layer in zip(self.norms, self.convolutions, strict=True):
            x = layer(gelu(norm(x)))
        return x


class Head(nn.Module):
    """Mean over all places, norm, a hidden layer with tanh (the published parameter counts need it), classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.hidden = linear(width, width)
        self.classifier = linear(width, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        return self.classifier(self.hidden(self.norm(pooled)).tanh())


def stochastic_depth_rates(model: CoAtNet, rate: float) -> list[float]:
    """The probability, per branch, of being dropped: rate * k / N in block k = 0..N-1, as in maxvit."""
    branches = [block.branches for block in model.blocks()]
    return [rate * k / len(branches) for k, count in enumerate(branches) for _ in range(count)]


def _stage(
    stage: Stage, inputs: int, grid: Grid, head_size: int, norm: Norm, stride_place: StridePlace
) -> nn.ModuleList:
    def block(inputs: int, stride: int) -> Block:
        if stage.kind == "mbconv":
            return MBConv(inputs, stage.width, stride, norm, stride_place)
        return TransformerBlock(inputs, stage.width, stride, head_size, grid)

    return nn.ModuleList([block(inputs, stage.stride), *(block(stage.width, 1) for _ in range(stage.blocks - 1))])


def _divide(grid: Grid, stride: int) -> Grid:
    """The grid after a stride, rounded up, as the convolutions and pools here do."""
    return -(-grid[0] // stride), -(-grid[1] // stride)
