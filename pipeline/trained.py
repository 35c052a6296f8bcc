"""A trained network to compute with, from a run, one checkpoint of it, or an exported file; at any resolution.

Bias tables are resized to it, as fine-tuning does; without fine-tuning that costs accuracy (paper, section 4.1).

Next: evaluate.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.overrides import validate
from pipeline.weights_file import Weights, kind_of, weights_of

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet


def opened(source: str, weights: str | None, resolution: int | None, crop: str | None) -> tuple[Weights, str, Config]:
    """What a path names, the kind of its weights, and its configuration with what is asked for otherwise.

    `resolution` and `crop` (a share of the short side, or `none`) stand in for the trained ones where they are given.
    """
    reader = weights_of(Path(source))
    tree = reader.state()["config"]
    if resolution is not None:
        tree = {**tree, "model": {**tree["model"], "resolution": resolution}}
    if crop is not None:
        tree = {**tree, "evaluate": {**tree.get("evaluate", {}), "crop_fraction": _fraction(crop)}}
    return reader, kind_of(reader, weights), validate(tree, str(reader.folder))


def trained_network(reader: Weights, kind: str, config: Config, device: torch.device) -> CoAtNet:
    """The network with these weights and statistics, for evaluation; BadRequest where no grid fits its resolution."""
    from pipeline.ema import assign
    from pipeline.network import build_network, no_values
    from pipeline.transfer import weights_from

    classes = reader.state()["classes"]
    values, statistics = weights_from(reader, kind, range(len(classes)), no_values)
    model = build_network(config.model, config.train, len(classes), device, values).eval()
    assign(model, statistics)
    return model


def _fraction(crop: str) -> float | None:
    """A share as it was typed; None of `none`."""
    try:
        fraction = None if crop == "none" else float(crop)
    except ValueError:
        fraction = 0.0
    if fraction is not None and not 0 < fraction <= 1:
        raise BadRequest(f"--crop is {crop}; it must be a share of the short side, above 0 and at most 1, or none")
    return fraction
