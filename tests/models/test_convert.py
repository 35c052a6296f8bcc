"""timm's networks and ours are the same functions, both ways, and what is not the same is refused by name."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import coatnet
from models.coatnet import CoAtNet
from models.convert import LAYOUTS, TIMM_DEFAULTS, from_timm, settings, to_timm
from models.variants import layout_of
from tests.peers import peer

CLASSES = 7
OTHERS = ["coatnet_rmlp_1_rw_224", "coatnet_0_rw_224", "coatnext_nano_rw_224", "maxvit_tiny_tf_224", "resnet50"]


@pytest.fixture(scope="module", autouse=True)
def no_initial_values() -> Iterator[None]:
    """Every value is set here, so the 688 million of timm's largest are not drawn first."""
    peer("timm")  # not where tests are collected: it takes two seconds
    drawing = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_")
    with pytest.MonkeyPatch.context() as patch:
        for name in drawing:
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        patch.setattr("timm.layers.pos_embed_rel.trunc_normal_", lambda tensor, *_, **__: tensor)
        yield


@torch.no_grad()
def filled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter and statistic away from its initial value, tables not symmetric, logits of size about 1."""
    noise = torch.randn((1 << 22) + 1)
    for name, values in state.items():
        for part in values.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
        if name.endswith("running_var"):
            values.abs_().add_(0.5)
        elif values.dim() == 1:
            values.mul_(0.2).add_(name.endswith("weight"))
        elif values.dim() > 1 and "table" not in name:
            values.div_(values[0].numel() ** 0.5)
    return state


def timm_model(name: str, **arguments: Any) -> nn.Module:
    model = peer("timm").create_model(name, num_classes=CLASSES, **arguments).eval()
    filled(model.state_dict())
    return model


def our_model(layout: str, state: dict[str, Tensor] | None = None, classes: int = CLASSES, **more: Any) -> CoAtNet:
    """Ours with this state, or one of its own."""
    with torch.device("meta"):
        model = coatnet(layout, classes, **more, normal=lambda _, shape: torch.empty(shape)).eval()
    if state is None:
        state = filled({name: torch.empty(values.shape) for name, values in model.state_dict().items()})
    model.load_state_dict(state, assign=True)
    return model


def opened_by_timm(model: CoAtNet, name: str, folder: Path) -> nn.Module:
    """timm's model from a folder such as `coatnet export --layout timm` writes."""
    state, arguments = to_timm(model, name)
    save_file(state, folder / "model.safetensors")
    data = {"input_size": [3, *model.resolution], "first_conv": "stem.conv1", "classifier": "head.fc"}
    config = {"architecture": f"{name}_224", "num_classes": CLASSES, "model_args": arguments, "pretrained_cfg": data}
    (folder / "config.json").write_text(json.dumps(config))
    return peer("timm").create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_same_logits(one: nn.Module, other: nn.Module, height: int, width: int) -> None:
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        expected, found = one(images), other(images)
    assert 0.2 < expected.std() < 5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",  # half a minute for the 688 million of the largest
    [pytest.param(name, marks=pytest.mark.torture) if name > "coatnet_2" else name for name in LAYOUTS.values()],
)
def test_timm_as_it_comes_is_one_of_ours_and_ours_is_one_of_timms_to_rounding(name: str, tmp_path: Path) -> None:
    side = 224 if name < "coatnet_4" else 96  # the two largest take seconds for each forward
    theirs = timm_model(f"{name}_224", img_size=side)
    arguments, state = from_timm(f"{name}_224", theirs.state_dict(), {"num_classes": CLASSES, "img_size": side})
    assert_same_logits(theirs, our_model(state=state, **arguments), side, side)
    del theirs, state
    paper = our_model(name, resolution=side)
    assert settings(paper) == {
        "stride": "expand",
        "pool": "max",
        "norm": "batch",
        "batch_norm_eps": 1e-3,
        "layer_norm_eps": 1e-5,
        "head_size": layout_of(name).head_size,
        "relative_attention": "pre_softmax",
    }
    assert_same_logits(paper, opened_by_timm(paper, name, tmp_path), side, side)


@pytest.mark.parametrize(
    "settings",
    [
        {"resolution": (64, 96)},
        {"norm": "layer", "layer_norm_eps": 1e-4},
        {"relative_attention": "none", "stride": "depthwise"},
        {"pool": "average", "head_size": 16, "batch_norm_eps": 0.1, "layer_norm_eps": 1e-2},
    ],
)
def test_every_setting_that_timm_has_survives_the_round_trip_to_the_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"resolution": 64, **settings}
    ours = our_model("coatnet_0", **settings)
    theirs = opened_by_timm(ours, "coatnet_0", tmp_path)
    assert_same_logits(ours, theirs, *ours.resolution)
    arguments, state = from_timm("coatnet_0_224", *to_timm(ours, "coatnet_0"))
    assert settings.items() <= arguments.items()
    back = our_model(state=state, **arguments)
    assert_bits_equal(back.state_dict(), ours.state_dict())
    assert_bits_equal(to_timm(back, "coatnet_0")[0], theirs.state_dict())


def test_the_logits_see_the_orientation_of_a_table() -> None:
    ours = our_model("coatnet_0", resolution=64)
    turned = {name: v.mT if name.endswith("table") else v for name, v in ours.state_dict().items()}
    with pytest.raises(AssertionError):
        assert_same_logits(ours, our_model("coatnet_0", turned, resolution=64), 64, 64)


def test_the_defaults_assumed_of_timm_are_those_that_timm_has() -> None:
    as_it_comes = timm_model("coatnet_0_224", img_size=32)
    spelled_out = (
        peer("timm").create_model("coatnet_0_224", **{**TIMM_DEFAULTS, "num_classes": CLASSES, "img_size": 32}).eval()
    )
    spelled_out.load_state_dict(as_it_comes.state_dict())
    assert str(spelled_out) == str(as_it_comes)
    assert_same_logits(as_it_comes, spelled_out, 32, 32)


def assert_bits_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    expected = {name: values for name, values in expected.items() if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("coatnet_6", lambda: our_model("coatnet_0", resolution=32), "name is coatnet_6; timm only has"),
        ("c_c_t_t", lambda: our_model("c_c_t_t", resolution=32), "name is c_c_t_t"),
        (
            "coatnet_0",
            lambda: our_model("coatnet_0", resolution=32, relative_attention="post_softmax"),
            "relative_attention is 'post_softmax'; timm only has 'pre_softmax' or 'none'",
        ),
    ],
)
def test_what_timm_does_not_have_is_refused(name: str, model: Callable[[], CoAtNet], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_timm(model(), name)


@pytest.mark.parametrize("name", OTHERS)
def test_another_network_of_timms_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is not one of .*coatnet_5_224$"):
        from_timm(name, {}, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conv_stride_mode": "pool"}, "conv_stride_mode is 'pool'; only '1x1' or 'dw'"),
        ({"conv_pool_type": "max2"}, "transformer_pool_type is 'avg2'; only 'max2'"),
        ({"conv_norm_layer": "layernorm2d"}, "transformer_norm_eps is 1e-06; only 1e-05"),
        ({"in_chans": 1}, "in_chans is 1"),
        ({"conv_act_layer": "silu"}, "conv_act_layer is 'silu'; this argument is"),
        ({"num_classes": 3}, r"head.fc.bias is \[7\] in the weights; .* it is \[3\]"),
        ({"stem_bias": True}, "stem.conv1.bias is absent in the weights"),
    ],
)
def test_arguments_that_are_not_ours_or_not_the_weights_are_refused(arguments: dict[str, Any], message: str) -> None:
    state = timm_model("coatnet_0_224", img_size=32).state_dict()
    with pytest.raises(ValueError, match=message):
        from_timm("coatnet_0_224", state, {"num_classes": CLASSES, "img_size": 32, **arguments})
