"""What the loader takes from the thread that launches: a loop of small operations alone, and beside the loader.

    coatnet bench launch --images PATH
    coatnet bench launch --beside ../before   # and of another checkout, in turn

On the CPU: the loop stands for a training thread, which launches a thousand kernels a micro batch and needs the
interpreter for each. It takes a micro batch whenever one is due at the rate, as training does, and the rest of its time
it launches. What it loses to the loader is the interpreter's lock; what it waits for a processor, of which DALI's
threads need some, does not count. A stop is a time in which it launched nothing. Beside these stands the time that the
loader's own threads, not DALI's, use for an image. `--images` is what `coatnet data pack` takes; the default is
CIFAR-10.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.machine import machine
from data.packing.pack import pack

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT.parent / "shared" / "data" / "cifar10-train.tar"
RATES = (0, 1_000, 3_000, 6_000)
"""Images a second; 0 is the loop alone."""
MICRO_BATCH, GLOBAL_BATCH, WINDOW, SIDE, LAYERS, MAGNITUDE = 32, 256, 32, 32, 2, 5.0
OPERATIONS, LONG = 10, 0.005
WARM_UP, SECONDS = 3.0, 6.0
SCHEDULE = open(f"/proc/self/task/{os.getpid()}/schedstat", "rb", buffering=0)  # noqa: SIM115


def batches(url: str) -> Iterator[object]:
    """The loader's micro batches, without end."""
    from data.augment import Augmentation
    from data.loader import LoaderSpec, training_batches
    from data.order import Order
    from data.shards.manifest import read_manifest

    manifest = read_manifest(url)
    order = Order(0, manifest.shards.samples, GLOBAL_BATCH, WINDOW)
    drawn = Augmentation(crop="random_resized", flip=True, layers=LAYERS, magnitude=MAGNITUDE)
    spec = LoaderSpec(0, 1, MICRO_BATCH, SIDE, torch.device("cpu"), len(os.sched_getaffinity(0)))
    with training_batches(manifest, order, drawn, spec, 0, 0, 10**9) as steps:
        yield from (batch for step in steps for batch in step)


def launch(rate: int, taken: Iterator[object], seconds: float) -> dict[str, float]:
    """Operations a second, long stops a second, the longest one in ms, and of the loader's threads us an image."""
    values, result = torch.ones(16), torch.ones(16)
    stops: list[float] = []
    operations, images, launching, used = 0, 0, 0.0, of_threads()
    start = now = time.perf_counter()
    while now < start + seconds:
        due = start + (images + MICRO_BATCH) / rate if rate else start + seconds
        last = time.perf_counter()
        queued = in_queue()
        while now < due:
            for _ in range(OPERATIONS):
                torch.add(values, result, out=result)
            operations += OPERATIONS
            now, before = time.perf_counter(), queued
            queued = in_queue()
            waited = queued - before
            launching += now - last - waited
            if now - last - waited > LONG:
                stops.append(now - last - waited)
            last = now
        if rate:
            next(taken)
            images += MICRO_BATCH
            now = time.perf_counter()
    spent = now - start
    return {
        "operations": operations / launching,
        "images": images / spent,
        "stops": len(stops) / launching,
        "longest": 1000 * max(stops, default=0.0),
        "microseconds": 1e6 * (of_threads() - used) / images if images else 0.0,
    }


def in_queue() -> float:
    """Seconds for which this thread, the main one, has waited for a processor."""
    return int(os.pread(SCHEDULE.fileno(), 64, 0).split()[1]) / 1e9


def of_threads() -> float:
    """CPU seconds of all threads of Python but the one that launches."""
    tasks = [thread.native_id for thread in threading.enumerate() if thread is not threading.main_thread()]
    stats = [Path(f"/proc/self/task/{task}/schedstat").read_text() for task in tasks]
    return sum(int(stat.split()[0]) for stat in stats) / 1e9


def measure(url: str) -> list[dict[str, float]]:
    """The figures at each rate."""
    warnings.simplefilter("ignore")  # of DALI
    torch.set_num_threads(1)
    taken = batches(url)
    launch(RATES[-1], taken, WARM_UP)
    gc.collect()
    gc.freeze()  # as training does
    return [launch(rate, taken, SECONDS) for rate in RATES]


def table_of(rounds: list[list[dict[str, float]]]) -> str:
    """Medians of the rounds, of the longest stop the longest, a line a rate."""
    lines = [" images/s  operations/s  of alone  stops > 5 ms /s  longest ms  us an image"]
    alone = statistics.median(each[0]["operations"] for each in rounds)
    for at in range(len(RATES)):
        found = {name: statistics.median(each[at][name] for each in rounds) for name in rounds[0][at]}
        found["longest"] = max(each[at]["longest"] for each in rounds)
        share = f"{100 * found['operations'] / alone:.0f} %"
        lines.append(
            f"{found['images']:9,.0f} {found['operations']:13,.0f} {share:>9} {found['stops']:16.2f}"
            f" {found['longest']:11.1f} {found['microseconds']:12.1f}"
        )
    return "\n".join(lines)


CHILD = """
import json, os, runpy, sys
print(json.dumps(runpy.run_path(sys.argv[1])["measure"](sys.argv[2])), flush=True)
os._exit(0)
"""
"""In a process of its own, and of its own checkout's code, which lies in its working folder."""


def measured(checkout: Path, url: str) -> list[dict[str, float]]:
    """The figures of a checkout at each rate."""
    command = [sys.executable, "-c", CHILD, str(Path(__file__).resolve()), url]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, and prints a table for each checkout."""
    parser = argparse.ArgumentParser("coatnet bench launch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", metavar="PATH", default=str(IMAGES), help=f"default: {IMAGES}")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    asked = parser.parse_args()
    if not Path(asked.images).exists():
        parser.error(f"{asked.images} does not exist; --images PATH says where the images are")
    checkouts = {"before": asked.beside, "now": ROOT} if asked.beside else {"now": ROOT}
    with tempfile.TemporaryDirectory() as folder:
        request = {"samples_per_shard": None, "bytes_per_shard": 2**24, "seed": 0, "workers": 2, "overwrite": False}
        pack(asked.images, f"{folder}/set", **request, progress=lambda *_: None)
        turns = [[measured(each, f"{folder}/set") for each in checkouts.values()] for _ in range(asked.rounds)]
    print(f"{machine()}\n{asked.rounds} rounds of {SECONDS:g} s, medians; the longest stop of all")
    for name, rounds in zip(checkouts, zip(*turns, strict=True), strict=True):
        print(f"\n{name}\n{table_of([*rounds])}")


if __name__ == "__main__":
    main()
