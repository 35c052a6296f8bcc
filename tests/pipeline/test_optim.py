"""Laws of the optimizer's rules: the learning rate's path, which parameters decay, AdamW and its average."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import coatnet
from pipeline.config.schema import Optim
from pipeline.training.ema import ema_decay
from pipeline.training.optimizer import AdamWWithEma, learning_rate, parameter_groups

decays = st.sampled_from(["cosine", "linear", "none"])


@given(st.floats(1e-6, 10), st.floats(0, 1), st.integers(0, 50), st.integers(2, 300), decays)
def test_the_rate_warms_up_to_its_peak_and_falls_to_its_final_value_at_the_last_step(peak, share, warmup, after, decay):
    optim = Optim(learning_rate=peak, final_learning_rate=share * peak, warmup_steps=warmup, decay=decay)
    steps = warmup + after
    rates = [learning_rate(optim, step, steps) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert rising == pytest.approx([peak * (step + 1) / warmup for step in range(warmup)])
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(falling))
    assert max(rates) == pytest.approx(peak) and falling[0] == pytest.approx(peak)
    assert falling[-1] == pytest.approx(peak if decay == "none" else share * peak)


@given(st.integers(0, 50), st.integers(20, 300), decays)
def test_the_rate_never_jumps(warmup, after, decay):
    """By no more than the steepest of a cosine over the steps that are left, and a step of the warm-up."""
    optim = Optim(learning_rate=1, final_learning_rate=0, warmup_steps=warmup, decay=decay)
    rates = [learning_rate(optim, step, warmup + after) for step in range(warmup + after)]
    assert max(abs(a - b) for a, b in pairwise(rates)) <= max(1.6 / (after - 1), 1 / max(1, warmup)) + 1e-9


def test_cosine_and_linear_are_half_way_down_in_the_middle():
    for decay in ("cosine", "linear"):
        optim = Optim(learning_rate=3, final_learning_rate=1, warmup_steps=10, decay=decay)
        assert learning_rate(optim, 60, 111) == pytest.approx(2)
    quarter = learning_rate(Optim(learning_rate=1, final_learning_rate=0, warmup_steps=0), 25, 101)
    assert quarter == pytest.approx(0.5 + 0.5 * 2**-0.5)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5), (10, 5), (4, 5)])
def test_runs_hardly_longer_than_their_warm_up_have_rates_from_0_to_the_peak(warmup, steps):
    optim = Optim(learning_rate=2, final_learning_rate=1, warmup_steps=warmup)
    assert all(0 < learning_rate(optim, step, steps) <= 2 for step in range(steps))


def test_the_averages_decay_warms_up_to_its_value_and_no_further():
    decays_of_steps = [ema_decay(0.9, step) for step in range(200)]
    assert decays_of_steps[:3] == [1 / 10, 2 / 11, 3 / 12]
    assert decays_of_steps == sorted(decays_of_steps) and decays_of_steps[-1] == 0.9


def test_biases_norms_and_bias_tables_do_not_decay_and_each_parameter_has_a_group():
    model = coatnet("coatnet_0", classes=3, resolution=32)
    decaying, exempt = parameter_groups(model, 0.3)
    assert (decaying["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    found = [id(parameter) for group in (decaying, exempt) for parameter in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    for parameter in decaying["params"]:
        owner, _, leaf = names[id(parameter)].rpartition(".")
        assert leaf == "weight" and isinstance(modules[owner], nn.Conv2d | nn.Linear)
    leaves = {names[id(parameter)].rpartition(".")[2] for parameter in exempt["params"]}
    assert leaves == {"weight", "bias", "bias_table"}
    assert all(p.dim() == 1 or names[id(p)].endswith("bias_table") for p in exempt["params"])


# ----------------------------------------------------------------------------------------------------- AdamWWithEma


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.sin(torch.arange(parameter.numel()) + number).reshape(parameter.shape))
    return model


def gradients(model: nn.Module, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        values = torch.cos(torch.arange(parameter.numel()) * (step + 1.5) + number)
        parameter.grad = values.reshape(parameter.shape) * 10 ** (step % 3 - 1)


OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "fused": True}


@pytest.mark.parametrize("averaging", [True, False])
def test_weights_and_moments_are_torchs_adamw_to_the_bit_with_or_without_ema(averaging):
    mine, theirs = small_model(), small_model()
    optimizer = AdamWWithEma(parameter_groups(mine, 0.1), **OPTIONS)
    oracle = torch.optim.AdamW(parameter_groups(theirs, 0.1), **OPTIONS)
    for step in range(12):
        gradients(mine, step), gradients(theirs, step)
        for each in (optimizer, oracle):
            for group in each.param_groups:
                group["lr"] = 0.05 / (step + 1)
        optimizer.decay = 0.9 if averaging else None
        optimizer.step(), oracle.step()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[a][kind], oracle.state[b][kind])
            assert ("ema" in optimizer.state[a]) == averaging


def test_the_average_is_that_of_the_definition_and_begins_as_the_initial_weights():
    model = small_model()
    oracle = [parameter.detach().double().clone() for parameter in model.parameters()]
    optimizer = AdamWWithEma(parameter_groups(model, 0.1), **OPTIONS)
    for step in range(30):
        gradients(model, step)
        optimizer.decay = ema_decay(0.95, step)
        optimizer.step()
        for average, parameter in zip(oracle, model.parameters(), strict=True):
            average.mul_(optimizer.decay).add_(parameter.detach().double(), alpha=1 - optimizer.decay)
            torch.testing.assert_close(optimizer.state[parameter]["ema"].double(), average, rtol=1e-5, atol=1e-6)


def test_flat_shards_give_the_weights_and_averages_of_whole_parameters():
    """As ZeRO has them: the parameters of a group end to end, cut anywhere. The last bit depends on the cut."""
    model = small_model()
    whole = [p.detach().reshape(-1) for p in model.parameters()]
    shards = [nn.Parameter(shard.clone()) for shard in torch.cat(whole).split(17)]
    options = {**OPTIONS, "weight_decay": 0.1}
    optimizer, of_shards = AdamWWithEma(model.parameters(), **options), AdamWWithEma(shards, **options)
    for step in range(5):
        gradients(model, step)
        flat = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        for shard, gradient in zip(shards, flat.split(17), strict=True):
            shard.grad = gradient.clone()
        optimizer.decay = of_shards.decay = 0.7
        optimizer.step(), of_shards.step()
    for kind in ("exp_avg", "exp_avg_sq", "ema"):
        together = torch.cat([optimizer.state[p][kind].reshape(-1) for p in model.parameters()])
        torch.testing.assert_close(torch.cat([of_shards.state[shard][kind] for shard in shards]), together)


def test_a_parameter_without_a_gradient_keeps_its_weight_and_its_average():
    model = small_model()
    optimizer = AdamWWithEma(parameter_groups(model, 0.1), **OPTIONS)
    optimizer.decay = 0.5
    for step in range(2):
        gradients(model, step)
        optimizer.step()
    still = next(model.parameters())
    before, average = still.detach().clone(), optimizer.state[still]["ema"].clone()
    gradients(model, 2)
    still.grad = None
    optimizer.step()
    assert torch.equal(still, before) and torch.equal(optimizer.state[still]["ema"], average)


def test_resuming_from_the_state_gives_the_same_weights_and_averages():
    model = small_model()
    optimizer = AdamWWithEma(parameter_groups(model, 0.1), **OPTIONS)
    optimizer.decay = 0.9
    for step in range(3):
        gradients(model, step)
        optimizer.step()
    again = small_model()
    again.load_state_dict(model.state_dict())
    resumed = AdamWWithEma(parameter_groups(again, 0.1), **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.decay = 0.9
    for step in range(3, 6):
        for each, of_model in ((optimizer, model), (resumed, again)):
            gradients(of_model, step)
            each.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(optimizer.state[a]["ema"], resumed.state[b]["ema"])
