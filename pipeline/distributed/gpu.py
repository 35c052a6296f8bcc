"""Which of its machine's GPUs a rank computes on, and the process group of all ranks over NCCL.

A launcher shows all GPUs of a machine to each of its ranks, or binds each rank to one (srun's --gpus-per-task or
--gpu-bind, or CUDA_VISIBLE_DEVICES), which then is the rank's device 0 whatever its local rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.distributed.environment import local_world_size
from pipeline.errors import UsageError
from pipeline.formatting import format_ranges

ADVICE = (
    "start as many ranks on a machine as it has GPUs, bind each to one of its own (srun --gpus-per-task=1), or train on"
    " the CPU with CUDA_VISIBLE_DEVICES= (empty)"
)


def join_over_nccl(timeout: timedelta) -> torch.device:
    """Joins the process group that RANK, WORLD_SIZE, MASTER_ADDR ... describe; returns this rank's GPU, now the current
    device. UsageError, on all ranks, where two have the same one, of which NCCL says only that its usage is invalid."""
    index = gpu_index(int(os.environ["LOCAL_RANK"]), local_world_size(1), torch.cuda.device_count())
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store.set(f"gpu/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    check_not_shared([uuid.decode() for uuid in store.multi_get([f"gpu/{each}" for each in range(ranks)])])
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes it for the device's index (engine.py, zero.Init)
    bound = device if ranks > 1 else None  # as DeepSpeed's own init_distributed does
    dist.init_process_group("nccl", store=store, rank=rank, world_size=ranks, timeout=timeout, device_id=bound)
    return device


def sum_in_fixed_order() -> None:
    """From now on the same work on this GPU gives the same bits; where no kernel does, torch raises RuntimeError.

    To be called before the first product of matrices: cuBLAS reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def gpu_index(local_rank: int, local_ranks: int, visible: int) -> int:
    """The device of a rank that sees so many; UsageError where they are too few for its machine's ranks."""
    if visible == 1:  # its own, unless another rank has it too
        return 0
    if local_ranks > visible:
        raise UsageError(f"{local_ranks} ranks on this machine see {visible} GPUs: {ADVICE}")
    return local_rank


def check_not_shared(uuids: Sequence[str]) -> None:
    """UsageError where ranks have the same GPU; `uuids` are those of all ranks' GPUs, in order."""
    for uuid in uuids:
        if uuids.count(uuid) > 1:
            ranks = [rank for rank, each in enumerate(uuids) if each == uuid]
            raise UsageError(f"ranks {', '.join(format_ranges(ranks))} have the same GPU ({uuid}): {ADVICE}")
