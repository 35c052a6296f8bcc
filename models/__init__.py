"""CoAtNet in plain PyTorch: `coatnet("coatnet_0")` makes one. Next: family.py."""

from .coatnet import coatnet

__all__ = ["coatnet"]
