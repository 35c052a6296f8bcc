"""Images per second and peak memory of our CoAtNets, beside timm's of the same size on the same machine.

    coatnet bench model --size coatnet_0 --batch 16

On a GPU if there is one, else on all cores of the CPU. Every contestant has a process of its own, so that its peak
memory is its own; they take turns, round by round, so that a busy machine slows all of them.
"""

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import document, machine, timer
from models import coatnet
from models.coatnet import CoAtNet
from models.compiled import compile_blocks
from models.count import count
from models.variants import FAMILY

OURS, OURS_AS_TIMM, TIMM, TIMM_CHANNELS_LAST = "ours", "ours, timm's settings", "timm", "timm, channels-last"
LEGEND = f"""\
{OURS:22} as in the paper: the stride in the expansion, max pooling
{OURS_AS_TIMM:22} the same function as timm's, so that the implementation alone is compared
{TIMM:22} as it comes; the faster of the two is the one that `of timm's` compares with
{TIMM_CHANNELS_LAST:22} weights and images in that memory format
forward                evaluation mode, without gradient
training               forward, cross entropy and backward, without optimizer
bf16                   autocast, over fp32 weights
peak MiB               of weights, gradients and activations
"""


@dataclass(frozen=True)
class Case:
    """The work that is timed for every contestant."""

    size: str
    batch: int
    resolution: int
    mode: str
    precision: str
    device: str
    compiled: bool = False

    def contestants(self) -> list[str]:
        """timm has no CoAtNet-6 and -7."""
        import timm

        both = f"{self.size}_224" in timm.list_models("coatnet_*")
        return [OURS, OURS_AS_TIMM, TIMM, TIMM_CHANNELS_LAST] if both else [OURS]


def network(contestant: str, case: Case) -> nn.Module:
    """The contestant's network, with initial weights, on the CPU."""
    if contestant == OURS:
        return coatnet(case.size, resolution=case.resolution)
    if contestant == OURS_AS_TIMM:
        return coatnet(
            case.size, resolution=case.resolution, stride="depthwise", pool="average", head_size=32,
            batch_norm_eps=1e-5, layer_norm_eps=1e-6,
        )  # fmt: skip
    import timm

    return timm.create_model(f"{case.size}_224", img_size=case.resolution)


def work(contestant: str, case: Case) -> Callable[[], object]:
    """What is timed: one forward of a batch, or one forward with backward."""
    training = case.mode == "training"
    model = network(contestant, case).to(case.device).train(training)
    images = torch.randn(case.batch, 3, case.resolution, case.resolution, device=case.device)
    labels = torch.arange(case.batch, device=case.device) % 1000
    if contestant == TIMM_CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)  # pyrefly: ignore
        images = images.contiguous(memory_format=torch.channels_last)
    if case.compiled and isinstance(model, CoAtNet):
        compile_blocks(model)  # as in training
    elif case.compiled:
        model.compile()

    def forward() -> Tensor:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16"):
            return F.cross_entropy(model(images), labels) if training else model(images)

    def forward_and_backward() -> None:
        model.zero_grad()
        forward().backward()

    return forward_and_backward if training else torch.no_grad()(forward)


def contend(link: Connection, contestant: str, case: Case) -> None:
    """A contestant's process: answers every message by one round, as seconds a batch and MiB at the peak so far."""
    before = _kibibytes("VmRSS")
    seconds = timer(work(contestant, case), case.device)
    link.send("ready")
    while link.recv():
        cuda = case.device == "cuda"
        taken = seconds()
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else (_kibibytes("VmHWM") - before) / 2**10
        link.send((taken, peak))


@contextmanager
def process_of(contestant: str, case: Case) -> Iterator[Callable[[], Any]]:
    """The contestant in a process of its own, as a function that has it do a round."""
    spawning = multiprocessing.get_context("spawn")
    link, its_end = spawning.Pipe()
    process = spawning.Process(target=contend, args=(its_end, contestant, case), daemon=True)
    process.start()
    its_end.close()

    def answer() -> Any:
        try:
            return link.recv()
        except EOFError:
            sys.exit(f"coatnet bench model: {contestant} has died; if it ran out of memory, use a smaller --batch")

    def do_round() -> Any:
        link.send("go")
        return answer()

    try:
        answer()
        yield do_round
    finally:
        process.kill()
        process.join()


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant: images per second, median and best of the rounds, and peak memory."""
    names = case.contestants()
    with ExitStack() as running:
        turns = {name: running.enter_context(process_of(name, case)) for name in names}
        found = [{name: turn() for name, turn in turns.items()} for _ in range(rounds)]
    rows = []
    for name in names:
        seconds, peaks = zip(*(one[name] for one in found), strict=True)
        median, best = case.batch / statistics.median(seconds), case.batch / min(seconds)
        rows.append(
            {"mode": case.mode, "precision": case.precision, "contestant": name}
            | {"images_per_second": round(median, 2), "best": round(best, 2), "peak_mib": round(max(peaks))}
        )
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed and memory as multiples of those of the faster timm, where there is one."""
    peers = [row for row in rows if row["contestant"] in (TIMM, TIMM_CHANNELS_LAST)]
    if not peers:
        return rows
    peer = max(peers, key=lambda row: row["images_per_second"])
    names = {"images_per_second": "speed_of_timms", "peak_mib": "memory_of_timms"}
    return [row | {new: round(row[old] / peer[old], 2) for old, new in names.items()} for row in rows]


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as plain text, a group for each mode and precision."""
    lines = [f"{'':24} images/s     best  of timm's  peak MiB  of timm's"]
    for row in rows:
        if row["contestant"] == OURS:
            lines.append(f"\n{row['mode']}, {row['precision']}")
        speed, memory = (f"{row[name]:.2f}" if name in row else "" for name in ("speed_of_timms", "memory_of_timms"))
        lines.append(
            f"  {row['contestant']:22} {row['images_per_second']:8.2f} {row['best']:8.2f} {speed:>10}"
            f" {row['peak_mib']:9,} {memory:>10}"
        )
    return "\n".join(lines)


def _kibibytes(name: str) -> int:
    """A line of this process's memory as Linux counts it; VmHWM is the most that VmRSS has been."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Measures both modes in both precisions, and prints the table or one JSON document."""
    parser = argparse.ArgumentParser("coatnet bench model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=FAMILY, default="coatnet_0", help="default: coatnet_0")
    parser.add_argument("--batch", type=int, default=16, help="images; default: 16")
    parser.add_argument("--resolution", type=int, default=224, help="side of an image; default: 224")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args()
    try:
        count(options.size, options.resolution)
    except ValueError as error:
        parser.error(str(error))
    if min(options.batch, options.rounds) < 1:
        parser.error("--batch and --rounds must be 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for mode, precision in product(("forward", "training"), ("fp32", "bf16")):
        print(f"{mode}, {precision} ...", file=sys.stderr)
        rows += measure(Case(options.size, options.batch, options.resolution, mode, precision, device), options.rounds)
    facts = {name: getattr(options, name) for name in ("size", "batch", "resolution", "rounds")}
    if options.json:
        print(document(rows, device=device, **facts))
    else:
        batches = f"batches of {options.batch} at {options.resolution}"
        print(f"{machine()}\n{options.size}, {batches}; median and best of {options.rounds} rounds\n")
        print(f"{LEGEND}\n{table_of(rows)}")


if __name__ == "__main__":
    main()
