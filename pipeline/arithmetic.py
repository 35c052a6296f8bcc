"""The arithmetic of a run, as lines for people: network, batch, length, and the bytes of its states. Pure.

Next: record.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data.order import passes
from models.count import Count
from pipeline.config import Model, Train, Zero, micro_batches_of
from pipeline.prepare import steps_of
from pipeline.words import counted, scaled

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


def arithmetic(
    model: Model, train: Train, zero: Zero, classes: int, counts: Count, world_size: int, samples: int | None
) -> Iterator[str]:
    """The lines; of the length only what is known where the training set's samples are not."""
    yield (
        f"{model.name or 'a spelled-out CoAtNet'}, {model.resolution} x {model.resolution},"
        f" {counted(classes, 'class', 'classes')}: {scaled(counts.parameters)} parameters,"
        f" {scaled(counts.multiply_adds)} multiply-adds an image"
    )
    micro_batches = micro_batches_of(train)
    rounds = counted(passes(micro_batches, world_size), "pass", "passes")
    yield (
        f"{counted(train.global_batch, 'sample')} a step: {counted(micro_batches, 'micro batch', 'micro batches')} of"
        f" {train.micro_batch}, {rounds} on {counted(world_size, 'rank')}"
    )
    yield _length(train, samples)
    held = states_of(counts.parameters, world_size, zero.stage, train.ema is not None)
    where = " in the host's memory" if zero.offload else ""
    average = f", average {scaled(held.average, 'B')}{where}" if held.average else ""
    yield (
        f"each rank holds at ZeRO stage {zero.stage}, beside activations: weights {scaled(held.weights, 'B')},"
        f" gradients {scaled(held.gradients, 'B')}, optimizer states {scaled(held.optimizer, 'B')}{where}{average}"
    )
    yield f"a checkpoint takes {scaled(held.checkpoint, 'B')}"


def _length(train: Train, samples: int | None) -> str:
    if samples is None and train.steps is None:
        return f"{train.epochs:g} epochs"
    steps = train.steps or steps_of(train.epochs or 0, samples or 0, train.global_batch)
    seen = steps * train.global_batch
    epochs = f", {seen / samples:.4g} epochs of {samples:,}" if samples else ""
    return f"{counted(steps, 'step')}: {counted(seen, 'sample')}{epochs}"
