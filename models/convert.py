"""timm's `coatnet_0_224` to `coatnet_5_224` and ours, both ways: the same weights, and settings for the same function.

timm's defaults are another reading of the paper (average pooling, the stride at the depthwise convolution, other
epsilons, a stem without biases, heads of 32), but its constructor takes arguments that make it compute ours. What it
calls `_rw`, `rmlp` or `coatnext` is another network.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import RelativeAttention
from .blocks import MBConv, Shortcut
from .coatnet import CoAtNet, coatnet
from .norm import BatchNorm2d, LayerNorm2d

LAYOUTS = {f"coatnet_{size}_224": f"coatnet_{size}" for size in range(6)}
"""timm's name of an architecture, and the layout that it is."""

TIMM_DEFAULTS: dict[str, Any] = {
    "num_classes": 1000,
    "img_size": 224,
    "in_chans": 3,
    "global_pool": "avg",
    "stem_bias": False,
    "conv_stride_mode": "dw",
    "conv_pool_type": "avg2",
    "conv_norm_layer": "batchnorm2d",
    "conv_norm_eps": 1e-5,
    "transformer_pool_type": "avg2",
    "transformer_norm_eps": 1e-6,
    "transformer_dim_head": 32,
    "transformer_rel_pos_type": "bias",
}
"""The arguments of timm's networks that are understood here, with their defaults."""
CHOICES = {
    "stride": ("conv_stride_mode", {"expand": "1x1", "depthwise": "dw"}),
    "pool": ("conv_pool_type", {"average": "avg2", "max": "max2"}),
    "norm": ("conv_norm_layer", {"batch": "batchnorm2d", "layer": "layernorm2d"}),
    "relative_attention": ("transformer_rel_pos_type", {"pre_softmax": "bias", "none": ""}),
}
"""Our arguments that are a choice, timm's names of them, and of the values that both have."""
WITHOUT_EFFECT = ("drop_rate", "drop_path_rate")
"""Of timm's arguments, on a trained network."""

OUTSIDE = {
    "stem.first": "stem.conv1",
    "stem.norms.0": "stem.norm1",
    "stem.convolutions.0": "stem.conv2",
    "head.norm": "head.norm",
    "head.hidden": "head.pre_logits.fc",
    "head.classifier": "head.fc",
}
IN_BLOCK = {
    "shortcut.project": "shortcut.expand",
    "norm": "pre_norm",
    "expand": "conv1_1x1",
    "expand_norm": "norm1",
    "depthwise": "conv2_kxk",
    "depthwise_norm": "norm2",
    "squeeze_excitation.squeeze": "se.fc1",
    "squeeze_excitation.excite": "se.fc2",
    "shrink": "conv3_1x1",
    "attention_norm": "norm1",
    "attention.query": "attn.qkv",
    "attention.key": "attn.qkv",
    "attention.value": "attn.qkv",
    "attention.output": "attn.proj",
    "attention": "attn.rel_pos",
    "feed_forward_norm": "norm2",
    "feed_forward.expand": "mlp.fc1",
    "feed_forward.shrink": "mlp.fc2",
}
PARTS = ("query", "key", "value")
"""Of timm's `qkv`, in the order in which each head has its rows there."""

State = dict[str, Tensor]


def to_timm(model: CoAtNet, name: str) -> tuple[State, dict[str, Any]]:
    """A model's weights under timm's names, and the arguments with which timm's `NAME_224` is the same function.

    `name` is the layout that the model was made of. ValueError, which begins with the argument of `coatnet`, where timm
    has no such network. Tensors share the model's memory where they can.
    """
    if name not in LAYOUTS.values():
        raise ValueError(f"name is {name}; timm only has {', '.join(LAYOUTS.values())}")
    found = settings(model)
    for ours, (_, values) in CHOICES.items():
        if found[ours] not in values:
            raise ValueError(f"{ours} is {found[ours]!r}; timm only has {' or '.join(map(repr, values))}")
    classifier, (height, width) = model.head.classifier, model.resolution
    arguments = {theirs: values[found[ours]] for ours, (theirs, values) in CHOICES.items()} | {
        "num_classes": classifier.out_features if isinstance(classifier, nn.Linear) else 0,
        "img_size": height if height == width else [height, width],
        "stem_bias": True,
        "conv_norm_eps": found.get("batch_norm_eps", found["layer_norm_eps"]),
        "transformer_norm_eps": found["layer_norm_eps"],
        "transformer_dim_head": found["head_size"],
    }
    return _timm_state(model, found["head_size"]), arguments | {"transformer_pool_type": arguments["conv_pool_type"]}


def from_timm(name: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], State]:
    """The arguments with which `coatnet` is timm's network `name`, made with these arguments, and its weights as ours.

    ValueError, which names what it is about, where no `coatnet` is the same function, or `state` is not its state.
    Tensors share the memory of `state` where they can.
    """
    check_known(name)
    given = {**TIMM_DEFAULTS, **{key: value for key, value in arguments.items() if key not in WITHOUT_EFFECT}}
    made: dict[str, Any] = {"layout": LAYOUTS[name], **_our_arguments(given)}
    with torch.device("meta"):
        model = coatnet(**made, attention="reference", normal=lambda _, shape: torch.empty(shape))
    expected = _timm_state(model, made["head_size"])
    if not given["stem_bias"]:
        state = {**{bias: torch.zeros(expected[bias].shape) for bias in STEM_BIASES}, **state}
    for key in sorted(state.keys() | expected.keys()):
        shapes = [list(each[key].shape) if key in each else "absent" for each in (state, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{key} is {shapes[0]} in the weights; in {name} with these arguments it is {shapes[1]}")
    return made, {key: _ours(key, own, state, made["head_size"]) for key, own in model.state_dict().items()}


def settings(model: nn.Module) -> dict[str, Any]:
    """The arguments of `coatnet` that say what a model computes and hardly show in the shapes of its weights.

    Of these, only what the model has: without MBConv no `stride`, without attention no `head_size`.
    """
    found: dict[str, Any] = {}
    for module in model.modules():
        if isinstance(module, MBConv) and module.shortcut.stride == 2:
            found["stride"] = "expand" if module.expand.stride == (2, 2) else "depthwise"
        elif isinstance(module, Shortcut) and module.stride == 2:
            found["pool"] = module.pool
        elif isinstance(module, BatchNorm2d):
            found |= {"norm": "batch", "batch_norm_eps": module.eps}
        elif isinstance(module, LayerNorm2d):
            found |= {"norm": "layer", "layer_norm_eps": module.eps}
        elif isinstance(module, nn.LayerNorm):
            found["layer_norm_eps"] = module.eps
        elif isinstance(module, RelativeAttention):
            found |= {"head_size": module.head_size, "relative_attention": module.bias_position}
    return found


STEM_BIASES = ("stem.conv1.bias", "stem.conv2.bias")


def _timm_state(model: CoAtNet, head_size: int) -> State:
    found: State = {}
    heads: dict[str, list[Tensor]] = {}
    for name, values in model.state_dict().items():
        target, leaf = _timm_name(name), name.rpartition(".")[2]
        if leaf == "bias_table":
            values = values.flatten(1).T
        elif name.startswith("stages.") and values.dim() == 2:  # a linear layer there is a 1x1 convolution
            values = values[:, :, None, None]
        if ".qkv." in target:
            heads.setdefault(target, []).append(values.unflatten(0, (-1, head_size)))
        else:
            found[target] = values.contiguous()
        if leaf == "running_var":
            counter = target.replace("running_var", "num_batches_tracked")
            found[counter] = torch.zeros((), dtype=torch.long, device=values.device)
    return found | {target: torch.stack(parts, 1).flatten(0, 2) for target, parts in heads.items()}


def _ours(name: str, own: Tensor, state: Mapping[str, Tensor], head_size: int) -> Tensor:
    """The values of our `name`, shaped as `own`, from a state of timm's that is known to fit."""
    target = _timm_name(name)
    values = state[target].float()
    if ".qkv." in target:
        part = PARTS.index(name.split(".")[-2])
        values = values.unflatten(0, (-1, len(PARTS), head_size))[:, part]
    elif name.endswith("bias_table"):
        values = values.T
    return values.reshape(own.shape).contiguous()


def _timm_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if not module.startswith("stages."):
        return f"{OUTSIDE[module]}.{leaf}"
    _, stage, block, inner = module.split(".", 3)
    # Where the resolution is halved, which is in the first block of each stage, timm's norm stands beside the pooling.
    theirs = "norm1.norm" if (inner, block) == ("attention_norm", "0") else IN_BLOCK[inner]
    leaf = "relative_position_bias_table" if leaf == "bias_table" else leaf
    return f"stages.{stage}.blocks.{block}.{theirs}.{leaf}"


def _our_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(given.keys() - TIMM_DEFAULTS.keys()):
        raise ValueError(f"{unknown[0]} is {given[unknown[0]]!r}; this argument is not supported")
    layers = given["conv_norm_layer"] == "layernorm2d"
    one_setting = {"conv_pool_type": "transformer_pool_type"}
    one_setting |= {"conv_norm_eps": "transformer_norm_eps"} if layers else {}
    accepted = {name: [TIMM_DEFAULTS[name]] for name in ("in_chans", "global_pool")}
    accepted |= {theirs: list(values.values()) for theirs, values in CHOICES.values()}
    accepted |= {other: [given[name]] for name, other in one_setting.items()}
    for name, values in accepted.items():
        if given[name] not in values:
            raise ValueError(f"{name} is {given[name]!r}; only {' or '.join(map(repr, values))} is supported")
    made = {
        ours: next(value for value, name in values.items() if name == given[theirs])
        for ours, (theirs, values) in CHOICES.items()
    }
    size = given["img_size"]
    return made | {
        "classes": given["num_classes"],
        "resolution": size if isinstance(size, int) else tuple(size),
        "head_size": given["transformer_dim_head"],
        "layer_norm_eps": given["transformer_norm_eps"],
        **({} if layers else {"batch_norm_eps": given["conv_norm_eps"]}),
    }


def check_known(name: str) -> None:
    """ValueError where timm's network `name` is none of those that can be converted."""
    if name not in LAYOUTS:
        raise ValueError(f"{name} is not one of the paper's networks; supported are {', '.join(LAYOUTS)}")
