"""Checkpoints: whole or absent, no pickle, readable in parts (the format is in docs/checkpoints.md). Names and reading.

A checkpoint is a folder `step-00001000` of safetensors files, one by each rank that wrote it, and manifest.json, which
says where each stretch of each parameter lies, with checksums by block. A reader of any world size reads and verifies
just the stretches that it needs. Without torch, so that a look at a run costs nothing.
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
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import xxhash

from pipeline.errors import RunFailed, UsageError

T = TypeVar("T")
FORMAT = 4
READING_THREADS = 8
"""More than processors: most wait for the disk."""
BLOCKS_AT_ONCE = 16
"""Blocks that a thread reads one after the other, so that a disk sees long reads."""


class DamagedCheckpoint(RunFailed):
    """A checkpoint's bytes are not those that were written; the message names the file and the place."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """The folders of complete checkpoints, by rising step."""
    return sorted((p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def prunable(steps: Collection[int], newest: int, keep_last: int, keep_every: int | None) -> list[int]:
    """The steps whose checkpoints may go once that of `newest` is complete.

    Later ones are left alone: they are damaged, or of a stretch that was rolled back on.
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
    """Reads parts of one checkpoint; every byte that it hands out has been verified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            digest = manifest.pop("sha256")
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}/manifest.json: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedCheckpoint(f"{folder}/manifest.json is damaged, or no checkpoint's") from None
        if digest != digest_of(manifest):
            raise DamagedCheckpoint(f"{folder}/manifest.json: its checksum does not agree")
        if manifest["format"] != FORMAT:  # every format has this key and this checksum, so this is no damage
            age = "a newer" if manifest["format"] > FORMAT else "an older"
            raise UsageError(
                f"{folder} is of format {manifest['format']}, made by {age} coatnet than this one, which reads format"
                f" {FORMAT}: take that one, and the same command resumes; nothing was changed"
            )
        self.step: int = manifest["step"]
        self.attempt: int = manifest["attempt"]
        self.shapes = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        self._files, self._block_bytes = manifest["files"], manifest["block_bytes"]
        self._verified: set[tuple[str, int]] = set()
        self._stretches: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for stretch in manifest["stretches"]:
            self._stretches.setdefault((stretch["parameter"], stretch["kind"]), []).append(stretch)

    def state(self) -> dict[str, Any]:
        """What state.json holds: step, configuration, classes, ancestry, ..."""
        return json.loads(self._whole("state.json"))

    def buffers(self) -> dict[str, np.ndarray]:
        """All buffers by name."""
        return safetensors.numpy.load(self._whole("buffers.safetensors"))

    def has(self, kind: str) -> bool:
        return any(found == kind for _, found in self._stretches)

    def sizes(self) -> dict[str, int]:
        """The bytes of every file but the manifest, by name."""
        return {name: entry["bytes"] for name, entry in self._files.items()}

    def stretch(self, name: str, kind: str, start: int, count: int) -> np.ndarray:
        """Elements [start, start + count) of a flattened parameter as float32, whoever wrote them."""
        result = np.empty(count, np.float32)
        self.read_into(result, name, kind, start)
        return result

    def read_into(self, result: np.ndarray, name: str, kind: str, start: int) -> None:
        """Fills a flat float32 array with a parameter's elements from `start` on."""
        content = result.view(np.uint8)
        for piece, begin, end in self._pieces(name, kind, start, len(result)):
            offset = piece["offset"] + 4 * (begin - piece["start"])
            self._read_into(content[4 * (begin - start) : 4 * (end - start)], piece["file"], offset)

    def verify(self, stretches: Iterable[tuple[str, str, int, int]]) -> None:
        """Checks all blocks that stretches (name, kind, start, count) lie in, by several threads, keeping nothing."""
        blocks: set[tuple[str, int]] = set()
        for name, kind, start, count in stretches:
            for piece, begin, end in self._pieces(name, kind, start, count):
                blocks |= self._blocks(piece["file"], piece["offset"] + 4 * (begin - piece["start"]), 4 * (end - begin))
        self._verify(blocks)

    def verify_network(self) -> None:
        """Checks what a network is made of: weights, their average, and what stands beside the ranks' files."""
        beside = {file: size for file, size in self.sizes().items() if not file.startswith("rank-")}
        self._verify({block for file, size in beside.items() for block in self._blocks(file, 0, size)})
        kinds = [kind for kind in ("weight", "ema") if self.has(kind)]
        self.verify((name, kind, 0, math.prod(shape)) for kind in kinds for name, shape in self.shapes.items())

    def verify_all(self) -> None:
        """Checks every byte of the checkpoint."""
        self._verify({block for file, size in self.sizes().items() for block in self._blocks(file, 0, size)})

    def tensors(self, kind: str) -> Iterator[tuple[str, np.ndarray]]:
        """Every parameter whole, of one kind: `weight`, `ema`, `exp_avg` or `exp_avg_sq`."""
        return ((name, self.tensor(name, kind)) for name in self.shapes)

    def tensor(self, name: str, kind: str) -> np.ndarray:
        """One parameter whole, of one kind."""
        shape = self.shapes[name]
        return self.stretch(name, kind, 0, int(np.prod(shape, dtype=np.int64))).reshape(shape)

    def _pieces(self, name: str, kind: str, start: int, count: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        """The stretches that hold a part of what is asked for, each with the elements [begin, end) that it is for."""
        found = 0
        for piece in self._stretches.get((name, kind), ()):
            begin, end = max(start, piece["start"]), min(start + count, piece["start"] + piece["count"])
            if begin < end:
                found += end - begin
                yield piece, begin, end
        if found != count:
            raise DamagedCheckpoint(f"{self.folder}: {name}, {kind}: {found} of {count} elements from {start} on")

    def _blocks(self, file: str, offset: int, size: int) -> set[tuple[str, int]]:
        last = -(-(offset + size) // self._block_bytes)
        return {(file, block) for block in range(offset // self._block_bytes, last)}

    def _whole(self, file: str) -> bytes:
        content = np.empty(self._files[file]["bytes"], np.uint8)
        self._read_into(content, file, 0)
        return content.tobytes()

    def _read_into(self, content: np.ndarray, file: str, offset: int) -> None:
        self._verify(self._blocks(file, offset, len(content)))
        with self._opened(file) as opened:
            opened.seek(offset)
            opened.readinto(content)

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
        for file, of_file in groupby(blocks, key=lambda each: each[0]):
            with self._opened(file) as opened:
                for _, block in of_file:
                    begin = opened.seek(block * self._block_bytes)
                    found = content[: opened.readinto(content)]
                    if checksum(found) != self._files[file]["xxh3"][block]:
                        where = f"{self.folder / file}: bytes {begin} ff."
                        raise DamagedCheckpoint(f"{where} are not those that were written")

    @contextmanager
    def _opened(self, file: str) -> Iterator[BufferedReader]:
        path, written = self.folder / file, self._files[file]["bytes"]
        try:
            with path.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                if size != written:
                    raise DamagedCheckpoint(f"{path}: {size} bytes, {written} were written")
                yield opened
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: {error.strerror}") from None


def checksum(block: np.ndarray | memoryview) -> str:
    """XXH3, 128 bits: against faults, not forgers, it sees every change that SHA-256 would, at 15 times the speed."""
    return xxhash.xxh3_128_hexdigest(block)


def digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Returns once the names in a folder would outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
