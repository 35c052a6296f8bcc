"""Each block is its equation, written out here slowly in plain layouts."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import BiasPosition, RelativeAttention, relative_bias
from models.blocks import MBConv, Pool, TransformerBlock
from models.norm import BatchNorm2d, LayerNorm, LayerNorm2d
from models.variants import StridePlace

Weights = dict[str, Tensor]


def drawn_weights(block: nn.Module) -> Weights:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.double().parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


def maps(samples: int, width: int) -> Tensor:
    return torch.randn(samples, width, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pooled_by_hand(x: Tensor, stride: int, pool: Pool) -> Tensor:
    """The largest, or the mean, of every stride x stride places."""
    squares = x.unflatten(3, (-1, stride)).unflatten(2, (-1, stride)).transpose(3, 4).flatten(4)
    return squares.amax(-1) if pool == "max" else squares.mean(-1)


def shortcut(x: Tensor, w: Weights, stride: int, pool: Pool) -> Tensor:
    pooled = pooled_by_hand(x, stride, pool)
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
@pytest.mark.parametrize(
    ("place", "pool", "norm"),
    [("expand", "max", "batch"), ("depthwise", "max", "layer"), ("expand", "average", "batch")],
)
def test_mbconv_is_equation_5(inputs: int, width: int, stride: int, place: StridePlace, pool: Pool, norm: str) -> None:
    made, by_hand = {
        "batch": (partial(BatchNorm2d, eps=1e-3), batch_norm),
        "layer": (partial(LayerNorm2d, eps=1e-5), layer_norm),
    }[norm]
    block = MBConv(inputs, width, stride, made, place, pool)
    w, x = drawn_weights(block), maps(3, inputs)
    first, second = (stride, 1) if place == "expand" else (1, stride)
    y = F.conv2d(by_hand(x, w, "norm"), w["expand.weight"], stride=first)
    y = F.gelu(by_hand(y, w, "expand_norm"))
    y = F.conv2d(y, w["depthwise.weight"], stride=second, padding=1, groups=4 * width)
    y = F.gelu(by_hand(y, w, "depthwise_norm"))
    squeezed = dense(y.mean((2, 3), keepdim=True), w, "squeeze_excitation.squeeze")
    assert squeezed.shape[1] == width // 4
    y = y * torch.sigmoid(dense(squeezed * torch.sigmoid(squeezed), w, "squeeze_excitation.excite"))
    y = F.conv2d(y, w["shrink.weight"], w["shrink.bias"])
    torch.testing.assert_close(block(x), shortcut(x, w, stride, pool) + y)


@pytest.mark.parametrize(("inputs", "width", "stride"), CASES)
@pytest.mark.parametrize(
    ("form", "pool"), [("pre_softmax", "max"), ("post_softmax", "max"), ("none", "max"), ("pre_softmax", "average")]
)
def test_transformer_block_is_equation_4_and_a_feed_forward(
    inputs: int, width: int, stride: int, form: BiasPosition, pool: Pool
) -> None:
    grid = (4 // stride, 6 // stride)
    attention = partial(RelativeAttention, grid=grid, head_size=4, bias_position=form)
    block = TransformerBlock(inputs, width, stride, attention, partial(LayerNorm, eps=1e-5), pool)
    w, x = drawn_weights(block), maps(2, inputs)
    pooled = pooled_by_hand(layer_norm(x, w, "attention_norm"), stride, pool)
    q, k, v = (
        dense(pooled, w, f"attention.{name}").view(2, width // 4, 4, -1).transpose(2, 3)
        for name in ("query", "key", "value")
    )
    bias = 0 if form == "none" else relative_bias(w["attention.bias_table"])
    inside, outside = (0, bias) if form == "post_softmax" else (bias, 0)
    attended = ((q @ k.transpose(2, 3) / 2 + inside).softmax(-1) + outside) @ v
    y = dense(attended.transpose(2, 3).reshape(2, width, *grid), w, "attention.output")
    y = shortcut(x, w, stride, pool) + y
    hidden = F.gelu(dense(layer_norm(y, w, "feed_forward_norm"), w, "feed_forward.expand"))
    assert hidden.shape[1] == 4 * width
    torch.testing.assert_close(block(x), y + dense(hidden, w, "feed_forward.shrink"))
