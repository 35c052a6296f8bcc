"""What every rank imports, imported once by the launcher, so that ranks are forks of it and start in no time.

A fork is a whole process only of one that has a single thread, no CUDA driver at work and no process group; whether
that holds is looked at before any is made.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress

CUDA_ERROR_NOT_INITIALIZED = 3
"""cuda.h: what the driver answers before cuInit."""


def preload(imports: Callable[[], None]) -> bool:
    """Imports what ranks need; whether they may be forked then."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else torch asks the driver, which a fork could not use any more
    try:
        imports()
    finally:
        del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
    return may_fork()


def may_fork() -> bool:
    """Whether a fork of this process can do all that a new one could."""
    distributed = sys.modules.get("torch.distributed")
    grouped = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return len(os.listdir("/proc/self/task")) == 1 and not grouped and not cuda_is_initialized()


def cuda_is_initialized() -> bool:
    with suppress(OSError):  # no driver
        count = ctypes.c_int()
        return ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(count)) != CUDA_ERROR_NOT_INITIALIZED
    return False
