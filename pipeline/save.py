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

from pipeline.checkpoint import FORMAT, checkpoints, digest_of, step_name
from pipeline.ema import Statistics, statistics
from pipeline.record import Events
from pipeline.zero_state import stretches

BLOCK_BYTES = 1 << 20
PART_TIMEOUT_SECONDS = 1800.0


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
        shapes = {name: tuple(parameter.shape) for name, parameter in engine.module.named_parameters()}
        tensors = {
            (stretch.name, kind, stretch.start): _on_host(values)
            for stretch in stretches(engine, average is not None)
            for kind, values in stretch.values.items()
        }
        buffers = {f"weight:{name}": _on_host(values) for name, values in statistics(engine.module).items()}
        buffers |= {f"ema:{name}": _on_host(values) for name, values in (average or {}).items()}
        arguments = (state["step"], tensors, shapes, buffers, json.dumps(state))
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns once the last checkpoint is durable; raises what its writing raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error:
            raise self._error.pop()

    def _write(self, step: int, tensors: dict, shapes: dict, buffers: dict, state: str) -> None:
        began = time.monotonic()
        try:
            folder = self.root / f".{step_name(step)}.attempt-{self.attempt}"
            folder.mkdir(parents=True, exist_ok=True)
            self._write_part(folder, tensors)
            if self.rank == 0:
                size = self._commit(folder, step, shapes, buffers, state)
                prune(self.root, self.keep_last)
                seconds = round(time.monotonic() - began, 3)
                self.events.write("checkpoint", step=step, seconds=seconds, bytes=size)
        except BaseException as error:  # handed to the training thread by wait()
            self._error.append(error)

    def _write_part(self, folder: Path, tensors: dict[tuple[str, str, int], torch.Tensor]) -> None:
        file = f"rank-{self.rank:05d}.safetensors"
        named = {f"{name}:{kind}:{start}": values for (name, kind, start), values in tensors.items()}
        checksums, offsets = _write_safetensors(folder / file, named)
        stretches = [
            {"parameter": name, "kind": kind, "file": file, "offset": offset, "start": start, "count": values.numel()}
            for ((name, kind, start), values), offset in zip(tensors.items(), offsets, strict=True)
        ]
        part = {"files": {file: checksums}, "stretches": stretches}
        _write_durably(folder / f"part-{self.rank:05d}.json", json.dumps(part).encode())

    def _commit(self, folder: Path, step: int, shapes: dict, buffers: dict, state: str) -> int:
        files = {
            "buffers.safetensors": _write_safetensors(folder / "buffers.safetensors", buffers)[0],
            "state.json": _write_durably(folder / "state.json", state.encode()),
        }
        parts = [_await_json(folder / f"part-{rank:05d}.json") for rank in range(self.world_size)]
        for part in parts:
            files |= part["files"]
        manifest = {
            "format": FORMAT,
            "step": step,
            "attempt": self.attempt,
            "world_size": self.world_size,
            "block_bytes": BLOCK_BYTES,
            "parameters": shapes,
            "files": files,
            "stretches": [stretch for part in parts for stretch in part["stretches"]],
        }
        _write_durably(folder / "manifest.json", json.dumps({"sha256": digest_of(manifest), **manifest}).encode())
        for rank in range(self.world_size):
            (folder / f"part-{rank:05d}.json").unlink()
        _sync_folder(folder)
        final, aside = self.root / step_name(step), self.root / f".{step_name(step)}.replaced"
        if final.exists():  # damaged: an earlier one was gone back to, and this is that stretch again
            final.rename(aside)
        folder.rename(final)
        _sync_folder(self.root)
        shutil.rmtree(aside, ignore_errors=True)
        return sum(entry["bytes"] for entry in files.values())


def prune(root: Path, keep_last: int) -> None:
    """Removes all but the newest checkpoints."""
    for folder in checkpoints(root)[:-keep_last]:
        hidden = root / f".{folder.name}.pruned"  # renamed first: under its name a checkpoint is complete
        folder.rename(hidden)
        shutil.rmtree(hidden)


def remove_leftovers(root: Path) -> None:
    """Removes what earlier attempts left half-written or half-removed; for the holder of the run's lock, at its start."""
    for hidden in root.glob(".step-*"):
        shutil.rmtree(hidden)


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
