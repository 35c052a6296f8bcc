"""Networks with drawn weights, as files, for tests that need weights and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.checkpoint import weights
from pipeline.checkpoint.weights import WeightsFile
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.lineage import lineage_entry
from pipeline.training.model import build_model, init_weights
from tests.pipeline.runs import ROOT


def export_network(file: Path, network: torch.nn.Module, config: Config, classes: Sequence[str]) -> WeightsFile:
    """Writes a network as an exported file, as if pretrained with its configuration."""
    metadata = {
        "format": weights.FORMAT,
        "weights": "ema",
        "step": 9,
        "classes": list(classes),
        "train_fingerprint": "f00",
        "config": config.model_dump(mode="json"),
        "ancestry": [lineage_entry(config, 9, [])],
    }
    weights.write(file, {name: values.numpy() for name, values in network.state_dict().items()}, metadata)
    return WeightsFile(file)


def tiny(classes: int) -> tuple[torch.nn.Module, Config]:
    """The tiny network with drawn weights."""
    config = read_config(str(ROOT / "configs" / "tiny.yaml"), [])
    return build_model(config.model, config.train, classes, torch.device("cpu"), init_weights(3)), config
