"""From the model section to a network with initial weights, and from a batch's pixels to its inputs.

Next: train.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from data import draws
from data.draws import Purpose
from models import coatnet
from models.coatnet import CoAtNet
from models.family import Layout, Stage, Stem
from pipeline.config import Model, Train
from pipeline.errors import BadRequest

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""Of ImageNet's pixels, by channel; the paper does not say how it scales its inputs."""


def build_network(model: Model, train: Train, classes: int, seed: int) -> CoAtNet:
    """A CoAtNet whose initial weights are draws by (seed, parameter's name); BadRequest for impossible values."""

    def normal(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.from_numpy(draws.normals(seed, name, shape.numel())).reshape(shape)

    return _network(model, train, classes, normal)


def check_model(model: Model, train: Train, classes: int) -> int:
    """The number of parameters, counted without memory for them; BadRequest where the model cannot be built."""
    with torch.device("meta"):
        network = _network(model, train, classes, lambda name, shape: torch.empty(shape))
    return sum(parameter.numel() for parameter in network.parameters())


def inputs(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, height, width, 3] as normalised float32 [n, 3, height, width] in channels-last memory."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    deviation = torch.tensor(DEVIATION, device=images.device).view(3, 1, 1)
    return images.permute(0, 3, 1, 2).float().sub_(mean).div_(deviation)


def survival(seed: int, positions: np.ndarray, rates: list[float], device: torch.device) -> torch.Tensor | None:
    """Stochastic depth's factors [n, branches], 0 or 1 / (1 - rate), drawn by (seed, stream position, branch)."""
    if not any(rates):
        return None
    drawn = draws.uniforms(seed, Purpose.STOCHASTIC_DEPTH, positions, len(rates))
    factors = np.where(drawn >= np.array(rates), 1 / (1 - np.array(rates)), 0.0)
    return torch.from_numpy(factors.astype(np.float32)).to(device)


def _network(model: Model, train: Train, classes: int, normal: Callable[[str, torch.Size], torch.Tensor]) -> CoAtNet:
    try:
        return coatnet(
            model.name or _layout(model),
            classes,
            model.resolution,
            stride=model.stride,
            head_size=model.head_size,
            batch_norm_momentum=model.batch_norm_momentum,
            batch_norm_group=train.batch_norm_group,
            normal=normal,
        )
    except ValueError as error:
        raise BadRequest(f"model: {error}") from None


def _layout(model: Model) -> Layout:
    assert model.stem is not None and model.stages is not None  # config.Model checks it
    stages = tuple(Stage(stage.kind, stage.blocks, stage.width, stage.stride) for stage in model.stages)
    return Layout(Stem(model.stem.blocks, model.stem.width, model.stem.stride), stages)
