"""The whole network: shapes, stochastic depth, precision and memory formats."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import coatnet
from models.coatnet import CoAtNet, stochastic_depth_rates
from models.family import Layout, Stage, Stem

# Both kinds of block, each with and without stride, and with and without a change of width.
SMALL = Layout(
    stem=Stem(blocks=2, width=16, stride=1),
    stages=(
        Stage("mbconv", 2, 16),
        Stage("mbconv", 1, 24, stride=1),
        Stage("transformer", 2, 32),
        Stage("transformer", 1, 48, stride=1),
        Stage("transformer", 1, 48),
    ),
    head_size=16,
)


def small(resolution: int | tuple[int, int] = 16, classes: int = 10) -> CoAtNet:
    """A small network in evaluation mode, with every parameter away from its initial 0 or 1."""
    model = coatnet(SMALL, classes, resolution).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def images(samples: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(samples, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("resolution", [(16, 16), (8, 24), (15, 21)])
def test_maps_of_all_stages_have_their_stride_and_width_at_any_resolution(resolution: tuple[int, int]) -> None:
    maps = small(resolution).forward_features(images(2, *resolution))
    strides, widths = [1, 2, 2, 4, 4, 8], [16, 16, 24, 32, 48, 48]
    grids = [(-(-resolution[0] // stride), -(-resolution[1] // stride)) for stride in strides]
    assert [tuple(x.shape) for x in maps] == [(2, w, *grid) for w, grid in zip(widths, grids, strict=True)]


def test_maps_stay_channels_last_from_stem_to_head() -> None:
    maps = small().forward_features(images(2))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_channels_last_and_contiguous_images_give_the_same_logits() -> None:
    model, x = small(), images(3)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-5, atol=1e-5)


def test_channels_last_weights_give_the_same_logits() -> None:
    model, x = small(), images(3)
    expected = model(x)
    model.to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_network_without_classes_gives_the_features_that_the_classifier_reads() -> None:
    model, x = small(), images(2)
    features = small(classes=0)
    features.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.classifier")})
    torch.testing.assert_close(model.head.classifier(features(x)), model(x))


def test_the_stem_is_two_convolutions_with_norm_and_gelu_between_them() -> None:
    stem, x = small().stem, images(2)
    w = dict(stem.named_parameters())
    y = F.gelu(stem.norms[0](F.conv2d(x, w["first.weight"], w["first.bias"], padding=1)))
    y = F.conv2d(y, w["convolutions.0.weight"], w["convolutions.0.bias"], padding=1)
    torch.testing.assert_close(stem(x), y)


def test_the_head_is_mean_norm_hidden_tanh_classifier() -> None:
    head, x = small().head, torch.randn(2, 48, 2, 3, generator=torch.Generator().manual_seed(2))
    hidden = torch.tanh(head.hidden(F.layer_norm(x.mean((2, 3)), (48,), head.norm.weight, head.norm.bias)))
    torch.testing.assert_close(head(x), head.classifier(hidden))


def test_survival_of_ones_is_no_stochastic_depth() -> None:
    model, x = small(), images(3)
    assert torch.equal(model(x, torch.ones(3, model.branches)), model(x))


def test_survival_of_zeros_leaves_the_shortcuts_alone() -> None:
    model, x = small(), images(2)
    dropped = torch.zeros(2, model.branches)
    expected, whole = model(x, dropped), model(x)
    with torch.no_grad():
        for name, parameter in model.stages.named_parameters():
            if ".shortcut." not in name:
                parameter.mul_(3)
    assert torch.equal(model(x, dropped), expected)
    assert not torch.allclose(model(x), whole, atol=1e-2)


def test_each_survival_factor_belongs_to_one_branch_of_one_sample() -> None:
    model, x = small(), images(2)
    whole = model(x)
    rows = []
    for branch in range(model.branches):
        survival = torch.ones(2, model.branches)
        survival[0, branch] = 0
        logits = model(x, survival)
        torch.testing.assert_close(logits[1], whole[1])
        rows.append(logits[0])
    rows.append(whole[0])
    assert torch.pdist(torch.stack(rows)).min() > 1e-3


def test_branches_are_one_per_mbconv_and_two_per_transformer_block() -> None:
    assert small().branches == 3 + 2 * 4


def test_rates_of_stochastic_depth_grow_by_block_from_zero_and_both_branches_of_a_block_share_theirs() -> None:
    blocks = [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert stochastic_depth_rates(small(), 0.7) == pytest.approx([0.1 * k for k in blocks])


@pytest.mark.parametrize("stride", ["expand", "depthwise"])
def test_in_bfloat16_autocast_loss_and_all_gradients_are_finite(stride: str) -> None:
    model = coatnet(SMALL, 10, 16, stride=stride)  # pyrefly: ignore[bad-argument-type]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(4), torch.full((4, model.branches), 1 / 0.9))
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_autocast_is_near_float32() -> None:
    model, x = small(), images(4)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_the_place_of_the_stride_changes_the_function_and_not_the_weights() -> None:
    ours, other = small(), coatnet(SMALL, 10, 16, stride="depthwise").eval()
    other.load_state_dict(ours.state_dict())
    assert other(images(2)).shape == (2, 10)
    assert not torch.allclose(other(images(2)), ours(images(2)), atol=1e-3)


def test_a_sample_s_logits_do_not_depend_on_its_neighbours_in_evaluation() -> None:
    model, x = small(), images(4)
    torch.testing.assert_close(model(x)[1:3], model(x[1:3]))


def test_every_parameter_takes_part() -> None:
    model = small()
    model(images(2)).square().sum().backward()
    # A constant added to all keys cancels in the softmax: their bias has no gradient but rounding.
    named = {name: p.grad for name, p in model.named_parameters() if not name.endswith("key.bias")}
    assert all(grad is not None and grad.any() for grad in named.values())


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="images are 16 x 24; the model was made for 16 x 16"):
        small()(images(2, 16, 24))


def test_survival_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"survival is \[2, 3\]; it must be \[2, 11\]"):
        small()(images(2), torch.ones(2, 3))


def test_an_unknown_place_of_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="stride is 'pool'"):
        coatnet(SMALL, stride="pool")  # pyrefly: ignore[bad-argument-type]
