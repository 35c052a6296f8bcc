"""The two residual blocks, x + Module(Norm(x)), MBConv and Transformer block, and their down-sampling (paper, A.1).

Blocks take and give maps [n, width, h, w] in channels-last memory, where [n, h, w, width] is a view: neither kind, nor
the passage from one to the other, copies. No randomness: a caller who wants stochastic depth hands in, per sample and
branch, a factor (0, or 1 / probability of staying).
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .init import convolution, linear
from .variants import StridePlace

Norm = Callable[[int], nn.Module]
"""Of a width: a norm of maps [n, width, h, w] in an MBConv, of rows [..., width] in a Transformer block."""
Pool = Literal["max", "average"]

# The paper does not say which GELU; google-research/maxvit has the tanh form. The exact one differs from it by
# less than 1e-3 and is the faster one on a CPU, forward and backward.
gelu = F.gelu


def downsample(x: Tensor, stride: int, pool: Pool) -> Tensor:
    """Maps [n, width, h, w] pooled 2x2 where the stride is 2. The paper says max pooling and not its size; 2x2 is
    maxvit's, which takes the average by default, as timm does."""
    if stride == 1:
        return x
    return F.max_pool2d(x, stride) if pool == "max" else F.avg_pool2d(x, stride)


def apply_drop_path(branch: Tensor, factors: Tensor | None) -> Tensor:
    """A residual branch [n, ...] times its factors [n], in the branch's own type; None leaves it."""
    return branch if factors is None else branch * factors.to(branch.dtype).view(-1, 1, 1, 1)


class Shortcut(nn.Module):
    """Proj(Pool(x)) of Eqs. 4 and 5. Without a projection where the widths agree, as the published FLOPs suggest."""

    def __init__(self, inputs: int, width: int, stride: int, pool: Pool) -> None:
        super().__init__()
        self.stride, self.pool = stride, pool
        self.project = nn.Identity() if inputs == width else convolution(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(downsample(x, self.stride, self.pool))


class SqueezeExcitation(nn.Module):
    """Maps [n, inner, h, w], each channel times a gate in 0..1 computed from the means of all (arXiv 1709.01507)."""

    def __init__(self, inner: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = linear(inner, squeezed)
        self.excite = linear(squeezed, inner)

    def forward(self, x: Tensor) -> Tensor:
        # Over one flat axis: a CPU is slower at (h, w) of channels-last maps. A mean's backward would write a map.
        places = x.permute(0, 2, 3, 1).flatten(1, 2)
        means = places.sum(1) / places.shape[1]
        gate = self.excite(F.silu(self.squeeze(means))).sigmoid()
        return x * gate[:, :, None, None]


class MBConv(nn.Module):
    """Proj(Pool(x)) + Conv(DepthConv(Conv(Norm(x), stride))) (Eq. 5): [n, inputs, h, w] to [n, width, h', w'].

    The inner width is four times the output's, the squeezed width a quarter of it. The stride is the first
    convolution's, or the depthwise one's (Table 9). `drop_path_mask` [n, 1].
    """

    branches: ClassVar[int] = 1

    def __init__(
        self, inputs: int, width: int, stride: int, norm: Norm, stride_place: StridePlace, pool: Pool = "max"
    ) -> None:
        super().__init__()
        inner = 4 * width
        first, second = (stride, 1) if stride_place == "expand" else (1, stride)
        self.shortcut = Shortcut(inputs, width, stride, pool)
        self.norm = norm(inputs)
        self.expand = convolution(inputs, inner, 1, stride=first, bias=False)
        self.expand_norm = norm(inner)
        self.depthwise = convolution(inner, inner, 3, stride=second, groups=inner, bias=False)
        self.depthwise_norm = norm(inner)
        self.squeeze_excitation = SqueezeExcitation(inner, max(1, width // 4))
        self.shrink = convolution(inner, width, 1)

    def forward(self, x: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        y = self.expand(self.norm(x))
        y = self.depthwise(gelu(self.expand_norm(y)))
        y = self.squeeze_excitation(gelu(self.depthwise_norm(y)))
        y = self.shrink(y)
        return self.shortcut(x) + apply_drop_path(y, None if drop_path_mask is None else drop_path_mask[:, 0])


class FeedForward(nn.Module):
    """Two linear layers over the last axis, the inner one four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = linear(width, 4 * width)
        self.shrink = linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(gelu(self.expand(x)))


class TransformerBlock(nn.Module):
    """Proj(Pool(x)) + Attention(Pool(Norm(x))) (Eq. 4), then x + FeedForward(Norm(x)).

    [n, inputs, h, w] to [n, width, h', w']. `attention` makes, of its input and output widths, a layer that takes
    [n, h', w', inputs] to [n, h', w', width]. `drop_path_mask` [n, 2]: the attention's factors and the feed-forward's.
    """

    branches: ClassVar[int] = 2

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        attention: Callable[[int, int], nn.Module],
        norm: Norm,
        pool: Pool = "max",
    ) -> None:
        super().__init__()
        self.stride, self.pool = stride, pool
        self.shortcut = Shortcut(inputs, width, stride, pool)
        self.attention_norm = norm(inputs)
        self.attention = attention(inputs, width)
        self.feed_forward_norm = norm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        attended, fed = (None, None) if drop_path_mask is None else drop_path_mask.unbind(1)
        y = _maps(self.attention_norm(_places(x)))
        y = self.attention(_places(downsample(y, self.stride, self.pool)))
        x = self.shortcut(x) + apply_drop_path(_maps(y), attended)
        y = self.feed_forward(self.feed_forward_norm(_places(x)))
        return x + apply_drop_path(_maps(y), fed)


def _places(x: Tensor) -> Tensor:
    """[n, width, h, w] seen as [n, h, w, width]."""
    return x.permute(0, 2, 3, 1)


def _maps(x: Tensor) -> Tensor:
    """[n, h, w, width] seen as [n, width, h, w]."""
    return x.permute(0, 3, 1, 2)
