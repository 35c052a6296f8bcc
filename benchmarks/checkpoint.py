"""Saving and loading a checkpoint of about a gigabyte on one rank, beside a plain write and read of the same bytes.

    coatnet bench checkpoint
    coatnet bench checkpoint --folder /lustre/me    # the disk that counts

CoAtNet-2 under ZeRO, weights, moments and average, as in training. Saving counts until the checkpoint has its name; the
stall is what training waits of it. Loading verifies every byte first. Reads are from a cold page cache, where the
kernel lets go of it. The pieces of work take turns, round by round, and every figure is the median.
"""

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from data.shards.manifest import Manifest
from data.shards.shard_list import Shards
from pipeline.checkpoint.reader import checkpoints, step_name
from pipeline.checkpoint.restore import restore, warn_of_damage
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config.schema import Checkpoint, Model, Optim, Train, Zero
from pipeline.run.events import Events
from pipeline.training import ema
from pipeline.training.engine import build_engine, start_process_group
from pipeline.training.model import build_model, init_weights

ROUNDS, PIECE_BYTES = 5, 1 << 20
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
LIMITS = {"save": ("plain_write", 1.3), "stall": ("plain_write", 0.2), "load": ("plain_read", 1.5)}


def engine_and_average() -> tuple[Any, ema.Statistics]:
    """An engine that nothing was trained with, and the batch-norm statistics' average."""
    os.environ.update(ONE_RANK)
    device = start_process_group()
    train = Train(steps=1, global_batch=1, micro_batch=1)
    model = build_model(Model(name="coatnet_2"), train, 1000, device, init_weights(0), None)
    return build_engine(model, train, Optim(), Zero()), ema.clone(ema.statistics(model))


def measure(folder: Path) -> tuple[dict[str, float], int, bool]:
    """The median seconds of each piece of work, the bytes, and whether all reads were from a cold page cache."""
    engine, average = engine_and_average()
    run, plain, train_set = folder / "run", folder / "plain", Manifest("", (), Shards.of([]))
    events = Events(run, 0, 0)
    writer = CheckpointWriter(run / "checkpoints", 0, 0, 1, Checkpoint(), events)
    content, rounds, cold = None, [], True
    for step in range(1, ROUNDS + 2):
        # Each piece of work begins with nothing of the files in memory, and so finds pages that the one before let go.
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        state = {"step": step, "applied_steps": step, "train_fingerprint": train_set.fingerprint}
        stall = timed(partial(writer.save, engine, average, state))
        save = stall + timed(writer.wait)
        files = list((run / "checkpoints" / step_name(step)).iterdir())
        if content is None:
            content = np.fromfile(max(files, key=lambda file: file.stat().st_size), np.uint8)
        cold &= dropped(files)
        plain.unlink(missing_ok=True)
        plain_write = timed(partial(write, plain, content))
        cold &= dropped([plain])
        load = timed(lambda: restore(engine, checkpoints(run / "checkpoints"), average, train_set, warn_of_damage))
        cold &= dropped(files)
        plain_read = timed(partial(read, plain, content))
        cold &= dropped([plain])
        rounds.append((stall, save, plain_write, load, plain_read))
    names = ("stall", "save", "plain_write", "load", "plain_read")
    medians = [statistics.median(column) for column in zip(*rounds[1:], strict=True)]
    return dict(zip(names, medians, strict=True)), content.nbytes if content is not None else 0, cold


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write(path: Path, content: np.ndarray) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(content), PIECE_BYTES):
            file.write(content[begin : begin + PIECE_BYTES])
        os.fsync(file.fileno())


def read(path: Path, content: np.ndarray) -> None:
    with path.open("rb", buffering=0) as file:
        for begin in range(0, len(content), PIECE_BYTES):
            file.readinto(content[begin : begin + PIECE_BYTES])


def dropped(files: Iterable[Path]) -> bool:
    """Asks the kernel to forget what it keeps of files that are on the disk; whether it did, but for a hundredth."""
    shares = []
    for path in files:
        with path.open("rb+") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0) as content:
                resident = (ctypes.c_ubyte * -(-len(content) // mmap.PAGESIZE))()
                address = ctypes.addressof(ctypes.c_ubyte.from_buffer(content))
                ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(content)), resident)
                shares.append(sum(page & 1 for page in bytes(resident)) / len(resident))
    return max(shares) < 0.01


def main() -> None:
    """Prints the machine and a line for each piece of work."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--folder", help="where files are written; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds, size, cold = measure(Path(folder))
    ratios = {name: seconds[name] / seconds[plain] for name, (plain, _) in LIMITS.items()}
    if options.json:
        facts = {"machine": machine(), "load": os.getloadavg()[0], "bytes": size, "cold": cold}
        return print(json.dumps({**facts, "seconds": seconds, "ratios": ratios}))
    print(machine())
    print(f"CoAtNet-2's state on one rank, {size / 1e9:.2f} GB; median of {ROUNDS}, load {os.getloadavg()[0]:.1f}\n")
    for name, time_taken in seconds.items():
        against = LIMITS.get(name)
        beside = f"   {ratios[name]:.2f} x {against[0]}, wanted: at most {against[1]}" if against else ""
        print(f"  {name:12} {time_taken:6.2f} s{beside}")
    if not cold:
        print("\n  the page cache could not be dropped: both reads were, in part, from memory")


if __name__ == "__main__":
    main()
