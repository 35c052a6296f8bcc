"""Initial weights are a function of a parameter's name and shape alone, and keep the signal's size at any width."""

from hashlib import sha256

import pytest
import torch
from torch import Tensor

from models import coatnet
from models.init import decay_exempt, initialize
from models.variants import Layout, Stage, Stem


def by_name(name: str, shape: torch.Size) -> Tensor:
    seed = int.from_bytes(sha256(name.encode()).digest()[:6])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout(width: int = 16, more: tuple[Stage, ...] = ()) -> Layout:
    stages = (Stage("mbconv", 2, width, 1), Stage("transformer", 2, 2 * width), *more)
    return Layout(Stem(2, width, 1), stages, head_size=16)


def test_the_same_model_made_twice_has_the_same_weights_whatever_was_drawn_before() -> None:
    first = coatnet(layout(), 10, 8, normal=by_name)
    torch.randn(7)
    second = coatnet(layout(), 10, 8, normal=by_name)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_weights_do_not_depend_on_the_other_parameters_of_the_network() -> None:
    short = coatnet(layout(), 10, 8, normal=by_name)
    long = coatnet(layout(more=(Stage("transformer", 1, 32, 1),)), 10, 8, normal=by_name)
    assert all(torch.equal(value, long.get_parameter(name)) for name, value in short.named_parameters())


def test_every_parameter_gets_a_value_and_its_own_draw() -> None:
    model = coatnet(layout(), 10, 8)
    drawn: list[str] = []

    def normal(name: str, shape: torch.Size) -> Tensor:
        drawn.append(name)
        return by_name(name, shape)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    initialize(model, normal)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sorted(drawn) == sorted(name for name, parameter in model.named_parameters() if parameter.dim() > 1)


def test_biases_begin_at_zero_scales_at_one_and_tables_at_a_deviation_of_0_02() -> None:
    model = coatnet(layout(), 10, 32, normal=by_name)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert bool((parameter == 1).all())
        elif name.endswith("bias_table"):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("width", [16, 128])
def test_maps_of_a_new_network_are_neither_vanishing_nor_exploding_at_any_width(width: int) -> None:
    model = coatnet(layout(width), 10, 16, normal=by_name)
    maps = model.forward_features(by_name("images", torch.Size([8, 3, 16, 16])))
    deviations = [float(x.detach().std()) for x in maps]
    assert all(0.5 < deviation < 3 for deviation in deviations), deviations


def test_weight_decay_takes_all_matrices_and_kernels_and_nothing_else() -> None:
    named = coatnet(layout()).named_parameters()
    decayed = {name for name, parameter in named if not decay_exempt(name, parameter.shape)}
    assert not any("norm" in name or "bias" in name for name in decayed)
    assert {"stem.first.weight", "stages.0.0.depthwise.weight", "stages.1.0.attention.query.weight"} <= decayed
    assert {"stages.1.1.feed_forward.expand.weight", "head.hidden.weight", "head.classifier.weight"} <= decayed
