"""What this machine can do and what is missing: tried, not read off version numbers.

What loads native code is tried in a process of its own, so that a library that crashes does not end the doctor. It
works where packages are missing or broken: that is its purpose.

    python -m pipeline.doctor        # as `coatnet doctor`, where not even the command line's own packages import
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.compiler import find_compiler
from pipeline.distributed.launcher import free_port
from pipeline.doctor.checks import Check
from pipeline.doctor.install import driver_cuda
from pipeline.doctor.subprocess_probe import REINSTALL, has_gpu, one_line, run_isolated

Version = tuple[int, int]

PACKAGES = (
    "numpy", "pillow", "webdataset", "fsspec", "submitit", "pydantic", "typer", "rich", "pyyaml", "safetensors",
    "matplotlib",
)  # fmt: skip
"""Distributions that are needed beside torch, DeepSpeed and DALI, which have checks of their own."""
MODULES = {"pyyaml": "yaml", "pillow": "PIL"}
DALI_BUILDS = {"nvidia-dali-cuda120": 12, "nvidia-dali-cuda130": 13}
GRAY_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AP//Z"
)


def check_machine() -> list[Check]:
    """Everything that can be tried on this machine, in about ten seconds; it changes nothing."""
    checks = check_node()
    if any(check.what == "torch" and check.state == "ok" for check in checks):
        checks += check_gloo()
    if sbatch := shutil.which("sbatch"):
        return [*checks, Check("Slurm", "ok", sbatch)]
    return [*checks, Check("Slurm", "note", "no sbatch on PATH: jobs can't be submitted from this machine")]


def check_node() -> list[Check]:
    """What a machine must have to be one of those that train."""
    names = ("torch", "packages", "nvImageCodec", "DALI")
    functions = ("torch", "packages", "codec", "dali")
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(run_isolated, names, [f"environment.check_{function}" for function in functions])
        checks = [*check_python(), *(check for group in found for check in group)]
    if any(check.what == "torch" and check.state == "ok" for check in checks):
        checks += run_isolated("DeepSpeed", "environment.check_deepspeed")
    else:
        checks.append(Check("DeepSpeed", "note", "not tried: it needs torch"))
    return [*checks, check_compiler(has_gpu()), *check_resources()]


def check_python() -> list[Check]:
    """The interpreter; its bounds are those of pyproject.toml."""
    version, interpreter = sys.version.split()[0], Check("interpreter", "ok", sys.executable)
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return [Check("Python", "ok", version), interpreter]
    advice = f"{REINSTALL} PYTHON=python3.11"
    return [Check("Python", "broken", f"{version}; it must be 3.11 to 3.13", advice), interpreter]


def check_packages() -> list[Check]:
    """The packages that are imported as they are."""
    problems = {package: import_problem(MODULES.get(package, package), package) for package in PACKAGES}
    good = [f"{package} {_version_of(package)}" for package, problem in problems.items() if not problem]
    checks = [problem for problem in problems.values() if problem]
    return [*checks, Check("packages", "ok", ", ".join(good))] if good else checks


def check_torch() -> list[Check]:
    """torch, the GPUs that it sees, and whether its build is the one for this machine."""
    if problem := import_problem("torch", "torch"):
        return [problem]
    import torch

    torch.ones(8).softmax(0)  # a build for other processors crashes here
    build, count = torch.version.cuda, torch.cuda.device_count()
    checks = [Check("torch", "ok", f"{torch.__version__}, {f'built for CUDA {build}' if build else 'CPU build'}")]
    try:
        checks.append(build_fit(_numbers(build) if build else None, driver_cuda(), count))
    except RuntimeError as error:
        checks.append(Check("GPU", "note", str(error)))
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"
        checks.append(Check(f"GPU {index}", "ok", detail))
    return checks


def build_fit(build: Version | None, driver: Version | None, devices: int) -> Check:
    """Whether a build of torch (for this CUDA; None: the CPU) suits the driver (up to this CUDA; None: no GPU)."""
    if driver is None:
        surplus = f"; torch's CUDA {_dotted(build)} libraries are not needed" if build else ""
        return Check("GPU", "note" if build else "ok", f"none on this machine: training runs on the CPU{surplus}")
    if build is None:
        return Check("GPU", "broken", "there is one, but torch is a CPU build", REINSTALL)
    fit = f"{devices} seen by torch, which is built for CUDA {_dotted(build)}; the driver supports {_dotted(driver)}"
    if build[0] > driver[0]:
        return Check("GPU", "broken", fit, f"update the driver, or {REINSTALL}, which takes the build for CUDA 12")
    if devices == 0:
        return Check("GPU", "broken", fit, "check CUDA_VISIBLE_DEVICES and nvidia-smi")
    return Check("GPU", "ok", fit)


def check_deepspeed() -> list[Check]:
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


def check_codec() -> list[Check]:
    """nvImageCodec decodes a JPEG on the CPU, which is how unknown bytes are examined."""
    if problem := import_problem("nvidia.nvimgcodec", "nvImageCodec"):
        return [problem]
    from nvidia import nvimgcodec

    backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    decoder = nvimgcodec.Decoder(device_id=-99999, max_num_cpu_threads=1, backends=backends)  # -99999: the CPU
    image = decoder.decode(GRAY_JPEG)
    if image is None or image.shape[:2] != (8, 8):
        return [Check("nvImageCodec", "broken", "it cannot decode a plain JPEG on the CPU", REINSTALL)]
    return [Check("nvImageCodec", "ok", f"{nvimgcodec.__version__}, decodes on the CPU")]


def check_dali() -> list[Check]:
    """DALI decodes on the CPU and, where there is one, on the GPU, and its build is the one for this driver."""
    builds = [name for name in DALI_BUILDS if _version_of(name) != "?"]
    if len(builds) > 1:
        return [Check("DALI", "broken", f"{' and '.join(builds)} overwrite each other", REINSTALL)]
    if problem := import_problem("nvidia.dali", "DALI"):
        return [problem]
    from nvidia import dali

    try:
        driver = driver_cuda()
    except RuntimeError:  # it does not say; then only decoding tells
        driver = None
    for build in builds:
        if driver and DALI_BUILDS[build] > driver[0]:
            detail = f"{build}; the driver supports CUDA up to {_dotted(driver)}"
            return [Check("DALI", "broken", detail, f"update the driver, or {REINSTALL}")]
    places = {"CPU": "cpu"} | ({"GPU": "mixed"} if has_gpu() else {})
    for place, device in places.items():
        if problem := decoding_problem(device):
            return [Check("DALI", "broken", f"on the {place}, {problem}", REINSTALL)]
    return [Check("DALI", "ok", f"{dali.__version__}, decodes on the {' and the '.join(places)}")]


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
        return f"it cannot decode a plain JPEG: {one_line(str(error))[:200]}"
    return None if shape == (1, 8, 8, 3) else f"it decodes a plain JPEG of 8 x 8 as {shape}"


def check_gloo() -> list[Check]:
    """Two processes on this machine add up a tensor over gloo."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [group | {"RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""} for rank in range(2)]

    def rank(environment: dict[str, str]) -> list[Check]:
        return run_isolated("collectives", "collectives.check_collectives", environment=environment)

    with ThreadPoolExecutor(2) as pool:
        found = [check for checks in pool.map(rank, ranks) for check in checks if check.what == "collectives"]
    return [next((check for check in found if check.state != "ok"), found[0])]


def check_compiler(on_gpu: bool) -> Check:
    """What torch.compile needs: nothing else does."""
    try:
        return Check("compiler", "ok", find_compiler(on_gpu))
    except ValueError as error:
        keys = "train.compile and model.attention=flex need it" if on_gpu else "train.compile needs it"
        return Check("compiler", "note", f"only {keys}", str(error))


def check_resources() -> list[Check]:
    """Cores, memory, disk space here, and the shared memory that ranks on one machine exchange through."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container or a Slurm job may take
    if limit.exists() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    here = f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB of memory"
    free = {f"free in {Path.cwd()}": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"}
    checks = [Check("machine", "ok", here, figures=free)]
    if (shared := Path("/dev/shm")).exists() and (size := shutil.disk_usage(shared).total) < 2**30:
        detail = f"{size / 2**20:.0f} MiB; NCCL between the GPUs of one machine needs 1 GiB"
        checks.append(Check("/dev/shm", "note", detail, "in a container: docker run --shm-size=1g, or --ipc=host"))
    return checks


def import_problem(name: str, what: str) -> Check | None:
    """Why a package does not import, if it does not."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return Check(what, "missing", "not installed", "make install")
        return Check(what, "broken", f"cannot be imported: {error}", REINSTALL)
    except (ImportError, OSError, RuntimeError) as error:
        return Check(what, "broken", f"cannot be imported: {one_line(str(error))}", REINSTALL)
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
