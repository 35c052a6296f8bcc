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
from pipeline.overrides import read_config, validate
from pipeline.prepare import Plan
from pipeline.start import check_config, run
from pipeline.weights_file import Weights, kind_of, weights_of

if TYPE_CHECKING:
    from models.coatnet import CoAtNet

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
        from pipeline.engine import on_rank_zero
        from pipeline.train import train

        def first_weights(model: CoAtNet) -> None:
            found = on_rank_zero(lambda: source_of(run_folder, Path(source)))
            reader = weights_of(Path(found.checkpoint))
            check_settings(config, reader)
            take_weights(model, reader, plan.train.classes, kind_of(reader, None))
            on_rank_zero(lambda: pin(run_folder, found))

        train(config, plan, ancestors, first_weights)

    return run(config, "finetune", procs, work)


def check_settings(config: Config, reader: Weights) -> None:
    """BadRequest where these weights would be taken into a network that computes another function than their own."""
    from models.convert import settings
    from pipeline.network import empty_network

    theirs = validate(reader.state()["config"], str(reader.folder))
    there, here = (settings(empty_network(each.model, each.train, classes=1)) for each in (theirs, config))
    for name in there.keys() & here.keys():
        if there[name] != here[name]:
            raise BadRequest(
                f"model.{name} is {here[name]} here and {there[name]} in {reader.folder}, whose weights are then"
                f" another network's; set model.{name}={there[name]}"
            )


def take_weights(model: CoAtNet, reader: Weights, classes: tuple[str, ...], kind: str) -> None:
    """Gives a new network a checkpoint's weights, kind `ema` or `weight`; BadRequest where they are another network's.

    Bias tables are resized to the network's grid; the classifier is taken only where the classes are the same.
    """
    import torch

    from models.attention import resize_bias_table
    from models.backends import grid_of
    from pipeline.ema import assign
    from pipeline.restore import of_kind

    same_classes = list(classes) == reader.state()["classes"]
    found = {name: torch.from_numpy(values) for name, values in reader.tensors(kind)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(CLASSIFIER) and not same_classes:
                continue
            if name not in found:
                raise BadRequest(f"{reader.folder} has no {name}: its network is another one than this configuration's")
            values = found[name]
            if name.endswith("bias_table") and values.shape != parameter.shape:
                values = resize_bias_table(values, grid_of(parameter))
            if values.shape != parameter.shape:
                raise BadRequest(
                    f"{reader.folder}: {name} is {list(values.shape)} there and {list(parameter.shape)} here;"
                    " take the model section of the run that it comes from"
                )
            parameter.copy_(values)
    assign(model, of_kind(reader.buffers(), kind))


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
