"""Collectives over all ranks: a sum, an object of rank 0, objects of all; and what their errors say of other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from data.pinned import ToHost, to_device
from data.shards.manifest import Manifest, read_manifest
from data.shards.shard_list import Shards
from data.storage.remote import DEFAULT, Storage
from pipeline.errors import DataError, RunFailed, UsageError

Item = TypeVar("Item")

_LOST, _LATE = "has lost another rank", "timed out waiting for another rank"
_MEANINGS = {
    # gloo
    "Timed out waiting": _LATE,
    "Connection closed by peer": _LOST,
    "Connection reset by peer": _LOST,  # and the store's
    "Broken pipe": _LOST,  # and the store's
    # NCCL: its timeout also aborts its communicator, so it comes first
    "caught collective operation timeout": _LATE,
    "NCCL timeout in": _LATE,
    "remote process exited or there was a network error": _LOST,
    "NCCL communicator was aborted": _LOST,
    # the store
    "wait timeout after": _LATE,
    "Connection was likely closed": _LOST,
}
"""Parts of messages of torch's backends where another rank is gone or hangs, and what that is to a person."""


def lost_rank(error: BaseException) -> str | None:
    """What an error says of another rank, if that is why this one fails: it is no fault of its own."""
    if not isinstance(error, RuntimeError):  # such as an OSError, of a connection to an object store
        return None
    return next((meaning for part, meaning in _MEANINGS.items() if part in str(error)), None)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The tensor's sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> Callable[[], bool]:
    """What tells whether a flag is set on any rank; it waits for the answer, and for nothing launched since."""
    total = ToHost(all_reduce_sum(to_device(np.array([flag], np.float32), device)))
    return lambda: total.tolist() != [0]


def from_rank_zero(work: Callable[[], Item]) -> Item:
    """The result of `work` on rank 0, on every rank; an error of it is raised on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (UsageError, DataError, RunFailed, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def manifest_from_rank_zero(url: str, storage: Storage) -> Manifest:
    """As read_manifest, which rank 0 does for all: a job has one set, and its file server one reader. Collective."""
    found: list[Manifest] = []

    def read() -> Manifest:
        found.append(read_manifest(url, storage))
        return replace(found[0], shards=Shards.of([]), storage=DEFAULT)

    def column(name: str) -> np.ndarray:
        return from_rank_zero(lambda: getattr(found[0].shards, name))

    manifest = from_rank_zero(read)
    shards = Shards(*(column(each.name) for each in fields(Shards)))  # one by one, as each takes its room three times
    return replace(manifest, shards=shards, storage=storage)


def all_gather(values: list[Item]) -> list[Item]:
    """The values of all ranks, by rank, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
