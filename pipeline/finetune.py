"""`coatnet finetune`: another run's weights, at another resolution or for other classes, with a fresh optimizer.

The source is pinned at the first start (RUN/source.json): a run that goes on never begins from a newer checkpoint.
Weights are the source's moving average if it has one. Bias tables are interpolated to the new grid; the classifier is
kept where the classes are the same and new where they are not. The augmentation of the source's whole ancestry is
compared first (ancestry.py).

Next: train.py.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import ancestry
from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.launch import is_rank
from pipeline.mirror import bring_back
from pipeline.overrides import read_config, validate
from pipeline.prepare import Plan
from pipeline.start import check_config, run
from pipeline.weights_file import Weights, kind_of, weights_of

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet
    from pipeline.ema import Statistics
    from pipeline.network import Shard, Values

CLASSIFIER = "head.classifier."


@dataclass(frozen=True)
class Source:
    """Where a fine-tuning begins: a run, one checkpoint of it, and the augmentation of its whole ancestry.

    Of an exported file `run` and `checkpoint` are the file.
    """

    run: str
    checkpoint: str
    ancestry: list[dict[str, Any]]


def finetune(preset: str, overrides: list[str], source: str, procs: int, check: bool) -> int:
    """Fine-tunes, or goes on; returns the exit status."""
    config = read_config(preset, overrides)
    run_folder = Path(config.run.dir)
    if not check:
        bring_back(config)
    pinned_to = source_of(run_folder, Path(source))
    ancestors = pinned_to.ancestry
    ancestry.check(config, ancestors)
    if not is_rank() and (warning := ancestry.warning(config, ancestors)):
        print(f"warning: {warning}", file=sys.stderr)
    if check:
        if Path(pinned_to.checkpoint).exists():  # a run that has begun does not need it any more
            check_settings(config, weights_of(Path(pinned_to.checkpoint)))
        return check_config(config, procs)

    def work(plan: Plan) -> None:
        from pipeline.ema import assign
        from pipeline.engine import on_rank_zero
        from pipeline.network import build_network, initial_values
        from pipeline.train import train

        def first_network(device: torch.device, shard: Shard | None) -> CoAtNet:
            found = on_rank_zero(lambda: source_of(run_folder, Path(source)))
            reader, classes = weights_of(Path(found.checkpoint)), plan.train.classes
            new = initial_values(config.run.seed)
            values, statistics = weights_from(reader, kind_of(reader, None), classes, new)
            network = build_network(config.model, config.train, len(classes), device, values, shard)
            assign(network, statistics)
            on_rank_zero(lambda: pin(run_folder, found))
            return network

        if plan.begins:  # before it claims a folder with another network than it can have
            check_settings(config, weights_of(Path(source_of(run_folder, Path(source)).checkpoint)))
        train(config, plan, ancestors, first_network)

    return run(config, "finetune", procs, work)


def check_settings(config: Config, reader: Weights) -> None:
    """BadRequest where these weights would be taken into a network that computes another function than their own."""
    from models.convert import settings
    from pipeline.network import empty_network

    theirs = validate(reader.state()["config"], str(reader.folder))
    networks = [empty_network(each.model, each.train, classes=1) for each in (theirs, config)]
    there, here = (
        {name: values.shape for name, values in network.named_parameters() if not name.endswith("bias_table")}
        for network in networks
    )
    if there != here:
        layout = theirs.model.model_dump(mode="json", include={"name", "stem", "stages"}, exclude_none=True)
        keys = " ".join(f"'model.{name}={json.dumps(value)}'" for name, value in layout.items())
        raise BadRequest(f"{reader.folder} has the weights of another network than this configuration's; set {keys}")
    there, here = map(settings, networks)
    for name in there.keys() & here.keys():
        if there[name] != here[name]:
            raise BadRequest(
                f"model.{name} is {here[name]} here and {there[name]} in {reader.folder}, whose weights are then"
                f" another network's; set model.{name}={there[name]}"
            )


def weights_from(reader: Weights, kind: str, classes: tuple[str, ...], new: Values) -> tuple[Values, Statistics]:
    """A checkpoint's weights, kind `ema` or `weight`, as a new network takes them, and its batch-norm statistics.

    Bias tables are resized to the network's grid; the classifier is taken only where the classes are the same, and is
    `new` elsewhere. The weights are BadRequest where they are another network's.
    """
    import torch

    from models.attention import resize_bias_table
    from models.backends import grid_of
    from pipeline.restore import of_kind

    same_classes = list(classes) == reader.state()["classes"]

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        if name.startswith(CLASSIFIER) and not same_classes:
            return new(name, shape)
        if name not in reader.shapes:
            raise BadRequest(f"{reader.folder} has no {name}, which its own configuration needs; export it again")
        found = torch.from_numpy(reader.tensor(name, kind))
        if name.endswith("bias_table") and found.shape != shape:
            found = resize_bias_table(found, grid_of(torch.empty(shape, device="meta")))
        if found.shape != shape:
            raise BadRequest(
                f"{reader.folder}: {name} is {list(found.shape)}, and by its own configuration"
                f" {list(shape)}; export it again"
            )
        return found

    return values, of_kind(reader.buffers(), kind)


def source_of(run_folder: Path, source: Path) -> Source:
    """The source that a run is pinned to, or the newest checkpoint of `source`; BadRequest where they are two runs."""
    note = run_folder / "source.json"
    if not note.exists():
        reader = weights_of(source)
        known = reader.state()["ancestry"]
        ancestors = [ancestry.unknown(str(source))] if known is None else known
        return Source(str(source.resolve()), str(reader.folder.resolve()), ancestors)
    found = Source(**json.loads(note.read_text()))
    if found.run != str(source.resolve()):
        raise BadRequest(
            f"run.dir={run_folder} was started from {found.run}, and --from is {source.resolve()};"
            " go on with the first, or fine-tune into another folder with run.dir=..."
        )
    return found


def pin(run_folder: Path, source: Source) -> None:
    """Writes the source down, which was found good, so that every later start of this run takes the same."""
    hidden = run_folder / ".source.json"
    hidden.write_text(json.dumps(asdict(source)) + "\n")
    os.replace(hidden, run_folder / "source.json")
