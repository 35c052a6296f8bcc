"""The compiler that torch.compile calls, by the rules of those who call it.

On a GPU Triton builds a launcher for its kernels, in C (triton/runtime/build.py); on a CPU torch builds the kernels, in
C++ (torch/_inductor/cpp_builder.py). Both include Python.h.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def find_compiler(on_gpu: bool) -> str:
    """Where it is; ValueError where it, or Python.h, is missing."""
    variable, names = ("CC", ["gcc", "clang"]) if on_gpu else ("CXX", ["g++"])
    names = [os.environ[variable]] if variable in os.environ else names
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise ValueError(
            f"there is no compiler {' or '.join(names)} on this machine; install it, or set another one in the"
            f" environment variable {variable}"
        )
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.exists():
        raise ValueError(f"there is no {header} on this machine; install Python's headers (python3-dev, python3-devel)")
    return found
