"""Every way to compute relative attention is the same function: output and all gradients, against float64."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.attention import BACKENDS, Backend, RelativeAttention, check_backend, fastest, reference
from models.blocks import TransformerBlock
from models.norm import LayerNorm

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
TRAINING: list[Any] = ["reference", "sdpa"]
ON: list[Any] = [
    *(pytest.param(backend, "cpu", id=f"{backend}-cpu") for backend in TRAINING),
    *(pytest.param(backend, "cuda", marks=pytest.mark.gpu, id=f"{backend}-cuda") for backend in BACKENDS),
]


def off(ours: Tensor, exact: Tensor) -> float:
    """Relative distance."""
    return float((ours.detach().cpu().double() - exact.detach()).norm() / exact.detach().norm())


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(samples: int, heads: int, grid: tuple[int, int], head_size: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v laid out as the layer has them, and a table; the values are numbers of `dtype`, in float64."""
    shape = (samples, grid[0] * grid[1], heads, head_size)
    qkv = [drawn(*shape, seed=seed).to(dtype).double().transpose(1, 2) for seed in range(3)]
    return [*qkv, drawn(heads, 2 * grid[0] - 1, 2 * grid[1] - 1, seed=3).float().double()]


def with_gradients(backend: Backend, values: list[Tensor], dtypes: list[torch.dtype], device: str) -> list[Tensor]:
    """The output, and the gradients of q, k, v and the table for a given gradient of the output."""
    leaves = [value.to(device, dtype).requires_grad_() for value, dtype in zip(values, dtypes, strict=True)]
    y = BACKENDS[backend](*leaves)
    gradient = drawn(*y.shape, seed=4).to(device, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


def check(backend: Backend, device: str, heads: int, grid: tuple[int, int], head_size: int, dtype: torch.dtype) -> None:
    values = inputs(2, heads, grid, head_size, dtype)
    exact = with_gradients("reference", values, [torch.float64] * 4, "cpu")
    ours = with_gradients(backend, values, [dtype, dtype, dtype, torch.float32], device)
    for name, own, expected in zip(("output", "dq", "dk", "dv", "dtable"), ours, exact, strict=True):
        assert off(own, expected) < LIMITS[dtype], (name, heads, grid, head_size)


@pytest.mark.parametrize(("backend", "device"), ON)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(
    ("heads", "grid", "head_size"), [(1, (7, 7), 32), (12, (14, 14), 32), (3, (9, 16), 64), (2, (32, 32), 16)]
)
def test_output_and_all_gradients_are_those_of_float64(
    backend: Backend, device: str, dtype: torch.dtype, heads: int, grid: tuple[int, int], head_size: int
) -> None:
    check(backend, device, heads, grid, head_size, dtype)


@pytest.mark.parametrize("backend", TRAINING)
@given(
    heads=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    head_size=st.sampled_from([8, 16, 32, 64, 128]),
    dtype=st.sampled_from(list(LIMITS)),
)
@settings(max_examples=settings().max_examples * 2 // 5)
def test_on_random_shapes_too(
    backend: Backend, heads: int, grid: tuple[int, int], head_size: int, dtype: torch.dtype
) -> None:
    if grid != (1, 1):  # a single place attends to itself: no gradient but rounding
        check(backend, "cpu", heads, grid, head_size, dtype)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_looks_up_the_same_bias() -> None:
    values = inputs(2, 3, (5, 8), 16, torch.float32)
    with torch.no_grad():
        assert off(BACKENDS["flex"](*(value.float() for value in values)), reference(*values)) < 1e-5


@pytest.mark.parametrize(("backend", "device"), ON)
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_block_with_stride_has_the_same_output_and_gradients_with_every_backend(
    backend: Backend, device: str, dtype: torch.dtype
) -> None:
    def block(backend: Backend) -> nn.Module:
        attention = partial(RelativeAttention, grid=(7, 9), head_size=16, backend=backend)
        return TransformerBlock(24, 48, 2, attention, LayerNorm)

    exact = block("reference").double()
    with torch.no_grad():
        for seed, parameter in enumerate(exact.parameters()):
            parameter.copy_(0.2 * drawn(*parameter.shape, seed=seed))
    ours = block(backend).to(device)
    ours.load_state_dict(copy.deepcopy(exact.state_dict()))
    x = drawn(2, 24, 14, 18, seed=99).contiguous(memory_format=torch.channels_last)
    expected = exact(x)
    expected.square().sum().backward()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = ours(x.float().to(device))
    y.float().square().sum().backward()
    assert off(y, expected) < LIMITS[dtype]
    for (name, own), other in zip(ours.named_parameters(), exact.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        if not name.endswith("key.bias"):  # a constant added to all keys cancels: no gradient but rounding
            assert off(own.grad, other.grad) < LIMITS[dtype], name


def test_a_table_gets_its_gradient_in_every_forward() -> None:
    layer = RelativeAttention(16, 16, (3, 4), head_size=8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    for _ in range(2):
        layer.zero_grad()
        layer(drawn(2, 3, 4, 16, seed=1).float()).square().sum().backward()
        table = layer.get_parameter("bias_table")
        assert table.grad is not None and bool((table.grad != 0).all())
        with torch.no_grad():
            table += 1


def test_backends_that_do_not_exist_or_do_not_train_on_a_device_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention is 'flash'; it must be auto, reference, sdpa, flex"):
        check_backend("flash")
    with pytest.raises(ValueError, match="no backward pass on cpu"):
        check_backend("flex", "cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_auto_picks_a_backend_that_is_valid_there(device: str, with_gradient: bool) -> None:
    for dtype in LIMITS:
        for tokens in (49, 196, 1024):
            check_backend(fastest(device, dtype, tokens, with_gradient), "cuda" if device == "cuda" else "cpu")
