"""Networks with drawn weights, as files, for tests that need weights and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import ancestry, weights_file
from pipeline.config import Config
from pipeline.network import build_network, initial_values
from pipeline.overrides import read_config
from pipeline.weights_file import WeightsFile
from tests.pipeline.runs import ROOT


def written(file: Path, network: torch.nn.Module, config: Config, classes: Sequence[str]) -> WeightsFile:
    """Writes a network as an exported file, pretrained under its configuration."""
    said = {
        "format": weights_file.FORMAT,
        "weights": "ema",
        "step": 9,
        "classes": list(classes),
        "train_fingerprint": "f00",
    }
    said |= {"config": config.model_dump(mode="json"), "ancestry": [ancestry.entry(config, 9, [])]}
    weights_file.write(file, {name: values.numpy() for name, values in network.state_dict().items()}, said)
    return WeightsFile(file)


def tiny(classes: int) -> tuple[torch.nn.Module, Config]:
    """The tiny network with drawn weights."""
    config = read_config(str(ROOT / "configs" / "tiny.yaml"), [])
    return build_network(config.model, config.train, classes, torch.device("cpu"), initial_values(3)), config
