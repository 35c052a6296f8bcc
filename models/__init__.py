"""CoAtNet in plain PyTorch: `coatnet("coatnet_0")` makes one."""

from .coatnet import coatnet

__all__ = ["coatnet"]
