"""Model-FLOP utilisation: what part of its devices' peak a training makes use of, from exact counts.

A training step costs three forwards (a backward is two), and a multiply-add is two operations. Activations that are
computed again are no work of the model's, nor are passes that count for nothing.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
TERA = 1e12
PEAKS: dict[str, tuple[float | None, float]] = {
    # H100 data sheet, which prints figures with sparsity: half of them
    "NVIDIA H100 80GB HBM3": (989.5, 494.5),
    "NVIDIA H100 NVL": (835.5, 417.5),
    "NVIDIA H100 PCIe": (756.5, 378.0),
    # H200 and GH200 data sheets, likewise
    "NVIDIA H200": (989.5, 494.5),
    "NVIDIA H200 NVL": (835.5, 417.5),
    "NVIDIA GH200 480GB": (989.5, 494.5),
    # HGX B200 data sheet, an eighth of eight GPUs; GB200 NVL72 data sheet, a 72nd of 72; half, likewise
    "NVIDIA B200": (2250.0, 1125.0),
    "NVIDIA GB200": (2500.0, 1250.0),
    # A100 data sheet, which prints both
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0),
    "NVIDIA A100-PCIE-40GB": (312.0, 156.0),
    "NVIDIA A100 80GB PCIe": (312.0, 156.0),
    # data sheets of A10, A30, A40, L4, L40 and L40S
    "NVIDIA A10": (125.0, 62.5),
    "NVIDIA A30": (165.0, 82.0),
    "NVIDIA A40": (149.7, 74.8),
    "NVIDIA L4": (121.0, 60.0),
    "NVIDIA L40": (181.05, 90.5),
    "NVIDIA L40S": (362.05, 183.0),
    # GA102 white paper, with fp32 sums; its data sheets print one figure with sparsity
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
    "NVIDIA RTX A6000": (154.8, 77.4),
    "NVIDIA RTX A5000": (111.1, 55.6),  # data sheet: 222.2 with sparsity
    # Ada white paper, with fp32 sums
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 182.1),
    # V100 data sheet: no bf16 and no TF32, so plain fp32
    "Tesla V100-SXM2-16GB": (None, 15.7),
    "Tesla V100-SXM2-32GB": (None, 15.7),
    "Tesla V100-PCIE-16GB": (None, 14.0),
    "Tesla V100-PCIE-32GB": (None, 14.0),
}
"""Dense TFLOP/s by the name that torch gives a device: of bf16, and of train.precision=fp32.

There convolutions run in TF32, as torch lets cuDNN do, and matrix products in fp32: the peak is the faster one's.
"""


def device_name(device: torch.device) -> str:
    """The name by which PEAKS lists a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_images_per_second(name: str, precision: Precision, multiply_adds: int, world_size: int) -> float | None:
    """What ranks on such devices could train at their peak, with these multiply-adds an image; None where unknown."""
    bf16, fp32 = PEAKS.get(name, (None, None))
    peak = bf16 if precision == "bf16" else fp32
    return None if peak is None else peak * TERA * world_size / (3 * 2 * multiply_adds)
