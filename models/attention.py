"""Relative attention: softmax over x_i . x_j + w(i - j), a trainable w per offset and head (paper, 2.1, Eq. 3).

The table of w belongs to one grid; `resize_bias_table` carries it to another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .init import linear
from .linear import apply_linear

BiasPosition = Literal["pre_softmax", "post_softmax", "none"]
"""Where w stands in Eq. 3: inside the softmax (the paper's choice), added to its result, or nowhere (Table 6)."""


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    bias_position: BiasPosition = "pre_softmax",
    backend: Backend = "reference",
) -> Tensor:
    """softmax(q k^T / sqrt(head_size) + w) v, or (softmax(q k^T / sqrt(head_size)) + w) v after the softmax.

    q, k, v are [n, heads, h * w, head_size], as is the result; `table` is [heads, 2h-1, 2w-1], or None without w.
    """
    if table is None or bias_position == "pre_softmax":
        return BACKENDS[backend](q, k, v, table)
    return BACKENDS[backend](q, k, v, None) + relative_bias(table).to(v.dtype) @ v


def resize_bias_table(table: Tensor, new_grid: tuple[int, int]) -> Tensor:
    """The table [heads, 2h-1, 2w-1] for another grid, bilinear per head (paper, A.1): [heads, 2h'-1, 2w'-1]."""
    size = [2 * side - 1 for side in new_grid]
    return F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]


class RelativeAttention(nn.Module):
    """Self-attention over the places of a grid: [n, h, w, inputs] to [n, h, w, width]; h and w are those of `grid`.

    Queries, keys and values have the output's width already where a stage begins: that is what the published
    parameter counts need. Loading a state whose table belongs to another grid resizes it.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        grid: tuple[int, int],
        head_size: int,
        bias_position: BiasPosition = "pre_softmax",
        backend: Backend | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.head_size, self.grid, self.bias_position, self.backend = head_size, grid, bias_position, backend
        self.query = linear(inputs, width)
        self.key = linear(inputs, width)
        self.value = linear(inputs, width)
        self.output = linear(width, width)
        self.bias_table: nn.Parameter | None = None
        if bias_position != "none":
            self.bias_table = nn.Parameter(torch.empty(width // head_size, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.register_load_state_dict_pre_hook(_resize_loaded_table)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        heads = apply_linear(x, weight, bias).flatten(1, 2).unflatten(-1, (-1, self.head_size))
        q, k, v = (part.transpose(1, 2) for part in heads.chunk(3, 2))
        backend = self.select_backend(q.device.type, q.dtype, torch.is_grad_enabled())
        y = relative_attention(q, k, v, self.bias_table, self.bias_position, backend)
        return self.output(y.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))

    def select_backend(self, device: str, dtype: torch.dtype, with_gradient: bool) -> Backend:
        """The backend that attention in this type on such a device takes."""
        if self.backend != "auto":
            return self.backend
        return fastest(device, dtype, self.grid[0] * self.grid[1], with_gradient, self.bias_position == "pre_softmax")

    def extra_repr(self) -> str:
        return (
            f"grid={self.grid}, head_size={self.head_size}, bias_position={self.bias_position}, backend={self.backend}"
        )


def _resize_loaded_table(layer: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: its table for the layer's own grid. `state` is load_state_dict's copy."""
    own, name = layer.bias_table, f"{prefix}bias_table"
    table = state.get(name)
    if isinstance(own, Tensor) and isinstance(table, Tensor) and table.dim() == 3 and table.shape != own.shape:
        state[name] = resize_bias_table(table, grid_of(own))  # pyrefly: ignore


Backend = Literal["reference", "sdpa", "flex"]


def relative_bias(table: Tensor) -> Tensor:
    """The bias [heads, h*w, h*w] of a table [heads, 2h-1, 2w-1].

    Of query (i, j) and key (i', j') it is table[head, i - i' + h - 1, j - j' + w - 1] (paper, A.1). To be called in
    every forward, so that the table gets its gradient.
    """
    height, width = grid_of(table)
    # Sliding windows of the table, read backwards, are the bias. An index buffer would hold (hw)^2 numbers per layer,
    # and the backward of indexing adds in no fixed order on a GPU.
    windows = table.unfold(1, height, 1).unfold(2, width, 1).flip(3, 4)
    return windows.reshape(len(table), height * width, height * width)


def grid_of(table: Tensor) -> tuple[int, int]:
    """Height and width of the grid that a table [heads, 2h-1, 2w-1] belongs to."""
    return (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2


def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
    """Products and softmax as the equation has them; the softmax in float32 where the table is float32."""
    logits = q @ k.transpose(-2, -1)
    scale = q.shape[-1] ** -0.5
    logits = logits * scale if table is None else torch.add(relative_bias(table), logits, alpha=scale)
    return logits.softmax(-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention, with the bias as its mask, in the type of q."""
    bias = None if table is None else relative_bias(table).to(q.dtype)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
    """torch's FlexAttention, which looks the bias up inside its kernel: neither bias nor logits are ever in memory.

    Compiled on a CUDA device, with its block or alone. On a CPU it has no backward (torch 2.13), and runs uncompiled:
    to check values only.
    """
    score = None if table is None else _score(table)
    return _flex(q.is_cuda and not torch.compiler.is_compiling())(q, k, v, score_mod=score)


def _score(table: Tensor) -> Callable[..., Tensor]:
    (height, width), columns = grid_of(table), table.shape[2]
    flat = table.flatten(1)

    def score(logit: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = query // width - key // width + height - 1
        return logit + flat[head, rows * columns + query % width - key % width + width - 1]

    return score


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # it imports the compiler

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    "reference": reference,
    "sdpa": sdpa,
    "flex": flex,
}


def fastest(device: str, dtype: torch.dtype, tokens: int, with_gradient: bool, with_table: bool = True) -> Backend:
    """The fastest valid backend for a device's type, the type of q, k, v, and a grid of this many tokens.

    A fixed rule and no timing at the start, so that a run that resumes takes the same one.
    """
    if device == "cuda":
        # Not measured yet. Its memory-efficient kernel takes a bias that needs a gradient.
        return "sdpa"
    if device != "cpu":
        return "reference"
    # benchmarks/results/attention.json: a bias that needs a gradient takes SDPA off its fast path, and it wins only
    # where memory counts most; without, it wins in float32, and in bfloat16 where there are many tokens.
    if with_gradient and with_table:
        return "sdpa" if dtype == torch.float32 and tokens >= 1000 else "reference"
    return "sdpa" if dtype == torch.float32 or tokens >= 400 else "reference"


def check_backend(name: str, device: str = "cuda") -> None:
    """ValueError for a backend that does not exist, or does not train on that device."""
    if name not in ("auto", *get_args(Backend)):
        raise ValueError(f"attention is {name!r}; it must be auto, {', '.join(get_args(Backend))}")
    if name == "flex" and device != "cuda":
        raise ValueError(f"attention is 'flex', which has no backward pass on {device}; use auto, reference or sdpa")
