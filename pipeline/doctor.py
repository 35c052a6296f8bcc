"""What this machine can do and what is missing, as findings that were tried, not read off version numbers.

What loads native code is tried in a process of its own, so that a library that crashes is a finding and not the end of
the doctor. It works where packages are missing or broken: that is its purpose. What cannot be tried is not claimed.

    python -m pipeline.doctor        # as `coatnet doctor`, where not even the command line's own packages import

Next: install.py, which makes the environment that is examined here; doctor_of_ranks.py for a whole allocation.
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.install import ROOT, driver_cuda

State = Literal["ok", "missing", "note", "broken"]
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
PROBE_SECONDS = 120
REINSTALL = "make clean install"
GRAY_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/wAALCAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8AP//Z"
)


@dataclass(frozen=True)
class Figure:
    """What was measured, and differs a little each time and from machine to machine."""

    what: str
    value: float
    unit: str

    @property
    def amount(self) -> str:
        """The value as it is read, with its unit."""
        return f"{self.value:{',.0f' if abs(self.value) >= 100 else '.3g'}} {self.unit}"

    def __str__(self) -> str:
        return f"{self.what} {self.amount}"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` and `broken` keep the training from working; a `note` does not."""

    what: str
    state: State
    detail: str
    advice: str = ""
    figures: tuple[Figure, ...] = ()

    def __str__(self) -> str:
        return "; ".join(filter(None, [self.detail, ", ".join(map(str, self.figures))]))


def diagnose() -> list[Finding]:
    """Everything that can be tried on this machine, in some ten seconds of computing; it changes nothing."""
    findings = examine_node()
    if any(finding.what == "torch" and finding.state == "ok" for finding in findings):
        findings += probe_collectives()
    return [*findings, *probe_slurm()]


def examine_node() -> list[Finding]:
    """What a machine must have to be one of those that train."""
    with ThreadPoolExecutor(2) as pool:
        separate = list(pool.map(in_own_process, ["torch", "packages", "nvImageCodec", "DALI"]))
    findings = [*probe_python(), *(finding for group in separate for finding in group)]
    if any(finding.what == "torch" and finding.state == "ok" for finding in findings):
        findings += in_own_process("DeepSpeed")
    else:
        findings.append(Finding("DeepSpeed", "note", "not tried: it needs torch"))
    return [*findings, *probe_compilers(), *probe_room()]


def exit_status(findings: list[Finding]) -> int:
    """0 where everything needed is there and works, else 1."""
    return int(any(finding.state in ("missing", "broken") for finding in findings))


def rows(findings: list[Finding]) -> list[tuple[str, str, str, str]]:
    """(mark, what, detail, advice) for a table, what needs doing first."""
    marks = {"broken": "BROKEN", "missing": "MISSING", "note": "note", "ok": "ok"}
    order = list(marks)
    worst_first = sorted(findings, key=lambda finding: order.index(finding.state))
    return [(marks[each.state], each.what, str(each), each.advice) for each in worst_first]


def findings_of(found: list[dict[str, Any]]) -> list[Finding]:
    """Findings that went through JSON as asdict makes them."""
    return [replace(Finding(**each), figures=tuple(Figure(**figure) for figure in each["figures"])) for each in found]


def probe_python() -> list[Finding]:
    """The interpreter; its bounds are those of pyproject.toml."""
    version, place = sys.version.split()[0], Finding("interpreter", "ok", sys.executable)
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return [Finding("Python", "ok", version), place]
    advice = f"{REINSTALL} PYTHON=python3.11"
    return [Finding("Python", "broken", f"{version}; it must be 3.11 to 3.13", advice), place]


def probe_packages() -> list[Finding]:
    """The packages that are imported as they are, and which stores fsspec can reach."""
    there, findings = [], []
    for name, distribution in PACKAGES.items():
        problem = import_problem(name, distribution)
        if problem:
            findings.append(problem)
        else:
            there.append(f"{distribution} {_version_of(distribution)}")
    if there:
        findings.append(Finding("packages", "ok", ", ".join(there)))
    return findings + ([] if any(finding.what == "fsspec" for finding in findings) else probe_stores())


def probe_stores() -> list[Finding]:
    """Which kinds of URL data can be read from."""
    import fsspec

    findings = [Finding("file://", "ok", f"fsspec {fsspec.__version__}")]
    for protocol, package in STORES.items():
        try:
            fsspec.get_filesystem_class(protocol)
            findings.append(Finding(f"{protocol}://", "ok", f"{package} {_version_of(package)}"))
        except ImportError:
            advice = f"only if data lie there: .venv/bin/pip install {package}"
            findings.append(Finding(f"{protocol}://", "note", f"{package} is not installed", advice))
    return findings


def probe_torch() -> list[Finding]:
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
        findings = [Finding("GPU", "note", str(error))]
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"
        findings.append(Finding(f"GPU {index}", "ok", detail))
    return [Finding("torch", "ok", f"{torch.__version__}, {kind}"), *findings]


def build_fit(build: Version | None, driver: Version | None, devices: int) -> Finding:
    """Whether a build of torch (for this CUDA; None: the CPU) suits the driver (up to this CUDA; None: no GPU)."""
    if driver is None:
        surplus = f"; torch's CUDA {_dotted(build)} libraries lie idle" if build else ""
        return Finding("GPU", "note" if build else "ok", f"none on this machine: training runs on the CPU{surplus}")
    if build is None:
        return Finding("GPU", "broken", "there is one, but torch is a CPU build", REINSTALL)
    if build[0] > driver[0]:
        detail = f"torch is built for CUDA {_dotted(build)}; the driver supports up to {_dotted(driver)}"
        return Finding("GPU", "broken", detail, f"update the driver, or {REINSTALL}, which takes the build for CUDA 12")
    if devices == 0:
        detail = f"driver (CUDA {_dotted(driver)}) and build ({_dotted(build)}) fit, but torch sees no device"
        return Finding("GPU", "broken", detail, "look at CUDA_VISIBLE_DEVICES and nvidia-smi")
    detail = f"{devices} seen; driver for CUDA {_dotted(driver)}, torch built for {_dotted(build)}"
    return Finding("GPU", "ok", detail)


def probe_deepspeed() -> list[Finding]:
    """DeepSpeed, and whether it is the version whose internals the checkpoints are written for."""
    if problem := import_problem("deepspeed", "DeepSpeed"):
        return [problem]
    import deepspeed

    from pipeline.zero_state import check_version

    try:
        check_version(deepspeed.__version__)
    except RuntimeError as error:
        return [Finding("DeepSpeed", "broken", str(error))]
    return [Finding("DeepSpeed", "ok", deepspeed.__version__)]


def probe_codec() -> list[Finding]:
    """nvImageCodec decodes a JPEG on the CPU, which is how unknown bytes are examined."""
    if problem := import_problem("nvidia.nvimgcodec", "nvImageCodec"):
        return [problem]
    from nvidia import nvimgcodec

    backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    decoder = nvimgcodec.Decoder(device_id=-99999, max_num_cpu_threads=1, backends=backends)  # -99999: the CPU
    image = decoder.decode(GRAY_JPEG)
    if image is None or image.shape[:2] != (8, 8):
        return [Finding("nvImageCodec", "broken", "it does not decode a plain JPEG on the CPU", REINSTALL)]
    return [Finding("nvImageCodec", "ok", f"{nvimgcodec.__version__}, decodes on the CPU")]


def probe_dali() -> list[Finding]:
    """DALI decodes on the CPU and, where there is one, on the GPU, and its build is the one for this driver."""
    builds = [name for name in DALI_BUILDS if _version_of(name) != "?"]
    if len(builds) > 1:
        return [Finding("DALI", "broken", f"{' and '.join(builds)} overwrite each other", REINSTALL)]
    if problem := import_problem("nvidia.dali", "DALI"):
        return [problem]
    from nvidia import dali

    fits = [dali_fit(name) for name in builds]
    places = {"CPU": "cpu"}
    if has_gpu() and all(fit.state == "ok" for fit in fits):
        places["GPU"] = "mixed"
    for place, device in places.items():
        if problem := decoding_problem(device):
            return [Finding("DALI", "broken", f"on the {place} {problem}", REINSTALL), *fits]
    return [Finding("DALI", "ok", f"{dali.__version__}, decodes on the {' and the '.join(places)}"), *fits]


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


def dali_fit(build: str) -> Finding:
    """Whether a build of DALI runs with this machine's driver; without a GPU any does."""
    try:
        driver = driver_cuda()
    except RuntimeError as error:
        return Finding("DALI's build", "note", f"{build}; {error}")
    if driver and DALI_BUILDS[build] > driver[0]:
        detail = f"{build}; the driver supports CUDA up to {_dotted(driver)}"
        return Finding("DALI's build", "broken", detail, f"update the driver, or {REINSTALL}")
    return Finding("DALI's build", "ok", build)


def probe_collectives() -> list[Finding]:
    """Two processes on this machine add up a tensor over gloo."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        meeting = {"GLOO_SOCKET_IFNAME": "lo", "RENDEZVOUS": f"file://{folder}/rendezvous"}
        ranks = [meeting | {"RANK": str(rank)} for rank in range(2)]
        groups = list(pool.map(lambda rank: in_own_process("gloo", environment=rank), ranks))
    found = [finding for group in groups for finding in group]
    return [next((finding for finding in found if finding.state != "ok"), found[0])]


def probe_all_reduce() -> list[Finding]:
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
        return [Finding("collectives", "broken", f"gloo: an all-reduce of 1 and 2 gave {total.item()}")]
    return [Finding("collectives", "ok", "gloo: two processes on this machine")]


def probe_slurm() -> list[Finding]:
    """Whether jobs can be submitted from here."""
    if found := shutil.which("sbatch"):
        return [Finding("Slurm", "ok", found)]
    return [Finding("Slurm", "note", "no sbatch on PATH: this machine is not a cluster's login node")]


def probe_compilers() -> list[Finding]:
    """Compilers, which nothing needs by default."""
    found = {name: shutil.which(name) for name in ("nvcc", "ninja", "g++")}
    there = ", ".join(path for path in found.values() if path)
    lacking = ", ".join(name for name, path in found.items() if not path)
    if not lacking:
        return [Finding("compilers", "ok", there)]
    return [Finding("compilers", "note", f"no {lacking}: not needed except for offload and torch.compile")]


def probe_room() -> list[Finding]:
    """Cores, memory, disk space here, and the shared memory that ranks on one machine exchange through."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container or a Slurm job may take
    if limit.exists() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    here = f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB of memory"
    free = Figure(f"free in {Path.cwd()}", shutil.disk_usage(".").free / 2**30, "GiB")
    findings = [Finding("machine", "ok", here, figures=(free,))]
    if (shared := Path("/dev/shm")).exists() and (size := shutil.disk_usage(shared).total) < 2**30:
        detail = f"{size / 2**20:.0f} MiB; NCCL between the GPUs of one machine wants 1 GiB"
        findings.append(Finding("/dev/shm", "note", detail, "in a container: docker run --shm-size=1g, or --ipc=host"))
    elif shared.exists():
        findings.append(Finding("/dev/shm", "ok", "", figures=(Figure("size", size / 2**30, "GiB"),)))
    return findings


def import_problem(name: str, what: str) -> Finding | None:
    """Why a package does not import, if it does not."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return Finding(what, "missing", "not installed", "make install")
        return Finding(what, "broken", f"does not import: {error}", REINSTALL)
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(what, "broken", f"does not import: {_one_line(str(error))}", REINSTALL)
    return None


def probe_run_folder(path: str) -> list[Finding]:
    """As examine_run_folder finds it, which is imported where it is tried."""
    from pipeline.storage_doctor import examine_run_folder

    return [examine_run_folder(Path(path))]


def probe_dataset(key: str, url: str) -> list[Finding]:
    """As examine_dataset finds it, which is imported where it is tried."""
    from pipeline.storage_doctor import examine_dataset

    return [examine_dataset(key, url)]


def probe_group() -> list[Finding]:
    """What this rank finds together with all others, which needs torch."""
    from pipeline.collective_doctor import join_and_measure

    return join_and_measure()


PROBES: dict[str, Callable[..., list[Finding]]] = {
    "torch": probe_torch,
    "packages": probe_packages,
    "nvImageCodec": probe_codec,
    "DALI": probe_dali,
    "DeepSpeed": probe_deepspeed,
    "gloo": probe_all_reduce,
    "collectives": probe_group,
    "run.dir": probe_run_folder,
    "data.train": partial(probe_dataset, "data.train"),
    "data.val": partial(probe_dataset, "data.val"),
}


def in_own_process(
    probe: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    seconds: float = PROBE_SECONDS,
    advice: str = REINSTALL,
) -> list[Finding]:
    """A probe's findings; if its process dies or hangs, a finding that says how."""
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    settings = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": _accelerator()} | (environment or {})
    # -P: a folder that happens to be called torch in the current directory is not torch
    command = [sys.executable, "-P", "-m", "pipeline.doctor", probe, *arguments]
    try:
        answer = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Finding(probe, "broken", f"no answer in {seconds:.0f} s", advice)]
    if answer.returncode < 0:
        return [Finding(probe, "broken", f"trying it crashed: {signal.Signals(-answer.returncode).name}", advice)]
    if answer.returncode > 0:
        return [Finding(probe, "broken", _one_line(answer.stderr.strip().rpartition("\n")[2]), advice)]
    return findings_of(json.loads(answer.stdout.strip().rpartition("\n")[2]))


def has_gpu() -> bool:
    """Whether this machine has a GPU, even one whose driver does not say what it supports."""
    try:
        return driver_cuda() is not None
    except RuntimeError:
        return True


def _accelerator() -> str:
    """What DeepSpeed is told to use, as the training tells it: without this it looks around, and says so."""
    return "cuda" if has_gpu() else "cpu"


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


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps([asdict(finding) for finding in PROBES[sys.argv[1]](*sys.argv[2:])]))
    else:
        findings = diagnose()
        for mark, what, detail, advice in rows(findings):
            print(f"{mark:8}{what:14}{detail}{f'  ->  {advice}' if advice else ''}")
        sys.exit(exit_status(findings))
