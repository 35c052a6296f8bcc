"""Everything about a request that can be known before any rank starts: data, length, and what a run's folder says.

Reads only; without torch, so that a wrong request is answered at once. Every rank calls it too, for the same answer.

Next: launch.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data.augment import Augmentation
from data.cache import with_cache
from data.memory import check_memory
from data.order import Order, passes, steps
from data.shards import Manifest, read_manifest
from data.storage import PLAIN, Fault, Storage
from pipeline.config import Augment, Config, check_world_size, micro_batches_of
from pipeline.errors import BadRequest
from pipeline.run_folder import compare, newest_step


@dataclass(frozen=True)
class Plan:
    """What a run is about to do."""

    train: Manifest
    val: Manifest | None
    order: Order
    steps: int
    changed: dict[str, Any]
    """Recorded and free keys that differ from the run's configuration: name -> [old, new]."""
    newest: int | None
    """The step of the newest checkpoint."""
    read_faults: list[Fault]
    """Reads that failed and were made again; threads that read add to it, who records them takes them out."""

    @property
    def begins(self) -> bool:
        """Whether there is no checkpoint to go on from."""
        return self.newest is None

    @property
    def finished(self) -> bool:
        return (self.newest or 0) >= self.steps


def prepare(config: Config, command: str, world_size: int, local_world_size: int) -> Plan:
    """The plan of a request, or BadRequest with what is wrong and what would do."""
    check_ranks(config, world_size)
    changed = compare(Path(config.run.dir), config, command)
    read_faults: list[Fault] = []
    storage = Storage(on_fault=read_faults.append)
    train, order = training_set(config, storage)
    val = _manifest(config, config.data.val, "data.val", storage) if config.data.val else None
    if val is not None and val.classes != train.classes:
        raise BadRequest(f"data.val={config.data.val} {_class_difference(val, train)}; pack both from the same classes")
    slots = passes(micro_batches_of(config.train), world_size) * config.train.micro_batch
    check_memory(train, slots, config.data.window, config.model.resolution, local_world_size)
    length = config.train.steps or steps_of(config.train.epochs or 0, train.samples, config.train.global_batch)
    return Plan(train, val, order, length, changed, newest_step(Path(config.run.dir)), read_faults)


def training_set(config: Config, storage: Storage = PLAIN) -> tuple[Manifest, Order]:
    """What is trained on, and in which order; BadRequest where it is not there, or not what was stated."""
    manifest = _manifest(config, config.data.train, "data.train", storage)
    _check_stated(config, manifest)
    counts = np.array([shard.samples for shard in manifest.shards], np.int64)
    return manifest, Order(config.run.seed, counts, config.train.global_batch, config.data.window)


def augmentation(augment: Augment) -> Augmentation:
    """What is drawn for each sample."""
    return Augmentation(
        crop=augment.crop,
        crop_area=augment.crop_area,
        flip=augment.flip,
        layers=augment.randaugment.layers,
        magnitude=augment.randaugment.magnitude,
    )


def check_ranks(config: Config, world_size: int) -> None:
    """BadRequest where a step's micro batches cannot be dealt to so many ranks."""
    try:
        check_world_size(config.train, world_size)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def steps_of(epochs: float, samples: int, global_batch: int) -> int:
    """ceil(epochs x N / global_batch), exact for epochs as they are written: 1.1 x 10 is 11."""
    if epochs == int(epochs):
        return steps(int(epochs), samples, global_batch)
    return math.ceil(Fraction(repr(epochs)) * samples / global_batch)


def _manifest(config: Config, url: str, key: str, storage: Storage) -> Manifest:
    try:
        return with_cache(read_manifest(url, storage), storage, config.data.cache.dir, config.data.cache.max_bytes)
    except BadRequest as error:
        without = "; data.val=null trains without" if key == "data.val" else ""
        raise BadRequest(f"{key}={url}: {error}{without}") from None


def _check_stated(config: Config, train: Manifest) -> None:
    for key, stated, found in (
        ("model.classes", config.model.classes, len(train.classes)),
        ("data.train_samples", config.data.train_samples, train.samples),
    ):
        if stated is not None and stated != found:
            raise BadRequest(f"{key} is {stated}, and data.train={config.data.train} has {found}; correct one of them")


def _class_difference(val: Manifest, train: Manifest) -> str:
    extra, missing = sorted(set(val.classes) - set(train.classes)), sorted(set(train.classes) - set(val.classes))
    differing = (extra or missing or list(val.classes))[0]
    return f"has {len(val.classes)} classes and the training set {len(train.classes)}, differing in {differing!r}"
