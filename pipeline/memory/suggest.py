"""Which settings would fit a rank's memory: one search, for a rank that ran out of it and for planning."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.config.batch_size import check_world_size, fitting_micro_batches, micro_batches_of
from pipeline.config.schema import Train
from pipeline.memory.estimate import Activations, Memory, Settings

MARGIN = 0.1
"""Share of an estimate that must be left free, for what is not tensors, so that a setting counts as one that fits."""


@dataclass(frozen=True)
class Suggestion:
    """Changes of config keys, and of `ranks`, by which a rank would fit, and the bytes that it would then take."""

    changes: dict[str, Any]
    bytes: int

    def __str__(self) -> str:
        return " with ".join(f"{key}={_written(value)}" for key, value in self.changes.items())


def suggest_settings(
    settings: Settings, estimate: Callable[[Settings], tuple[Memory, Activations]], usable: int
) -> list[Suggestion]:
    """Settings nearest to these that fit into `usable` bytes, each by itself; none where nothing does.

    The largest smaller micro batch, and the fewest more stages to recompute, the largest first; where neither fits, a
    higher ZeRO stage, if need be with all stages recomputed; then more ranks.
    """
    train, zero, world_size = settings

    def fitting(changes: dict[str, Any]) -> Suggestion | None:
        needed = estimate(changed(settings, changes))[0].total
        return Suggestion(changes, needed) if fits(needed, usable) else None

    def first_fitting(candidates: Iterable[dict[str, Any]]) -> list[Suggestion]:
        return list(islice(filter(None, map(fitting, candidates)), 1))

    smaller = [{"train.micro_batch": size} for size in _smaller_micro_batches(train, world_size)]
    too_large = bisect_left(smaller, True, key=lambda changes: fitting(changes) is None)
    recomputed = [{"train.activation_checkpointing": stages} for stages in _recomputed_stages(settings, estimate)]
    if found := first_fitting(smaller[max(0, too_large - 1) : too_large]) + first_fitting(recomputed):
        return found
    all_stages = {"train.activation_checkpointing": "all"}
    stages = range(zero.stage + 1, 4) if world_size > 1 else ()
    higher = [{"zero.stage": stage, **more} for stage in stages for more in ({}, all_stages)]
    ranks = [n for n in range(world_size + 1, micro_batches_of(train) + 1) if _is_possible(train, n)]
    return first_fitting([*higher, *({"ranks": n, "zero.stage": 3, **all_stages} for n in ranks)])


def changed(settings: Settings, changes: dict[str, Any]) -> Settings:
    """The settings with a suggestion's changes."""
    train, zero, world_size = settings
    of_train = {key.removeprefix("train."): value for key, value in changes.items() if key.startswith("train.")}
    sharded = zero.model_copy(update={"stage": changes.get("zero.stage", zero.stage)})
    return train.model_copy(update=of_train), sharded, changes.get("ranks", world_size)


def fits(needed: int, usable: int) -> bool:
    """Whether so many bytes, as estimated, fit with the margin."""
    return needed * (1 + MARGIN) <= usable


def _smaller_micro_batches(train: Train, world_size: int) -> list[int]:
    """The possible micro batches below the present one, rising."""
    sizes = [size for size in fitting_micro_batches(train, train.global_batch) if size < train.micro_batch]
    return [size for size in sizes if _is_possible(train.model_copy(update={"micro_batch": size}), world_size)]


def _is_possible(train: Train, world_size: int) -> bool:
    try:
        check_world_size(train, world_size)
    except ValueError:
        return False
    return True


def _recomputed_stages(
    settings: Settings, estimate: Callable[[Settings], tuple[Memory, Activations]]
) -> list[tuple[int, ...] | str]:
    """Values of train.activation_checkpointing that recompute ever more stages, those with most activations first."""
    present, peak = settings[0].activation_checkpointing, estimate(settings)[1].peak
    stages = [int(part.split()[1]) for part in sorted(peak, key=lambda part: -peak[part]) if part.startswith("stage ")]
    done = set(stages if present == "all" else () if present == "none" else present)
    more = [stage for stage in stages if stage not in done]
    lists = [tuple(sorted({*done, *more[: count + 1]})) for count in range(len(more))]
    return ["all" if len(chosen) == len(stages) else chosen for chosen in lists]


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
