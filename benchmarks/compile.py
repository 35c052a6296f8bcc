"""What torch.compile takes and gives: forward and backward of a micro batch eager, compiled whole, and by block.

    coatnet bench compile > benchmarks/results/compile.txt

Every way has a process and an empty cache of its own. Some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine, timer
from benchmarks.plan import ROOT, network, written
from models.compiled import compile_blocks
from pipeline.config.parsing import read_config
from pipeline.training.model import build_model, init_weights
from tests.pipeline.peaks import CLASSES, allocator_peak

CASES = [network("tiny", 32, 32), network("coatnet_0", 64, 8)]
ENTRY = [sys.executable, "-P", str(ROOT / "coatnet_main.py"), "benchmarks.compile"]
WAYS = ("eager", "whole", "by block")


class Figures(NamedTuple):
    """Of one way: seconds of the first pass, networks or blocks compiled, images a second, bytes of tensors."""

    first_seconds: float
    compilations: int
    images_per_second: float
    peak: int


def measure(arguments: list[str], way: str, rounds: int) -> Figures:
    """Runs in a process of its own; the rate is the best of the rounds."""
    config = read_config(arguments[0], arguments[1:])
    n, side, cpu = config.train.micro_batch, config.model.resolution, torch.device("cpu")
    model = build_model(config.model, config.train, CLASSES, cpu, init_weights(0))
    images, labels = torch.rand(n, 3, side, side), torch.arange(n) % CLASSES
    factors = torch.ones(n, model.branches)

    def one_pass() -> None:
        model.zero_grad()
        F.cross_entropy(model(images, factors), labels).backward()

    with fresh_cache():
        if way == "whole":
            model.compile()
        elif way == "by block":
            compile_blocks(model)
        start = time.perf_counter()
        one_pass()
        first = time.perf_counter() - start
        seconds = timer(one_pass, "cpu")
        rate = n / min(seconds() for _ in range(rounds))
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            one_pass()
        return Figures(first, counters["stats"]["unique_graphs"], rate, allocator_peak(profiled))


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser("coatnet bench compile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--network", choices=("tiny", "coatnet_0"), help="default: both")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(measure(*options.one)))
    print(f"{machine()}\n\n{'':11} first pass s  compilations  images/s  peak MiB of tensors")
    for arguments in CASES:
        if options.network not in (None, written(arguments).split()[0]):
            continue
        print(f"\n{written(arguments)}")
        for way in WAYS:
            asked = ["--one", json.dumps([arguments, way, options.rounds])]
            found = Figures(*json.loads(subprocess.run([*ENTRY, *asked], check=True, stdout=subprocess.PIPE).stdout))
            figures = f"{found.first_seconds:12.1f} {found.compilations:13} {found.images_per_second:9.1f}"
            print(f"  {way:9} {figures} {found.peak / 2**20:9.1f}", flush=True)


if __name__ == "__main__":
    main()
