"""Loading pretrained weights into a network, with bias tables for another grid and a classifier for other classes.

Everything else must be the same: a network that would compute another function with these weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.checkpoint.weights import Weights, open_weights, select_weights
from pipeline.config.parsing import validate
from pipeline.config.schema import Config
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet
    from pipeline.training.ema import Statistics
    from pipeline.training.model import WeightSource

CLASSIFIER = "head.classifier."
Rows = Sequence[int | None]
"""For each class of the new network, the row of the source's classifier that it keeps; None: a new row."""


def map_classes(
    how: Literal["auto", "keep", "new", "map"], here: Sequence[str], there: Sequence[str], source: str
) -> Rows:
    """Which rows of the source's classifier the classes `here` keep; UsageError where `how` is not possible.

    Classes are matched by name. `auto` keeps the classifier where both have the same classes, and else begins with a
    new one (google-research/maxvit always does; the paper does not say).
    """
    number = {name: row for row, name in enumerate(there)}
    by_name = [number.get(name) for name in here]
    same = set(here) == set(there)
    if how == "keep" and not same:
        example = min(set(here) ^ set(there))
        side = "here" if example in here else "there"
        raise UsageError(
            f"model.classifier=keep, but the classes are not those of {source}: {len(here)} here, {len(there)} there,"
            f" {example!r} only {side}; model.classifier=map keeps those with the same name, new keeps none"
        )
    if how == "map" and all(row is None for row in by_name):
        raise UsageError(
            f"model.classifier=map, but none of the {len(here)} classes ({here[0]}, ...) is a class of {source}"
            f" ({there[0]}, ...); pack them under the same names, or set model.classifier=new"
        )
    return by_name if how in ("keep", "map") or (how == "auto" and same) else [None] * len(here)


def describe_classifier(rows: Rows, there: Sequence[str]) -> str:
    """Which rows of the classifier are kept, as a phrase."""
    kept = sum(row is not None for row in rows)
    if kept == len(rows) == len(there):
        return f"the classifier of its {kept} classes is kept"
    if not kept:
        return f"a new classifier for {len(rows)} classes (the source has {len(there)})"
    return f"of {len(rows)} classes {kept} keep their row of the classifier, {len(rows) - kept} are new"


def convert_weights(reader: Weights, kind: str, rows: Rows, new: WeightSource) -> tuple[WeightSource, Statistics]:
    """The weights of a kind (`ema` or `weight`) for a new network, and its batch-norm statistics.

    Bias tables are resized to the network's grid; `new` draws the rows of the classifier that are not kept. UsageError
    where a weight is absent or of another shape.
    """
    import torch

    from models.attention import grid_of, resize_bias_table
    from pipeline.training.ema import of_kind

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        if name not in reader.shapes:
            raise UsageError(f"{reader.folder} has no {name}, which its own configuration needs; export it again")
        found = torch.from_numpy(reader.tensor(name, kind))
        if name.startswith(CLASSIFIER):
            kept = [place for place, row in enumerate(rows) if row is not None]
            old, found = found, new(name, shape)
            found[kept] = old[[row for row in rows if row is not None]]
        elif name.endswith("bias_table") and found.shape != shape:
            found = resize_bias_table(found, grid_of(torch.empty(shape, device="meta")))
        if found.shape != shape:
            raise UsageError(
                f"{reader.folder}: {name} has shape {list(found.shape)}, but by its own configuration"
                f" {list(shape)}; export it again"
            )
        return found

    return values, of_kind(reader.buffers(), kind)


def check_compatible_network(here: Config, there: Config, source: str) -> None:
    """UsageError where the weights of the network `there` would compute another function in the one `here`."""
    from models.convert import settings
    from pipeline.training.model import meta_model

    theirs, ours = (meta_model(each.model, each.train, classes=1) for each in (there, here))
    if _shapes(theirs) != _shapes(ours):
        layout = there.model.model_dump(mode="json", include={"name", "stem", "stages"}, exclude_none=True)
        keys = " ".join(f"'model.{name}={json.dumps(value)}'" for name, value in layout.items())
        raise UsageError(f"{source} has weights of a different network than this configuration; set {keys}")
    old, new = settings(theirs), settings(ours)
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise UsageError(
                f"model.{name} is {new[name]} here and {old[name]} in {source}, which would make it another network;"
                f" set model.{name}={old[name]}"
            )


def _shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    """The shapes of all parameters that do not depend on the resolution."""
    return {name: p.shape for name, p in network.named_parameters() if not name.endswith("bias_table")}


def load_weights(
    source: str, weights: str | None, resolution: int | None, crop: str | None
) -> tuple[Weights, str, Config]:
    """A path's weights, their kind, and their configuration.

    `resolution` and `crop` (a fraction of the short side, or `none`) replace the trained ones where they are given.
    """
    reader = open_weights(Path(source))
    tree = reader.state()["config"]
    if resolution is not None:
        tree = {**tree, "model": {**tree["model"], "resolution": resolution}}
    if crop is not None:
        tree = {**tree, "evaluate": {**tree.get("evaluate", {}), "crop_fraction": _parse_crop(crop)}}
    return reader, select_weights(reader, weights), validate(tree, str(reader.folder))


def load_model(reader: Weights, kind: str, config: Config, device: torch.device) -> CoAtNet:
    """The network with these weights and statistics, in eval mode; UsageError where no grid fits its resolution."""
    from pipeline.training.ema import load
    from pipeline.training.model import build_model, empty_weights

    classes = reader.state()["classes"]
    values, statistics = convert_weights(reader, kind, range(len(classes)), empty_weights)
    model = build_model(config.model, config.train, len(classes), device, values).eval()
    load(model, statistics)
    return model


def _parse_crop(crop: str) -> float | None:
    try:
        fraction = None if crop == "none" else float(crop)
    except ValueError:
        fraction = 0.0
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"--crop is {crop}; it must be a fraction of the short side, above 0 and at most 1, or none")
    return fraction
