"""Time to the first batch of a run that resumes, from the start of an epoch, its middle, its end, and 3e9 samples on.

    coatnet bench resume

Opens the loader of one rank and takes its first step: threads, DALI and all. The places take turns, round by round, and
every figure is the median. What differs is how many samples the windows have that are begun by then: a rank that goes
on reads all rows of a window, an epoch's first windows are shorter, and near its end the next epoch's are read as well.
The position as such costs nothing.
"""

import argparse
import gc
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import machine
from data.augment import Augmentation
from data.loader import LoaderSpec, training_batches
from data.memory import DECODED_AT_ONCE
from data.order import Order
from data.packing.pack import pack
from data.rng import Stream, uint32s
from data.shards.manifest import Manifest, read_manifest

SAMPLES, SHARDS, SIDE, GLOBAL_BATCH, WINDOW, ROUNDS = 20_000, 40, 16, 64, 32, 21
RUNS_LOOKED_AHEAD = 4
FULL_STEPS = SAMPLES // GLOBAL_BATCH
STEPS = {
    "start of the epoch": 0,
    "middle of the epoch": FULL_STEPS // 2,
    "in its last shard's worth": (SAMPLES - SAMPLES // SHARDS) // GLOBAL_BATCH,
    "last step of the epoch": FULL_STEPS - 1,
    "3,000,000,000 samples on": 3_000_000_000 // GLOBAL_BATCH,
}


def packed(folder: Path) -> Manifest:
    """Packs images of noise, as plain as PPM, from a tar."""
    noise = uint32s(0, Stream.PACK, np.arange(SAMPLES), 3 * SIDE * SIDE // 4).astype("<u4")
    with tarfile.open(folder / "images.tar", "w") as archive:
        for number, pixels in enumerate(noise):
            contents = b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes()
            member = tarfile.TarInfo(f"class/{number:05d}.ppm")
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    request = {"samples_per_shard": SAMPLES // SHARDS, "bytes_per_shard": None, "seed": 0, "workers": 2}
    pack(str(folder / "images.tar"), str(folder / "packed"), **request, overwrite=False, progress=lambda *_: None)
    return read_manifest(str(folder / "packed"))


def seconds_to_first_batch(manifest: Manifest, order: Order, step: int) -> float:
    """Seconds from opening the loader at a step to having its micro batches."""
    augmentation = Augmentation(crop="random_resized", flip=True, layers=2, magnitude=5.0)
    spec = LoaderSpec(0, 1, GLOBAL_BATCH, SIDE, torch.device("cpu"), 2)
    gc.collect()  # else it falls due every few times, and often at the same place
    start = time.perf_counter()
    with training_batches(manifest, order, augmentation, spec, 0, step, step + 1000) as steps:
        next(steps)
        return time.perf_counter() - start


def samples_begun(order: Order, step: int) -> int:
    """Samples of the windows that are begun before the first batch is there: of so many runs of DALI."""
    first = step * order.global_batch
    places = [order.place(position) for position in range(first, first + RUNS_LOOKED_AHEAD * DECODED_AT_ONCE)]
    windows = {(w := order.epoch(epoch).window_at(g)).ranges: w.samples for epoch, g in places}
    return sum(windows.values())


def measure() -> dict[str, dict[str, float]]:
    """Of each place the median milliseconds to the first batch, and the samples begun by then."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = packed(Path(folder))
        order = Order(0, manifest.shards.samples, GLOBAL_BATCH, WINDOW)
        rounds = [
            {place: seconds_to_first_batch(manifest, order, step) for place, step in STEPS.items()}
            for _ in range(ROUNDS + 1)
        ]
    return {
        place: {
            "milliseconds": 1e3 * statistics.median(each[place] for each in rounds[1:]),
            "samples_begun": samples_begun(order, step),
        }
        for place, step in STEPS.items()
    }


def main() -> None:
    """Prints the machine and a line for each place."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    as_json, figures = parser.parse_args().json, measure()
    times = [found["milliseconds"] for found in figures.values()]
    ratio = max(times) / min(times)
    if as_json:
        return print(json.dumps({"machine": machine(), "places": figures, "slowest_over_fastest": ratio}))
    print(machine())
    print(
        f"{SAMPLES:,} images of {SIDE} x {SIDE} in {SHARDS} shards, global batch {GLOBAL_BATCH} on one rank,"
        f" windows of {WINDOW}; median of {ROUNDS}\n"
    )
    for place, found in figures.items():
        print(
            f"  {place:28} {found['milliseconds']:6.0f} ms   {found['samples_begun']:6,} samples in the windows begun"
        )
    print(f"  {'slowest / fastest':28} {ratio:6.2f}")


if __name__ == "__main__":
    main()
