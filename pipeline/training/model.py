"""From the model section to a network with initial weights, and from a batch's pixels to its inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import nn

from data import rng
from data.pinned import to_device
from data.rng import Stream
from models import coatnet
from models.attention import RelativeAttention, check_backend
from models.coatnet import CoAtNet
from models.count import Count, count_network
from models.init import allocate, initial_value
from models.norm import BatchNorm2d
from models.variants import Layout, Stage, Stem
from pipeline.compiler import find_compiler
from pipeline.config.schema import Model, Train
from pipeline.errors import UsageError

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""Of ImageNet's pixels, by channel; the paper does not say how it scales its inputs."""
WeightSource = Callable[[str, torch.Size], torch.Tensor]
"""The weights of a network: a parameter's values by its name and shape."""
ShardLayer = Callable[[nn.Module], None]
"""Shards the parameters of a layer, which have their values, over the ranks."""
InitialWeights = Callable[[CoAtNet, torch.device, ShardLayer | None], CoAtNet]
"""Gives a network without memory for weights the ones that a new run begins with."""


def init_weights(seed: int) -> WeightSource:
    """Initial weights as draws by (seed, parameter's name)."""

    def normal(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.from_numpy(rng.normals(seed, name, shape.numel())).reshape(shape)

    return lambda name, shape: initial_value(name, shape, normal)


def empty_weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Zeros, where a checkpoint's weights follow."""
    return torch.zeros(shape)


def build_model(
    model: Model,
    train: Train,
    classes: int,
    device: torch.device,
    values: WeightSource,
    shard: ShardLayer | None = None,
) -> CoAtNet:
    """A CoAtNet with the weights that `values` gives; UsageError for impossible values."""
    check_attention(model, device)
    return load_values(meta_model(model, train, classes), device, values, shard)


def check_attention(model: Model, device: torch.device) -> None:
    """UsageError where this machine cannot compute the model's attention on such a device."""
    try:
        check_backend(model.attention, device.type)
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
    try:
        if model.attention == "flex":
            find_compiler(device.type == "cuda")
    except ValueError as error:
        raise UsageError(f"model.attention=flex needs to compile, but {error}") from None


@torch.no_grad()
def load_values(
    network: CoAtNet, device: torch.device, values: WeightSource, shard: ShardLayer | None = None
) -> CoAtNet:
    """The network, which had no memory for weights, with those that `values` gives.

    Layer by layer: where `shard` takes them apart (ZeRO-3), a rank never holds more of the whole than one layer.
    """
    for path, layer in reversed(list(network.named_modules())):  # a parent's own parameters after its children's
        allocate(layer, device)
        if isinstance(layer, BatchNorm2d):
            layer.reset_statistics()
        for name, parameter in layer.named_parameters(path, recurse=False):
            parameter.copy_(values(name, parameter.shape))
        if shard is not None and layer._parameters:
            shard(layer)
    return network


def meta_model(model: Model, train: Train, classes: int) -> CoAtNet:
    """The network without memory for weights, on the meta device; UsageError where it cannot be built."""
    with torch.device("meta"):
        return _network(model, train, classes)


def count_model(model: Model, train: Train, classes: int) -> Count:
    """Parameters and multiply-adds, counted without memory for weights; UsageError where the model cannot be built."""
    return count_network(meta_model(model, train, classes))


def attention_backends(network: CoAtNet, train: Train, device: torch.device) -> str:
    """How the network's attention is computed on a device, for the log: by grid, in training and in evaluation."""
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    layers = [module for module in network.modules() if isinstance(module, RelativeAttention)]
    chosen = {
        f"{layer.grid[0]} x {layer.grid[1]} {layer.select_backend(device.type, dtype, True)}"
        f" (evaluation {layer.select_backend(device.type, dtype, False)})": None
        for layer in layers
    }
    return f"attention: {', '.join(chosen) or 'none'}"


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] as normalised float32 [n, 3, height, width] in channels-last memory."""
    mean, deviation = _by_channel(MEAN, images.device), _by_channel(DEVIATION, images.device)
    return images.permute(0, 3, 1, 2).float().sub_(mean).div_(deviation)


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(3, 1, 1)


def drop_path_mask(seed: int, positions: np.ndarray, rates: list[float], device: torch.device) -> torch.Tensor | None:
    """Stochastic depth's factors [n, branches], 0 or 1 / (1 - rate), drawn by (seed, stream position, branch)."""
    if not any(rates):
        return None
    drawn = rng.uniforms(seed, Stream.STOCHASTIC_DEPTH, positions, len(rates))
    factors = np.where(drawn >= np.array(rates), 1 / (1 - np.array(rates)), 0.0)
    return to_device(factors.astype(np.float32), device)


def _network(model: Model, train: Train, classes: int) -> CoAtNet:
    try:
        return coatnet(
            model.name or _layout(model),
            classes,
            model.resolution,
            stride=model.stride,
            pool=model.pool,
            norm=model.norm,
            head_size=model.head_size,
            relative_attention=model.relative_attention,
            attention=model.attention,
            batch_norm_momentum=model.batch_norm_momentum,
            batch_norm_eps=model.batch_norm_eps,
            batch_norm_group=train.batch_norm_group,
            layer_norm_eps=model.layer_norm_eps,
            activation_checkpointing=train.activation_checkpointing,
            normal=lambda name, shape: torch.empty(shape),
        )
    except ValueError as error:
        raise UsageError(f"model: {error}") from None


def _layout(model: Model) -> Layout:
    assert model.stem is not None and model.stages is not None  # config.Model checks it
    stages = tuple(Stage(stage.kind, stage.blocks, stage.width, stage.stride) for stage in model.stages)
    stem = model.stem
    return Layout(Stem(stem.blocks, stem.width, stem.stride, stem.kernel), stages, model.head_size or Layout.head_size)
