"""Bytes of a rank by component: arithmetic on sections, counts and a number of ranks.

Every figure is one of tensors, but for a bound of what DALI takes of a GPU (data/memory.py). What no tensor holds is
left out: the CUDA context, NCCL, the workspaces of kernels, and what the allocator can't use between its blocks. What
ZeRO holds was measured on the engine itself (tests/pipeline/test_memory.py); with zero.offload and train.compile it was
not, and a compiled network takes less.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.order import accumulation_steps
from pipeline.config.batch_size import micro_batches_of
from pipeline.config.schema import Train, Zero
from pipeline.training.engine import BUCKET_ELEMENTS, LIVE_ELEMENTS

WIDTH = 4
"""Bytes of a weight, gradient, moment, average: all are fp32, under autocast too."""
MOMENTS = 2


@dataclass(frozen=True)
class Work:
    """What a device does: operations of matrix products, two a multiply-add; bytes that it reads and writes; calls."""

    operations: int
    moved_bytes: int
    calls: int

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.moved_bytes + other.moved_bytes, self.calls + other.calls)

    def __rmul__(self, times: int) -> Work:
        return Work(times * self.operations, times * self.moved_bytes, times * self.calls)


@dataclass(frozen=True)
class Activations:
    """Bytes of the forward and backward of one micro batch, beside weights and what ZeRO holds; and their work.

    `peak` is what is alive at the most, by part of the network, and `gathered` the whole weights of ZeRO-3 beside it;
    `kept` is what the forward leaves for the backward.
    """

    peak: dict[str, int]
    kept: int
    work: Work = Work(0, 0, 0)
    gathered: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the moment of a step when most is alive, by component."""

    components: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.components.values())


Settings = tuple[Train, Zero, int]
"""What decides over a rank's memory, beside the network: train, zero, ranks."""


def memory_of(
    parameters: int, activations: Activations, settings: Settings, resolution: int, on_gpu: bool, decoding: int = 0
) -> Memory:
    """The memory of a rank whose network has `parameters` weights; on a GPU, or of a machine where there is none.

    `decoding` is what decoders take beside the batches of a step.

    The largest of three moments: the backward, when activations are alive; after the last one, when what is left of
    the gradients is added up over the ranks; the optimizer's step, which takes a rank's share of them.
    """
    train, zero, world_size = settings
    held = states_of(parameters, world_size, zero.stage, train.ema is not None)
    whole, share = WIDTH * parameters, WIDTH * -(-parameters // world_size)
    bucket, passes = WIDTH * min(parameters, BUCKET_ELEMENTS), accumulation_steps(micro_batches_of(train), world_size)
    on_device = not (zero.offload and on_gpu)
    states = {
        "weights": held.weights,
        "optimizer states": held.optimizer * on_device,
        "moving average": held.average * on_device,
        "batch": passes * train.micro_batch * 3 * resolution**2,
        "decoding": decoding,
    }
    # Stages 2 and 3 take the gradients of a full bucket, or those that a pass leaves, and put them into one tensor.
    # How many wait for that when most activations are alive is not known: a whole bucket's are counted.
    several = fill_a_bucket(parameters)
    taken = share * (zero.stage == 3 or passes > 1 or several)
    waiting = bucket if several and zero.stage > 1 else 0
    backward = {
        "weights": held.weights + activations.gathered,
        "gradients": (taken if zero.stage > 1 else whole * (passes > 1)) * on_device,
        "buckets": WIDTH * BUCKET_ELEMENTS if zero.offload else waiting,
        "activations": sum(activations.peak.values()),
    }
    reduction = {
        "gradients": (taken + bucket if zero.stage > 1 else whole) * on_device,
        "buckets": max(bucket, share * several),  # at stage 1 the share takes the room of the first bucket's gradients
    }
    step = {"gradients": share * on_device}
    return max((Memory(states | moment) for moment in (backward, reduction, step)), key=lambda memory: memory.total)


def fill_a_bucket(parameters: int) -> bool:
    """Whether so many gradients are taken by several buckets in a pass; else they stay to its end."""
    return parameters > BUCKET_ELEMENTS


def most_gathered(stage: int, world_size: int) -> int | None:
    """Bytes of whole weights that ZeRO-3 puts together at a time, none on one rank; None at other stages."""
    if stage < 3:
        return None
    return WIDTH * (LIVE_ELEMENTS + BUCKET_ELEMENTS) if world_size > 1 else 0


@dataclass(frozen=True)
class States:
    """Bytes that a rank holds between steps, activations and buffers of collectives apart; and a checkpoint's."""

    weights: int
    gradients: int
    optimizer: int
    """The fp32 weights that are stepped, which ZeRO keeps apart from the forward's, and AdamW's two moments."""
    average: int
    checkpoint: int


def states_of(parameters: int, world_size: int, stage: int, averages: bool) -> States:
    """What is sharded at a ZeRO stage is an equal share of the whole; the small buffers of norms are left out."""
    whole, share = WIDTH * parameters, WIDTH * -(-parameters // world_size)
    return States(
        weights=share if stage >= 3 else whole,
        gradients=share if stage >= 2 else whole,
        optimizer=(1 + MOMENTS) * share,
        average=share * averages,
        checkpoint=(1 + MOMENTS + averages) * whole,
    )
