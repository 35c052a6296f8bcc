"""Relative attention: softmax over x_i . x_j + w(i - j), a trainable w per offset and head (paper, 2.1, Eq. 3).

The table of w belongs to one grid; `resize_bias_table` carries it to another. Next: norm.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initial import linear


def relative_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_size) + bias) v: [n, heads, tokens, head_size], with bias [heads, tokens, tokens].

    The softmax is computed in the wider of the logits' and the bias' types: in float32 under bfloat16 autocast.
    """
    # Plain products, not scaled_dot_product_attention: that one leaves its fast path where the bias needs a gradient.
    logits = torch.add(bias, q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)
    return logits.softmax(-1).to(v.dtype) @ v


def relative_bias(table: Tensor) -> Tensor:
    """The bias [heads, h*w, h*w] of a table [heads, 2h-1, 2w-1].

    Of query (i, j) and key (i', j') it is table[head, i - i' + h - 1, j - j' + w - 1] (paper, A.1). To be called in
    every forward, so that the table gets its gradient.
    """
    height, width = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    # Sliding windows of the table, read backwards, are the bias. An index buffer would hold (hw)^2 numbers per layer,
    # and the backward of indexing adds in no fixed order on a GPU.
    windows = table.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)
    return windows.reshape(len(table), height * width, height * width)


def resize_bias_table(table: Tensor, new_grid: tuple[int, int]) -> Tensor:
    """The table [heads, 2h-1, 2w-1] for another grid, bilinear per head (paper, A.1): [heads, 2h'-1, 2w'-1]."""
    size = [2 * side - 1 for side in new_grid]
    return F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]


class RelativeAttention(nn.Module):
    """Self-attention over the places of a grid: [n, h, w, inputs] to [n, h, w, width]; h and w are those of `grid`.

    Queries, keys and values have the output's width already where a stage begins: that is what the published
    parameter counts need.
    """

    def __init__(self, inputs: int, width: int, head_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.head_size = head_size
        self.query = linear(inputs, width)
        self.key = linear(inputs, width)
        self.value = linear(inputs, width)
        self.output = linear(width, width)
        self.bias_table = nn.Parameter(torch.empty(width // head_size, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        q, k, v = (
            layer(tokens).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = relative_attention(q, k, v, relative_bias(self.bias_table))
        return self.output(y.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])
