"""How long the order takes at 3e9 samples in 300,000 shards: `python -m benchmarks.order` prints it as plain text.

Every figure is the median of 21 runs in one process; an epoch is opened afresh each time. Next: ../data/order.py.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.order import Epoch, Order, positions_of_step

SHARDS, SAMPLES_PER_SHARD, WINDOW, RUNS = 300_000, 10_000, 32, 21


def machine() -> str:
    """The machine and the versions, in one line."""
    processors = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = processors[0] if processors else platform.processor()
    return (
        f"{len(processors)} x {name}, {platform.system()}, Python {platform.python_version()}, numpy {np.__version__}"
    )


def median_milliseconds(work: Callable[[], object]) -> float:
    """Median time of the work, in milliseconds, after one run that is not counted."""
    work()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def measure(global_batch: int) -> dict[str, float]:
    """Milliseconds of each thing that a reader asks of the order."""
    order = Order(0, np.full(SHARDS, SAMPLES_PER_SHARD), global_batch, WINDOW)
    epoch = order.epoch(1)
    step = positions_of_step(order.samples // global_batch // 2, global_batch)
    return {
        "open an epoch": median_milliseconds(lambda: Epoch(order, 1)),
        "find one position's sample": median_milliseconds(lambda: epoch.samples_at(step[0])),
        "find one position's window": median_milliseconds(lambda: epoch.window_at(int(step[0]))),
        "find 64 positions' samples": median_milliseconds(lambda: epoch.samples_at(step[:64])),
        f"find all {global_batch:,} samples of a step": median_milliseconds(lambda: epoch.samples_at(step)),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    """Prints the machine and the table."""
    print(machine())
    print(f"{SHARDS * SAMPLES_PER_SHARD:,} samples, {SHARDS:,} shards, windows of {WINDOW}; median of {RUNS}")
    for global_batch in (4_096, 65_536):
        print(f"\nglobal batch {global_batch:,}")
        for what, milliseconds in measure(global_batch).items():
            print(f"  {what:36} {milliseconds:9.3f} ms")


if __name__ == "__main__":
    main()
