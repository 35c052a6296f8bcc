"""Finding, reading and verifying checkpoints (the format is in docs/reference/formats.md).

A checkpoint is a folder `step-00001000` with a safetensors file from each rank that wrote it, and manifest.json, which
has the place of each slice of each parameter, and checksums by block. Any number of ranks can read it, each only the
slices that it needs. This module does not import torch, so that `coatnet status` starts fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import xxhash

from pipeline.errors import RunFailed, UsageError

T = TypeVar("T")
FORMAT = 5
READING_THREADS = 8
"""More than CPUs: most wait for the disk."""
BLOCKS_AT_ONCE = 16
"""Blocks that a thread reads in sequence."""


class DamagedCheckpoint(RunFailed):
    """A checkpoint's bytes are not those that were written; the message has the file and the place."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """The folders of complete checkpoints, oldest first. OSError where a folder of that name can't be read."""
    found = root.iterdir() if root.exists() else ()
    return sorted((p for p in found if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def prunable(steps: Collection[int], newest: int, keep_last: int, keep_every: int | None) -> list[int]:
    """The steps whose checkpoints may be removed once that of `newest` is complete.

    Later ones are kept: they are damaged, or abandoned by a rollback.
    """
    older = sorted(step for step in steps if step <= newest)[:-keep_last]
    return [step for step in older if keep_every is None or step % keep_every]


def newest_good(
    place: object,
    folders: Sequence[Path],
    load: Callable[[Path], T],
    on_damage: Callable[[Path, DamagedCheckpoint], object],
    suggestion: str,
) -> T:
    """What `load` returns for the newest of these checkpoints, or, where it is damaged, for the one before, and so on.

    Each damaged one is passed to `on_damage`. RunFailed, with the suggestion, where none is good. Any other error of
    `load`, such as the UsageError of a newer format, is no damage and passes through.
    """
    for folder in reversed(folders):
        try:
            return load(folder)
        except DamagedCheckpoint as error:
            on_damage(folder, error)
    raise RunFailed(f"{place}: none of {', '.join(folder.name for folder in folders)} is good; {suggestion}")


class CheckpointReader:
    """Reads parts of one checkpoint; every byte that it returns has been verified.

    DamagedCheckpoint where a file is missing or not as it was written; UsageError where the format is another one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            digest = self.digest = manifest.pop("sha256")
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}/manifest.json: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpoint(f"{folder}/manifest.json is damaged, or not a checkpoint's") from None
        if digest != digest_of(manifest):
            raise DamagedCheckpoint(f"{folder}/manifest.json: wrong checksum")
        if manifest["format"] != FORMAT:  # not damage: every format has this key and this checksum
            age = "a newer" if manifest["format"] > FORMAT else "an older"
            raise UsageError(
                f"{folder} has format {manifest['format']}, written by {age} coatnet than this one, which reads format"
                f" {FORMAT}: resume with that version; nothing was changed"
            )
        self.step: int = manifest["step"]
        self.attempt: int = manifest["attempt"]
        self.shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        self._files, self._block_bytes = manifest["files"], manifest["block_bytes"]
        self._verified: set[tuple[str, int]] = set()
        self._slices: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for entry in manifest["slices"]:
            self._slices.setdefault((entry["parameter"], entry["kind"]), []).append(entry)

    def state(self) -> dict[str, Any]:
        """The contents of state.json: step, configuration, classes, ancestry, ..."""
        return json.loads(self._read_file("state.json"))

    def buffers(self) -> dict[str, np.ndarray]:
        """All buffers, by kind and name."""
        return safetensors.numpy.load(self._read_file("buffers.safetensors"))

    def has_kind(self, kind: str) -> bool:
        return any(kind == other for _, other in self._slices)

    def file_sizes(self) -> dict[str, int]:
        """The size of every file except the manifest, by name."""
        return {name: entry["bytes"] for name, entry in self._files.items()}

    def check_sizes(self) -> None:
        """DamagedCheckpoint where a file is missing or has another size; reads none of them."""
        for name in self._files:
            with self._open(name):
                pass

    def read(self, name: str, kind: str, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of a flattened parameter, float32."""
        result = np.empty(count, np.float32)
        self.read_into(result, name, kind, start)
        return result

    def read_into(self, result: np.ndarray, name: str, kind: str, start: int) -> None:
        """Fills a flat float32 array with a parameter's elements from `start` on."""
        content, filled = result.view(np.uint8), 0
        for file, offset, size in self._ranges(name, kind, start, len(result)):
            self._read_into(content[filled : filled + size], file, offset)
            filled += size

    def verify(self, slices: Iterable[tuple[str, str, int, int]]) -> None:
        """Verifies all blocks of slices (name, kind, start, count), with several threads, keeping no bytes."""
        ranges = [each for piece in slices for each in self._ranges(*piece)]
        self._verify(set().union(*(self._blocks(*each) for each in ranges)))

    def verify_weights(self) -> None:
        """Verifies weights, moving average, buffers and state.json, but not the optimizer's moments."""
        self._verify_files(file for file in self._files if not file.startswith("rank-"))
        kinds = [kind for kind in ("weight", "ema") if self.has_kind(kind)]
        self.verify((name, kind, 0, math.prod(shape)) for kind in kinds for name, shape in self.shapes.items())

    def verify_all(self) -> None:
        """Verifies every byte of the checkpoint."""
        self._verify_files(self._files)

    def tensors(self, kind: str) -> Iterator[tuple[str, np.ndarray]]:
        """Every whole parameter of one kind: `weight`, `ema`, `exp_avg` or `exp_avg_sq`."""
        return ((name, self.tensor(name, kind)) for name in self.shapes)

    def tensor(self, name: str, kind: str) -> np.ndarray:
        """One whole parameter of one kind."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, math.prod(shape)).reshape(shape)

    def _ranges(self, name: str, kind: str, start: int, count: int) -> Iterator[tuple[str, int, int]]:
        """Where elements [start, start + count) of a parameter lie, in order: file, offset and size in bytes."""
        found = 0
        for piece in sorted(self._slices.get((name, kind), ()), key=itemgetter("start")):
            begin, end = max(start, piece["start"]), min(start + count, piece["start"] + piece["count"])
            if begin < end:
                found += end - begin
                yield piece["file"], piece["offset"] + 4 * (begin - piece["start"]), 4 * (end - begin)
        if found != count:
            raise DamagedCheckpoint(f"{self.folder}: {name}, {kind}: only {found} of {count} elements from {start} on")

    def _blocks(self, file: str, offset: int, size: int) -> set[tuple[str, int]]:
        last = -(-(offset + size) // self._block_bytes)
        return {(file, block) for block in range(offset // self._block_bytes, last)}

    def _read_file(self, file: str) -> bytes:
        content = np.empty(self._files[file]["bytes"], np.uint8)
        self._read_into(content, file, 0)
        return content.tobytes()

    def _read_into(self, content: np.ndarray, file: str, offset: int) -> None:
        self._verify(self._blocks(file, offset, len(content)))
        with self._open(file) as opened:
            opened.seek(offset)
            opened.readinto(content)

    def _verify_files(self, files: Iterable[str]) -> None:
        self._verify(set().union(*(self._blocks(file, 0, self._files[file]["bytes"]) for file in files)))

    def _verify(self, blocks: set[tuple[str, int]]) -> None:
        missing = sorted(blocks - self._verified)
        runs = [missing[begin : begin + BLOCKS_AT_ONCE] for begin in range(0, len(missing), BLOCKS_AT_ONCE)]
        if len(runs) == 1:
            self._verify_run(runs[0])
        elif runs:
            with ThreadPoolExecutor(READING_THREADS) as pool:
                for _ in pool.map(self._verify_run, runs):
                    pass
        self._verified.update(missing)

    def _verify_run(self, blocks: list[tuple[str, int]]) -> None:
        content = memoryview(bytearray(self._block_bytes))
        for file, of_file in groupby(blocks, key=itemgetter(0)):
            with self._open(file) as opened:
                for _, block in of_file:
                    begin = opened.seek(block * self._block_bytes)
                    found = content[: opened.readinto(content)]
                    if checksum(found) != self._files[file]["xxh3"][block]:
                        raise DamagedCheckpoint(f"{self.folder / file}: wrong checksum of the block at byte {begin}")

    @contextmanager
    def _open(self, file: str) -> Iterator[BufferedReader]:
        path, written = self.folder / file, self._files[file]["bytes"]
        try:
            with path.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                if size != written:
                    raise DamagedCheckpoint(f"{path}: {size} bytes instead of {written}")
                yield opened
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from None


def checksum(block: np.ndarray | memoryview) -> str:
    """XXH3, 128 bits: finds accidental changes as surely as SHA-256, 15 times as fast; no protection from forgery."""
    return xxhash.xxh3_128_hexdigest(block)


def digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
