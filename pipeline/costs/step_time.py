"""The time of a training step on a device: few named terms, of counted work and of rates.

    compute     matrix products, at a share of the device's peak
    memory      the bytes that all operations read and write, at a share of its memory's rate
    calls       operations, as many as there are, at a time for each
    optimizer   bytes of adding up gradients, clipping, AdamW and the average
    collectives ZeRO's volumes, over links within a node and the network between nodes
    input       decoding, which runs beside the rest; on a CPU it competes with it, and is part of what calibrates

Work is counted on the network itself (pipeline/memory/activations.py), recomputation included. What runs at the same
time on a device is taken as one after the other, but for ZeRO-3's collectives, which hide behind computing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from data.order import accumulation_steps
from pipeline.config.batch_size import micro_batches_of
from pipeline.costs.devices import Device, Precision
from pipeline.errors import UsageError
from pipeline.memory.estimate import MOMENTS, WIDTH, Settings, Work

GIGA = 1e9


@dataclass(frozen=True)
class Rates:
    """What devices reach of their data sheets' figures, and rates that no data sheet has. All here are assumptions."""

    compute: float = 0.6
    """Share of the peak of matrix products."""
    memory: float = 0.7
    """Share of the memory's rate."""
    call_seconds: float = 3e-6
    """Of an operation, however small."""
    collectives: float = 0.7
    """Share of the links' and the network's rates."""
    network: float = 25.0
    """GB/s of a GPU's network to other nodes, one way: 200 Gbit/s."""
    decoding: float = 2500.0
    """Images a second at 224 that a GPU's decoder has ready beside the training."""
    core_decoding: float = 450.0
    """The same of a CPU core: benchmarks/results/data.txt, with RandAugment."""
    host: float = 20.0
    """GB/s of a rank to the host's memory, and of an optimizer there."""


CPU = Device(bf16=0.1, fp32=0.1, gibibytes=0, memory_rate=10, link_rate=1)
"""Figures of no CPU, which calibration replaces; its memory is this machine's."""


def step_terms(
    work: Work, parameters: int, settings: Settings, device: Device, gpus_per_node: int, rates: Rates
) -> dict[str, float]:
    """Seconds of a step by term. `work` is that of a micro batch."""
    train, zero, ranks = settings
    passes = accumulation_steps(micro_batches_of(train), ranks)
    moved = device.memory_rate * GIGA * rates.memory
    compute = passes * work.operations / (peak(device, train.precision) * rates.compute)
    memory = passes * work.moved_bytes / moved
    share, whole = WIDTH * parameters / ranks, WIDTH * parameters
    adding = 3 * whole * (passes if zero.stage > 1 or passes > 1 else 0)
    stepping = share * (4 + 2 * (1 + MOMENTS) + 2 * (train.ema is not None))  # norm, clip, gradient, forward's weights
    on_host = zero.offload and device.kind == "cuda"
    optimizer = (
        adding / moved + (stepping + 2 * share) / (rates.host * GIGA) if on_host else (adding + stepping) / moved
    )
    collectives = collective_bytes(parameters, zero.stage, ranks, passes) / (
        link_rate(device, ranks, gpus_per_node, rates) * GIGA * rates.collectives
    )
    if zero.stage == 3:
        collectives = max(0.0, collectives - compute - memory)
    return {
        "compute": compute,
        "memory": memory,
        "calls": passes * work.calls * rates.call_seconds,
        "optimizer": optimizer,
        "collectives": collectives,
        "input": passes * train.micro_batch / rates.decoding if device.kind == "cuda" else 0.0,
    }


def step_seconds(terms: dict[str, float]) -> float:
    """A step's seconds: decoding runs beside all else."""
    return max(terms["input"], sum(seconds for name, seconds in terms.items() if name != "input"))


def peak(device: Device, precision: Precision) -> float:
    """Operations a second at most; UsageError where the device has no such type."""
    found = device.peak(precision)
    if found is None:
        raise UsageError(f"this GPU does not compute in {precision}; set train.precision=fp32")
    return found


def collective_bytes(parameters: int, stage: int, ranks: int, passes: int) -> float:
    """Bytes that a rank sends in a step (Rajbhandari et al. 2020, section 7): weights gathered after the step, and
    gradients added up once, or at stage 2 in each pass; at stage 3 both in each pass, and weights twice.

    Below stage 3 every rank gets all sums, which sends twice what a rank's share of them would.
    """
    reduced = {1: 2, 2: 2 * passes, 3: passes}[stage]
    gathered = 2 * passes if stage == 3 else 1
    return (reduced + gathered) * WIDTH * parameters * (ranks - 1) / ranks


def link_rate(device: Device, ranks: int, gpus_per_node: int, rates: Rates) -> float:
    """GB/s at which a ring passes on bytes: of its slowest part. Rings of a node's GPUs use all of its networks."""
    if ranks <= gpus_per_node:
        return device.link_rate
    return min(device.link_rate, rates.network * gpus_per_node)


def scaled(rates: Rates, factors: dict[str, float]) -> Rates:
    """The rates at which the terms of these names take so many times as long."""
    found = {name: getattr(rates, name) / factor for name, factor in factors.items() if name != "calls"}
    return replace(rates, call_seconds=rates.call_seconds * factors.get("calls", 1.0), **found)
