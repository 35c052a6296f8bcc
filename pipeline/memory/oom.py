"""A rank that runs out of memory says what was largest and what would fit, in place of a traceback.

It knows the configuration and not the moment: the sizes are estimates (estimate.py, activations.py), and say so. They
are computed on the host, once what the run held was let go. Whatever goes wrong while advising is said beside the
error, never instead of it. A process that the kernel kills for its memory, as Linux does on a machine without GPUs,
says nothing.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import memory
from pipeline.checkpoint.attempts import latest_attempt
from pipeline.config.schema import Config
from pipeline.distributed.environment import local_world_size, rank_and_world_size
from pipeline.errors import Interrupted, RunFailed, first_line
from pipeline.memory.activations import estimates
from pipeline.memory.estimate import MARGIN, Activations, Memory, suggest_settings
from pipeline.run.events import Events

WORDS = ("out of memory", "allocate memory", "enough memory", "bad_alloc", "allocation failed", "ALLOC_FAILED")
"""Of the allocators of torch (the CPU's raises a mere RuntimeError), C++, CUDA's libraries and DALI."""
SHOWN_SHARE = 0.02
"""Of the whole: smaller components are not named."""


@dataclass(frozen=True)
class AvailableMemory:
    """A device's memory, in words, and the bytes of it that one rank may use."""

    words: str
    usable: int


@dataclass(frozen=True)
class Advice:
    """What a rank needs under its configuration, and the changes of keys by which it would fit."""

    memory: Memory
    activations: Activations
    ways: list[dict[str, Any]]


@contextmanager
def explain_oom(config: Config, classes: int) -> Iterator[None]:
    """Inside, running out of memory, on the device or the host, becomes RunFailed, with an event `out_of_memory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        try:
            room = _room_of_gpu() if torch.cuda.is_available() else None  # while it is as it was
            left, resident = memory.available_addresses(), memory.resident()
            _let_go(error)
            room = room or _room_of_host(left, resident)
            message = _explanation(config, classes, error, room)
        except MemoryError:
            rank = rank_and_world_size()[0]
            raise RunFailed(f"rank {rank} ran out of memory, so much that it can't say what would fit") from None
        raise RunFailed(message) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, RunFailed | Interrupted):
        return False
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in WORDS)


def advice(config: Config, classes: int, world_size: int, usable: int, device: str) -> Advice:
    """What a rank needs, and what would fit into so many bytes of a device of this type."""
    estimate = estimates(config, classes, device)
    present = (config.train, config.zero, world_size)
    memory, activations = estimate(present)
    peak = activations.peak
    stages = [int(part.split()[1]) for part in sorted(peak, key=lambda part: -peak[part]) if part.startswith("stage ")]
    ways = suggest_settings(present, stages, lambda settings: estimate(settings)[0].total, usable)
    return Advice(memory, activations, ways)


def _explanation(config: Config, classes: int, error: BaseException, room: AvailableMemory) -> str:
    rank, world_size = rank_and_world_size()
    said = f"rank {rank} ran out of memory{_asked_for(error)}; {room.words}"
    facts: dict[str, Any] = {"rank": rank, "usable_bytes": room.usable, "error": first_line(error)}
    try:
        found = advice(config, classes, world_size, room.usable, "cuda" if torch.cuda.is_available() else "cpu")
        facts |= {"needed_bytes": found.memory.components, "activations": found.activations.peak, "fits": found.ways}
        said = "\n".join([said, *(f"  {line}" for line in in_words(found, room.usable))])
    except Exception as second:
        said += f"\n  what would fit could not be computed ({type(second).__name__}: {second}); error: {facts['error']}"
    run = Path(config.run.dir)
    if (attempt := latest_attempt(run)) >= 0:
        Events(run, attempt, rank).write("out_of_memory", by=rank, **facts)
    return said


def _asked_for(error: BaseException) -> str:
    """The bytes of the allocation that failed, in words: torch says them as 2.00 GiB on a GPU, in bytes on a CPU."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    return f", asking for {format_bytes(int(found[1])) if found[2] == 'bytes' else f'{found[1]} {found[2]}'} more"


def in_words(found: Advice, usable: int) -> list[str]:
    """Two lines: what is how large, the largest first, and what would fit."""
    memory, total = found.memory, found.memory.total
    parts = ", ".join(f"{part} {format_bytes(count)}" for part, count in _largest(found.activations.peak, total))
    named = [
        f"{component} {format_bytes(count)}{f' ({parts})' if component == 'activations' else ''}"
        for component, count in _largest(memory.components, total)
    ]
    needs = f"by estimate this configuration takes {format_bytes(total)}: {', '.join(named)}"
    if total <= usable:
        needs += "; that would fit, but for gaps between blocks and what isn't tensors"
    if not found.ways:
        way_out = "no micro batch, checkpointing, ZeRO stage or number of ranks would: take a device with more memory"
    else:
        way_out = ", or ".join(" with ".join(map(_change, way.items())) for way in found.ways)
    return [needs, f"would fit, with {MARGIN:.0%} to spare: {way_out}"]


def format_bytes(count: int) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _change(item: tuple[str, Any]) -> str:
    key, value = item
    if key == "ranks":
        return f"{value} ranks"
    if key == "train.micro_batch":  # it defines a run
        return f"train.micro_batch={value} in a new run (run.dir=...)"
    return f"{key}={list(value) if isinstance(value, tuple) else value}".replace(" ", "")


def _largest(counts: dict[str, int], total: int) -> list[tuple[str, int]]:
    named = [(name, count) for name, count in counts.items() if count >= SHOWN_SHARE * total]
    return sorted(named, key=lambda item: -item[1])


def _room_of_gpu() -> AvailableMemory:
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    usable = min(free + reserved, int(torch.cuda.get_per_process_memory_fraction(device) * total))
    others = total - free - reserved
    words = (
        f"of the {format_bytes(total)} of GPU {device} ({torch.cuda.get_device_name(device)}) its tensors held"
        f" {format_bytes(held)}, {format_bytes(reserved - held)} lay unused between them, and"
        f" {format_bytes(others)} were others' (CUDA's and DALI's, too); it may use {format_bytes(usable)}"
    )
    return AvailableMemory(words, usable)


def _room_of_host(left: int | None, resident: int) -> AvailableMemory:
    """Once the run was let go: what is free, and what tensors still hold because DeepSpeed does.

    Of a limit of address space there was so much left when memory ran out, when so much was resident; addresses that
    the loader's threads and allocators had reserved they will want again.
    """
    share = memory.available_bytes() // local_world_size(1)
    free = share if left is None else min(share, left + max(0, resident - memory.resident()))
    # Other kinds, as fake tensors, have no memory of their own, and some raise where they are asked for its place.
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    usable = free + sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    return AvailableMemory(f"its tensors may take {format_bytes(usable)} of this machine's memory", usable)


def _let_go(error: BaseException) -> None:
    """Frees what the frames of the error hold: network, engine, batches."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
