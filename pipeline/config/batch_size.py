"""The arithmetic of batches: how a step is dealt to ranks, and which sizes fit where one does not."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Protocol

from data.order import accumulation_steps, steps


class Batches(Protocol):
    """The sizes of train.* that belong together."""

    @property
    def global_batch(self) -> int: ...

    @property
    def micro_batch(self) -> int: ...

    @property
    def batch_norm_group(self) -> int | None: ...


class Length(Protocol):
    """The keys of train.* that say how long it is."""

    @property
    def global_batch(self) -> int: ...

    @property
    def steps(self) -> int | None: ...

    @property
    def epochs(self) -> float | None: ...


def micro_batches_of(train: Batches) -> int:
    """Micro batches of a step, on all ranks together."""
    return train.global_batch // train.micro_batch


def ranks_of_group(train: Batches) -> int:
    """How many ranks a batch-norm group lies on: 1, or as many as it has micro batches."""
    return max(1, (train.batch_norm_group or 1) // train.micro_batch)


def check_world_size(train: Batches, world_size: int) -> None:
    """Raises ValueError, with the nearest sizes that would do, where a step cannot be dealt to `world_size` ranks."""
    micro_batches, group_ranks = micro_batches_of(train), ranks_of_group(train)
    ranks = ("ranks", list(range(group_ranks, micro_batches + 1, group_ranks)), world_size)
    if world_size > micro_batches:
        group = train.batch_norm_group or 1
        enough = [
            size
            for size in fitting_micro_batches(train, train.global_batch)
            if train.global_batch // size >= world_size and world_size % max(1, group // size) == 0
        ]
        raise ValueError(
            f"{micro_batches} micro batches a step (train.global_batch={train.global_batch} /"
            f" train.micro_batch={train.micro_batch}) are too few for {world_size} ranks;"
            f" {suggest(ranks, ('train.micro_batch', enough, train.micro_batch))}"
        )
    if world_size % group_ranks:
        groups = ("train.batch_norm_group", divisors(train.micro_batch)[1:], train.micro_batch)
        raise ValueError(
            f"train.batch_norm_group={train.batch_norm_group} spans {group_ranks} ranks (a micro batch of"
            f" {train.micro_batch} on each), and {world_size} ranks are not a multiple; {suggest(ranks, groups)}"
        )


def padding_share(train: Batches, world_size: int) -> str | None:
    """A warning about a number of ranks to which a step's micro batches cannot be dealt evenly; None where they can."""
    micro_batches = micro_batches_of(train)
    slots = accumulation_steps(micro_batches, world_size) * world_size
    if slots == micro_batches:
        return None
    even = [ranks for ranks in divisors(micro_batches) if ranks % ranks_of_group(train) == 0]
    return (
        f"{micro_batches} micro batches a step do not divide evenly among {world_size} ranks:"
        f" {100 * (slots - micro_batches) / slots:.0f} % of their time is wasted; {_nearest(even, world_size)} ranks"
        " would waste none"
    )


def fitting_micro_batches(train: Batches, samples: int) -> list[int]:
    """Micro batches that divide this number of samples and hold whole batch-norm groups, or are equal parts of one."""
    group = train.batch_norm_group or 1
    if samples % group:
        return []
    return [size for size in divisors(samples) if size % group == 0 or group % size == 0]


def divisors(number: int) -> list[int]:
    """All divisors, rising; of 0 none."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def suggest(*options: tuple[str, list[int], int]) -> str:
    """For each (key, possible values, present value) that has any the nearest value, as alternatives."""
    nearest = [f"{key}={_nearest(values, present)}" for key, values, present in options if values]
    return f"{' or '.join(nearest)} would do" if nearest else "change both, and train.batch_norm_group too"


def _nearest(values: list[int], present: int) -> int:
    return min(values, key=lambda value: abs(value - present))


def planned_steps(train: Length, samples: int) -> int:
    """The length of a training, with a training set of so many samples."""
    return train.steps or total_steps(train.epochs or 0, samples, train.global_batch)


def known_steps(train: Length, samples: int | None) -> int | None:
    """The same, None where it follows from samples that are not known."""
    return train.steps if samples is None else planned_steps(train, samples)


def total_steps(epochs: float, samples: int, global_batch: int) -> int:
    """ceil(epochs x N / global_batch), exact for epochs as they are written: 1.1 x 10 is 11."""
    if epochs == int(epochs):
        return steps(int(epochs), samples, global_batch)
    return math.ceil(Fraction(repr(epochs)) * samples / global_batch)
