"""The cost of the manifest and the order, and what it makes ranks read, at 3e9 samples in 300,000 shards.

    coatnet bench order
    coatnet bench order --beside ../before   # opens the manifest with another checkout too, in turn

Times are the median of 21 runs in one process; an epoch is opened afresh each time. The simulation asks the order for
every window of some of 4,096 ranks, over an epoch and the steps after it; a window counts as read, whole, in the
step that needs its first sample, and as held until its last one is used.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.machine import machine
from data.memory import READ_AHEAD_BYTES
from data.order import Epoch, Order, positions_of_step, rank_micro_batches
from data.shards.manifest import write_manifest
from data.shards.sample_table import table_checksum
from data.shards.shard_list import Shard
from tests.forked import ROOT

SHARDS, SAMPLES_PER_SHARD, WINDOW, RUNS = 300_000, 10_000, 32, 21
RANKS, MICRO_BATCH, SAMPLE_BYTES = 4_096, 16, 110_000
SIMULATED = range(0, RANKS, 65)
"""Ranks that are simulated: 64, evenly over the batch, even and odd, whose slots' windows are staggered differently."""
STEPS_AFTER = 1_000
"""Steps of the second epoch that are simulated."""


OPENING = """
import re, sys, time
from data.shards.manifest import read_manifest
def taken(): return time.process_time(), int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
places = [taken()]
manifest = read_manifest(sys.argv[1])
places.append(taken())
manifest.fingerprint, manifest.header_fingerprint
places.append(taken())
print(*(after - before for old, new in zip(places, places[1:]) for before, after in zip(old, new)))
"""
OPENED = 9
"""How often a manifest is opened, each time by a new process."""


def print_openings(checkouts: list[Path]) -> None:
    """Prints CPU seconds, and megabytes by which the peak of the memory grows, of opening a manifest of SHARDS."""
    sums = [table_checksum(str(number).encode()) for number in range(2 * SHARDS)]
    columns = zip(sums[:SHARDS], sums[SHARDS:], strict=True)
    shards = [Shard(f"shard-{i:06d}.tar", SAMPLES_PER_SHARD, 10**9 + i, "", *each) for i, each in enumerate(columns)]
    found: dict[Path, list[list[float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(folder, [f"class {number}" for number in range(1000)], shards)
        for _ in range(OPENED):
            for checkout in checkouts:
                command = [sys.executable, "-c", OPENING, folder]
                opened = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
                found[checkout].append([*map(float, opened.stdout.split())])
    for checkout, rows in found.items():
        seconds, megabytes, more_seconds, more_megabytes = map(statistics.median, zip(*rows, strict=True))
        name = "now" if checkout == ROOT else "before"
        print(f"  {name:8} open the manifest      {seconds:6.2f} CPU s {megabytes:8.1f} MB")
        print(f"  {name:8} and both fingerprints  {more_seconds:6.2f} CPU s {more_megabytes:8.1f} MB")


def median_milliseconds(work: Callable[[], object]) -> float:
    """Median time of the work, in milliseconds, after one run that is not counted."""
    work()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def measure(order: Order) -> dict[str, float]:
    """Milliseconds of each query of a reader."""
    epoch, batch = order.epoch(1), order.global_batch
    step = positions_of_step(order.samples // batch // 2, batch)
    position = order.samples + int(step[0])
    return {
        "open an epoch": median_milliseconds(lambda: Epoch(order, 1)),
        "find one position's sample": median_milliseconds(lambda: order.samples_at(position)),
        "find one position's window": median_milliseconds(lambda: epoch.window_at(int(step[0]))),
        "find 64 positions' samples": median_milliseconds(lambda: epoch.samples_at(step[:64])),
        f"find all {batch:,} samples of a step": median_milliseconds(lambda: epoch.samples_at(step)),
    }


def megabytes_of_an_epoch() -> tuple[float, float]:
    """Megabytes that an order with one opened epoch keeps, and the most it has taken on the way there."""
    tracemalloc.start()
    order = Order(0, np.full(SHARDS, SAMPLES_PER_SHARD), RANKS * MICRO_BATCH, WINDOW)
    order.samples_at(order.samples)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / 1e6, most / 1e6


@dataclass(frozen=True)
class Reads:
    """What ranks read and hold: int64 [ranks, steps] each, but `ranges`, the ranged reads of each rank: [ranks]."""

    windows: np.ndarray
    samples: np.ndarray
    held: np.ndarray
    ranges: np.ndarray


def simulate(order: Order, ranks: range, steps: int) -> Reads:
    """The windows that these of RANKS ranks open in the first steps of training."""
    batch, shape = order.global_batch, (len(ranks), steps)
    reads = Reads(np.zeros(shape, int), np.zeros(shape, int), np.zeros(shape, int), np.zeros(len(ranks), int))
    for i, rank in enumerate(ranks):
        for number in rank_micro_batches(batch // MICRO_BATCH, rank, RANKS):
            for position in range(number * MICRO_BATCH, (number + 1) * MICRO_BATCH):
                while (step := position // batch) < steps:
                    epoch, g = order.place(position)
                    window = order.epoch(epoch).window_at(g)
                    reads.windows[i, step] += 1
                    reads.samples[i, step] += window.samples
                    reads.held[i, step : step + window.samples] += window.samples
                    reads.ranges[i] += len(window.ranges)
                    position += window.samples * batch
    return reads


def print_reads(order: Order) -> None:
    """Prints how much the simulated ranks read and hold, when, and how evenly."""
    border = order.samples // order.global_batch  # the step with both epochs' samples
    reads = simulate(order, SIMULATED, border + STEPS_AFTER)
    megabytes = reads.samples * SAMPLE_BYTES / 1e6
    inside = slice(WINDOW, border - WINDOW)
    in_a_window = sliding_window_view(megabytes[:, inside], WINDOW, axis=1).sum(axis=-1)
    print(f"  over {border + STEPS_AFTER:,} steps, an epoch and {STEPS_AFTER:,} more    mean of ranks   most of a rank")
    for what, figures in (
        ("GB read", megabytes.sum(axis=1) / 1e3),
        ("windows opened", reads.windows.sum(axis=1)),
        ("ranged reads", reads.ranges),
        ("MB read in a step", megabytes),
        (f"MB read in a step, {WINDOW} steps off a border", megabytes[:, inside]),
        (f"MB read in {WINDOW} steps, {WINDOW} off a border", in_a_window),
        ("windows opened in a step", reads.windows),
        (f"windows opened in a step, {WINDOW} off a border", reads.windows[:, inside]),
        ("samples held", reads.held),
        ("MB held", reads.held * SAMPLE_BYTES / 1e6),
    ):
        print(f"  {what:43} {figures.mean():14,.2f} {figures.max():16,.2f}  x {figures.max() / figures.mean():.5f}")
    print("     step   MB read: mean, most   windows opened: mean, most   samples held: mean, most   GB of all ranks")
    for step in (0, 1, 2, border // 2, *range(border - 2, border + 4)):
        read, windows, held = (part[:, step] for part in (megabytes, reads.windows, reads.held))
        print(
            f"  {step:7,} {read.mean():13.2f} {read.max():7.2f} {windows.mean():22.2f} {windows.max():5}"
            f" {held.mean():20.1f} {held.max():5} {RANKS * read.mean() / 1e3:17.1f}"
        )
    ahead = READ_AHEAD_BYTES / (MICRO_BATCH * SAMPLE_BYTES)
    print(f"  read ahead by a rank: up to {READ_AHEAD_BYTES / 1e6:.0f} MB, {ahead:.0f} steps")


def main() -> None:
    """Prints the machine, the times, the memory and the simulation."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("coatnet bench order", description=__doc__, formatter_class=formatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    beside = parser.parse_args().beside
    print(machine())
    print(f"{SHARDS * SAMPLES_PER_SHARD:,} samples, {SHARDS:,} shards, windows of {WINDOW}; median of {RUNS}")
    print_openings([each for each in (beside, ROOT) if each is not None])
    for global_batch in (4_096, RANKS * MICRO_BATCH):
        order = Order(0, np.full(SHARDS, SAMPLES_PER_SHARD), global_batch, WINDOW)
        print(f"\nglobal batch {global_batch:,}")
        for what, milliseconds in measure(order).items():
            print(f"  {what:36} {milliseconds:9.3f} ms")
    kept, most = megabytes_of_an_epoch()
    print(f"  memory of the order and an open epoch {kept:8.1f} MB, {most:.1f} MB while it is opened")
    print(f"\n{len(SIMULATED)} of {RANKS:,} ranks, {MICRO_BATCH} samples a step each, of {SAMPLE_BYTES / 1e3:.0f} kB")
    print_reads(order)


if __name__ == "__main__":
    main()
