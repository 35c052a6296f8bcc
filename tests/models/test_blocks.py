"""Each block is its equation, written out here slowly in plain layouts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import relative_attention, relative_bias
from models.blocks import MBConv, StridePlace, TransformerBlock
from models.norm import BatchNorm2d

Weights = dict[str, Tensor]


def drawn_weights(block: nn.Module) -> Weights:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.double().parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def maps(samples: int, width: int) -> Tensor:
    return torch.randn(samples, width, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shortcut(x: Tensor, w: Weights, stride: int) -> Tensor:
    pooled = F.max_pool2d(x, stride, stride, ceil_mode=True)
    if "shortcut.project.weight" not in w:
        return pooled
    return F.conv2d(pooled, w["shortcut.project.weight"], w["shortcut.project.bias"])


def batch_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, bias = w[f"{name}.weight"].view(1, -1, 1, 1), w[f"{name}.bias"].view(1, -1, 1, 1)
    return (x - mean) / (variance + 1e-3).sqrt() * scale + bias


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Over the channels of maps [n, width, h, w]."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    scale, bias = w[f"{name}.weight"].view(1, -1, 1, 1), w[f"{name}.bias"].view(1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * scale + bias


def dense(x: Tensor, w: Weights, name: str) -> Tensor:
    """A linear layer at every place of maps [n, width, h, w]."""
    return torch.einsum("oi,nihw->nohw", w[f"{name}.weight"], x) + w[f"{name}.bias"].view(1, -1, 1, 1)


CASES = [(8, 8, 1), (8, 8, 2), (8, 12, 1), (8, 12, 2)]


@pytest.mark.parametrize(("inputs", "width", "stride"), CASES)
@pytest.mark.parametrize("place", ["expand", "depthwise"])
def test_mbconv_is_equation_5(inputs: int, width: int, stride: int, place: StridePlace) -> None:
    block = MBConv(inputs, width, stride, partial(BatchNorm2d, eps=1e-3), place)
    w, x = drawn_weights(block), maps(3, inputs)
    first, second = (stride, 1) if place == "expand" else (1, stride)
    y = F.conv2d(batch_norm(x, w, "norm"), w["expand.weight"], stride=first)
    y = F.gelu(batch_norm(y, w, "expand_norm"))
    y = F.conv2d(y, w["depthwise.weight"], stride=second, padding=1, groups=4 * width)
    y = F.gelu(batch_norm(y, w, "depthwise_norm"))
    squeezed = dense(y.mean((2, 3), keepdim=True), w, "squeeze_excitation.squeeze")
    assert squeezed.shape[1] == width // 4
    y = y * torch.sigmoid(dense(squeezed * torch.sigmoid(squeezed), w, "squeeze_excitation.excite"))
    y = F.conv2d(y, w["shrink.weight"], w["shrink.bias"])
    torch.testing.assert_close(block(x), shortcut(x, w, stride) + y)


@pytest.mark.parametrize(("inputs", "width", "stride"), CASES)
def test_transformer_block_is_equation_4_and_a_feed_forward(inputs: int, width: int, stride: int) -> None:
    grid = (-(-5 // stride), -(-6 // stride))
    block = TransformerBlock(inputs, width, stride, head_size=4, grid=grid)
    w, x = drawn_weights(block), maps(2, inputs)
    pooled = F.max_pool2d(layer_norm(x, w, "attention_norm"), stride, stride, ceil_mode=True)
    q, k, v = (
        dense(pooled, w, f"attention.{name}").view(2, width // 4, 4, -1).transpose(2, 3)
        for name in ("query", "key", "value")
    )
    attended = relative_attention(q, k, v, relative_bias(w["attention.bias_table"])).transpose(2, 3)
    y = shortcut(x, w, stride) + dense(attended.reshape(2, width, *grid), w, "attention.output")
    hidden = F.gelu(dense(layer_norm(y, w, "feed_forward_norm"), w, "feed_forward.expand"))
    assert hidden.shape[1] == 4 * width
    torch.testing.assert_close(block(x), y + dense(hidden, w, "feed_forward.shrink"))
