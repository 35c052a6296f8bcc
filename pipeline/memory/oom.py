"""A rank that runs out of memory reports what it needed, what there was and what would fit, instead of a traceback.

It knows the configuration and not the moment: the sizes are estimates (estimate.py, activations.py), computed on the
host once the memory of the run was freed. A process that the kernel kills for its memory, as Linux does on a machine
without GPUs, reports nothing.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data import memory
from pipeline.checkpoint.attempts import latest_attempt
from pipeline.config.schema import Config
from pipeline.distributed.environment import local_world_size, rank_and_world_size
from pipeline.errors import Interrupted, RunFailed, first_line
from pipeline.memory.activations import estimates
from pipeline.memory.suggest import MARGIN, suggest_settings
from pipeline.run.events import Events


@contextmanager
def explain_oom(config: Config, classes: int) -> Iterator[None]:
    """Inside, running out of memory, on the device or the host, becomes RunFailed, with an event `out_of_memory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        try:
            on_gpu = torch.cuda.is_available()
            left, resident = memory.available_addresses(), memory.resident()  # while it is as it was
            _release(error)
            usable = _usable_of_gpu() if on_gpu else _usable_of_host(left, resident)
            message = _explanation(config, classes, error, usable, "cuda" if on_gpu else "cpu")
        except MemoryError:
            rank = rank_and_world_size()[0]
            raise RunFailed(f"rank {rank} ran out of memory; too little is left to compute what would fit") from None
        raise RunFailed(message) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error that is not reported yet says that memory could not be had."""
    return not isinstance(error, RunFailed | Interrupted) and memory.is_out_of_memory(error)


def _explanation(config: Config, classes: int, error: BaseException, usable: int, device: str) -> str:
    """The lines of the error, whose facts go to the run's events too; a failing estimate does not hide the error."""
    rank, world_size = rank_and_world_size()
    facts: dict[str, Any] = {"rank": rank, "usable_bytes": usable, "error": first_line(error)}
    lines = [f"rank {rank} ran out of memory: {facts['error']}"]
    try:
        estimate, present = estimates(config, classes, device), (config.train, config.zero, world_size)
        needed, activations = estimate(present)
        suggestions = suggest_settings(present, estimate, usable)
        fits = [suggestion.changes for suggestion in suggestions]
        facts |= {"needed_bytes": needed.components, "activations": activations.peak, "fits": fits}
        largest = sorted(needed.components.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{component} {format_bytes(count)}" for component, count in largest)
        lines.append(f"needed, by estimate: {format_bytes(needed.total)} ({parts}), plus {MARGIN:.0%} overhead")
        lines.append(f"usable by this rank: {format_bytes(usable)}")
        options = [f"{suggestion} ({format_bytes(suggestion.bytes)})" for suggestion in suggestions]
        lines.append(f"would fit: {', or '.join(options) or 'nothing; take a device with more memory'}")
        if any("train.micro_batch" in changes for changes in fits):
            lines[-1] += "; a new train.micro_batch needs a new run (run.dir=...)"
    except Exception as second:
        lines.append(f"what would fit could not be computed ({type(second).__name__}: {second})")
    run = Path(config.run.dir)
    if (attempt := latest_attempt(run)) >= 0:
        Events(run, attempt, rank).write("out_of_memory", by=rank, **facts)
    return "\n  ".join(lines)


def format_bytes(count: int) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _usable_of_gpu() -> int:
    """Bytes of the GPU that this rank's allocator may have: what is free, and what it holds already."""
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return min(free + torch.cuda.memory_reserved(device), int(fraction * total))


def _usable_of_host(left: int | None, resident: int) -> int:
    """Once the run's memory was freed: what is free, and what tensors still hold because DeepSpeed does.

    `left` was left of a limit of address space when memory ran out, and `resident` resident; addresses that the
    loader's threads and allocators had reserved they will need again.
    """
    share = memory.available_bytes() // local_world_size(1)
    free = share if left is None else min(share, left + max(0, resident - memory.resident()))
    # Other kinds, as fake tensors, have no memory of their own, and some raise where they are asked for its address.
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return free + sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _release(error: BaseException) -> None:
    """Frees what the frames of the error hold: network, engine, batches."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if dali := sys.modules.get("nvidia.dali.backend"):
            dali.ReleaseUnusedMemory()  # the estimate counts its decoders
