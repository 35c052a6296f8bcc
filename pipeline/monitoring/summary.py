"""The summary that a training begins with: network, batch, length, and the bytes of its states."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from data.order import accumulation_steps
from models.coatnet import CoAtNet
from models.count import Count
from pipeline.config.batch_size import micro_batches_of, planned_steps
from pipeline.config.schema import Config, Model, Train, Zero
from pipeline.distributed.environment import rank_and_world_size
from pipeline.formatting import format_si, pluralize
from pipeline.memory.estimate import states_of
from pipeline.monitoring.progress import Console
from pipeline.plan import Plan
from pipeline.training.model import attention_backends, count_model


def training_summary(
    model: Model, train: Train, zero: Zero, classes: int, counts: Count, world_size: int, samples: int | None
) -> Iterator[str]:
    """The lines; of the length only what is known where the training set's samples are not."""
    yield (
        f"{model.name or 'custom CoAtNet'}, {model.resolution} x {model.resolution},"
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


def print_summary(console: Console, config: Config, plan: Plan, model: CoAtNet, device: torch.device) -> None:
    """Prints the summary of a run that begins or resumes, and how its attention is computed on this device."""
    classes, world_size = len(plan.train.classes), rank_and_world_size()[1]
    counts = count_model(config.model, config.train, classes)
    samples = plan.train.samples
    for line in training_summary(config.model, config.train, config.zero, classes, counts, world_size, samples):
        console.print(line)
    console.print(attention_backends(model, config.train, device))


def _length(train: Train, samples: int | None) -> str:
    if samples is None and train.steps is None:
        return f"{train.epochs:g} epochs"
    steps = planned_steps(train, samples or 0)
    seen = steps * train.global_batch
    epochs = f", {seen / samples:.4g} epochs of {samples:,}" if samples else ""
    return f"{pluralize(steps, 'step')}: {pluralize(seen, 'sample')}{epochs}"
