"""GPUs with the figures of their makers' data sheets. Nothing here is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UsageError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Device:
    """A GPU: dense peaks in TFLOP/s, gibibytes, and GB/s of its memory and, one way, of its link to the next GPU.

    `fp32` is the peak of train.precision=fp32: there convolutions run in TF32, as torch lets cuDNN do, and matrix
    products in fp32, and the peak is the faster one's. `names` are those that torch gives the device.
    """

    bf16: float | None
    fp32: float
    gibibytes: int
    memory_rate: float
    link_rate: float
    names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Of the device, as torch names it."""
        return "cuda" if self.names else "cpu"

    def peak(self, precision: Precision) -> float | None:
        """Operations a second; None where it has none."""
        peak = self.bf16 if precision == "bf16" else self.fp32
        return None if peak is None else peak * 1e12


PCIE3, PCIE4, PCIE5 = 16, 32, 64
"""GB/s one way of 16 lanes."""
DEVICES = {
    # H100 data sheet, which prints figures with sparsity: half of them. NVLink both ways there, half of it here.
    "h100": Device(989.5, 494.5, 80, 3350, 450, ("NVIDIA H100 80GB HBM3",)),
    "h100-nvl": Device(835.5, 417.5, 94, 3900, 300, ("NVIDIA H100 NVL",)),
    "h100-pcie": Device(756.5, 378.0, 80, 2000, PCIE5, ("NVIDIA H100 PCIe",)),
    # H200 and GH200 data sheets, likewise
    "h200": Device(989.5, 494.5, 141, 4800, 450, ("NVIDIA H200",)),
    "h200-nvl": Device(835.5, 417.5, 141, 4800, 450, ("NVIDIA H200 NVL",)),
    "gh200": Device(989.5, 494.5, 96, 4000, PCIE5, ("NVIDIA GH200 480GB",)),
    # HGX B200 data sheet, an eighth of eight GPUs; GB200 NVL72 data sheet, a 72nd of 72; half, likewise
    "b200": Device(2250.0, 1125.0, 180, 7700, 900, ("NVIDIA B200",)),
    "gb200": Device(2500.0, 1250.0, 186, 8000, 900, ("NVIDIA GB200",)),
    # A100 data sheet, which prints both
    "a100-40gb": Device(312.0, 156.0, 40, 1555, 300, ("NVIDIA A100-SXM4-40GB",)),
    "a100": Device(312.0, 156.0, 80, 2039, 300, ("NVIDIA A100-SXM4-80GB",)),
    "a100-pcie-40gb": Device(312.0, 156.0, 40, 1555, PCIE4, ("NVIDIA A100-PCIE-40GB",)),
    "a100-pcie": Device(312.0, 156.0, 80, 1935, PCIE4, ("NVIDIA A100 80GB PCIe",)),
    # data sheets of A10, A30, A40, L4, L40 and L40S
    "a10": Device(125.0, 62.5, 24, 600, PCIE4, ("NVIDIA A10",)),
    "a30": Device(165.0, 82.0, 24, 933, PCIE4, ("NVIDIA A30",)),
    "a40": Device(149.7, 74.8, 48, 696, PCIE4, ("NVIDIA A40",)),
    "l4": Device(121.0, 60.0, 24, 300, PCIE4, ("NVIDIA L4",)),
    "l40": Device(181.05, 90.5, 48, 864, PCIE4, ("NVIDIA L40",)),
    "l40s": Device(362.05, 183.0, 48, 864, PCIE4, ("NVIDIA L40S",)),
    # GA102 white paper, with fp32 sums; its data sheets print one figure with sparsity
    "rtx-3090": Device(71.0, 35.6, 24, 936, PCIE4, ("NVIDIA GeForce RTX 3090",)),
    "rtx-a6000": Device(154.8, 77.4, 48, 768, PCIE4, ("NVIDIA RTX A6000",)),
    "rtx-a5000": Device(111.1, 55.6, 24, 768, PCIE4, ("NVIDIA RTX A5000",)),  # data sheet: 222.2 with sparsity
    # Ada white paper, with fp32 sums
    "rtx-4090": Device(165.2, 82.6, 24, 1008, PCIE4, ("NVIDIA GeForce RTX 4090",)),
    "rtx-6000-ada": Device(364.2, 182.1, 48, 960, PCIE4, ("NVIDIA RTX 6000 Ada Generation",)),
    # V100 data sheet: no bf16 and no TF32, so plain fp32
    "v100-16gb": Device(None, 15.7, 16, 900, 150, ("Tesla V100-SXM2-16GB",)),
    "v100": Device(None, 15.7, 32, 900, 150, ("Tesla V100-SXM2-32GB",)),
    "v100-pcie-16gb": Device(None, 14.0, 16, 900, PCIE3, ("Tesla V100-PCIE-16GB",)),
    "v100-pcie": Device(None, 14.0, 32, 900, PCIE3, ("Tesla V100-PCIE-32GB",)),
}
"""By the name that --gpu takes. Where a link is PCIe's, NVLink bridges, which some cards can have, are not counted."""
BY_TORCH_NAME = {name: device for device in DEVICES.values() for name in device.names}


def find_device(name: str) -> Device:
    """A device by its short name or by torch's, in any case; UsageError for one that is not listed."""
    written = re.sub(r"[\s_]+", "-", name.strip().lower())
    found = DEVICES.get(written) or {each.lower(): device for each, device in BY_TORCH_NAME.items()}.get(name.lower())
    if found is None:
        raise UsageError(f"--gpu {name} is not known; choose {', '.join(DEVICES)}, or, with --calibrate, cpu")
    return found
