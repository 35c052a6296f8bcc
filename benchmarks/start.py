"""The cost of a start: two steps of the tiny configuration on 1, 2 and 4 ranks, as seconds and as CPU seconds.

    coatnet bench start
    coatnet bench start --beside ../before   # and of another checkout, in turn

Each figure is the median of `--times` whole commands, from the shell's point of view, after one that is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine
from tests.forked import ROOT
from tests.pipeline.runs import pack_digits

RANKS = (1, 2, 4)
SETTINGS = ["train.steps=2", "train.micro_batch=16", "data.val=null"]


def start(checkout: Path, ranks: int, data: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds of all its processes, of one training in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=data) as run, tempfile.TemporaryFile("w+") as output:
        words = ["configs/tiny.yaml", "--procs", str(ranks), f"data.train={data}/train", f"run.dir={run}/run"]
        command = [sys.executable, "-m", "pipeline.cli", "pretrain", *words, *SETTINGS]
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=checkout, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} in {checkout} ended with {process.returncode}: {output.read()}")
    return seconds, used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    checkouts = [each for each in (options.beside, ROOT) if each is not None]
    with tempfile.TemporaryDirectory() as folder:
        data = pack_digits(Path(folder))
        print("| ranks |" + "".join(f" {name} s | {name} CPU s |" for name in ("before", "now")[-len(checkouts) :]))
        print("|---" * (1 + 2 * len(checkouts)) + "|")
        for ranks in RANKS:
            found: dict[Path, list[tuple[float, float]]] = {each: [] for each in checkouts}
            for _ in range(1 + options.times):
                for checkout in checkouts:
                    found[checkout].append(start(checkout, ranks, data))
            medians = [statistics.median(column) for each in checkouts for column in zip(*found[each][1:], strict=True)]
            print(f"| {ranks} | " + " | ".join(f"{median:.2f}" for median in medians) + " |", flush=True)
    print(f"\n{machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
