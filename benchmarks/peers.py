"""timm, the peer that benchmarks and tests compare with; it imports beside every build of torch."""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import library

_SCHEMAS = library.Library("torchvision", "FRAGMENT")
"""What is defined in it lives as long as it does."""


@cache
def import_timm() -> ModuleType:
    """timm. ImportError where it, or the torchvision that it needs, is not installed: both are in the extra `dev`.

    torchvision's wheel is built for CUDA. Beside a CPU build of torch its operators do not load, and torchvision,
    which describes two of them to torch, does not import; with their schemas defined it does. No model calls them.
    """
    if not _operators_load():
        for name in ("nms", "qnms"):
            _SCHEMAS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


def _operators_load() -> bool:
    """Whether torchvision's compiled operators fit this torch. To import torchvision instead would leave half of it."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise ImportError("torchvision is not installed; pip install -e '.[dev]' brings it")
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        return False
    return True
