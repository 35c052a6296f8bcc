"""Model-FLOP utilisation: what part of its devices' peak a training makes use of, from exact counts.

A training step costs three forwards (a backward is two), and a multiply-add is two operations. Activations that are
computed again are no work of the model's, nor are passes that count for nothing.
"""

from __future__ import annotations

import torch

from pipeline.costs.devices import BY_TORCH_NAME, Precision


def device_name(device: torch.device) -> str:
    """The name by which pipeline/costs/devices.py lists a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_images_per_second(name: str, precision: Precision, multiply_adds: int, world_size: int) -> float | None:
    """What ranks on such devices could train at their peak, with these multiply-adds an image; None where unknown."""
    device = BY_TORCH_NAME.get(name)
    peak = None if device is None else device.peak(precision)
    return None if peak is None else peak * world_size / (3 * 2 * multiply_adds)
