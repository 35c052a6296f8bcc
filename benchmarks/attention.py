"""Which attention backend is the fastest, at every shape that a CoAtNet has, and which one `fastest` takes there.

    coatnet bench attention --json > benchmarks/results/attention.json

On a GPU if there is one. Queries, keys and values come and the result goes as in the network, under autocast where they
are bfloat16. Every round goes once through all shapes and backends, so that a while of a busy machine is in few of the
rounds of each: the best of them is what counts.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import document, machine, timer
from models.attention import BACKENDS, Backend, fastest, relative_attention

ROUNDS = 21


@dataclass(frozen=True)
class Shape:
    """Heads, grid, and channels of a head, of a stage of a CoAtNet."""

    heads: int
    grid: tuple[int, int]
    head_size: int

    def batch(self, device: str) -> int:
        """As many samples as make the work of every shape about the same: 16 of CoAtNet-0's S3 at 224 on a CPU."""
        work = {"cpu": 16, "cuda": 512}[device] * 12 * 196**2 * 32
        return max(1, round(work / (self.heads * prod(self.grid) ** 2 * self.head_size)))


SHAPES = (
    Shape(12, (14, 14), 32),  # S3 and S4 of CoAtNet-0 at 224, 384 and 512
    Shape(24, (7, 7), 32),
    Shape(12, (24, 24), 32),
    Shape(24, (12, 12), 32),
    Shape(12, (32, 32), 32),
    Shape(24, (16, 16), 32),
    Shape(24, (14, 14), 32),  # S3 of CoAtNet-3 and -4, -5, and -6 at 224
    Shape(20, (14, 14), 64),
    Shape(12, (14, 14), 128),
)


@dataclass(frozen=True)
class Case:
    """The work that is timed on every backend."""

    shape: Shape
    dtype: torch.dtype
    with_gradient: bool


def measure(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """A row for each case: milliseconds of every backend that is valid there, best and median of the rounds."""
    valid: list[Backend] = [name for name in BACKENDS if name != "flex" or device == "cuda"]
    timers = {(case, name): timer(work(case, name, device), device) for case in cases for name in valid}
    found = []
    for number in range(ROUNDS):
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
        found.append({key: 1e3 * seconds() for key, seconds in timers.items()})
    return [_row(case, {name: [one[case, name] for one in found] for name in valid}, device) for case in cases]


def _row(case: Case, times: dict[Backend, list[float]], device: str) -> dict[str, Any]:
    best = {name: round(min(all_times), 3) for name, all_times in times.items()}
    return {
        "device": device,
        "heads": case.shape.heads,
        "grid": case.shape.grid,
        "head_size": case.shape.head_size,
        "batch": case.shape.batch(device),
        "dtype": str(case.dtype).removeprefix("torch."),
        "with_gradient": case.with_gradient,
        "best": best,
        "median": {name: round(statistics.median(all_times), 3) for name, all_times in times.items()},
        "fastest": min(best, key=lambda name: best[name]),
        "chosen": fastest(device, case.dtype, prod(case.shape.grid), case.with_gradient),
    }


def work(case: Case, backend: Backend, device: str) -> Callable[[], object]:
    """Attention from projected tokens [n, tokens, width] to those that the output projection takes, as in the network;
    with gradient, then that of all three and of the table."""
    shape, dtype, with_gradient = case.shape, case.dtype, case.with_gradient
    (height, width), channels = shape.grid, shape.heads * shape.head_size
    size = (shape.batch(device), height * width, channels)
    tokens = [torch.randn(size, device=device, dtype=dtype, requires_grad=with_gradient) for _ in range(3)]
    table = torch.randn(shape.heads, 2 * height - 1, 2 * width - 1, device=device, requires_grad=with_gradient)
    downstream = torch.randn(size, device=device, dtype=dtype)

    def forward() -> Tensor:
        q, k, v = (each.unflatten(-1, (-1, shape.head_size)).transpose(1, 2) for each in tokens)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return relative_attention(q, k, v, table, backend=backend).transpose(1, 2).flatten(2)

    def without_gradient() -> Tensor:
        with torch.no_grad():
            return forward()

    return (lambda: torch.autograd.grad(forward(), (*tokens, table), downstream)) if with_gradient else without_gradient


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as plain text."""
    names = list(rows[0]["median"])
    times = "".join(f"{name:>12} {'best':>8}" for name in names)
    lines = [f"{'heads x grid x size':20} {'batch':>5}  {'type':9} gradient {times}   fastest    chosen"]
    for row in rows:
        shape = f"{row['heads']} x {row['grid'][0]}x{row['grid'][1]} x {row['head_size']}"
        times = "".join(f"{row['median'][name]:12.1f} {row['best'][name]:8.1f}" for name in names)
        gradient = "yes" if row["with_gradient"] else "no"
        lines.append(
            f"{shape:20} {row['batch']:5}  {row['dtype']:9} {gradient:8} {times}   {row['fastest']:10} {row['chosen']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures all shapes in both types with and without gradient, and prints the table or one JSON document."""
    parser = argparse.ArgumentParser("coatnet bench attention", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    as_json = parser.parse_args().json
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [Case(*each) for each in product(SHAPES, (torch.float32, torch.bfloat16), (True, False))]
    rows = measure(cases, device)
    if as_json:
        print(document(rows, rounds=ROUNDS))
    else:
        print(f"{machine()}\nmilliseconds, median and best of {ROUNDS} rounds, forward or forward with backward\n")
        print(table_of(rows))


if __name__ == "__main__":
    main()
