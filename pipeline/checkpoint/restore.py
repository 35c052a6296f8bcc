"""Resuming from the newest checkpoint that all ranks find good; each rank reads only its own slices.

All ranks agree on whether a checkpoint is good before any state changes. A damaged one is an event, and the one before
is used; if none is good the run stops, since it must not begin again silently. A checkpoint of another network, another
training set or a newer format is refused, and never skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data.shards.manifest import Manifest
from pipeline.checkpoint.reader import READING_THREADS, CheckpointReader, DamagedCheckpoint, newest_good
from pipeline.checkpoint.train_set import check_train_set
from pipeline.distributed.collectives import all_gather
from pipeline.distributed.environment import rank_and_world_size
from pipeline.errors import UsageError
from pipeline.training import zero
from pipeline.training.ema import Statistics, load, of_kind, statistics
from pipeline.training.zero import ParamSlice

State = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
OnDamage = Callable[[Path, DamagedCheckpoint], object]
_ANOTHER_CHECKPOINT = (
    "see events.jsonl; restore one from a copy, or remove them to resume from checkpoint.mirror, if there is one,"
    " or start over with --restart"
)
_ANOTHER_RUN = "restore the configuration and program that wrote it, or start another run with run.dir=..."


def restore(
    engine: Any,
    folders: list[Path],
    average: Statistics | None,
    train: Manifest,
    on_damage: OnDamage,
    suggestion: str = _ANOTHER_CHECKPOINT,
) -> State | None:
    """Loads the newest good checkpoint of these into the engine and `average`; returns its state, None of no folder.

    Collective. RunFailed, with the suggestion, where checkpoints exist and none is good; UsageError where the newest
    is of another training set, network or format.
    """
    if not folders:
        return None
    owned, shapes = zero.owned_slices(engine, average is not None), zero.shapes(engine)
    buffers = {f"weight:{name}": tuple(values.shape) for name, values in statistics(engine.module).items()}
    buffers |= {f"ema:{name}": tuple(values.shape) for name, values in (average or {}).items()}

    def verified_by_all(folder: Path) -> CheckpointReader:
        try:
            reader, problem = _verified(folder, owned, {**shapes, **buffers}, train), None
        except (UsageError, DamagedCheckpoint) as error:
            reader, problem = None, error
        problems = all_gather([problem] if problem else [])
        problems.sort(key=lambda each: not isinstance(each, UsageError))  # first what must not be skipped
        if reader is None or problems:
            raise problems[0]
        return reader

    reader = newest_good(folders[-1].parent, folders, verified_by_all, on_damage, suggestion)
    return _apply(engine, owned, average, reader)


def warn_of_damage(folder: Path, error: DamagedCheckpoint) -> None:
    if rank_and_world_size()[0] == 0:
        print(f"warning: {error}; trying the checkpoint before {folder.name}", file=sys.stderr)


def _verified(folder: Path, owned: list[ParamSlice], shapes: Shapes, train: Manifest) -> CheckpointReader:
    """A checkpoint of which everything that this rank needs is verified.

    DamagedCheckpoint where a byte of it is wrong, UsageError where it is of another network or training set.
    """
    reader = CheckpointReader(folder)
    there = reader.shapes | {name: values.shape for name, values in reader.buffers().items()}
    _check_same_network(folder, there, shapes)
    for kind in owned[0].values if owned else ():
        if not reader.has_kind(kind):
            raise UsageError(f"{folder} holds no {kind}; {_ANOTHER_RUN}")
    check_train_set(train, reader)
    reader.verify((s.name, kind, s.start, own.numel()) for s in owned for kind, own in s.values.items())
    return reader


def _check_same_network(folder: Path, there: Shapes, here: Shapes) -> None:
    """UsageError naming the first parameter or statistic that differs, except for an average that is no longer used."""
    for name in [*here, *(name for name in there if not name.startswith("ema:"))]:
        old, new = (list(shapes[name]) if name in shapes else "absent" for shapes in (there, here))
        if old != new:
            what = name.removeprefix("weight:")
            raise UsageError(f"{folder} is of another network: {what} is {old} there and {new} here; {_ANOTHER_RUN}")


def _apply(engine: Any, owned: list[ParamSlice], average: Statistics | None, reader: CheckpointReader) -> State:
    """Reads verified slices one by one into the live state, so that memory never holds a second copy of it."""
    state, buffers = reader.state(), reader.buffers()

    def read(piece: ParamSlice) -> None:
        for kind, own in piece.values.items():
            on_host = own if own.device.type == "cpu" else torch.empty_like(own, device="cpu")
            reader.read_into(on_host.numpy(), piece.name, kind, piece.start)
            if on_host is not own:
                own.copy_(on_host)

    with ThreadPoolExecutor(READING_THREADS) as pool:
        for _ in pool.map(read, owned):
            pass
    zero.finish_loading(engine, state["applied_steps"])
    load(engine.module, of_kind(buffers, "weight"))
    if average is not None:
        average.update({name: values.to(average[name].device) for name, values in of_kind(buffers, "ema").items()})
    return state
