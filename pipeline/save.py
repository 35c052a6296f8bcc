"""Writing checkpoints in the background, durable before they have their name (the format is in docs/checkpoints.md).

Every rank writes the stretches that it owns (zero_state.Stretch) as one safetensors file; rank 0 adds the buffers and
state.json. All goes to a hidden folder named by the attempt, is made durable, and is renamed by rank 0 once every
rank's part is there. The thread runs no collectives; training stands still only while the state is copied to the host.

Next: restore.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint import FORMAT, checkpoints, digest_of, step_name, step_of
from pipeline.ema import Statistics, statistics
from pipeline.record import Events
from pipeline.zero_state import stretches

BLOCK_BYTES = 1 << 20
PART_TIMEOUT_SECONDS = 1800.0


Elements = dict[tuple[str, str, int], torch.Tensor]
"""Stretches on the host, float32 and flat, by parameter, kind and start."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank puts into a checkpoint: its stretches; rank 0's shapes, buffers and state count for all."""

    step: int
    elements: Elements
    shapes: Mapping[str, tuple[int, ...]]
    buffers: Mapping[str, torch.Tensor]
    state: str


@dataclass
class CheckpointWriter:
    """Writes one checkpoint at a time in the background; an error of the last one is raised by the next call."""

    root: Path
    attempt: int
    rank: int
    world_size: int
    keep_last: int
    events: Events
    _thread: threading.Thread | None = None
    _error: list[BaseException] = field(default_factory=list)

    def save(self, engine: Any, average: Statistics | None, state: Mapping[str, Any]) -> None:
        """Copies what this rank owns to the host and returns; `average` has the batch-norm statistics' average."""
        self.wait()
        snapshot = _snapshot(engine, average, state)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns once the last checkpoint is durable; raises what its writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error.pop()

    def _write(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            size = write_checkpoint(self.root, self.attempt, self.rank, self.world_size, snapshot)
            if size is not None:
                prune(self.root, self.keep_last, snapshot.step)
                seconds = round(time.monotonic() - began, 3)
                self.events.write("checkpoint", step=snapshot.step, seconds=seconds, bytes=size)
        except BaseException as error:  # handed to the training thread by wait()
            self._error.append(error)


def write_checkpoint(root: Path, attempt: int, rank: int, world_size: int, snapshot: Snapshot) -> int | None:
    """Writes this rank's part; on rank 0 it also waits for the others', names the checkpoint, and returns its bytes."""
    folder = root / f".{step_name(snapshot.step)}.attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    _write_part(folder, rank, snapshot.elements)
    return _commit(folder, attempt, world_size, snapshot) if rank == 0 else None


def _snapshot(engine: Any, average: Statistics | None, state: Mapping[str, Any]) -> Snapshot:
    elements = {
        (stretch.name, kind, stretch.start): _on_host(values)
        for stretch in stretches(engine, average is not None)
        for kind, values in stretch.values.items()
    }
    buffers = {f"weight:{name}": _on_host(values) for name, values in statistics(engine.module).items()}
    buffers |= {f"ema:{name}": _on_host(values) for name, values in (average or {}).items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
    return Snapshot(state["step"], elements, shapes, buffers, json.dumps(state))


def _write_part(folder: Path, rank: int, elements: Elements) -> None:
    file = f"rank-{rank:05d}.safetensors"
    named = {f"{name}:{kind}:{start}": values for (name, kind, start), values in elements.items()}
    checksums, offsets = _write_safetensors(folder / file, named)
    found = [
        {"parameter": name, "kind": kind, "file": file, "offset": offset, "start": start, "count": values.numel()}
        for ((name, kind, start), values), offset in zip(elements.items(), offsets, strict=True)
    ]
    _write_durably(folder / _part(rank), json.dumps({"files": {file: checksums}, "stretches": found}).encode())


def _commit(folder: Path, attempt: int, world_size: int, snapshot: Snapshot) -> int:
    """Completes a checkpoint's folder and gives it its name; returns its bytes."""
    files = {
        "buffers.safetensors": _write_safetensors(folder / "buffers.safetensors", snapshot.buffers)[0],
        "state.json": _write_durably(folder / "state.json", snapshot.state.encode()),
    }
    parts = [_await_json(folder / _part(rank)) for rank in range(world_size)]
    for part in parts:
        files |= part["files"]
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "attempt": attempt,
        "world_size": world_size,
        "block_bytes": BLOCK_BYTES,
        "parameters": snapshot.shapes,
        "files": files,
        "stretches": [stretch for part in parts for stretch in part["stretches"]],
    }
    _write_durably(folder / "manifest.json", json.dumps({"sha256": digest_of(manifest), **manifest}).encode())
    for rank in range(world_size):
        (folder / _part(rank)).unlink()
    _sync_folder(folder)
    _give_name(folder, folder.parent / step_name(snapshot.step))
    return sum(entry["bytes"] for entry in files.values())


def _give_name(folder: Path, final: Path) -> None:
    aside = final.with_name(f".{final.name}.replaced")
    if final.exists():  # damaged: an earlier one was gone back to, and this is that stretch again
        final.rename(aside)
    folder.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def prune(root: Path, keep_last: int, step: int) -> None:
    """Removes all but the newest checkpoints up to this step; later ones are damaged, or of a stretch gone back on."""
    for folder in [each for each in checkpoints(root) if step_of(each) <= step][:-keep_last]:
        hidden = root / f".{folder.name}.pruned"  # renamed first: under its name a checkpoint is complete
        folder.rename(hidden)
        shutil.rmtree(hidden)


def remove_leftovers(root: Path) -> None:
    """Removes what earlier attempts left half-written or half-removed; for the holder of the run's lock."""
    for hidden in root.glob(".step-*"):
        shutil.rmtree(hidden)


def _part(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _on_host(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True)


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], list[int]]:
    """Writes the tensors durably; returns the file's checksums and the byte offset of each tensor."""
    header, sizes = {}, []
    for name, values in tensors.items():
        begin = sum(sizes)
        sizes.append(values.numel() * values.element_size())
        header[name] = {
            "dtype": {torch.float32: "F32", torch.int64: "I64"}[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [begin, begin + sizes[-1]],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    chunks = [len(text).to_bytes(8, "little"), text]
    chunks += [memoryview(values.contiguous().numpy().reshape(-1)).cast("B") for values in tensors.values()]
    starts = np.cumsum([8 + len(text), *sizes])[:-1].tolist() if sizes else []
    return _write_chunks(path, chunks), starts


def _write_durably(path: Path, content: bytes) -> dict[str, Any]:
    """Writes under a temporary name, makes it durable, renames; returns the file's checksums."""
    hidden = path.with_name(f".{path.name}")
    checksums = _write_chunks(hidden, [content])
    hidden.rename(path)
    return checksums


def _write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digests, current, filled, total = [], hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for chunk in chunks:
            view = memoryview(chunk)
            file.write(view)
            total += len(view)
            while len(view):
                taken = view[: BLOCK_BYTES - filled]
                current.update(taken)
                view, filled = view[len(taken) :], filled + len(taken)
                if filled == BLOCK_BYTES:
                    digests.append(current.hexdigest())
                    current, filled = hashlib.sha256(), 0
        file.flush()
        os.fsync(file.fileno())
    if filled:
        digests.append(current.hexdigest())
    return {"bytes": total, "sha256": digests}


def _await_json(path: Path) -> Any:
    deadline = time.monotonic() + PART_TIMEOUT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: not written within {PART_TIMEOUT_SECONDS:.0f} s; look at that rank's log")
        time.sleep(0.02)
    return json.loads(path.read_bytes())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
