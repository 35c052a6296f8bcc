"""What all ranks of an allocation find together: whether they meet, how fast they add up, how far their clocks differ.

Every rank says what it saw. It runs in a process of its own, since torch and NCCL end a process when they give up.
"""

from __future__ import annotations

import datetime
import os
import time

import torch
import torch.distributed as dist

from pipeline.distributed.environment import rank_and_world_size
from pipeline.doctor.findings import Check, Measurement
from pipeline.errors import first_line

MEETING_SECONDS = 120
TIMES = 5
LARGEST_OFFSET_SECONDS = 1.0
NETWORK = (
    "see that every node reaches MASTER_ADDR:MASTER_PORT and that no firewall lies between them; NCCL_SOCKET_IFNAME or"
    " GLOO_SOCKET_IFNAME names the network, NCCL_DEBUG=INFO says more"
)


def check_all_reduce() -> list[Check]:
    """This rank's device, the collectives and its clock, over the backend that the training would take."""
    backend, device, findings = "gloo", torch.device("cpu"), []
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            detail = f"there are {torch.cuda.device_count()}, and ranks for more"
            return [Check("device", "broken", detail, "start as many tasks on a node as it has GPUs")]
        torch.cuda.set_device(device)
        findings.append(_device(device))
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=MEETING_SECONDS))
        findings += [_all_reduce(backend, device), _clock(device)]
    except (RuntimeError, ValueError) as error:
        findings.append(Check("collectives", "broken", f"{backend}: {first_line(error)[:200]}", NETWORK))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return findings


def _device(device: torch.device) -> Check:
    free, total = torch.cuda.mem_get_info(device)
    detail = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
    figures = (Measurement("free", free / 2**30, "GiB"),)
    if free < total / 2:
        return Check("device", "note", detail, "somebody else uses it: nvidia-smi says who", figures)
    return Check("device", "ok", detail, figures=figures)


def _all_reduce(backend: str, device: torch.device) -> Check:
    """Whether all ranks' numbers add up to the right sum, and how fast, as NCCL's own tests count it."""
    rank, ranks = rank_and_world_size()
    numbers = [1 + each % 16 for each in range(ranks)]  # so that the sum is exact
    mebibytes = 64 if backend == "nccl" else 16
    values, spent = torch.empty(mebibytes << 18, device=device), []
    for _ in range(1 + TIMES):
        values.fill_(numbers[rank])
        _meet(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()  # which waits for the device
        spent.append(time.perf_counter() - began)
    least, most = (value.item() for value in values.aminmax())
    if least != sum(numbers) or most != sum(numbers):
        detail = f"{backend}: an all-reduce gave {least:g} to {most:g} in place of {sum(numbers)}"
        return Check("collectives", "broken", detail, "have this node's memory and network tested, and leave it out")
    seconds = sum(spent[1:]) / TIMES  # the first one sets up the connections
    bus = 2 * (ranks - 1) / ranks * values.nbytes / seconds / 1e9
    detail = f"{backend}: {ranks} ranks add up {mebibytes} MiB"
    return Check("collectives", "ok", detail, figures=(Measurement("bus bandwidth", bus, "GB/s"),))


def _clock(device: torch.device) -> Check:
    """How far this host's clock is ahead of rank 0's, by the try in which the clocks seemed to differ least."""
    rank, ranks = rank_and_world_size()
    tries = []
    for _ in range(TIMES):
        began = time.perf_counter()
        _meet(device)
        waited = time.perf_counter() - began
        looks = torch.zeros(ranks, 2, dtype=torch.float64, device=device)
        looks[rank] = torch.tensor([time.time(), waited], dtype=torch.float64)
        dist.all_reduce(looks)
        tries.append(looks.cpu())
    looks = min(tries, key=lambda each: float(each[:, 0].max() - each[:, 0].min()))
    ahead, known_to = float(looks[rank, 0] - looks[0, 0]), float(looks[:, 1].max())
    figures = (
        Measurement("ahead of rank 0's by", 1000 * ahead, "ms"),
        Measurement("accurate to", 1000 * known_to, "ms"),
    )
    if abs(ahead) - known_to > LARGEST_OFFSET_SECONDS:
        advice = "have the nodes' clocks set (chrony, NTP): times in logs and of files mislead, certificates may fail"
        return Check("clocks", "note", "", advice, figures)
    return Check("clocks", "ok", "", figures=figures)


def _meet(device: torch.device) -> None:
    """Returns on all ranks at about the same time; a sum that is looked at, since NCCL's barrier is the device's."""
    dist.all_reduce(one := torch.ones(1, device=device))
    one.item()
