"""One network's weights as another one takes them: bias tables for another grid, a classifier for other classes.

Everything else must be the same network: what would compute another function with these weights is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pipeline.checkpoint.weights import Weights
from pipeline.config.schema import Config
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import torch

    from pipeline.training.ema import Statistics
    from pipeline.training.model import WeightSource


from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.weights import open_weights, select_weights
from pipeline.config.parsing import validate

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet


CLASSIFIER = "head.classifier."
Rows = Sequence[int | None]
"""For each class of the new network the source's class whose row of the classifier it takes; None: a new one."""


def map_classes(
    how: Literal["auto", "keep", "new", "map"], here: Sequence[str], there: Sequence[str], source: str
) -> Rows:
    """Where the rows of the classifier for the classes `here` come from; UsageError where `how` cannot be done.

    Classes are known by their names, in whatever order. Fine-tuning with `auto` keeps the classifier where the classes
    are the same, and begins with a new one where they are not (google-research/maxvit always does, the paper is
    silent).
    """
    number = {name: place for place, name in enumerate(there)}
    by_name = [number.get(name) for name in here]
    same = set(here) == set(there)
    if how == "keep" and not same:
        raise UsageError(
            f"model.classifier=keep, and the classes are not those of {source}: {_difference(here, there)};"
            " model.classifier=map takes those that are known by name, new none of them"
        )
    if how == "map" and all(row is None for row in by_name):
        raise UsageError(
            f"model.classifier=map, and none of the {len(here)} classes ({here[0]}, ...) has a name that {source}"
            f" knows ({there[0]}, ...); pack them under its names, or set model.classifier=new"
        )
    return by_name if how in ("keep", "map") or (how == "auto" and same) else [None] * len(here)


def classifier_in_words(rows: Rows, there: Sequence[str]) -> str:
    """What becomes of the classifier, for a person."""
    kept = sum(row is not None for row in rows)
    if kept == len(rows) == len(there):
        return f"the classifier of its {kept} classes is kept"
    if not kept:
        return f"a new classifier for {len(rows)} classes (the source has {len(there)})"
    return f"of {len(rows)} classes {kept} keep their row of the classifier, {len(rows) - kept} are new"


def convert_weights(reader: Weights, kind: str, rows: Rows, new: WeightSource) -> tuple[WeightSource, Statistics]:
    """A checkpoint's weights, kind `ema` or `weight`, as a new network takes them, and its batch-norm statistics.

    Bias tables are resized to the network's grid; rows of the classifier that come from nowhere are `new`'s. UsageError
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
            found = _of_rows(found, rows, new(name, shape))
        elif name.endswith("bias_table") and found.shape != shape:
            found = resize_bias_table(found, grid_of(torch.empty(shape, device="meta")))
        if found.shape != shape:
            raise UsageError(
                f"{reader.folder}: {name} is {list(found.shape)}, and by its own configuration"
                f" {list(shape)}; export it again"
            )
        return found

    return values, of_kind(reader.buffers(), kind)


def check_compatible_network(here: Config, there: Config, source: str) -> None:
    """UsageError where the weights of a network `there` would compute another function in the one `here`."""
    from models.convert import settings
    from pipeline.training.model import meta_model

    of_source, own = (meta_model(each.model, each.train, classes=1) for each in (there, here))
    if _shapes(of_source) != _shapes(own):
        layout = there.model.model_dump(mode="json", include={"name", "stem", "stages"}, exclude_none=True)
        keys = " ".join(f"'model.{name}={json.dumps(value)}'" for name, value in layout.items())
        raise UsageError(f"{source} has the weights of another network than this configuration's; set {keys}")
    theirs, ours = settings(of_source), settings(own)
    for name in theirs.keys() & ours.keys():
        if theirs[name] != ours[name]:
            raise UsageError(
                f"model.{name} is {ours[name]} here and {theirs[name]} in {source}, whose weights are then"
                f" another network's; set model.{name}={theirs[name]}"
            )


def _shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    """Of all parameters whose shape the resolution does not change."""
    return {name: p.shape for name, p in network.named_parameters() if not name.endswith("bias_table")}


def _of_rows(found: torch.Tensor, rows: Rows, made: torch.Tensor) -> torch.Tensor:
    """`made`, whose first axis is the new classes, with the rows that come from the source's."""
    places = [place for place, row in enumerate(rows) if row is not None]
    made[places] = found[[row for row in rows if row is not None]]
    return made


def _difference(here: Sequence[str], there: Sequence[str]) -> str:
    """How many classes each side has, and one that only one of them has."""
    only_here, only_there = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    one, where = (only_here[0], "here") if only_here else (only_there[0], "there")
    return f"{len(here)} here and {len(there)} there, {one!r} only {where}"


def load_weights(
    source: str, weights: str | None, resolution: int | None, crop: str | None
) -> tuple[Weights, str, Config]:
    """What a path names, the kind of its weights, and its configuration with what is asked for otherwise.

    `resolution` and `crop` (a share of the short side, or `none`) stand in for the trained ones where they are given.
    """
    reader = open_weights(Path(source))
    tree = reader.state()["config"]
    if resolution is not None:
        tree = {**tree, "model": {**tree["model"], "resolution": resolution}}
    if crop is not None:
        tree = {**tree, "evaluate": {**tree.get("evaluate", {}), "crop_fraction": _fraction(crop)}}
    return reader, select_weights(reader, weights), validate(tree, str(reader.folder))


def load_model(reader: Weights, kind: str, config: Config, device: torch.device) -> CoAtNet:
    """The network with these weights and statistics, for evaluation; UsageError where no grid fits its resolution."""
    from pipeline.training.ema import load
    from pipeline.training.model import build_model, empty_weights

    classes = reader.state()["classes"]
    values, statistics = convert_weights(reader, kind, range(len(classes)), empty_weights)
    model = build_model(config.model, config.train, len(classes), device, values).eval()
    load(model, statistics)
    return model


def _fraction(crop: str) -> float | None:
    """A share as it was typed; None of `none`."""
    try:
        fraction = None if crop == "none" else float(crop)
    except ValueError:
        fraction = 0.0
    if fraction is not None and not 0 < fraction <= 1:
        raise UsageError(f"--crop is {crop}; it must be a share of the short side, above 0 and at most 1, or none")
    return fraction
