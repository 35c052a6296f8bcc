"""Imports that every rank needs, done once by the launcher, so that ranks are forks of it and start at once.

A process can be forked only if it has a single thread, no initialized CUDA driver and no process group; that is
checked first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress

CUDA_ERROR_NOT_INITIALIZED = 3
"""cuda.h: what the driver returns before cuInit."""


def preload(imports: Callable[[], None]) -> bool:
    """Imports what ranks need; returns whether they may then be forks."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else torch initializes the driver, unusable in a fork then
    try:
        imports()
    finally:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
    return may_fork()


def may_fork() -> bool:
    """Whether a fork of this process could do all that a new process can."""
    distributed = sys.modules.get("torch.distributed")
    grouped = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return len(os.listdir("/proc/self/task")) == 1 and not grouped and not cuda_is_initialized()


def cuda_is_initialized() -> bool:
    with suppress(OSError):  # no driver
        count = ctypes.c_int()
        return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count)) != CUDA_ERROR_NOT_INITIALIZED
    return False
