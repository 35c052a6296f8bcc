"""The whole network: shapes, stochastic depth, precision and memory formats."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import coatnet
from models.attention import resize_bias_table
from models.coatnet import CoAtNet, stochastic_depth_rates
from models.norm import pop_statistics
from models.variants import Layout, Stage, Stem
from tests.models.test_initial import by_name

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


@pytest.mark.parametrize("resolution", [(16, 16), (8, 24), (40, 16)])
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
    hidden = torch.tanh(head.hidden(head.norm(x.mean((2, 3)))))
    torch.testing.assert_close(head(x), head.classifier(hidden))


def test_a_drop_path_mask_of_ones_changes_nothing() -> None:
    model, x = small(), images(3)
    assert torch.equal(model(x, torch.ones(3, model.branches)), model(x))


def test_a_drop_path_mask_of_zeros_leaves_the_shortcuts_alone() -> None:
    model, x = small(), images(2)
    dropped = torch.zeros(2, model.branches)
    expected, whole = model(x, dropped), model(x)
    with torch.no_grad():
        for name, parameter in model.stages.named_parameters():
            if ".shortcut." not in name:
                parameter.mul_(3)
    assert torch.equal(model(x, dropped), expected)
    assert not torch.allclose(model(x), whole, atol=1e-2)


def test_each_factor_of_the_mask_belongs_to_one_branch_of_one_sample() -> None:
    model, x = small(), images(2)
    whole = model(x)
    rows = []
    for branch in range(model.branches):
        drop_path_mask = torch.ones(2, model.branches)
        drop_path_mask[0, branch] = 0
        logits = model(x, drop_path_mask)
        torch.testing.assert_close(logits[1], whole[1])
        rows.append(logits[0])
    rows.append(whole[0])
    assert torch.pdist(torch.stack(rows)).min() > 1e-3


def test_stochastic_depth_rates_grow_by_block_from_zero() -> None:
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


def test_images_of_another_size_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"images are 16 x 24; the model was made for 16 x 16.*resolution=\(16, 24\)"):
        small()(images(2, 16, 24))


@pytest.mark.parametrize(
    ("resolution", "nearest"), [(225, "224 x 224"), ((224, 250), "224 x 256"), (10, "32 x 32"), (0, "32 x 32")]
)
def test_a_resolution_that_no_grid_fits_is_refused_with_the_nearest_that_does(
    resolution: int | tuple[int, int], nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"multiples of 32.*the nearest is {nearest}$"):
        coatnet("coatnet_0", resolution=resolution)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_every_variant_of_the_settings_trains_all_its_parameters(norm: Literal["batch", "layer"]) -> None:
    for form in ("pre_softmax", "post_softmax", "none"):
        model = coatnet(SMALL, 10, 16, norm=norm, pool="average", relative_attention=form, stride="depthwise")
        model(images(2)).square().sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if not name.endswith("key.bias")}
        assert all(grad is not None and grad.any() for grad in named.values()), form


def test_weights_load_into_a_model_of_another_resolution_with_resized_tables() -> None:
    state, larger = small(16).state_dict(), small((24, 32))
    larger.load_state_dict(state)
    for name, loaded in larger.state_dict().items():
        grid = ((loaded.shape[1] + 1) // 2, (loaded.shape[2] + 1) // 2) if name.endswith("bias_table") else None
        assert torch.equal(loaded, resize_bias_table(state[name], grid) if grid else state[name])
    assert larger(images(2, 24, 32)).isfinite().all()


# --------------------------------------------------------------------------------------------- activation checkpointing


def trained_once(stages: Literal["none", "all"] | tuple[int, ...]) -> tuple[CoAtNet, Tensor, int]:
    """A model after one backward, its loss, and the bytes that autograd kept for the backward."""
    model = coatnet(SMALL, 10, 16, activation_checkpointing=stages, normal=by_name)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    drop_path_mask = torch.rand(4, model.branches, generator=torch.Generator().manual_seed(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(images(4), drop_path_mask).square().sum()
    loss.backward()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return model, loss.detach(), sum(size for place, size in kept.items() if place not in parameters)


@pytest.mark.parametrize("stages", ["all", (1,), (2, 3, 5)])
def test_checkpointed_stages_are_the_same_to_the_bit_and_keep_less(
    stages: Literal["all"] | tuple[int, ...],
) -> None:
    plain, loss, kept = trained_once("none")
    model, same_loss, kept_less = trained_once(stages)
    assert torch.equal(loss, same_loss)
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)
    assert torch.equal(pop_statistics(model), pop_statistics(plain))
    assert kept_less < (0.5 if stages == "all" else 0.95) * kept


@pytest.mark.parametrize("stages", [(0,), (6,), "some"])
def test_a_stage_that_does_not_exist_cannot_be_checkpointed(stages: Any) -> None:
    with pytest.raises(ValueError, match="none, all, or a list of stages from 1 to 5"):
        coatnet(SMALL, 10, 16, activation_checkpointing=stages)


# ------------------------------------------------------------------------------------------------------ memory formats


class Copies(TorchDispatchMode):
    """Counts the copies of whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_map_is_copied_on_its_way_through_the_stages() -> None:
    model, x = coatnet(SMALL, 10, 16, attention="sdpa").eval(), images(2).to(memory_format=torch.channels_last)
    with torch.no_grad(), Copies() as copies:
        model(x)
    biases = 4  # of the four attention layers: their tables, spread out
    assert len(copies.seen) == biases, copies.seen


def test_a_drop_path_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_path_mask is \[2, 3\]; it must be \[2, 11\]"):
        small()(images(2), torch.ones(2, 3))


def test_an_unknown_place_of_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="stride is 'pool'"):
        coatnet(SMALL, stride="pool")  # pyrefly: ignore[bad-argument-type]


def test_what_the_readme_shows_a_borrower_is_what_happens() -> None:
    code = re.findall(r"```python\n(.*?)```", (Path(models.__file__).parent / "README.md").read_text(), re.DOTALL)[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code)
    shown = re.findall(r"# ([\[t].*?)(?::.*)?$", code, re.MULTILINE)
    assert printed.getvalue().splitlines() == shown
