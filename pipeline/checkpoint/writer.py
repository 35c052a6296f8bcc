"""Writing checkpoints in the background, durable before they have their name (the format is in docs/checkpoints.md).

Every rank writes the slices that it owns (../training/zero.py) as one safetensors file; rank 0 adds the buffers and
state.json. All goes to a hidden folder named by the attempt, is made durable, and is renamed by rank 0 once every
rank's part is there. The thread runs no collectives; training waits only while the state is copied to the host,
into the same memory each time. Where a copy does not fit there, the live state is written, and training waits for it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.memory import available_bytes
from data.storage.durable import publish, sync_folder, write_atomically
from pipeline.checkpoint.attempts import raise_if_superseded
from pipeline.checkpoint.mirror import Mirror
from pipeline.checkpoint.reader import (
    FORMAT,
    checkpoints,
    checksum,
    digest_of,
    prunable,
    step_name,
    step_of,
)
from pipeline.config.schema import Checkpoint
from pipeline.distributed.environment import cpus_per_rank, local_world_size
from pipeline.distributed.heartbeat import beat
from pipeline.errors import RunFailed
from pipeline.run.events import Events
from pipeline.training.ema import Statistics, statistics
from pipeline.training.zero import owned_slices, shapes

BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 64 << 20
"""Whole blocks that are on the host at once where there is no copy of everything."""
COPY_SHARE = 0.75
"""Share of the available memory that the copies of a machine's ranks may take."""
PART_TIMEOUT_SECONDS = 1800.0
_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class GlobalState:
    """What rank 0 says of a checkpoint for all ranks: the parameters' whole shapes, buffers, state.json."""

    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, torch.Tensor]
    state: str


class SafetensorsSnapshot:
    """A safetensors file that is not written yet: its bytes, from live tensors or from a copy of them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        sizes = [values.numel() * values.element_size() for values in tensors.values()]
        ends = list(accumulate(sizes, initial=0))
        header = {
            name: {
                "dtype": {torch.float32: "F32", torch.int64: "I64"}[values.dtype],
                "shape": list(values.shape),
                "data_offsets": [begin, end],
            }
            for (name, values), begin, end in zip(tensors.items(), ends, ends[1:], strict=False)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        first = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8).copy()
        flat = [values.detach().reshape(-1).view(torch.uint8) for values in tensors.values()]
        self._parts = [torch.from_numpy(first), *flat]
        self.offsets = [len(first) + begin for begin in ends[:-1]]
        """Where in the file each tensor begins."""
        self.bytes = len(first) + ends[-1]
        self._copy: torch.Tensor | None = None

    def copy_to(self, memory: torch.Tensor) -> None:
        """From now on the bytes are those of this moment, which `memory` holds."""
        threads = 1 if self.on_gpu() else min(4, cpus_per_rank())
        size = -(-len(memory) // threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda begin: self._fill(memory[begin : begin + size], begin), range(0, len(memory), size)))
        self._copy = memory

    def chunks(self) -> Iterator[np.ndarray]:
        """All bytes in order, whole blocks but for the last; each chunk is good until the next is asked for."""
        if self._copy is not None:
            yield self._copy.numpy()
            return
        memory = torch.empty(min(CHUNK_BYTES, self.bytes), dtype=torch.uint8)
        for begin in range(0, self.bytes, len(memory)):
            chunk = memory[: self.bytes - begin]
            self._fill(chunk, begin)
            yield chunk.numpy()

    def _fill(self, memory: torch.Tensor, begin: int) -> None:
        starts, filled = [0, *self.offsets], 0
        part = bisect_right(starts, begin) - 1
        while filled < len(memory):
            skipped = begin + filled - starts[part]
            source = self._parts[part][skipped : skipped + len(memory) - filled]
            _copy(source, memory[filled : filled + len(source)])
            filled, part = filled + len(source), part + 1
        if self.on_gpu():
            torch.cuda.current_stream().synchronize()

    def on_gpu(self) -> bool:
        return any(part.is_cuda for part in self._parts)


def _copy(source: torch.Tensor, memory: torch.Tensor) -> None:
    if source.is_cuda:
        memory.copy_(source, non_blocking=True)
    else:  # torch would wake a thread for each processor, for every small tensor
        memory.numpy()[:] = source.numpy()


@dataclass(frozen=True)
class RankShard:
    """What one rank puts into a checkpoint: parameter, kind and start of its stretches, and their bytes in a file."""

    step: int
    titles: list[tuple[str, str, int, int]]
    image: SafetensorsSnapshot
    common: GlobalState | None
    """Rank 0's."""
    blocking: bool = False
    """Whether training waits for it."""


def rank_shard(
    step: int, elements: Mapping[tuple[str, str, int], torch.Tensor], common: GlobalState | None
) -> RankShard:
    """A rank's part, of flat float32 tensors by parameter, kind and start; nothing is copied yet."""
    titles = [(*title, values.numel()) for title, values in elements.items()]
    image = SafetensorsSnapshot({f"{name}:{kind}:{start}": values for (name, kind, start), values in elements.items()})
    return RankShard(step, titles, image, common)


@dataclass
class CheckpointWriter:
    """Writes one checkpoint at a time in the background; an error of the last one is raised by the next call."""

    root: Path
    attempt: int
    rank: int
    world_size: int
    settings: Checkpoint
    events: Events
    _thread: threading.Thread | None = None
    _error: list[BaseException] = field(default_factory=list)
    _memory: torch.Tensor | None = None
    _said: bool = False

    def __post_init__(self) -> None:
        keep_last, keep_every, url = self.settings.keep_last, self.settings.keep_every, self.settings.mirror
        mirrors = url is not None and self.rank == 0
        self.mirror = Mirror(url, self.root.parent, keep_last, keep_every, self.events.write) if mirrors else None

    def save(self, engine: Any, average: Statistics | None, state: Mapping[str, Any]) -> None:
        """Copies what this rank owns to the host and returns; `average` has the batch-norm statistics' average.

        Where a copy does not fit in memory it returns when this rank's part is durable.
        """
        self.wait()
        elements = {
            (stretch.name, kind, stretch.start): values
            for stretch in owned_slices(engine, average is not None)
            for kind, values in stretch.values.items()
        }
        part = rank_shard(state["step"], elements, _common(engine, average, state) if self.rank == 0 else None)
        memory = self._memory_for(part.image)
        if memory is None:
            self._write(replace(part, blocking=True))
            return self.wait()
        part.image.copy_to(memory)
        self._thread = threading.Thread(target=self._write, args=(part,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises what the writing of the last checkpoint raised, if it has."""
        if self._error:
            raise self._error.pop()

    def wait(self) -> None:
        """Returns once the last checkpoint is durable; raises what its writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Returns once the last checkpoint is durable and copied to the mirror, and superseded ones are gone."""
        self.wait()
        if self.mirror is not None:
            self.mirror.wait()
            if folders := checkpoints(self.root):
                self._prune(step_of(folders[-1]))

    def _memory_for(self, image: SafetensorsSnapshot) -> torch.Tensor | None:
        """Memory for a copy, the same each time: new pages would cost more than the copy; None where it won't fit."""
        share = COPY_SHARE * available_bytes() / local_world_size(1)
        if self._memory is None and image.bytes <= share:
            self._memory = torch.from_numpy(np.empty(image.bytes, np.uint8))
            if image.on_gpu():  # torch's own pinned memory would take up to twice the bytes
                cuda: Any = torch.cuda.cudart()
                torch.cuda.check_error(cuda.cudaHostRegister(self._memory.data_ptr(), image.bytes, 0))
        return self._memory

    def _write(self, part: RankShard) -> None:
        began = time.monotonic()
        try:
            facts = write_checkpoint(self.root, self.attempt, self.rank, self.world_size, part)
            if facts is not None:
                seconds = round(time.monotonic() - began, 3)
                self.events.write("checkpoint", step=part.step, seconds=seconds, **facts)
                self._say_blocking(facts["blocking"])
                if self.mirror is not None:
                    self.mirror.copy(self.root / step_name(part.step))
                self._prune(part.step)
        except BaseException as error:  # handed to the training thread by check()
            self._error.append(error)

    def _say_blocking(self, blocking: bool) -> None:
        if blocking and not self._said:
            self._said = True
            print(
                "memory has no room for a copy of the state, so training waits while a checkpoint is written"
                " (events.jsonl: blocking); with more machines each would have less to copy",
                file=sys.stderr,
            )

    def _prune(self, step: int) -> None:
        spared = self.mirror.in_use() if self.mirror is not None else set()
        prune(self.root, self.settings.keep_last, self.settings.keep_every, step, spared)


def write_checkpoint(root: Path, attempt: int, rank: int, world_size: int, part: RankShard) -> dict[str, Any] | None:
    """Writes this rank's part; rank 0 also waits for the others', names the checkpoint, and returns its `bytes` and
    whether training waited for any part (`blocking`).

    RunFailed, on rank 0 too, where a file can't be written, nothing half-written is left then; and where a newer
    attempt has begun.
    """
    folder = root / f".{step_name(part.step)}.attempt-{attempt}"
    given_up = folder.with_name(f"{folder.name}.failed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_part(folder, rank, part)
        if given_up.exists():  # before this rank had begun
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        return _commit(folder, attempt, world_size, part.step, part.common) if part.common is not None else None
    except BaseException as error:
        raise_if_superseded(root.parent, attempt)  # which removes what older ones have not finished
        failed = _in_words(root, part, world_size, error) if isinstance(error, OSError) else None
        if rank == 0:
            with suppress(OSError):
                folder.rename(given_up)  # so that no other rank writes into it any more
                for file in given_up.iterdir():
                    file.unlink()  # the empty folder stays as a sign until the next start
        elif given_up.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with suppress(OSError):
                (folder / _file(rank)).unlink()  # which makes room for the note
            with suppress(OSError):  # without a note, rank 0 waits until the launcher ends it
                write_atomically(folder / _part(rank), json.dumps({"error": f"rank {rank}: {failed or error}"}))
        if failed is None:
            raise
        raise RunFailed(failed) from error


def _in_words(root: Path, part: RankShard, world_size: int, error: OSError) -> str:
    if part.common is None and isinstance(error, FileNotFoundError | FileExistsError):  # its folder just went
        return f"{root / step_name(part.step)} was given up by rank 0, which says why"
    written = checkpoints(root) if root.is_dir() else []
    goes_on = f"resumes from step {step_of(written[-1])}" if written else "begins again"
    if error.errno in _SPACE:
        existing = next(folder for folder in (root, *root.parents) if folder.exists())
        free, needed = shutil.disk_usage(existing).free, world_size * part.image.bytes
        way_out = f"it needs {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB are free; make room, then the same command"
    else:
        way_out = f"fix that ({error.filename or root}), then the same command"
    return f"{root / step_name(part.step)} cannot be written: {error.strerror or error}; {way_out} {goes_on}"


def _common(engine: Any, average: Statistics | None, state: Mapping[str, Any]) -> GlobalState:
    named = {f"weight:{name}": values for name, values in statistics(engine.module).items()}
    named |= {f"ema:{name}": values for name, values in (average or {}).items()}
    buffers = {name: values.detach().to("cpu", copy=True) for name, values in named.items()}
    return GlobalState(shapes(engine), buffers, json.dumps(state))


def _write_part(folder: Path, rank: int, part: RankShard) -> None:
    file = _file(rank)
    checksums = _write_chunks(folder / file, part.image.chunks())
    found = [
        {"parameter": name, "kind": kind, "file": file, "offset": offset, "start": start, "count": count}
        for (name, kind, start, count), offset in zip(part.titles, part.image.offsets, strict=True)
    ]
    facts = {"files": {file: checksums}, "stretches": found, "blocking": part.blocking}
    write_atomically(folder / _part(rank), json.dumps(facts))


def _commit(folder: Path, attempt: int, world_size: int, step: int, common: GlobalState) -> dict[str, Any]:
    """Completes a checkpoint's folder and gives it its name."""
    files = {
        "buffers.safetensors": _write_chunks(
            folder / "buffers.safetensors", SafetensorsSnapshot(common.buffers).chunks()
        ),
        "state.json": _write_chunks(folder / "state.json", [np.frombuffer(common.state.encode(), np.uint8)]),
    }
    parts = [_await_part(folder / _part(rank)) for rank in range(world_size)]
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
        "stretches": [stretch for part in parts for stretch in part["stretches"]],
    }
    write_atomically(folder / "manifest.json", json.dumps({"sha256": digest_of(manifest), **manifest}))
    for rank in range(world_size):
        (folder / _part(rank)).unlink()
    sync_folder(folder)
    raise_if_superseded(folder.parent.parent, attempt)
    publish(folder, folder.parent / step_name(step))  # replaces a damaged one, whose steps were done again
    size = sum(entry["bytes"] for entry in files.values())
    return {"bytes": size, "blocking": any(part["blocking"] for part in parts)}


def prune(root: Path, keep_last: int, keep_every: int | None, step: int, spared: Iterable[Path] = ()) -> None:
    """Removes the checkpoints that the one of this step supersedes, but for those that are spared."""
    folders = {step_of(folder): folder for folder in checkpoints(root)}
    for old in prunable(folders, step, keep_last, keep_every):
        folder = folders[old]
        if folder not in spared:
            hidden = root / f".{folder.name}.pruned"  # renamed first: under its name a checkpoint is complete
            folder.rename(hidden)
            shutil.rmtree(hidden)


def clean_partial(root: Path) -> None:
    """Removes what earlier attempts left half-written or half-removed; for the holder of the run's lock."""
    for hidden in root.glob(".step-*"):
        shutil.rmtree(hidden)


def _part(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_chunks(path: Path, chunks: Iterable[np.ndarray]) -> dict[str, Any]:
    """Writes chunks of whole blocks, each durable before the next is asked for; returns the file's checksums."""
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


def _await_part(path: Path) -> Any:
    """What a rank says of its part; RunFailed with its words where it could not write it."""
    deadline = time.monotonic() + PART_TIMEOUT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was not written within {PART_TIMEOUT_SECONDS:.0f} s, see that rank's log")
        time.sleep(0.02)
    part = json.loads(path.read_bytes())
    if "error" in part:
        raise RunFailed(part["error"])
    return part
