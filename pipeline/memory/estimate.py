"""Bytes of a rank by component, and which settings would fit: arithmetic on sections, counts and a number of ranks.

Every figure is one of tensors. It leaves out what no tensor holds: the CUDA context, NCCL, DALI, the workspaces of
kernels, and what the allocator can't use between its blocks. MARGIN is for these. What ZeRO holds was measured on the
engine itself (tests/pipeline/test_memory.py); with zero.offload and train.compile it was not, and compiled networks
take less than is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.order import accumulation_steps
from pipeline.config.batch_size import check_world_size, fitting_micro_batches, micro_batches_of
from pipeline.config.schema import Train, Zero
from pipeline.training.engine import BUCKET_ELEMENTS, LIVE_ELEMENTS

MARGIN = 0.1
"""Share of an estimate that must be left free for a setting to count as one that fits."""


@dataclass(frozen=True)
class Activations:
    """Bytes of the forward and backward of one micro batch, beside weights and what ZeRO holds.

    `peak` is what is alive at the most, by part of the network; `kept` what the forward leaves for the backward.
    """

    peak: dict[str, int]
    kept: int


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the moment of a step when most is alive, by component."""

    components: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.components.values())


Settings = tuple[Train, Zero, int]
"""What decides over a rank's memory, beside the network: train, zero, ranks."""


def memory_of(parameters: int, activations: Activations, settings: Settings, resolution: int, on_gpu: bool) -> Memory:
    """The memory of a rank whose network has so many parameters; on a GPU, or of a machine where there is none.

    The largest of three moments: the backward, when activations are alive; after the last one, when what is left of
    the gradients is added up over the ranks; the optimizer's step, which copies a rank's share of them.
    """
    train, zero, world_size = settings
    held = states_of(parameters, world_size, zero.stage, train.ema is not None)
    whole, share = WIDTH * parameters, WIDTH * -(-parameters // world_size)
    bucket, rounds = WIDTH * BUCKET_ELEMENTS, accumulation_steps(micro_batches_of(train), world_size)
    on_device = not (zero.offload and on_gpu)
    states = {
        "weights": held.weights + (_gathered(parameters, world_size) if zero.stage == 3 else 0),
        "optimizer states": held.optimizer * on_device,
        "moving average": held.average * on_device,
        "batch": rounds * train.micro_batch * 3 * resolution**2,
    }
    # Stage 2 collects a pass's share of gradients beside that of the passes before, once its bucket is full.
    collected = share * (2 if zero.stage == 2 and rounds > 1 else 1)
    while_passing = collected if parameters > BUCKET_ELEMENTS else share
    accumulated = while_passing if zero.stage > 1 else whole * (rounds > 1)
    backward = {"gradients": accumulated * on_device, "buckets": bucket, "activations": sum(activations.peak.values())}
    reduction = {
        "gradients": (whole * (zero.stage == 1) + collected) * on_device,
        "buckets": bucket + WIDTH * min(parameters, BUCKET_ELEMENTS),
    }
    step = {"gradients": 2 * share * on_device, "buckets": bucket * (zero.stage == 3)}
    return max((Memory(states | moment) for moment in (backward, reduction, step)), key=lambda memory: memory.total)


def _gathered(parameters: int, world_size: int) -> int:
    """Whole weights that stage 3 has put together at a time; one rank has nothing to put together."""
    return 0 if world_size == 1 else WIDTH * min(parameters, LIVE_ELEMENTS + BUCKET_ELEMENTS)


def fits(needed: int, usable: int) -> bool:
    """Whether so many bytes, as estimated, would fit with the margin."""
    return needed * (1 + MARGIN) <= usable


def suggest_settings(
    settings: Settings, stages_by_size: list[int], needs: Callable[[Settings], int], usable: int
) -> list[dict[str, Any]]:
    """Changes of keys, each of which would fit by itself; none where nothing would.

    First the largest micro batch below the present one, and the fewest more stages to recompute, the largest first;
    where neither fits, a higher ZeRO stage, if need be with all stages recomputed; then more ranks. `needs` gives bytes
    and is asked as seldom as possible.
    """

    def good(changed: Settings) -> bool:
        return fits(needs(changed), usable)

    train, zero, world_size = settings
    found: list[dict[str, Any]] = []
    smaller = [(size, (_with(train, micro_batch=size), zero, world_size)) for size in _smaller(train, world_size)]
    if best := _last_good(smaller, good):
        found.append({"train.micro_batch": best})
    for stages in _recomputing(train, stages_by_size):
        if good((_with(train, activation_checkpointing=stages), zero, world_size)):
            found.append({"train.activation_checkpointing": stages})
            break
    return found or _with_more_sharding(settings, good)


def _smaller(train: Train, world_size: int) -> list[int]:
    """The possible micro batches below the present one, rising."""
    sizes = [size for size in fitting_micro_batches(train, train.global_batch) if size < train.micro_batch]
    return [size for size in sizes if _is_possible(_with(train, micro_batch=size), world_size)]


def _is_possible(train: Train, world_size: int) -> bool:
    try:
        check_world_size(train, world_size)
    except ValueError:
        return False
    return True


def _last_good(rising: list[tuple[int, Settings]], good: Callable[[Settings], bool]) -> int | None:
    """The largest value that is good, where all below a good one are."""
    low, high = 0, len(rising)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if good(rising[middle][1]) else (low, middle)
    return rising[low - 1][0] if low else None


def _recomputing(train: Train, stages_by_size: list[int]) -> list[Any]:
    """Settings of activation checkpointing that recompute ever more stages than the present one."""
    present = train.activation_checkpointing
    done = set(stages_by_size if present == "all" else () if present == "none" else present)
    more = [stage for stage in stages_by_size if stage not in done]
    lists = [tuple(sorted({*done, *more[: count + 1]})) for count in range(len(more))]
    return ["all" if len(stages) == len(stages_by_size) else stages for stages in lists]


def _with_more_sharding(settings: Settings, good: Callable[[Settings], bool]) -> list[dict[str, Any]]:
    train, zero, world_size = settings
    recomputing = _with(train, activation_checkpointing="all")
    all_stages = {"train.activation_checkpointing": "all"}
    for stage in range(zero.stage + 1, 4):
        sharded = zero.model_copy(update={"stage": stage})
        for tried, change in ((train, {}), (recomputing, all_stages)):
            if world_size > 1 and good((tried, sharded, world_size)):
                return [{"zero.stage": stage, **change}]
    sharded = zero.model_copy(update={"stage": 3})
    ranks = [n for n in range(world_size + 1, micro_batches_of(train) + 1) if _is_possible(train, n)]
    fewest = next((n for n in ranks if good((recomputing, sharded, n))), None)
    return [{"ranks": fewest, "zero.stage": 3, **all_stages}] if fewest else []


def _with(train: Train, **changes: Any) -> Train:
    return train.model_copy(update=changes)


WIDTH = 4
"""Bytes of a weight, gradient, moment, average: all are fp32, under autocast too."""
MOMENTS = 2


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
