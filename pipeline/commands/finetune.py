"""`coatnet finetune`: trains another run's weights, at another resolution or for other classes, or resumes.

The source is pinned at the first start (RUN/source.json), so that a restart never begins from a newer checkpoint; a run
that has begun no longer needs it. The same weights may come to lie elsewhere, and other ones are refused. The source's
weights are the moving average if it has one; how they are converted is in ../checkpoint/pretrained.py. Augmentation is
compared with that of the source's whole ancestry first (../lineage.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.storage.durable import write_atomically
from pipeline.checkpoint.attempts import latest_step, newest_state
from pipeline.checkpoint.mirror import restore_from_mirror
from pipeline.checkpoint.pretrained import check_compatible_network, convert_weights, describe_classifier, map_classes
from pipeline.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from pipeline.checkpoint.weights import Weights, WeightsFile, open_weights, select_weights
from pipeline.commands.pretrain import begin_anew, check_config, run, set_aside_config
from pipeline.config.parsing import read_config, validate
from pipeline.config.schema import Config
from pipeline.distributed.environment import is_first_process, rank_and_world_size
from pipeline.errors import RunFailed, UsageError
from pipeline.lineage import check_new_augmentations, lineage_entry, lineage_warning, unknown_lineage
from pipeline.plan import Plan
from pipeline.run.identity import read_identity
from pipeline.run.lock import check_folder
from pipeline.run.small_files import DamagedFile, read_object, warn_damaged

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet
    from pipeline.training.model import ShardLayer


@dataclass(frozen=True)
class Source:
    """What a fine-tuning begins from: a run, one checkpoint of it, and its lineage (lineage.lineage_entry).

    Of an exported file `run` and `checkpoint` are the file. `weights` is `ema` or `model`; None, in older runs, means
    the average where there is one. `digest` is of these weights, `run_id` the run's (run/identity.py).
    """

    run: str
    checkpoint: str
    ancestry: list[dict[str, Any]]
    weights: str | None = None
    digest: str | None = None
    run_id: str | None = None

    def reader(self) -> Weights:
        if not Path(self.checkpoint).exists():
            raise UsageError(
                f"{self.checkpoint}, which this run starts from (source.json), is gone: copy it back, or start from"
                " another with --restart"
            )
        return open_weights(Path(self.checkpoint))


def finetune(
    preset: str,
    overrides: list[str],
    source: str | None,
    weights: str | None,
    procs: int,
    check: bool,
    restart: bool = False,
) -> int:
    """Fine-tunes, resumes, or begins anew with `restart`; returns the exit status."""
    config = read_config(preset, overrides)
    anew = set_aside_config(config) if restart else config
    if check:
        if source is None:
            print("without --from, the weights and their augmentation are not checked", file=sys.stderr)
        classes = None if source is None else check_source(anew, source, weights)
        return check_config(config, procs, likely_classes=classes)
    if source is not None and _is_preset(source):
        raise UsageError(f"--from needs a run: pretrain with {source} first; only --check accepts a preset")
    run_folder, path = Path(config.run.dir), None if source is None else Path(source)
    check_folder(run_folder)
    if restart:
        found = source_of(Path(anew.run.dir), path, weights)
        check_new_augmentations(config, found.ancestry)
        check_compatible_network(config, _config_of(found.reader()), found.run)
        begin_anew(config, "finetune", procs)
    restore_from_mirror(config)
    ancestors = source_of(run_folder, path, weights).ancestry
    check_ancestry(config, ancestors)

    def work(plan: Plan) -> None:
        from pipeline.distributed.collectives import from_rank_zero
        from pipeline.train import train

        def first_weights(network: CoAtNet, device: torch.device, shard: ShardLayer | None) -> CoAtNet:
            found = from_rank_zero(lambda: source_of(run_folder, path, weights))
            load_source(config, plan.train.classes, found, network, device, shard)
            from_rank_zero(lambda: pin_source(run_folder, found))
            return network

        if plan.is_new_run:  # an impossible start is refused before the run has a folder
            description = describe_start(config, plan, source_of(run_folder, path, weights))
            if rank_and_world_size()[0] == 0:
                print(description)
        train(config, plan, ancestors, first_weights)

    return run(config, "finetune", procs, work)


def load_source(
    config: Config,
    classes: Sequence[str],
    source: Source,
    network: CoAtNet,
    device: torch.device,
    shard: ShardLayer | None,
) -> CoAtNet:
    """The network, which had no memory for weights, with those that the run begins with."""
    from pipeline.training.ema import load
    from pipeline.training.model import init_weights, load_values

    reader, new = source.reader(), init_weights(config.run.seed)
    rows = map_classes(config.model.classifier, classes, reader.state()["classes"], source.run)
    values, statistics = convert_weights(reader, select_weights(reader, source.weights), rows, new)
    load_values(network, device, values, shard)
    load(network, statistics)
    return network


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
                f"model.classifier=keep, but model.classes is {config.model.classes} and {found.run} has {classes};"
                " model.classifier=map keeps the classes with the same names, model.classifier=new keeps none"
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


def source_of(run_folder: Path, source: Path | None, weights: str | None) -> Source:
    """The source that a run is pinned to, or else the newest checkpoint of `source`; UsageError where they differ.

    Where the same weights lie elsewhere now, it is the source there.
    """
    found = _pinned_source(run_folder)
    if found is None and (state := newest_state(run_folder)) is not None:
        return _source_of_begun(run_folder, source, state["ancestry"][:-1], weights)
    if found is None:
        if source is None:
            raise UsageError("finetune needs --from RUN; only --check works without one")
        reader = open_weights(source)
        ancestors = reader.state()["ancestry"]
        if ancestors is None:
            ancestors = [unknown_lineage(str(source))]
        kind = "ema" if select_weights(reader, weights) == "ema" else "model"
        identity = read_identity(source)
        places = str(source.resolve()), str(reader.folder.resolve())
        return Source(*places, ancestors, kind, reader.digest, identity.id if identity else None)
    begun = f"run.dir={run_folder} was started from {found.run}"
    suggestion = "resume with that, or without --from, or fine-tune into another folder with run.dir=..."
    if source is not None:
        there = _find_weights(source, Path(found.checkpoint).name)
        if not _is_source(found, source, there, has_begun=latest_step(run_folder) is not None):
            others = " has other weights" if found.run == str(source.resolve()) else f" is {source.resolve()}"
            raise UsageError(f"{begun}, but --from{others}; {suggestion}")
        if there is not None:
            found = replace(found, run=str(source.resolve()), checkpoint=str(there.folder.resolve()))
    if weights and found.weights and weights != found.weights:
        raise UsageError(f"{begun} with --weights {found.weights}, but now it is {weights}; {suggestion}")
    return found


def _find_weights(source: Path, step: str) -> Weights | None:
    """The file or checkpoint that a path is, or a run's checkpoint of this name; None where it cannot be read."""
    checkpoint = source if (source / "manifest.json").exists() else source / "checkpoints" / step
    try:
        return WeightsFile(source) if source.is_file() else CheckpointReader(checkpoint)
    except (UsageError, DamagedCheckpoint):
        return None


def _is_source(pinned: Source, source: Path, there: Weights | None, has_begun: bool) -> bool:
    """Whether a path leads to the weights that a run is pinned to, or, if they are gone there, to where they lay."""
    if there is not None and pinned.digest is not None:
        return there.digest == pinned.digest
    if pinned.run == str(source.resolve()):
        return True
    if pinned.digest is None or not source.exists():  # as older runs wrote it; or a place that has nothing any more
        return pinned.digest is not None and has_begun
    identity = read_identity(source)  # of the same run, which has trained further since then
    return identity is not None and identity.id == pinned.run_id


def _pinned_source(run_folder: Path) -> Source | None:
    """What RUN/source.json holds; None where there is none, or it is damaged."""
    file = run_folder / "source.json"
    try:
        row = read_object(file, run=str, checkpoint=str, ancestry=list)
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn_damaged(file, error, "its checkpoint says what the run started from, or --from if there is none yet")
        return None
    optional = (row.get(name) for name in ("weights", "digest", "run_id"))
    return Source(row["run"], row["checkpoint"], row["ancestry"], *optional)


def _source_of_begun(
    run_folder: Path, source: Path | None, ancestors: list[dict[str, Any]], weights: str | None
) -> Source:
    """The source of a run whose source.json is lost, by its newest checkpoint; UsageError where --from is another."""
    warn_damaged(run_folder / "source.json", "it is missing", "its newest checkpoint says what the run started from")
    theirs = ancestors  # a run that has begun needs its source no more
    if source is not None:
        with suppress(UsageError, RunFailed):
            theirs = open_weights(source).state()["ancestry"] or [unknown_lineage(str(source))]
    if not ancestors or [each["run"] for each in theirs] != [each["run"] for each in ancestors]:
        began = f"was started from {ancestors[-1]['run']}" if ancestors else "is not a fine-tuning run"
        raise UsageError(f"run.dir={run_folder} {began}, but --from is {source}; fine-tune into another run.dir=...")
    place = str(source.resolve()) if source is not None else ancestors[-1]["run"]
    return Source(place, place, ancestors, weights)


def pin_source(run_folder: Path, source: Source) -> None:
    """Writes the source down, which was found good, so that every later start of this run takes the same."""
    write_atomically(run_folder / "source.json", json.dumps(asdict(source)) + "\n")


def _is_preset(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _config_of(reader: Weights) -> Config:
    return validate(reader.state()["config"], str(reader.folder))
