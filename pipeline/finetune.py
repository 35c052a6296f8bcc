"""`coatnet finetune`: another run's weights, at another resolution or for other classes, with a fresh optimizer.

The source is pinned at the first start (RUN/source.json): a run that goes on never begins from a newer checkpoint.
Weights are the source's moving average if it has one. What becomes of them is in transfer.py. The augmentation of the
source's whole ancestry is compared first (ancestry.py).

Next: transfer.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import ancestry
from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.json_lines import write_whole
from pipeline.launch import is_rank, rank_and_world_size
from pipeline.mirror import bring_back
from pipeline.overrides import read_config, validate
from pipeline.prepare import Plan
from pipeline.start import check_config, run
from pipeline.transfer import check_network, classifier_in_words, classifier_rows, weights_from
from pipeline.weights_file import Weights, kind_of, weights_of

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet
    from pipeline.network import Shard


@dataclass(frozen=True)
class Source:
    """Where a fine-tuning begins: a run, one checkpoint of it, and the augmentation of its whole ancestry.

    Of an exported file `run` and `checkpoint` are the file. `weights` is `ema` or `model`, or, in runs that are older
    than the choice, None: the average where there is one.
    """

    run: str
    checkpoint: str
    ancestry: list[dict[str, Any]]
    weights: str | None = None

    def reader(self) -> Weights:
        return weights_of(Path(self.checkpoint))


def finetune(
    preset: str, overrides: list[str], source: str | None, weights: str | None, procs: int, check: bool
) -> int:
    """Fine-tunes, or goes on; returns the exit status."""
    config = read_config(preset, overrides)
    if check:
        return check_request(config, source, weights, procs)
    if source is None or _is_preset(source):
        what = "needs --from RUN" if source is None else f"takes a run: pretrain with {source} first"
        raise BadRequest(f"finetune {what}; --check does without, or takes a preset")
    run_folder, path = Path(config.run.dir), Path(source)
    bring_back(config)
    ancestors = source_of(run_folder, path, weights).ancestry
    check_ancestry(config, ancestors)

    def work(plan: Plan) -> None:
        from pipeline.ema import assign
        from pipeline.engine import on_rank_zero
        from pipeline.network import initial_values, with_values
        from pipeline.train import train

        def first_weights(network: CoAtNet, device: torch.device, shard: Shard | None) -> CoAtNet:
            found = on_rank_zero(lambda: source_of(run_folder, path, weights))
            reader, classes = found.reader(), plan.train.classes
            rows = classifier_rows(config.model.classifier, classes, reader.state()["classes"], found.run)
            new = initial_values(config.run.seed)
            values, statistics = weights_from(reader, kind_of(reader, found.weights), rows, new)
            with_values(network, device, values, shard)
            assign(network, statistics)
            on_rank_zero(lambda: pin(run_folder, found))
            return network

        if plan.begins:  # before it claims a folder with another network than it can have
            said = beginning(config, plan, source_of(run_folder, path, weights))
            if rank_and_world_size()[0] == 0:
                print(said)
        train(config, plan, ancestors, first_weights)

    return run(config, "finetune", procs, work)


def check_request(config: Config, source: str | None, weights: str | None, procs: int) -> int:
    """Checks what can be checked without data, and says what would be trained; returns the exit status.

    Without a source it is left unchecked what depends on it.
    """
    classes = None
    if source is not None:
        classes = check_source(config, source, weights)
    elif not is_rank():
        print("without --from it is not checked what the weights are, and which augmentation they saw", file=sys.stderr)
    return check_config(config, procs, likely_classes=classes)


def check_source(config: Config, source: str, weights: str | None) -> int | None:
    """How many classes a source has, where it is known: a run or file, or a preset of a run still to be made.

    BadRequest where this could not begin from it. A run that has begun does not need its source any more.
    """
    if _is_preset(source):
        theirs = read_config(source, [])
        check_against(config, theirs, source, [])
        return theirs.model.classes
    found = source_of(Path(config.run.dir), Path(source), weights)
    classes = None
    if Path(found.checkpoint).exists():
        reader = found.reader()
        check_network(config, _config_of(reader), found.run)
        classes = len(reader.state()["classes"])
        if config.model.classifier == "keep" and config.model.classes not in (None, classes):
            raise BadRequest(
                f"model.classifier=keep, and model.classes is {config.model.classes} where {found.run} has {classes};"
                " model.classifier=map takes the classes that are known by name, new none of them"
            )
    check_ancestry(config, found.ancestry)
    return classes


def check_against(config: Config, theirs: Config, source: str, ancestors: list[dict[str, Any]]) -> None:
    """BadRequest where this could not begin from a run that is still to be made, with `theirs` and these ancestors."""
    check_network(config, theirs, source)
    check_ancestry(config, [*ancestors, ancestry.entry(theirs, theirs.train.steps or 0, ancestors)])


def check_ancestry(config: Config, ancestors: list[dict[str, Any]]) -> None:
    """BadRequest where an augmentation is on that no ancestor saw; warns once of what is not refused."""
    ancestry.check(config, ancestors)
    if not is_rank() and (warning := ancestry.warning(config, ancestors)):
        print(f"warning: {warning}", file=sys.stderr)


def beginning(config: Config, plan: Plan, source: Source) -> str:
    """What the run begins from, in a line; BadRequest where it cannot."""
    reader = source.reader()
    there, theirs = _config_of(reader), reader.state()["classes"]
    check_network(config, there, source.run)
    rows = classifier_rows(config.model.classifier, plan.train.classes, theirs, source.run)
    kind = "moving average" if kind_of(reader, source.weights) == "ema" else "weights"
    sides = [f"{each.model.resolution} x {each.model.resolution}" for each in (there, config)]
    tables = f"bias tables resized from {sides[0]} to {sides[1]}" if sides[0] != sides[1] else f"{sides[1]} as before"
    return f"from {source.run} at step {reader.step}: its {kind}, {tables}; {classifier_in_words(rows, theirs)}"


def source_of(run_folder: Path, source: Path, weights: str | None) -> Source:
    """The source that a run is pinned to, or the newest checkpoint of `source`; BadRequest where they are two."""
    note = run_folder / "source.json"
    if not note.exists():
        reader = weights_of(source)
        known = reader.state()["ancestry"]
        ancestors = [ancestry.unknown(str(source))] if known is None else known
        kind = "ema" if kind_of(reader, weights) == "ema" else "model"
        return Source(str(source.resolve()), str(reader.folder.resolve()), ancestors, kind)
    found = Source(**json.loads(note.read_text()))
    begun = f"run.dir={run_folder} was started from {found.run}"
    way_out = "go on with the first, or fine-tune into another folder with run.dir=..."
    if found.run != str(source.resolve()):
        raise BadRequest(f"{begun}, and --from is {source.resolve()}; {way_out}")
    if weights and found.weights and weights != found.weights:
        raise BadRequest(f"{begun} with --weights {found.weights}, and now it is {weights}; {way_out}")
    return found


def pin(run_folder: Path, source: Source) -> None:
    """Writes the source down, which was found good, so that every later start of this run takes the same."""
    write_whole(run_folder / "source.json", json.dumps(asdict(source)) + "\n")


def _is_preset(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _config_of(reader: Weights) -> Config:
    return validate(reader.state()["config"], str(reader.folder))
