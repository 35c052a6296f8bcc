"""Relative attention is the paper's Eq. 3, and its tables move between grids."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import BiasPosition, RelativeAttention, relative_attention, resize_bias_table

HEADS, HEIGHT, WIDTH, HEAD_SIZE = 2, 2, 3, 4


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def attention_by_offsets(q: Tensor, k: Tensor, v: Tensor, table: Tensor, after: bool) -> Tensor:
    """Eq. 3 place by place: exp(x_i . x_j + w(i - j)) weighs the value at j, normalised over all j; or, after the
    softmax, exp(x_i . x_j) normalised, plus w(i - j)."""
    places = [(i, j) for i in range(HEIGHT) for j in range(WIDTH)]
    y = torch.zeros_like(v)
    for sample in range(len(q)):
        for head in range(HEADS):
            for a, (i, j) in enumerate(places):
                weights: list[Tensor] = []
                offsets: list[Tensor] = []
                for b, (i2, j2) in enumerate(places):
                    dot = torch.stack([q[sample, head, a, d] * k[sample, head, b, d] for d in range(HEAD_SIZE)]).sum()
                    offsets.append(table[head, i - i2 + HEIGHT - 1, j - j2 + WIDTH - 1])
                    weights.append(torch.exp(dot / math.sqrt(HEAD_SIZE) + (0 if after else offsets[b])))
                for b, weight in enumerate(weights):
                    share = weight / sum(weights) + (offsets[b] if after else 0)
                    y[sample, head, a] += share * v[sample, head, b]
    return y


@pytest.mark.parametrize("form", ["pre_softmax", "post_softmax"])
def test_relative_attention_is_the_papers_equation_on_an_oblong_grid(form: BiasPosition) -> None:
    q, k, v = drawn(3, 2, HEADS, HEIGHT * WIDTH, HEAD_SIZE)
    table = drawn(HEADS, 2 * HEIGHT - 1, 2 * WIDTH - 1)
    ours = relative_attention(q, k, v, table, form)
    slow = attention_by_offsets(q, k, v, table, after=form == "post_softmax")
    torch.testing.assert_close(ours, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["pre_softmax", "post_softmax"])
def test_gradients_are_those_of_finite_differences(form: BiasPosition) -> None:
    q, k, v = drawn(3, 1, HEADS, HEIGHT * WIDTH, HEAD_SIZE)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, drawn(HEADS, 2 * HEIGHT - 1, 2 * WIDTH - 1))]
    assert torch.autograd.gradcheck(lambda q, k, v, table: relative_attention(q, k, v, table, form), inputs)


@pytest.mark.parametrize("form", ["pre_softmax", "post_softmax", "none"])
def test_with_a_table_of_zeros_or_without_one_it_is_plain_attention(form: BiasPosition) -> None:
    q, k, v = drawn(3, 2, HEADS, HEIGHT * WIDTH, HEAD_SIZE)
    table = torch.zeros(HEADS, 2 * HEIGHT - 1, 2 * WIDTH - 1, dtype=torch.float64)
    ours = relative_attention(q, k, v, None if form == "none" else table, form)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v))


def test_with_a_table_alone_the_layer_shifts_with_its_input() -> None:
    layer = RelativeAttention(4, 8, (3, 1), head_size=4).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    with torch.no_grad():  # only neighbours one row up or the place itself are seen
        layer.get_parameter("bias_table").fill_(-1e9)[:, 2:4] = 0.5
    x = drawn(1, 3, 1, 4)
    shifted = x.roll(1, dims=1)
    torch.testing.assert_close(layer(shifted)[:, 2], layer(x)[:, 1])


def test_loading_a_state_of_another_grid_resizes_its_table_once() -> None:
    small, large = RelativeAttention(8, 8, (3, 2), head_size=4), RelativeAttention(8, 8, (6, 5), head_size=4)
    torch.nn.init.normal_(small.get_parameter("bias_table"), generator=torch.Generator().manual_seed(0))
    state = small.state_dict()
    large.load_state_dict(state)
    assert state["bias_table"].shape == (2, 5, 3)
    assert torch.equal(large.get_parameter("bias_table"), resize_bias_table(state["bias_table"], (6, 5)))


def test_a_table_of_another_number_of_heads_is_refused_at_loading() -> None:
    with pytest.raises(RuntimeError, match="bias_table"):
        RelativeAttention(8, 8, (3, 2), head_size=4).load_state_dict(
            RelativeAttention(8, 8, (6, 5), head_size=8).state_dict()
        )


def test_resizing_a_table_to_its_own_grid_changes_nothing() -> None:
    table = torch.randn(3, 13, 9)
    assert torch.equal(resize_bias_table(table, (7, 5)), table)


@pytest.mark.parametrize("grid", [(12, 16), (7, 9), (2, 3)])
def test_resizing_keeps_a_constant_of_each_head(grid: tuple[int, int]) -> None:
    constants = torch.tensor([-1.5, 0.0, 2.0]).view(3, 1, 1)
    resized = resize_bias_table(constants.expand(3, 13, 9), grid)
    torch.testing.assert_close(resized, constants.expand(3, 2 * grid[0] - 1, 2 * grid[1] - 1))


def test_resizing_is_bilinear_between_the_centres_of_cells() -> None:
    resized = resize_bias_table(torch.tensor([[[0.0, 1.0, 2.0]]]), (1, 3))
    torch.testing.assert_close(resized, torch.tensor([[[0.0, 0.4, 1.0, 1.6, 2.0]]]))


def test_resizing_keeps_the_centre_of_a_symmetric_table_where_it_is() -> None:
    rows, columns = torch.meshgrid(torch.arange(-6.0, 7), torch.arange(-4.0, 5), indexing="ij")
    resized = resize_bias_table(-(rows**2 + columns**2)[None], (12, 10))[0]
    assert int(resized.argmax()) == 11 * 19 + 9
    torch.testing.assert_close(resized, resized.flip(0, 1))
