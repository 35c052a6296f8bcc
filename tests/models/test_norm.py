"""Batch normalisation follows groups of samples, and its running statistics move once per step."""

import pytest
import torch
from torch import Tensor, nn

from models.norm import BatchNorm2d, apply_statistics, pop_statistics

WIDTH, GROUP, MOMENTUM, EPS = 5, 4, 0.1, 1e-3


def maps(samples: int, seed: int = 0) -> Tensor:
    x = torch.randn(samples, WIDTH, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1, samples + 1).view(-1, 1, 1, 1) + torch.arange(WIDTH).view(-1, 1, 1)


def norm(group: int | None = GROUP) -> BatchNorm2d:
    made = BatchNorm2d(WIDTH, EPS, MOMENTUM, group).double()
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 2, WIDTH))
        made.bias.copy_(torch.linspace(-1, 1, WIDTH))
        made.running_mean.fill_(0.25)
    return made


def torch_norm(like: BatchNorm2d, momentum: float = MOMENTUM) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(WIDTH, EPS, momentum).double()
    made.load_state_dict(like.state_dict(), strict=False)
    return made


def test_outputs_and_gradients_are_those_of_torch_on_each_group_alone() -> None:
    ours = norm()
    theirs = torch_norm(ours)
    x = maps(3 * GROUP).requires_grad_()
    x_alone = x.detach().clone().requires_grad_()
    weights = maps(3 * GROUP, seed=1)
    y = ours(x)
    y_alone = torch.cat([theirs(part) for part in x_alone.split(GROUP)])
    (y * weights).sum().backward()
    (y_alone * weights).sum().backward()
    torch.testing.assert_close(y, y_alone)
    torch.testing.assert_close(x.grad, x_alone.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_without_a_group_all_samples_are_one() -> None:
    torch.testing.assert_close(norm(None)(maps(6)), norm(6)(maps(6)))


def test_running_statistics_move_once_per_step_towards_the_mean_over_groups() -> None:
    ours = norm()
    step = [maps(2 * GROUP, seed=1), maps(GROUP, seed=2)]
    groups = [group for x in step for group in x.split(GROUP)]
    mean = torch.stack([group.mean((0, 2, 3)) for group in groups]).mean(0)
    variance = torch.stack([group.var((0, 2, 3), unbiased=True) for group in groups]).mean(0)
    for x in step:
        ours(x)
    apply_statistics(ours, pop_statistics(ours))
    torch.testing.assert_close(ours.running_mean, 0.9 * 0.25 + 0.1 * mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variance, rtol=1e-6, atol=1e-6)


def test_with_one_group_running_statistics_are_those_of_torch() -> None:
    ours = norm(None)
    theirs = torch_norm(ours)
    ours(maps(8))
    theirs(maps(8))
    apply_statistics(ours, pop_statistics(ours))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=1e-6)


def test_statistics_of_two_ranks_added_are_those_of_one_that_did_all() -> None:
    together, first, second = norm(), norm(), norm()
    together(maps(3 * GROUP))
    first(maps(3 * GROUP)[: 2 * GROUP])
    second(maps(3 * GROUP)[2 * GROUP :])
    torch.testing.assert_close(pop_statistics(first) + pop_statistics(second), pop_statistics(together))


def test_a_forward_alone_does_not_move_the_running_statistics() -> None:
    ours = norm()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours(maps(GROUP))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_statistics_that_were_taken_are_gone() -> None:
    ours = norm()
    ours(maps(GROUP))
    assert pop_statistics(ours).any()
    assert not pop_statistics(ours).any()


def test_applying_statistics_of_no_groups_moves_nothing() -> None:
    ours = norm()
    apply_statistics(ours, pop_statistics(ours))
    assert torch.equal(ours.running_mean, torch.full((WIDTH,), 0.25, dtype=torch.float64))
    assert torch.equal(ours.running_var, torch.ones(WIDTH, dtype=torch.float64))


def test_evaluation_uses_the_running_statistics_and_adds_none() -> None:
    ours = norm().eval()
    torch.testing.assert_close(ours(maps(3)), torch_norm(ours).eval()(maps(3)))
    assert not pop_statistics(ours).any()


def test_statistics_of_several_layers_go_back_to_their_own() -> None:
    two = nn.Sequential(norm(), BatchNorm2d(WIDTH, EPS, 1.0, GROUP).double())
    two(maps(GROUP))
    apply_statistics(two, pop_statistics(two))
    first, second = (layer.get_buffer("running_mean") for layer in two)
    torch.testing.assert_close(first, 0.9 * 0.25 + 0.1 * maps(GROUP).mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, torch.linspace(-1, 1, WIDTH, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_a_broken_group_is_refused() -> None:
    with pytest.raises(ValueError, match="6 samples do not split into groups of 4"):
        norm()(maps(6))


def test_statistics_of_bfloat16_maps_are_added_in_float32() -> None:
    ours = BatchNorm2d(WIDTH, group=GROUP)
    x = maps(GROUP).bfloat16()
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(pop_statistics(ours)[0], x.float().mean((0, 2, 3)))
