"""Three epochs under random schedules: stopped or killed anywhere, resumed with any number of ranks, nothing changes.

No model; what is read, decoded and augmented is real, and some of it is damaged. What counts are the steps before a
checkpoint, as in a run: what was done after it is lost, and done again by whoever resumes.
"""

import io
import json
import os
import signal
import time
import zlib
from collections import Counter
from collections.abc import Generator
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import loader
from data.augment import Augmentation
from data.loader import LoaderSpec, training_batches
from data.order import Order, steps
from data.packing.pack import pack
from data.shards.manifest import read_manifest
from data.shards.tar_index import index_tar
from tests.forked import forkserver

SAMPLES, EPOCHS, GLOBAL_BATCH, WINDOW, SIDE, SEED = 397, 3, 24, 5, 16, 7
RANKS = [1, 2, 3, 4, 6, 8]
STEPS = steps(EPOCHS, SAMPLES, GLOBAL_BATCH)
AUGMENTATION = Augmentation(crop="random_resized", flip=True, layers=2, magnitude=10.0)
Consumed = list[tuple[int, str, int]]
"""Of a step: position, key and checksum of the pixels, by position."""
Rank = Generator[tuple[int, Consumed], None, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packed set: seven shards; of a dozen neighbours, which are more than a window, all are damaged."""
    source, packed = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    for number in range(SAMPLES):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE + number % 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        place = source / f"class {number % 3}" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.getvalue())
    request = {"samples_per_shard": 60, "bytes_per_shard": None, "seed": 0, "workers": 2, "overwrite": False}
    pack(str(source), str(packed), **request, progress=lambda done, total: None)
    tar = packed / "shard-000002.tar"
    contents = bytearray(tar.read_bytes())
    for sample in index_tar(bytes(contents))[20:32]:
        contents[sample.parts["png"][0] + 60] ^= 1
    tar.write_bytes(contents)
    return str(packed)


def consumed_by(folder: str, rank: int, world_size: int, first_step: int) -> Rank:
    """What a rank that begins at this step consumes, step by step, with the step's number."""
    manifest = read_manifest(folder)
    order = Order(SEED, np.array([shard.samples for shard in manifest.shards]), GLOBAL_BATCH, WINDOW)
    spec = LoaderSpec(rank, world_size, 1, SIDE, torch.device("cpu"), 1)
    with training_batches(manifest, order, AUGMENTATION, spec, SEED, first_step, STEPS) as batches:
        for step, micro_batches in enumerate(batches, first_step):
            found = [(int(b.positions[0]), b.keys[0], zlib.crc32(b.images.numpy())) for b in micro_batches]
            yield step, found


@pytest.fixture(scope="module")
def undisturbed(folder: str) -> list[Consumed]:
    return [found for _, found in consumed_by(folder, 0, 1, 0)]


@pytest.fixture(autouse=True)
def small_runs_of_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run that is stopped after a few steps has not decoded all that follow."""
    monkeypatch.setattr(loader, "DECODED_AT_ONCE", 16)


def assert_nothing_changed(disturbed: list[Consumed], undisturbed: list[Consumed]) -> None:
    for step, (found, expected) in enumerate(zip(disturbed, undisturbed, strict=True)):
        assert sorted(found) == expected, f"step {step}"
    keys = Counter(key for found in disturbed for position, key, _ in found if position < EPOCHS * SAMPLES)
    assert len(keys) == SAMPLES and set(keys.values()) == {EPOCHS}


def shortly_and_at_length(short: int, long: int) -> list[object]:
    """The numbers below `long`, of which those from `short` on are torture."""
    return [number if number < short else pytest.param(number, marks=pytest.mark.torture) for number in range(long)]


@pytest.mark.parametrize("seed", shortly_and_at_length(11, 190))
def test_stopped_anywhere_and_resumed_on_other_ranks_nothing_changes(folder, undisturbed, seed):
    """Each rank is some steps past the checkpoint when it is stopped, with more under way."""
    rng, disturbed = np.random.default_rng(seed), []
    while (first := len(disturbed)) < STEPS:
        world_size, checkpoint = int(rng.choice(RANKS)), min(STEPS, first + int(rng.integers(1, 36)))
        of_steps: list[Consumed] = [[] for _ in range(checkpoint - first)]
        for rank in range(world_size):
            consuming = consumed_by(folder, rank, world_size, first)
            for step, found in islice(consuming, len(of_steps) + int(rng.integers(0, 4))):
                if step < checkpoint:
                    of_steps[step - first] += found
            consuming.close()
        disturbed += of_steps
    assert_nothing_changed(disturbed, undisturbed)


# -------------------------------------------------------------------------------------------- real ranks, really killed


def rank_that_writes(folder: str, rank: int, world_size: int, first_step: int, file: Path, most: int) -> None:
    """The work of a rank's process: a line for every step that is done. After `most` of them it waits for its end."""
    with pytest.MonkeyPatch.context() as patched, file.open("w") as lines:
        patched.setattr(loader, "DECODED_AT_ONCE", 16)
        for step, found in consumed_by(folder, rank, world_size, first_step):
            lines.write(json.dumps([step, found]) + "\n")
            lines.flush()
            if step - first_step + 1 == most:
                time.sleep(3600)


def written(file: Path) -> list[Consumed]:
    """The steps that a rank has written whole, in order."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [[tuple(part) for part in json.loads(line)[1]] for line in lines if line.endswith("\n")]


def killed_after(processes: list[BaseProcess], files: list[Path], done: int) -> list[list[Consumed]]:
    """What each rank had written when all were killed, after the slowest did so many steps; or all ended."""
    while min(len(written(file)) for file in files) < done and any(process.is_alive() for process in processes):
        time.sleep(0.002)
    for process in processes:
        if process.pid and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    return [written(file) for file in files]


@pytest.mark.parametrize("seed", shortly_and_at_length(1, 10))
def test_killed_in_a_batch_and_resumed_from_the_checkpoint_nothing_changes(folder, undisturbed, tmp_path, seed):
    """The ranks are processes, all killed at once; there is a checkpoint after every third step that all have done."""
    rng, disturbed, attempt = np.random.default_rng(seed), [], 0
    while (first := len(disturbed)) < STEPS:
        attempt += 1
        world_size, survives = int(rng.choice(RANKS)), int(rng.integers(1, STEPS // 2))
        files = [tmp_path / f"{attempt}-{rank}" for rank in range(world_size)]
        work = [
            partial(rank_that_writes, folder, r, world_size, first, file, survives + 3) for r, file in enumerate(files)
        ]
        processes: list[BaseProcess] = [forkserver.Process(target=each) for each in work]
        for process in processes:
            process.start()
        of_ranks = killed_after(processes, files, survives)
        common = min(len(of_rank) for of_rank in of_ranks)
        checkpoint = STEPS if first + common == STEPS else (first + common) // 3 * 3
        for step in range(max(0, checkpoint - first)):
            disturbed.append([part for of_rank in of_ranks for part in of_rank[step]])
    assert attempt > 1
    assert_nothing_changed(disturbed, undisturbed)
