"""What all ranks of an allocation find together: whether they meet, how fast they add up, how far their clocks differ.

It runs in a process of its own, since torch and NCCL end a process when they give up.
"""

from __future__ import annotations

import datetime
import time

import torch
import torch.distributed as dist

from pipeline.distributed.environment import rank_and_world_size
from pipeline.distributed.gpu import join_over_nccl
from pipeline.doctor.checks import Check
from pipeline.errors import UsageError, first_line
from pipeline.formatting import format_number

RENDEZVOUS_SECONDS = 120
REPEATS = 5
LARGEST_OFFSET_SECONDS = 1.0
NETWORK = (
    "see that every node reaches MASTER_ADDR:MASTER_PORT and that no firewall lies between them; NCCL_SOCKET_IFNAME or"
    " GLOO_SOCKET_IFNAME names the network, NCCL_DEBUG=INFO says more"
)


def check_collectives() -> list[Check]:
    """This rank's device, the collectives and its clock, over the backend that the training would take."""
    backend, device, checks = "nccl" if torch.cuda.is_available() else "gloo", torch.device("cpu"), []
    timeout = datetime.timedelta(seconds=RENDEZVOUS_SECONDS)
    try:
        if backend == "nccl":
            device = join_over_nccl(timeout)
            checks.append(_device(device))
        else:
            dist.init_process_group(backend, timeout=timeout)
        checks += [_all_reduce(backend, device), _clock(device)]
    except UsageError as error:
        problem, _, advice = str(error).partition(": ")
        checks.append(Check("device", "broken", problem, advice))
    except (RuntimeError, ValueError) as error:
        checks.append(Check("collectives", "broken", f"{backend}: {first_line(error)[:200]}", NETWORK))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return checks


def _device(device: torch.device) -> Check:
    free, total = torch.cuda.mem_get_info(device)
    detail = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
    if free < total / 2:
        return Check("device", "note", f"{detail}, {free / 2**30:.0f} free", "other processes use it: see nvidia-smi")
    return Check("device", "ok", detail)


def _all_reduce(backend: str, device: torch.device) -> Check:
    """Whether all ranks' numbers add up to the right sum, and how fast, as NCCL's own tests count it."""
    rank, ranks = rank_and_world_size()
    numbers = [1 + each % 16 for each in range(ranks)]  # so that the sum is exact
    mebibytes = 64 if backend == "nccl" else 16
    values, times = torch.empty(mebibytes << 18, device=device), []
    for _ in range(1 + REPEATS):
        values.fill_(numbers[rank])
        _barrier(device)
        start = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # which waits for the device
        times.append(time.perf_counter() - start)
    low, high = (value.item() for value in values.aminmax())
    if low != sum(numbers) or high != sum(numbers):
        detail = f"{backend}: an all-reduce gave {low:g} to {high:g} instead of {sum(numbers)}"
        return Check("collectives", "broken", detail, "leave this node out, and have its memory and network tested")
    seconds = sum(times[1:]) / REPEATS  # the first one sets up the connections
    bandwidth = 2 * (ranks - 1) / ranks * values.nbytes / seconds / 1e9
    figures = {"bus bandwidth": f"{format_number(bandwidth)} GB/s"}
    return Check("collectives", "ok", f"{backend}: {ranks} ranks all-reduce {mebibytes} MiB", figures=figures)


def _clock(device: torch.device) -> Check:
    """How far this host's clock is from rank 0's, by the attempt in which the clocks seemed to differ least."""
    rank, ranks = rank_and_world_size()
    offsets = []
    for _ in range(REPEATS):
        _barrier(device)
        clocks = torch.zeros(ranks, dtype=torch.float64, device=device)
        clocks[rank] = time.time()
        dist.all_reduce(clocks)
        offsets.append((clocks - clocks[0]).cpu())
    offset = float(min(offsets, key=lambda each: float(each.max() - each.min()))[rank])
    if abs(offset) > LARGEST_OFFSET_SECONDS:
        advice = "have the nodes' clocks set (chrony, NTP): times in logs and of files mislead, certificates may fail"
        return Check("clocks", "note", f"{offset:+.1f} s from rank 0's", advice)
    return Check("clocks", "ok", f"within {LARGEST_OFFSET_SECONDS:g} s of rank 0's")


def _barrier(device: torch.device) -> None:
    """Returns on all ranks at about the same time; by a sum that is read, since NCCL's barrier is the device's."""
    dist.all_reduce(one := torch.ones(1, device=device))
    one.item()
