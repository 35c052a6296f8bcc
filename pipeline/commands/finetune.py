"""`coatnet finetune`: trains another run's weights, at another resolution or for other classes, or resumes.

The source is pinned at the first start (RUN/source.json), so that a restart never begins from a newer checkpoint. Its
weights are the moving average if it has one; how they are converted is in ../checkpoint/pretrained.py. Augmentation is
compared with that of the source's whole ancestry first (../lineage.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.storage.durable import write_atomically
from pipeline.checkpoint.mirror import restore_from_mirror
from pipeline.checkpoint.pretrained import check_compatible_network, convert_weights, describe_classifier, map_classes
from pipeline.checkpoint.weights import Weights, open_weights, select_weights
from pipeline.commands.pretrain import check_config, run
from pipeline.config.parsing import read_config, validate
from pipeline.config.schema import Config
from pipeline.distributed.environment import is_first_process, rank_and_world_size
from pipeline.errors import UsageError
from pipeline.lineage import check_new_augmentations, lineage_entry, lineage_warning, unknown_lineage
from pipeline.plan import Plan

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet
    from pipeline.training.model import ShardLayer


@dataclass(frozen=True)
class Source:
    """What a fine-tuning begins from: a run, one checkpoint of it, and its lineage (lineage.lineage_entry).

    Of an exported file `run` and `checkpoint` are the file. `weights` is `ema` or `model`; None, in older runs, means
    the average where there is one.
    """

    run: str
    checkpoint: str
    ancestry: list[dict[str, Any]]
    weights: str | None = None

    def reader(self) -> Weights:
        return open_weights(Path(self.checkpoint))


def finetune(
    preset: str, overrides: list[str], source: str | None, weights: str | None, procs: int, check: bool
) -> int:
    """Fine-tunes, or resumes; returns the exit status."""
    config = read_config(preset, overrides)
    if check:  # without data
        if source is None:
            print("without --from, the weights and their augmentation are not checked", file=sys.stderr)
        classes = None if source is None else check_source(config, source, weights)
        return check_config(config, procs, likely_classes=classes)
    if source is None or _is_preset(source):
        problem = "needs --from RUN" if source is None else f"needs a run: pretrain with {source} first"
        raise UsageError(f"finetune {problem}; only --check works without one, or with a preset")
    run_folder, path = Path(config.run.dir), Path(source)
    restore_from_mirror(config)
    ancestors = source_of(run_folder, path, weights).ancestry
    check_ancestry(config, ancestors)

    def work(plan: Plan) -> None:
        from pipeline.distributed.collectives import from_rank_zero
        from pipeline.train import train
        from pipeline.training.ema import load
        from pipeline.training.model import init_weights, load_values

        def first_weights(network: CoAtNet, device: torch.device, shard: ShardLayer | None) -> CoAtNet:
            found = from_rank_zero(lambda: source_of(run_folder, path, weights))
            reader, classes = found.reader(), plan.train.classes
            rows = map_classes(config.model.classifier, classes, reader.state()["classes"], found.run)
            new = init_weights(config.run.seed)
            values, statistics = convert_weights(reader, select_weights(reader, found.weights), rows, new)
            load_values(network, device, values, shard)
            load(network, statistics)
            from_rank_zero(lambda: pin_source(run_folder, found))
            return network

        if plan.is_new_run:  # an impossible start is refused before the run has a folder
            description = describe_start(config, plan, source_of(run_folder, path, weights))
            if rank_and_world_size()[0] == 0:
                print(description)
        train(config, plan, ancestors, first_weights)

    return run(config, "finetune", procs, work)


def check_source(config: Config, source: str, weights: str | None) -> int | None:
    """The number of classes of a source (a run, a file, or the preset of a run to come), or None where unknown.

    UsageError where this could not begin from it. A run that has begun no longer needs its source.
    """
    if _is_preset(source):
        theirs = read_config(source, [])
        check_compatible_config(config, theirs, source, [])
        return theirs.model.classes
    found = source_of(Path(config.run.dir), Path(source), weights)
    classes = None
    if Path(found.checkpoint).exists():
        reader = found.reader()
        check_compatible_network(config, _config_of(reader), found.run)
        classes = len(reader.state()["classes"])
        if config.model.classifier == "keep" and config.model.classes not in (None, classes):
            raise UsageError(
                f"model.classifier=keep, and model.classes is {config.model.classes} where {found.run} has {classes};"
                " model.classifier=map keeps those with the same name, new none"
            )
    check_ancestry(config, found.ancestry)
    return classes


def check_compatible_config(config: Config, theirs: Config, source: str, ancestors: list[dict[str, Any]]) -> None:
    """UsageError where this could not begin from a future run with the configuration `theirs` and these ancestors."""
    check_compatible_network(config, theirs, source)
    check_ancestry(config, [*ancestors, lineage_entry(theirs, theirs.train.steps or 0, ancestors)])


def check_ancestry(config: Config, ancestors: list[dict[str, Any]]) -> None:
    """UsageError where an augmentation is on that no ancestor had; prints the lineage's warning once."""
    check_new_augmentations(config, ancestors)
    if is_first_process() and (warning := lineage_warning(config, ancestors)):
        print(f"warning: {warning}", file=sys.stderr)


def describe_start(config: Config, plan: Plan, source: Source) -> str:
    """What the run begins from, in one line; UsageError where it cannot."""
    reader = source.reader()
    there, theirs = _config_of(reader), reader.state()["classes"]
    check_compatible_network(config, there, source.run)
    rows = map_classes(config.model.classifier, plan.train.classes, theirs, source.run)
    kind = "moving average" if select_weights(reader, source.weights) == "ema" else "weights"
    sides = [f"{each.model.resolution} x {each.model.resolution}" for each in (there, config)]
    tables = f"bias tables resized from {sides[0]} to {sides[1]}" if sides[0] != sides[1] else f"{sides[1]} as before"
    return f"from {source.run} at step {reader.step}: its {kind}, {tables}; {describe_classifier(rows, theirs)}"


def source_of(run_folder: Path, source: Path, weights: str | None) -> Source:
    """The source that a run is pinned to, or else the newest checkpoint of `source`; UsageError where they differ."""
    pinned = run_folder / "source.json"
    if not pinned.exists():
        reader = open_weights(source)
        ancestors = reader.state()["ancestry"]
        if ancestors is None:
            ancestors = [unknown_lineage(str(source))]
        kind = "ema" if select_weights(reader, weights) == "ema" else "model"
        return Source(str(source.resolve()), str(reader.folder.resolve()), ancestors, kind)
    found = Source(**json.loads(pinned.read_text()))
    begun = f"run.dir={run_folder} was started from {found.run}"
    suggestion = "resume with the first, or fine-tune into another folder with run.dir=..."
    if found.run != str(source.resolve()):
        raise UsageError(f"{begun}, and --from is {source.resolve()}; {suggestion}")
    if weights and found.weights and weights != found.weights:
        raise UsageError(f"{begun} with --weights {found.weights}, and now it is {weights}; {suggestion}")
    return found


def pin_source(run_folder: Path, source: Source) -> None:
    """Writes the source down, which was found good, so that every later start of this run takes the same."""
    write_atomically(run_folder / "source.json", json.dumps(asdict(source)) + "\n")


def _is_preset(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _config_of(reader: Weights) -> Config:
    return validate(reader.state()["config"], str(reader.folder))
