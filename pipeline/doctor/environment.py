"""What this machine can do and what is missing, as findings that were tried, not read off version numbers.

What loads native code is tried in a process of its own, so that a library that crashes is a finding and not the end of
the doctor. It works where packages are missing or broken: that is its purpose. What cannot be tried is not claimed.

    python -m pipeline.doctor        # as `coatnet doctor`, where not even the command line's own packages import
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.doctor.findings import Check, Measurement
from pipeline.doctor.install import driver_cuda
from pipeline.doctor.subprocess_probe import REINSTALL, _one_line, has_gpu, run_isolated

Version = tuple[int, int]

PACKAGES = {
    "numpy": "numpy",
    "webdataset": "webdataset",
    "fsspec": "fsspec",
    "submitit": "submitit",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
}
"""Import name and distribution of what is needed beside torch, DeepSpeed and DALI, which have probes of their own."""
STORES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp"}
DALI_BUILDS = {"nvidia-dali-cuda120": 12, "nvidia-dali-cuda130": 13}
GRAY_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AP//Z"
)


def diagnose() -> list[Check]:
    """Everything that can be tried on this machine, in some ten seconds of computing; it changes nothing."""
    findings = check_node()
    if any(finding.what == "torch" and finding.state == "ok" for finding in findings):
        findings += probe_collectives()
    return [*findings, *probe_slurm()]


def check_node() -> list[Check]:
    """What a machine must have to be one of those that train."""
    with ThreadPoolExecutor(2) as pool:
        separate = list(pool.map(run_isolated, ["torch", "packages", "nvImageCodec", "DALI"]))
    findings = [*probe_python(), *(finding for group in separate for finding in group)]
    if any(finding.what == "torch" and finding.state == "ok" for finding in findings):
        findings += run_isolated("DeepSpeed")
    else:
        findings.append(Check("DeepSpeed", "note", "not tried: it needs torch"))
    return [*findings, *probe_compilers(), *check_resources()]


def probe_python() -> list[Check]:
    """The interpreter; its bounds are those of pyproject.toml."""
    version, place = sys.version.split()[0], Check("interpreter", "ok", sys.executable)
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return [Check("Python", "ok", version), place]
    advice = f"{REINSTALL} PYTHON=python3.11"
    return [Check("Python", "broken", f"{version}; it must be 3.11 to 3.13", advice), place]


def probe_packages() -> list[Check]:
    """The packages that are imported as they are, and which stores fsspec can reach."""
    there, findings = [], []
    for name, distribution in PACKAGES.items():
        problem = import_problem(name, distribution)
        if problem:
            findings.append(problem)
        else:
            there.append(f"{distribution} {_version_of(distribution)}")
    if there:
        findings.append(Check("packages", "ok", ", ".join(there)))
    return findings + ([] if any(finding.what == "fsspec" for finding in findings) else probe_stores())


def probe_stores() -> list[Check]:
    """Which kinds of URL data can be read from."""
    import fsspec

    findings = [Check("file://", "ok", f"fsspec {fsspec.__version__}")]
    for protocol, package in STORES.items():
        try:
            fsspec.get_filesystem_class(protocol)
            findings.append(Check(f"{protocol}://", "ok", f"{package} {_version_of(package)}"))
        except ImportError:
            advice = f"only if data lie there: .venv/bin/pip install {package}"
            findings.append(Check(f"{protocol}://", "note", f"{package} is not installed", advice))
    return findings


def probe_torch() -> list[Check]:
    """torch, the GPUs that it sees, and whether its build is the one for this machine."""
    if problem := import_problem("torch", "torch"):
        return [problem]
    import torch

    torch.ones(8).softmax(0)  # a build for other processors dies here
    build, count = torch.version.cuda, torch.cuda.device_count()
    kind = f"built for CUDA {build}" if build else "CPU build"
    driver = None
    try:
        driver = driver_cuda()
        findings = [build_fit(_numbers(build) if build else None, driver, count)]
    except RuntimeError as error:
        findings = [Check("GPU", "note", str(error))]
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"
        findings.append(Check(f"GPU {index}", "ok", detail))
    return [Check("torch", "ok", f"{torch.__version__}, {kind}"), *findings]


def build_fit(build: Version | None, driver: Version | None, devices: int) -> Check:
    """Whether a build of torch (for this CUDA; None: the CPU) suits the driver (up to this CUDA; None: no GPU)."""
    if driver is None:
        surplus = f"; torch's CUDA {_dotted(build)} libraries lie idle" if build else ""
        return Check("GPU", "note" if build else "ok", f"none on this machine: training runs on the CPU{surplus}")
    if build is None:
        return Check("GPU", "broken", "there is one, but torch is a CPU build", REINSTALL)
    if build[0] > driver[0]:
        detail = f"torch is built for CUDA {_dotted(build)}; the driver supports up to {_dotted(driver)}"
        return Check("GPU", "broken", detail, f"update the driver, or {REINSTALL}, which takes the build for CUDA 12")
    if devices == 0:
        detail = f"driver (CUDA {_dotted(driver)}) and build ({_dotted(build)}) fit, but torch sees no device"
        return Check("GPU", "broken", detail, "look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    detail = f"{devices} seen; driver for CUDA {_dotted(driver)}, torch built for {_dotted(build)}"
    return Check("GPU", "ok", detail)


def probe_deepspeed() -> list[Check]:
    """DeepSpeed, and whether it is the version whose internals the checkpoints are written for."""
    if problem := import_problem("deepspeed", "DeepSpeed"):
        return [problem]
    import deepspeed

    from pipeline.training.zero import check_version

    try:
        check_version(deepspeed.__version__)
    except RuntimeError as error:
        return [Check("DeepSpeed", "broken", str(error))]
    return [Check("DeepSpeed", "ok", deepspeed.__version__)]


def probe_codec() -> list[Check]:
    """nvImageCodec decodes a JPEG on the CPU, which is how unknown bytes are examined."""
    if problem := import_problem("nvidia.nvimgcodec", "nvImageCodec"):
        return [problem]
    from nvidia import nvimgcodec

    backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    decoder = nvimgcodec.Decoder(device_id=-99999, max_num_cpu_threads=1, backends=backends)  # -99999: the CPU
    image = decoder.decode(GRAY_JPEG)
    if image is None or image.shape[:2] != (8, 8):
        return [Check("nvImageCodec", "broken", "it does not decode a plain JPEG on the CPU", REINSTALL)]
    return [Check("nvImageCodec", "ok", f"{nvimgcodec.__version__}, decodes on the CPU")]


def probe_dali() -> list[Check]:
    """DALI decodes on the CPU and, where there is one, on the GPU, and its build is the one for this driver."""
    builds = [name for name in DALI_BUILDS if _version_of(name) != "?"]
    if len(builds) > 1:
        return [Check("DALI", "broken", f"{' and '.join(builds)} overwrite each other", REINSTALL)]
    if problem := import_problem("nvidia.dali", "DALI"):
        return [problem]
    from nvidia import dali

    fits = [dali_fit(name) for name in builds]
    places = {"CPU": "cpu"}
    if has_gpu() and all(fit.state == "ok" for fit in fits):
        places["GPU"] = "mixed"
    for place, device in places.items():
        if problem := decoding_problem(device):
            return [Check("DALI", "broken", f"on the {place} {problem}", REINSTALL), *fits]
    return [Check("DALI", "ok", f"{dali.__version__}, decodes on the {' and the '.join(places)}"), *fits]


def decoding_problem(device: str) -> str | None:
    """Why DALI does not decode on a device ("cpu", or "mixed" for the GPU), if it does not."""
    import numpy
    from nvidia import dali

    graph = dali.Pipeline(batch_size=1, num_threads=1, device_id=0 if device == "mixed" else None)
    with graph:
        encoded = dali.fn.external_source(source=lambda: [numpy.frombuffer(GRAY_JPEG, numpy.uint8)])
        graph.set_outputs(dali.fn.decoders.image(encoded, device=device))
    try:
        graph.build()
        (images,) = graph.run()
        shape = images.as_cpu().as_array().shape
    except RuntimeError as error:
        return f"it does not decode a plain JPEG: {_one_line(str(error))[:200]}"
    return None if shape == (1, 8, 8, 3) else f"it makes {shape} of a plain JPEG of 8 x 8"


def dali_fit(build: str) -> Check:
    """Whether a build of DALI runs with this machine's driver; without a GPU any does."""
    try:
        driver = driver_cuda()
    except RuntimeError as error:
        return Check("DALI's build", "note", f"{build}; {error}")
    if driver and DALI_BUILDS[build] > driver[0]:
        detail = f"{build}; the driver supports CUDA up to {_dotted(driver)}"
        return Check("DALI's build", "broken", detail, f"update the driver, or {REINSTALL}")
    return Check("DALI's build", "ok", build)


def probe_collectives() -> list[Check]:
    """Two processes on this machine add up a tensor over gloo."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        meeting = {"GLOO_SOCKET_IFNAME": "lo", "RENDEZVOUS": f"file://{folder}/rendezvous"}
        ranks = [meeting | {"RANK": str(rank)} for rank in range(2)]
        groups = list(pool.map(lambda rank: run_isolated("gloo", environment=rank), ranks))
    found = [finding for group in groups for finding in group]
    return [next((finding for finding in found if finding.state != "ok"), found[0])]


def probe_all_reduce() -> list[Check]:
    """One of the two ranks of probe_collectives."""
    import datetime

    import torch
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=60)
    meeting, rank = os.environ["RENDEZVOUS"], int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    if total.item() != 3:
        return [Check("collectives", "broken", f"gloo: an all-reduce of 1 and 2 gave {total.item()}")]
    return [Check("collectives", "ok", "gloo: two processes on this machine")]


def probe_slurm() -> list[Check]:
    """Whether jobs can be submitted from here."""
    if found := shutil.which("sbatch"):
        return [Check("Slurm", "ok", found)]
    return [Check("Slurm", "note", "no sbatch on PATH: this machine is not a cluster's login node")]


def probe_compilers() -> list[Check]:
    """Compilers, which nothing needs by default."""
    found = {name: shutil.which(name) for name in ("nvcc", "ninja", "g++")}
    there = ", ".join(path for path in found.values() if path)
    lacking = ", ".join(name for name, path in found.items() if not path)
    if not lacking:
        return [Check("compilers", "ok", there)]
    return [Check("compilers", "note", f"no {lacking}: not needed except for offload and torch.compile")]


def check_resources() -> list[Check]:
    """Cores, memory, disk space here, and the shared memory that ranks on one machine exchange through."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container or a Slurm job may take
    if limit.exists() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    here = f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB of memory"
    free = Measurement(f"free in {Path.cwd()}", shutil.disk_usage(".").free / 2**30, "GiB")
    findings = [Check("machine", "ok", here, figures=(free,))]
    if (shared := Path("/dev/shm")).exists() and (size := shutil.disk_usage(shared).total) < 2**30:
        detail = f"{size / 2**20:.0f} MiB; NCCL between the GPUs of one machine wants 1 GiB"
        findings.append(Check("/dev/shm", "note", detail, "in a container: docker run --shm-size=1g, or --ipc=host"))
    elif shared.exists():
        findings.append(Check("/dev/shm", "ok", "", figures=(Measurement("size", size / 2**30, "GiB"),)))
    return findings


def import_problem(name: str, what: str) -> Check | None:
    """Why a package does not import, if it does not."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return Check(what, "missing", "not installed", "make install")
        return Check(what, "broken", f"does not import: {error}", REINSTALL)
    except (ImportError, OSError, RuntimeError) as error:
        return Check(what, "broken", f"does not import: {_one_line(str(error))}", REINSTALL)
    return None


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def _numbers(version: str) -> Version:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: Version | None) -> str:
    return ".".join(map(str, version or ()))
