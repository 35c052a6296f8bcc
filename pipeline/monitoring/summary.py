"""The arithmetic of a run, as lines for people: network, batch, length, and the bytes of its states. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from data.order import accumulation_steps
from models.count import Count
from pipeline.config.batch_size import micro_batches_of, total_steps
from pipeline.config.schema import Model, Train, Zero
from pipeline.formatting import format_si, pluralize
from pipeline.memory.estimate import states_of


def training_summary(
    model: Model, train: Train, zero: Zero, classes: int, counts: Count, world_size: int, samples: int | None
) -> Iterator[str]:
    """The lines; of the length only what is known where the training set's samples are not."""
    yield (
        f"{model.name or 'a spelled-out CoAtNet'}, {model.resolution} x {model.resolution},"
        f" {pluralize(classes, 'class', 'classes')}: {format_si(counts.parameters)} parameters,"
        f" {format_si(counts.multiply_adds)} multiply-adds an image"
    )
    micro_batches = micro_batches_of(train)
    rounds = pluralize(accumulation_steps(micro_batches, world_size), "pass", "passes")
    dealt = f"{pluralize(micro_batches, 'micro batch', 'micro batches')} of {train.micro_batch}"
    ranks = pluralize(world_size, "rank")
    yield f"{pluralize(train.global_batch, 'sample')} a step: {dealt}, {rounds} on {ranks}"
    yield _length(train, samples)
    held = states_of(counts.parameters, world_size, zero.stage, train.ema is not None)
    where = " in the host's memory" if zero.offload else ""
    average = f", average {format_si(held.average, 'B')}{where}" if held.average else ""
    yield (
        f"each rank holds at ZeRO stage {zero.stage}, beside activations: weights {format_si(held.weights, 'B')},"
        f" gradients {format_si(held.gradients, 'B')},"
        f" optimizer states {format_si(held.optimizer, 'B')}{where}{average}"
    )
    yield f"a checkpoint takes {format_si(held.checkpoint, 'B')}"


def _length(train: Train, samples: int | None) -> str:
    if samples is None and train.steps is None:
        return f"{train.epochs:g} epochs"
    steps = train.steps or total_steps(train.epochs or 0, samples or 0, train.global_batch)
    seen = steps * train.global_batch
    epochs = f", {seen / samples:.4g} epochs of {samples:,}" if samples else ""
    return f"{pluralize(steps, 'step')}: {pluralize(seen, 'sample')}{epochs}"
