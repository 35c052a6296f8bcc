"""CoAtNet (Dai et al. 2021, arXiv 2106.04803): convolution stem, MBConv stages, relative-attention stages, head.

    model = coatnet("coatnet_2", classes=0, resolution=(384, 512))    # needs this folder and torch, nothing else
    model.load_state_dict(state)                                      # bias tables of another resolution are resized
    stem, s1, s2, s3, s4 = model.forward_features(images)             # [n, width, h / 2, w / 2] ... / 32

What the paper leaves open follows google-research/maxvit, which was built on CoAtNet's code, and of the remaining
readings the one whose parameters and FLOPs agree with the published ones (count.py).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import repeat
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Backend, BiasPosition, RelativeAttention, check_backend
from .blocks import MBConv, Norm, Pool, TransformerBlock, gelu
from .init import Normal, convolution, from_torch, initialize, linear
from .norm import BatchNorm2d, LayerNorm, LayerNorm2d, frozen_statistics
from .variants import Layout, Stage, Stem, StridePlace, layout_of

Block = MBConv | TransformerBlock
Grid = tuple[int, int]


def coatnet(
    layout: str | Layout,
    classes: int = 1000,
    resolution: int | Grid = 224,
    *,
    stride: StridePlace | None = None,
    pool: Pool = "max",
    norm: Literal["batch", "layer"] = "batch",
    head_size: int | None = None,
    relative_attention: BiasPosition = "pre_softmax",
    attention: Backend | Literal["auto"] = "auto",
    batch_norm_momentum: float = 0.01,
    batch_norm_eps: float = 1e-3,
    batch_norm_group: int | None = None,
    layer_norm_eps: float = 1e-5,
    activation_checkpointing: Literal["none", "all"] | Collection[int] = "none",
    normal: Normal = from_torch,
) -> "CoAtNet":
    """A CoAtNet with initial weights, for images of `resolution` (a side, or height and width).

    `layout` is a name ("coatnet_0" to "coatnet_7", or a variant of variants.py) or a `Layout`. `classes=0` leaves the
    classifier out. `stride` and `head_size` None are the layout's. `pool` is that of all down-sampling, `norm` that of
    stem and MBConv (Table 8), `relative_attention` where the bias stands (attention.py), `attention` its backend.
    Norm constants are maxvit's; of `batch_norm_group` see norm.py. `activation_checkpointing` recomputes
    the blocks of these stages (1 is the first after the stem) in the backward instead of keeping their activations.
    ValueError where a name or value does not exist, or the resolution is no multiple of the strides.
    """
    layout = layout_of(layout) if isinstance(layout, str) else layout
    layout = replace(layout, head_size=head_size or layout.head_size, stride=stride or layout.stride)
    _check_choice("stride", layout.stride, get_args(StridePlace))
    _check_choice("pool", pool, get_args(Pool))
    _check_choice("norm", norm, ("batch", "layer"))
    _check_choice("relative_attention", relative_attention, get_args(BiasPosition))
    check_backend(attention)
    batch_norm = partial(BatchNorm2d, eps=batch_norm_eps, momentum=batch_norm_momentum, group=batch_norm_group)
    map_norm: Norm = batch_norm if norm == "batch" else partial(LayerNorm2d, eps=layer_norm_eps)
    row_norm: Norm = partial(LayerNorm, eps=layer_norm_eps)
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    _check_resolution(layout, (height, width))

    mbconv = partial(MBConv, norm=map_norm, stride_place=layout.stride, pool=pool)
    attend = partial(RelativeAttention, head_size=layout.head_size, bias_position=relative_attention, backend=attention)

    def block(kind: str, inputs: int, width: int, stride: int, grid: Grid) -> Block:
        if kind == "mbconv":
            return mbconv(inputs, width, stride)
        return TransformerBlock(inputs, width, stride, partial(attend, grid=grid), row_norm, pool)

    stem = ConvolutionStem(layout.stem, map_norm)
    stages, inputs, reduction = nn.ModuleList(), layout.stem.width, layout.stem.stride
    for stage in layout.stages:
        reduction *= stage.stride
        stages.append(_stage(stage, inputs, partial(block, grid=(height // reduction, width // reduction))))
        inputs = stage.width
    recomputed = _stage_numbers(activation_checkpointing, len(stages))
    model = CoAtNet((height, width), stem, stages, Head(inputs, classes, row_norm), recomputed)
    initialize(model, normal)
    return model


class CoAtNet(nn.Module):
    """Images [n, 3, h, w] to logits [n, classes]; made by `coatnet`. `branches` residual branches can be dropped."""

    def __init__(
        self, resolution: Grid, stem: "ConvolutionStem", stages: nn.ModuleList, head: "Head", recomputed: set[int]
    ) -> None:
        super().__init__()
        self.resolution, self.recomputed = resolution, recomputed
        self.stem = stem
        self.stages = stages
        self.head = head
        self.branches = sum(block.branches for block in self.blocks())

    def forward(self, images: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """Logits [n, classes]. `drop_path_mask` [n, branches] multiplies each residual branch (0, or 1 / probability).

        ValueError for images of another size than the model was made for.
        """
        return self.head(deque(self._maps(images, drop_path_mask), maxlen=1).pop())

    def forward_features(self, images: Tensor, drop_path_mask: Tensor | None = None) -> list[Tensor]:
        """The maps [n, width, h, w] of the stem and of every stage, in order, channels-last."""
        return list(self._maps(images, drop_path_mask))

    def blocks(self) -> Iterator[Block]:
        """All residual blocks in the order of the forward."""
        return (module for module in self.modules() if isinstance(module, MBConv | TransformerBlock))

    def _maps(self, images: Tensor, drop_path_mask: Tensor | None) -> Iterator[Tensor]:
        self._check(images, drop_path_mask)
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        yield x
        branches = [block.branches for block in self.blocks()]
        factors = repeat(None) if drop_path_mask is None else iter(drop_path_mask.split(branches, dim=1))
        for number, stage in enumerate(self.stages, 1):
            recomputes = number in self.recomputed and torch.is_grad_enabled()
            for block in stage.children():
                x = _recomputed(block, x, next(factors)) if recomputes else block(x, next(factors))
            yield x

    def _check(self, images: Tensor, drop_path_mask: Tensor | None) -> None:
        if images.shape[-2:] != self.resolution:
            height, width = images.shape[-2:]
            wanted = " x ".join(map(str, self.resolution))
            raise ValueError(
                f"images are {height} x {width}; the model was made for {wanted}:"
                f" resize them, or make one with resolution=({height}, {width}) and load the weights"
            )
        if drop_path_mask is not None and drop_path_mask.shape != (len(images), self.branches):
            raise ValueError(
                f"drop_path_mask is {list(drop_path_mask.shape)}; it must be {[len(images), self.branches]}"
            )


class ConvolutionStem(nn.Module):
    """S0: convolutions with norm and GELU between them, none after the last: the next block starts with a norm."""

    def __init__(self, stem: Stem, norm: Norm) -> None:
        super().__init__()
        self.first = convolution(3, stem.width, stem.kernel, stride=stem.stride)
        self.norms = nn.ModuleList(norm(stem.width) for _ in range(stem.blocks - 1))
        self.convolutions = nn.ModuleList(convolution(stem.width, stem.width, 3) for _ in range(stem.blocks - 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        for norm, layer in zip(self.norms, self.convolutions, strict=True):
            x = layer(gelu(norm(x)))
        return x


class Head(nn.Module):
    """Mean over all places, norm, a hidden layer with tanh (the published parameter counts need it), classifier."""

    def __init__(self, width: int, classes: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.hidden = linear(width, width)
        self.classifier = linear(width, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        return self.classifier(self.hidden(self.norm(pooled)).tanh())


def stochastic_depth_rates(model: CoAtNet, rate: float) -> list[float]:
    """The probability, per branch, of being dropped: rate * k / N in block k = 0..N-1, as in maxvit."""
    branches = [block.branches for block in model.blocks()]
    return [rate * k / len(branches) for k, count in enumerate(branches) for _ in range(count)]


def _stage(stage: Stage, inputs: int, block: Callable[..., Block]) -> nn.ModuleList:
    first = block(stage.kind, inputs, stage.width, stage.stride)
    return nn.ModuleList([first, *(block(stage.kind, stage.width, stage.width, 1) for _ in range(stage.blocks - 1))])


def _recomputed(block: nn.Module, *inputs: Any) -> Tensor:
    """A block's output, whose activations are computed again in the backward; it draws no random numbers."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), frozen_statistics()


def _stage_numbers(chosen: str | Collection[int], stages: int) -> set[int]:
    every = set(range(1, stages + 1))
    numbers = {"none": set(), "all": every}.get(chosen) if isinstance(chosen, str) else set(chosen)
    if numbers is None or not numbers <= every:
        raise ValueError(
            f"activation_checkpointing is {chosen!r}; it must be none, all, or a list of stages from 1 to {stages}"
        )
    return numbers


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}")


def _check_resolution(layout: Layout, resolution: Grid) -> None:
    """ValueError, with the nearest resolution that would do, unless both sides are multiples of all strides."""
    reduction = layout.stem.stride * prod(stage.stride for stage in layout.stages)
    if any(side < 1 or side % reduction for side in resolution):
        height, width = (max(1, round(side / reduction)) * reduction for side in resolution)
        raise ValueError(
            f"resolution is {resolution[0]} x {resolution[1]}; both sides must be multiples of {reduction},"
            f" the product of all strides: the nearest is {height} x {width}"
        )
