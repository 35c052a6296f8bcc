"""The training set as the loop takes it: this rank's micro batches of every step, read and decoded ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, closing
from functools import partial

import torch

from data.loader import LoaderSpec, Steps, steps_of_batches, training_batches
from pipeline.config.schema import Config
from pipeline.distributed.environment import cpus_per_rank, rank_and_world_size
from pipeline.plan import Plan, augmentation


def loader_spec(config: Config, device: torch.device, gives_up: Callable[[], bool] = lambda: False) -> LoaderSpec:
    """This rank's part of each global batch, decoded on its device."""
    micro_batch, resolution = config.train.micro_batch, config.model.resolution
    return LoaderSpec(*rank_and_world_size(), micro_batch, resolution, device, cpus_per_rank(), gives_up)


def training_steps(
    config: Config, plan: Plan, spec: LoaderSpec, first_step: int, skipped: Collection[int]
) -> AbstractContextManager[Steps]:
    """Inside, the steps from `first_step` (from 0) to the plan's last, None in place of the batches of skipped ones."""
    drawn = augmentation(config.augment)
    batches = partial(training_batches, plan.train, plan.order, drawn, spec, config.run.seed)
    return closing(steps_of_batches(batches, first_step, plan.steps, skipped))
