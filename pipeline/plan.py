"""What can be known about a request before any rank starts: data, length, and the state of the run's folder.

Reads only; without torch, so that a wrong request is refused at once. Every rank calls it too, with the same result: it
is then in the process group already, where rank 0 reads the manifests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data.augment import Augmentation
from data.memory import check_memory
from data.order import Order, accumulation_steps
from data.shards.complete import complete_if_writable, with_checksums
from data.shards.manifest import Manifest, NoManifest, read_manifest, with_cache
from data.storage.remote import DEFAULT, ReadError, Storage
from pipeline.checkpoint.attempts import newest_state, trusted_checkpoints
from pipeline.checkpoint.reader import CheckpointReader, DamagedCheckpoint, checkpoints, step_of
from pipeline.checkpoint.train_set import check_train_set
from pipeline.config.batch_size import check_world_size, micro_batches_of, planned_steps
from pipeline.config.parsing import changes, read_resolved, validate
from pipeline.config.schema import Augment, Config
from pipeline.distributed.environment import is_first_process, is_rank_zero
from pipeline.errors import DataError, UsageError, first_line
from pipeline.run.events import last_logged_step, last_saved_step
from pipeline.run.jsonl import evaluated_steps, read_lines
from pipeline.run.small_files import warn_damaged


@dataclass(frozen=True)
class Plan:
    """What a run is about to do."""

    train: Manifest
    val: Manifest | None
    order: Order
    steps: int
    changed: dict[str, Any]
    """Tracked and mutable keys that differ from the run's configuration: name -> [old, new]."""
    newest: int | None
    """The step of the newest checkpoint."""
    evaluated: bool
    """Whether that step's evaluation is recorded."""
    read_errors: list[ReadError]
    """Reads that failed and were retried, as the reading threads append them."""

    def take_read_errors(self) -> list[ReadError]:
        """The reads that were retried since the last call."""
        taken = self.read_errors[:]
        del self.read_errors[: len(taken)]
        return taken

    @property
    def is_new_run(self) -> bool:
        """Whether there is no checkpoint to resume from."""
        return self.newest is None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, the evaluation of the last step included."""
        newest = self.newest or 0
        return newest > self.steps or (newest == self.steps and (self.val is None or self.evaluated))


ReadManifest = Callable[[str, Storage], Manifest]
"""As read_manifest; on ranks one that is collective."""


def make_plan(
    config: Config, command: str, world_size: int, local_world_size: int, read: ReadManifest = read_manifest
) -> Plan:
    """The plan of a request, or UsageError with what is wrong and what would do; collective if `read` is."""
    check_ranks(config, world_size)
    run = Path(config.run.dir)
    changed = config_changes(run, config, command)
    read_errors: list[ReadError] = []
    storage = Storage(on_error=read_errors.append)
    train, order = training_set(config, storage, read)
    if train.header_fingerprint is None and is_rank_zero():
        train = complete_if_writable(train) if is_first_process() else with_checksums(train)
    length = planned_steps(config.train, train.samples)
    newest = _newest(run, train, length)
    val = _manifest(config, config.data.val, "data.val", storage, read) if config.data.val else None
    if val is not None and val.classes != train.classes:
        raise UsageError(f"data.val={config.data.val} {_class_difference(val, train)}; pack both from the same classes")
    slots = accumulation_steps(micro_batches_of(config.train), world_size) * config.train.micro_batch
    check_memory(train, slots, config.data.shuffle_window, config.model.resolution, local_world_size)
    evaluated = newest is not None and newest in evaluated_steps(run)
    return Plan(train, val, order, length, changed, newest, evaluated, read_errors)


def _newest(run: Path, train: Manifest, length: int) -> int | None:
    """The step of a run's newest checkpoint; UsageError where it was trained on other data.

    One by which the run is done must have all its files, since then no rank looks at it.
    """
    folders = trusted_checkpoints(run)
    if not folders:
        if not checkpoints(run / "checkpoints"):
            _check_none_lost(run)
        return None
    for folder in reversed(folders):
        with suppress(DamagedCheckpoint):  # the ranks report it, and take an older one
            reader = CheckpointReader(folder)
            if step_of(folder) >= length:  # else ranks verify it, each what it reads
                reader.check_sizes()
            check_train_set(train, reader)
            return step_of(folder)
    return 0  # none is good, with which the ranks end: it is neither a new run nor one that is done


def _check_none_lost(run: Path) -> None:
    """UsageError where a run without checkpoints has had some: it does not begin again by itself."""
    events, logged = list(read_lines(run / "events.jsonl", event=str)), last_logged_step(run)
    saved = last_saved_step(events)
    abandoned = map(step_of, checkpoints(run / "checkpoints" / "abandoned"))  # by a rollback
    if (saved is not None and saved not in abandoned) or (logged and not events):
        known = f"it had saved step {saved} and logged step {logged}"
        unknown = (
            f"events.jsonl, which would say what was saved, is gone too, and metrics.jsonl ends with step {logged}"
        )
        raise UsageError(
            f"run.dir={run}: its checkpoints are gone: {known if events else unknown}, and there is no checkpoint"
            f" in {run}/checkpoints, nor at a mirror"
            " (checkpoint.mirror). Copy one back; or start over from step 1 with --restart, which sets the old files"
            " aside, or in another folder with run.dir=..."
        )


def training_set(
    config: Config, storage: Storage = DEFAULT, read: ReadManifest = read_manifest
) -> tuple[Manifest, Order]:
    """The training set and its order; UsageError where it is missing, or not what the configuration states."""
    manifest = _manifest(config, config.data.train, "data.train", storage, read)
    check_stated(config, manifest)
    samples = manifest.shards.samples
    return manifest, Order(config.run.seed, samples, config.train.global_batch, config.data.shuffle_window)


def readable_manifest(url: str) -> Manifest | None:
    """What a training set's manifest says, if it can be read from here and at once: the data may be the nodes' alone.

    UsageError where it is there and is none.
    """
    try:
        return read_manifest(url, Storage(attempts=1, attempt_timeout=10.0))
    except (NoManifest, DataError):
        return None


def augmentation(augment: Augment) -> Augmentation:
    """What is drawn for each sample: the keys that Augmentation has fields for, RandAugment's among them."""
    keys = {**dict(augment), **dict(augment.randaugment)}
    return Augmentation(**{field.name: keys[field.name] for field in fields(Augmentation)})


def check_ranks(config: Config, world_size: int) -> None:
    """UsageError where a step's micro batches cannot be dealt to this number of ranks."""
    try:
        check_world_size(config.train, world_size)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _manifest(config: Config, url: str, key: str, storage: Storage, read: ReadManifest) -> Manifest:
    try:
        return with_cache(read(url, storage), storage, config.data.cache.dir, config.data.cache.max_bytes)
    except UsageError as error:
        without = "; data.val=null trains without" if key == "data.val" else ""
        raise UsageError(f"{key}={url}: {error}{without}") from None


def check_stated(config: Config, train: Manifest) -> None:
    """UsageError where the configuration states other classes or samples than the training set has."""
    wrong = {
        key: f"{found} {what} ({key} is {stated})"
        for key, stated, found, what in (
            ("model.classes", config.model.classes, len(train.classes), "classes"),
            ("data.train_samples", config.data.train_samples, train.samples, "samples"),
        )
        if stated not in (None, found)
    }
    if wrong:
        nulls = " ".join(f"{key}=null" for key in wrong)
        raise UsageError(
            f"data.train={config.data.train} has {' and '.join(wrong.values())}; set another data.train, or {nulls}"
            " to take what it has"
        )


def _class_difference(val: Manifest, train: Manifest) -> str:
    extra, missing = sorted(set(val.classes) - set(train.classes)), sorted(set(train.classes) - set(val.classes))
    differing = (extra or missing or list(val.classes))[0]
    return f"has {len(val.classes)} classes and the training set {len(train.classes)}, differing in {differing!r}"


def config_changes(path: Path, config: Config, command: str) -> dict[str, Any]:
    """Keys that differ from the configuration that the run was started with: name -> [old, new]; {} at the first start.

    Raises UsageError with the keys where one differs that defines the run.
    """
    before, problem = _config_of(path / "config.yaml")
    differing = changes(before, config) if before else {}
    fixed = _fixed(differing)
    if (before is None or fixed) and (saved := newest_state(path)) is not None:
        # The file may be gone, empty or cut: what the newest checkpoint was trained with decides.
        there = changes(validate(saved["config"], f"{path}: its newest checkpoint"), config)
        if before is None or not _fixed(there):
            instead = "comparing with the configuration in the newest checkpoint instead"
            warn_damaged(path / "config.yaml", problem or "it differs from the newest checkpoint's", instead)
            differing, fixed = there, _fixed(there)
    elif before is None and (path / "config.yaml").exists():
        warn_damaged(path / "config.yaml", problem, "the run has no checkpoint, and starts with what is requested now")
    if fixed:
        raise UsageError(
            f"run.dir={path}: this run was started with another configuration: {'; '.join(fixed)}."
            f" These keys define a run: change them back, or {command} into another folder with run.dir=..."
        )
    return {name: [old, new] for name, (_, old, new) in differing.items()}


def _config_of(file: Path) -> tuple[Config | None, str]:
    """What a run's config.yaml holds, or None and why it can't be read."""
    try:
        return read_resolved(file), ""
    except UsageError as error:
        return None, first_line(error).partition(";")[0]


def _fixed(differing: dict[str, tuple[str, Any, Any]]) -> list[str]:
    """Those of the keys that differ which define a run, with both values."""
    immutable = {name: (old, new) for name, (kind, old, new) in differing.items() if kind == "immutable"}
    return [f"{name} was {old!r}, now {new!r}" for name, (old, new) in immutable.items()]
