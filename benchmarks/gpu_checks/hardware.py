"""What the machine is, and what it can do at most: the bandwidth of its memory and the rate of matrix products."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu_checks import Place, Row
from benchmarks.machine import timer

PACKAGES = (
    "numpy", "triton", "deepspeed", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "timm", "webdataset", "pillow",
)  # fmt: skip


def versions_and_ceilings(place: Place) -> Iterator[Row]:
    device = _device(place)
    facts = {**device, "Linux": platform.release(), "Python": platform.python_version(), **_versions()}
    yield from ({"what": name, "is": value} for name, value in facts.items())
    size, side = (2**26, 1024) if place.small else (2**30, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=place.device) for _ in range(2))
    copying = 2 * size / timer(lambda: target.copy_(source), place.device)() / 1e9
    yield {"what": "copies in memory, read and written", "is": f"{copying:,.0f} GB/s"}
    if not place.small:
        for name, host in (("pinned", torch.zeros(size, dtype=torch.uint8).pin_memory()), ("pageable", source.cpu())):
            seconds = timer(lambda host=host: target.copy_(host, non_blocking=True), place.device)()
            yield {"what": f"{name} host memory to the device", "is": f"{size / seconds / 1e9:,.1f} GB/s"}
    rates: dict[str, float] = {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("fp32", torch.float32, False), ("fp32 by TF32", torch.float32, True),
    ):  # fmt: skip
        if tf32 and place.small:
            continue
        torch.backends.cuda.matmul.allow_tf32 = tf32
        matrix, product = (torch.ones(side, side, dtype=dtype, device=place.device) for _ in range(2))
        rates[name] = 2 * side**3 / timer(lambda m=matrix, p=product: torch.mm(m, m, out=p), place.device)() / 1e12
        yield {"what": f"matrix product in {name}", "is": f"{rates[name]:,.2f} TFLOP/s"}
    name = next(iter(device.values()))
    yield {"said": f"{name}; torch {torch.__version__}; {copying:,.0f} GB/s; {rates['bf16']:,.1f} TFLOP/s in bf16"}


def _device(place: Place) -> dict[str, str]:
    processor = f"{os.cpu_count()} x {_processor()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = {"processors": processor, "memory": f"{memory / 2**30:.0f} GiB"}
    if place.small:
        return host
    gpu = torch.cuda.get_device_properties(0)
    capability = (
        f"{gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, {torch.cuda.device_count()} here"
    )
    return {"GPU": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", "its capability": capability, **host}


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    if torch.version.cuda and torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyrefly: ignore
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version()), "NCCL": nccl}
        found["driver"] = _driver()
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "processors")
