"""Writing checkpoints in the background, durable before they have their name (format: docs/reference/formats.md).

Every rank writes the slices that it owns (../training/zero.py) as one safetensors file to a hidden folder named by the
attempt; rank 0 adds buffers and state.json, and renames the folder once every rank's part is durable. The writing
thread runs no collectives. Training waits only for the copy of the state to the host, or, where host memory has no room
for one, until the live state is written, or its writing stalls. What a failure means for the run is decided in
checkpointer.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.memory import available_bytes
from data.storage.durable import publish, sync_folder, write_atomically
from pipeline.checkpoint.attempts import raise_if_superseded
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.pruning import Unremoved, abandon, prune, remove_failed, remove_leftovers
from pipeline.checkpoint.reader import FORMAT, checksum, digest_of, step_name
from pipeline.checkpoint.snapshot import SafetensorsSnapshot
from pipeline.config.schema import Checkpoint
from pipeline.distributed import signals
from pipeline.distributed.environment import local_world_size
from pipeline.distributed.heartbeat import beat, last_beat
from pipeline.errors import RunFailed
from pipeline.run.events import Events
from pipeline.training.ema import Statistics, statistics
from pipeline.training.zero import owned_slices, shapes

BLOCK_BYTES = 1 << 20
COPY_SHARE = 0.75
"""Share of the available memory that the copies of a machine's ranks may take."""
PART_TIMEOUT_SECONDS = 1800.0
STALLED_SECONDS = 120.0
"""Training waits no longer for a piece of the live state to become durable."""
MIRROR_POLL_SECONDS = 1.0


class SaveFailed(RunFailed):
    """A checkpoint that could not be written, which left nothing half-written; the message says why and what to do."""


@dataclass(frozen=True)
class GlobalState:
    """What rank 0 writes for all ranks: the parameters' whole shapes, buffers, and the text of state.json."""

    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, torch.Tensor]
    state: str


@dataclass(frozen=True)
class RankShard:
    """One rank's part of a checkpoint: its slices (parameter, kind, start, count), and their bytes in that order."""

    step: int
    index: list[tuple[str, str, int, int]]
    snapshot: SafetensorsSnapshot
    common: GlobalState | None
    """Only rank 0's."""
    number: int = 0
    """Of the try: each has a folder of its own."""
    blocking: bool = False
    """Whether training waits until it is written."""
    written: threading.Event = field(default_factory=threading.Event)
    """Set once the tensors are no longer read."""


def rank_shard(
    step: int, elements: Mapping[tuple[str, str, int], torch.Tensor], common: GlobalState | None
) -> RankShard:
    """A rank's part, of flat float32 tensors by parameter, kind and start; nothing is copied yet."""
    index = [(*key, values.numel()) for key, values in elements.items()]
    named = {f"{name}:{kind}:{start}": values for (name, kind, start), values in elements.items()}
    return RankShard(step, index, SafetensorsSnapshot(named), common)


@dataclass
class CheckpointWriter:
    """Writes one checkpoint at a time in the background; `wait` raises its error, which `on_failure` learns at once."""

    root: Path
    attempt: int
    rank: int
    world_size: int
    settings: Checkpoint
    events: Events
    on_failure: Callable[[int, SaveFailed], None] = lambda step, error: None
    """Called on rank 0, in the writing thread."""
    _thread: threading.Thread | None = None
    _error: list[BaseException] = field(default_factory=list)
    _saves: int = 0
    _given_up: list[str] = field(default_factory=list)
    """Why a rank's part will not come."""
    _live: RankShard | None = None
    """What is being written of the live state."""
    _memory: torch.Tensor | None = None
    _warned: bool = False
    _unremoved: set[Path] = field(default_factory=set)
    """Of which a warning has been printed."""

    def __post_init__(self) -> None:
        keep_last, keep_every, url = self.settings.keep_last, self.settings.keep_every, self.settings.mirror
        mirrors = url is not None and self.rank == 0
        self.mirror = Mirror(url, self.root.parent, keep_last, keep_every, self.events.write) if mirrors else None

    def save(self, engine: Any, average: Statistics | None, state: Mapping[str, Any]) -> None:
        """Copies this rank's slices to the host and returns; `average` is the average of the batch-norm statistics.

        Where a copy does not fit in memory, the state must not change before `await_state` has returned.
        """
        self.wait()
        self._given_up.clear()
        self._saves += 1
        elements = {
            (owned.name, kind, owned.start): values
            for owned in owned_slices(engine, average is not None)
            for kind, values in owned.values.items()
        }
        part = rank_shard(state["step"], elements, _common(engine, average, state) if self.rank == 0 else None)
        part = replace(part, number=self._saves)
        memory = self._memory_for(part.snapshot)
        if memory is None:
            part = replace(part, blocking=True)
        else:
            part.snapshot.copy_to(memory)
        self._live = part if part.blocking else None
        self._thread = threading.Thread(target=self._write, args=(part,), name="checkpoint")
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the writing of the last checkpoint has ended, after so many seconds at most; raises its error, once.

        Without `seconds` it waits for the end.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._error:
            raise self._error.pop()
        return True

    def await_state(self) -> None:
        """Returns once the live state may change: it is written, or the save is given up since its writing stalls."""
        part, self._live = self._live, None
        last, since = last_beat(), time.monotonic()
        while part is not None and self._thread is not None and self._thread.is_alive() and not part.written.wait(0.1):
            if last != (last := last_beat()):
                since = time.monotonic()
            elif time.monotonic() - since > STALLED_SECONDS:
                reason = f"nothing could be written for {STALLED_SECONDS:.0f} s"
                self.give_up(f"{self.root / step_name(part.step)} cannot be written: {reason}; check its storage")
                message = f"{self.root / step_name(part.step)} was given up: {reason}; training continues without it"
                return self.events.warn("checkpoint_stalled", message, step=part.step, reason=reason)

    def give_up(self, reason: str) -> None:
        """Fails the save that is being written: a rank's part of it will not come."""
        self._given_up.append(reason)

    def is_mirrored(self, newest: int, signals_before: int) -> bool:
        """Whether nothing is left to copy to the mirror, after some seconds; what `newest` supersedes is then removed.

        What is durable needs no mirror to be resumed from, so a further signal ends the wait. Only for rank 0.
        """
        if self.mirror is not None:
            if not self.mirror.wait(MIRROR_POLL_SECONDS):
                if signals.count() == signals_before:
                    return False
                self.mirror.leave()
            self._prune(newest)
        return True

    def remove_leftovers(self) -> None:
        """Removes what earlier attempts left half-written or half-removed; only for the holder of the run's lock."""
        self._tidy(partial(remove_leftovers, self.root))

    def remove_failed(self, step: int) -> None:
        """Removes what marks a save that failed, once it has ended on all ranks."""
        if self.rank == 0:
            self._tidy(partial(remove_failed, self.root, step))

    def abandon(self, after: int) -> None:
        """Sets the checkpoints of later steps aside, and deletes their copies at the mirror."""
        self._tidy(partial(abandon, self.root, after))
        if self.mirror is not None:
            self.mirror.delete_after(after)

    def _memory_for(self, snapshot: SafetensorsSnapshot) -> torch.Tensor | None:
        """Memory for a copy, always the same, since new pages cost more than the copy; None where it does not fit."""
        size, share = snapshot.bytes, COPY_SHARE * available_bytes() / local_world_size(1)
        if self._memory is None and size <= share:
            self._memory = torch.from_numpy(np.empty(size, np.uint8))
            if snapshot.gpu:
                self._pin(self._memory, snapshot.gpu)
        return self._memory

    def _pin(self, memory: torch.Tensor, gpu: torch.device) -> None:
        """Locks memory, to which a GPU then copies faster; not by torch, which would take up to twice the bytes."""
        cuda: Any = torch.cuda.cudart()
        error = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if error == cuda.cudaError.success:
            return
        with suppress(RuntimeError):  # CUDA raises it once more, at this thread's next kernel
            torch.zeros(1, device=gpu)
        reason = cuda.cudaGetErrorString(error)
        message = (
            f"rank {self.rank} cannot lock {memory.nbytes / 1e9:.3g} GB of host memory ({reason}), so the copies of its"
            " checkpoints take longer; raise the limit (ulimit -l; under Slurm LimitMEMLOCK of slurmd)"
        )
        self.events.warn("memory_not_locked", message, by=self.rank, rank=self.rank, reason=reason)

    def _write(self, part: RankShard) -> None:
        began = time.monotonic()
        try:
            facts = write_checkpoint(self.root, self.attempt, self.rank, self.world_size, part, self._given_up)
            if facts is not None:
                seconds = round(time.monotonic() - began, 3)
                self.events.write("checkpoint", step=part.step, seconds=seconds, **facts)
                self._warn_blocking(facts["blocking"])
                if self.mirror is not None:
                    self.mirror.copy(self.root / step_name(part.step))
                self._prune(part.step)
        except BaseException as error:  # handed to the training thread by wait()
            self._error.append(error)
            if isinstance(error, SaveFailed) and self.rank == 0:
                self.on_failure(part.step, error)

    def _warn_blocking(self, blocking: bool) -> None:
        if blocking and not self._warned:
            self._warned = True
            print(
                "warning: host memory has no room for a copy of the state, so training waits while a checkpoint is"
                " written (blocking in events.jsonl); on more machines each has less to copy",
                file=sys.stderr,
            )

    def _prune(self, step: int) -> None:
        spared = self.mirror.in_use() if self.mirror is not None else set()
        self._tidy(partial(prune, self.root, self.settings.keep_last, self.settings.keep_every, step, spared))

    def _tidy(self, work: Callable[[], Unremoved]) -> None:
        """Does what may fail without harm, and warns once of each folder that stays."""
        try:
            unremoved = work()
        except OSError as error:  # the folder itself cannot be read
            unremoved = {self.root: error.strerror or str(error)}
        for folder, reason in unremoved.items():
            if folder not in self._unremoved:
                self._unremoved.add(folder)
                message = f"{folder} cannot be removed: {reason}; training continues, and the removal is retried"
                self.events.warn("prune_failed", message, checkpoint=folder.name, reason=reason)


def write_checkpoint(
    root: Path, attempt: int, rank: int, world_size: int, part: RankShard, given_up: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Writes this rank's part; rank 0 then waits for the others', publishes the checkpoint, and returns its `bytes` and
    whether training waited for any part (`blocking`). A reason in `given_up` ends it.

    SaveFailed, on rank 0 too, where a file can't be written, which leaves nothing half-written; RunFailed where a newer
    attempt has begun.
    """
    folder = root / f".{step_name(part.step)}.attempt-{attempt}.{part.number}"
    aborted = folder.with_name(f"{folder.name}.failed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_part(folder, rank, part, given_up)
        if aborted.exists():  # before this rank began
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        if part.common is None:
            return None
        return _commit(folder, attempt, world_size, part.step, part.common, given_up)
    except BaseException as error:
        with suppress(OSError):  # where the folder cannot be read, the error says so
            raise_if_superseded(root.parent, attempt)  # a newer attempt removes unfinished folders, hence the error
        failed = _describe_failure(root, part, world_size, error) if isinstance(error, OSError) else None
        if rank == 0:
            with suppress(OSError):
                folder.rename(aborted)  # so that no other rank can write into it
                for file in aborted.iterdir():
                    file.unlink()  # the empty folder marks the failure until all ranks know
        elif os.path.exists(aborted):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with suppress(OSError):
                (folder / _file(rank)).unlink()  # makes room for the note
            with suppress(OSError):  # without a note, rank 0 learns it when the next checkpoint is due
                write_atomically(folder / _part(rank), json.dumps({"error": f"rank {rank}: {failed or error}"}))
        if failed is None:
            raise
        raise SaveFailed(failed) from error


def _describe_failure(root: Path, part: RankShard, world_size: int, error: OSError) -> str:
    if part.common is None and isinstance(error, FileNotFoundError | FileExistsError):  # rank 0 has moved the folder
        return f"{root / step_name(part.step)} was aborted by rank 0; its log has the reason"
    needed = f"it needs {world_size * part.snapshot.bytes / 1e9:.3g} GB"
    existing = next(folder for folder in (root, *root.parents) if os.path.exists(folder))
    if error.errno == errno.ENOSPC:
        disk = os.statvfs(existing)
        if disk.f_files and not disk.f_favail:
            suggestion = f"no inodes are left on the file system of {existing}; remove files"
        else:
            suggestion = f"{needed} and {disk.f_bavail * disk.f_frsize / 1e9:.3g} GB are free; make room"
    elif error.errno == errno.EDQUOT:
        suggestion = f"{needed}; make room in your quota"
    elif error.errno == errno.EFBIG:
        suggestion = f"{needed}; raise the limit on file size (ulimit -f)"
    else:
        suggestion = f"fix that ({existing})"
    return f"{root / step_name(part.step)} cannot be written: {error.strerror or error}; {suggestion}"


def _common(engine: Any, average: Statistics | None, state: Mapping[str, Any]) -> GlobalState:
    named = {f"weight:{name}": values for name, values in statistics(engine.module).items()}
    named |= {f"ema:{name}": values for name, values in (average or {}).items()}
    buffers = {name: values.detach().to("cpu", copy=True) for name, values in named.items()}
    return GlobalState(shapes(engine), buffers, json.dumps(state))


def _write_part(folder: Path, rank: int, part: RankShard, given_up: Sequence[str]) -> None:
    file = _file(rank)
    checksums = _write_chunks(folder / file, part.snapshot.chunks())
    if given_up:  # the live state may have changed meanwhile
        raise SaveFailed(given_up[0])
    part.written.set()
    found = [
        {"parameter": name, "kind": kind, "file": file, "offset": offset, "start": start, "count": count}
        for (name, kind, start, count), offset in zip(part.index, part.snapshot.offsets, strict=True)
    ]
    facts = {"files": {file: checksums}, "slices": found, "blocking": part.blocking}
    write_atomically(folder / _part(rank), json.dumps(facts))


def _commit(
    folder: Path, attempt: int, world_size: int, step: int, common: GlobalState, given_up: Sequence[str]
) -> dict[str, Any]:
    """Completes a checkpoint's folder and publishes it; its `bytes` and `blocking`."""
    files = {
        "buffers.safetensors": _write_chunks(
            folder / "buffers.safetensors", SafetensorsSnapshot(common.buffers).chunks()
        ),
        "state.json": _write_chunks(folder / "state.json", [np.frombuffer(common.state.encode(), np.uint8)]),
    }
    parts = [_await_part(folder / _part(rank), given_up) for rank in range(world_size)]
    for part in parts:
        files |= part["files"]
    manifest = {
        "format": FORMAT,
        "step": step,
        "attempt": attempt,
        "world_size": world_size,
        "block_bytes": BLOCK_BYTES,
        "parameters": common.shapes,
        "files": files,
        "slices": [each for part in parts for each in part["slices"]],
    }
    write_atomically(folder / "manifest.json", json.dumps({"sha256": digest_of(manifest), **manifest}))
    for rank in range(world_size):
        (folder / _part(rank)).unlink()
    sync_folder(folder)
    raise_if_superseded(folder.parent.parent, attempt)
    publish(folder, folder.parent / step_name(step))  # replaces a damaged one, whose steps were done again
    size = sum(entry["bytes"] for entry in files.values())
    return {"bytes": size, "blocking": any(part["blocking"] for part in parts)}


def _part(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_chunks(path: Path, chunks: Iterable[np.ndarray]) -> dict[str, Any]:
    """Writes chunks of whole blocks, each durable before the next is requested; returns size and checksums."""
    checksums, total = [], 0
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            for begin in range(0, len(chunk), BLOCK_BYTES):
                block = chunk[begin : begin + BLOCK_BYTES]
                checksums.append(checksum(block))
                _write_all(file.fileno(), block)
            os.fsync(file.fileno())
            beat("a piece of a checkpoint")
            total += len(chunk)
    return {"bytes": total, "xxh3": checksums}


def _write_all(file: int, content: np.ndarray) -> None:
    while len(content):
        content = content[os.write(file, content) :]


def _await_part(path: Path, given_up: Sequence[str]) -> Any:
    """The note of a rank on its part, once it is written; SaveFailed with the rank's error where it failed."""
    deadline = time.monotonic() + PART_TIMEOUT_SECONDS
    while not path.exists():
        if given_up:
            raise SaveFailed(given_up[0])
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was not written within {PART_TIMEOUT_SECONDS:.0f} s, see that rank's log")
        time.sleep(0.02)
    part = json.loads(path.read_bytes())
    if "error" in part:
        raise SaveFailed(part["error"])
    return part
