"""What `make install` does: a virtual environment in .venv with the builds that fit this machine, in timed stages.

It runs on a bare Python, with nothing but the standard library. The GPU's driver decides which builds fit; a machine
without a GPU gets a CPU build of torch, never gigabytes of CUDA libraries. What pip itself is configured to offer comes
first, then the public index of PyTorch. A .venv that was made with --system-site-packages keeps the torch that it sees.
timm, which tests and benchmarks compare with, comes where there is a torchvision for that torch.

    python3 -m pipeline.doctor.install              # GPU_CUDA=13 (or 12) in front: on a login node, for nodes with GPUs
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
VENV_PYTHON = str(VENV / "bin" / "python")
TORCH_INDEX = "https://download.pytorch.org/whl/"
PYPI_TORCH_CUDA = 13
"""The CUDA major version of the builds of torch on PyPI, whose version carries no tag; from 2.11 on."""
CUDA12_TAG = "cu126"
"""The build of torch 2.12 to 2.14 for drivers that support CUDA 12 only (github.com/pytorch/pytorch/issues/190355)."""

ASK_TORCH = """
import json, os, torch
print(json.dumps([torch.__version__, torch.version.cuda, os.path.dirname(os.path.dirname(torch.__file__))]))
"""
ASK_TORCHVISION = "import torchvision; from importlib.metadata import version; print(version('torchvision'))"
SCHEMAS = """
if not _has_ops():  # added by coatnet's `make install`: this build's operators need a CUDA build of torch
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""What torchvision/extension.py lacks to import without its operators (github.com/pytorch/vision/issues/8985)."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: its version, the CUDA version it was built for (None: a CPU build), its site-packages."""

    version: str
    cuda: str | None
    folder: str

    @property
    def cuda_major(self) -> int | None:
        return int(self.cuda.partition(".")[0]) if self.cuda else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the GPU driver supports, as (major, minor); None on a machine without a GPU.

    Raises RuntimeError where there is a GPU whose driver does not say.
    """
    if not glob.glob("/dev/nvidia[0-9]*") and "GPU 0" not in _output("nvidia-smi", "-L"):
        return None
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    except OSError:
        pass  # the library is not on the loader's path; nvidia-smi knows it too
    found = re.search(r"CUDA[\w ]* Version\s*:\s*(\d+)\.(\d+)", _output("nvidia-smi"))
    if found is None:
        raise RuntimeError("there is a GPU, but its driver does not say which CUDA it supports; set GPU_CUDA=12 or 13")
    return int(found[1]), int(found[2])


def dali_extra(driver: tuple[int, int] | None) -> str:
    """The extra of pyproject.toml whose DALI runs with this driver; without a GPU any would do, the newer is taken."""
    if driver and driver[0] < 12:
        raise RuntimeError(
            f"the driver supports CUDA {driver[0]}.{driver[1]}; DALI and torch need 12.0: update it to 525.60 or later"
        )
    return "cuda12" if driver and driver[0] == 12 else "cuda13"


def build_fits(cuda_major: int | None, driver: tuple[int, int] | None) -> bool:
    """Whether a build for this CUDA (None: for the CPU) is the kind that this machine should have."""
    if driver is None or cuda_major is None:
        return driver is None and cuda_major is None
    return cuda_major <= driver[0]


def cuda_major_of(version: str) -> int | None:
    """The CUDA major version that a torch version's tag names: 2.13.0+cu126 is 12, +cpu None, no tag PyPI's."""
    tag = version.partition("+")[2]
    named = re.fullmatch(r"cu(\d+)\d", tag)
    return int(named[1]) if named else None if tag else PYPI_TORCH_CUDA


def offered_build(tested: str, offered: list[str], driver: tuple[int, int] | None) -> str | None:
    """Of the torch versions that pip offers, the build of the tested one that fits best; None where none fits."""
    fitting = [
        version
        for version in offered
        if version.partition("+")[0] == tested and build_fits(cuda_major_of(version), driver)
    ]
    return max(fitting, key=lambda version: (cuda_major_of(version) or 0, version), default=None)


def pytorch_build(tested: str, driver: tuple[int, int] | None) -> str:
    """The build of the tested version to fetch from PyTorch's own index for this driver."""
    return f"{tested}+cpu" if driver is None else f"{tested}+{CUDA12_TAG}" if driver[0] == 12 else f"{tested}+cu130"


def install() -> None:
    """Makes or completes .venv; raises RuntimeError with one line where a stage fails."""
    start = time.monotonic()
    asked = os.environ.get("GPU_CUDA", "")
    if asked not in ("", "12", "13"):
        raise RuntimeError(f"GPU_CUDA is {asked}; it must be 12 or 13, the CUDA that the GPU nodes' drivers support")
    driver = (int(asked), 0) if asked else driver_cuda()
    extra = dali_extra(driver)
    with stage("venv", f"{VENV.relative_to(ROOT)}, Python {sys.version.split()[0]}"):
        make_environment()
    builds = {"torch": install_torch(driver)}
    extras = [extra, "dev"]
    if torchvision := install_torchvision(builds["torch"]):
        builds["torchvision"] = torchvision
        extras.append("timm")
    pinned, text = VENV / "constraints.txt", (ROOT / "constraints.txt").read_text()
    for name, version in builds.items():
        text = re.sub(rf"(?m)^{name}==.*$", f"{name}=={version}", text)
    pinned.write_text(text)
    with stage("coatnet", f"with the extras {', '.join(extras)}"):
        pip("-c", str(pinned), "-e", f"{ROOT}[{','.join(extras)}]")
    if torchvision:
        make_torchvision_import(builds["torch"])  # which needs what has just been installed
    print(f"done     {_megabytes(VENV):,} MB in {time.monotonic() - start:.0f} s", flush=True)


def make_environment() -> None:
    """An environment of this Python at .venv; one of another Python's version, or a broken one, is replaced."""
    version = "import sys; print(*sys.version_info[:2])"
    current = " ".join(map(str, sys.version_info[:2]))
    if _output(VENV_PYTHON, "-c", version).strip() != current or not _output(VENV_PYTHON, "-m", "pip", "--version"):
        # by its real name: a link to it, or the environment it was called from, may be gone tomorrow
        command = [os.path.realpath(sys.executable), "-m", "venv", "--clear", "--prompt", "coatnet", str(VENV)]
        if subprocess.run(command).returncode:
            raise RuntimeError(f"{' '.join(command)} failed; its output is above")


def install_torch(driver: tuple[int, int] | None) -> str:
    """Installs the build of torch that fits, or finds it installed; returns its version."""
    kind = "no GPU here" if driver is None else f"for a driver of CUDA {driver[0]}.{driver[1]}"
    tested, present = constraint("torch"), installed_torch()
    # One outside .venv is seen because --system-site-packages asked for it.
    outside = present is not None and not Path(present.folder).is_relative_to(VENV)
    if present and build_fits(present.cuda_major, driver) and (outside or present.version.split("+")[0] == tested):
        with stage("torch", f"{present.version}, {kind}: the one in {present.folder}"):
            return present.version
    if version := offered_build(tested, offered_versions("torch"), driver):
        with stage("torch", f"{version}, {kind}: offered by pip's configuration"):
            # `===` compares whole strings: plain == would take the CPU build beside a CUDA one
            pip("-c", str(ROOT / "constraints.txt"), f"torch==={version}")
            return version
    version = pytorch_build(tested, driver)
    with stage("torch", f"{version}, {kind}: from {TORCH_INDEX}"):
        # its dependencies come with the next stage, from the index that pip is configured for
        pip("--no-deps", "--index-url", TORCH_INDEX + version.partition("+")[2], f"torch=={version}")
    return version


def torchvision_builds(torch: str) -> list[str]:
    """The builds of torchvision that go with this torch, the best first; none where it is not the tested one.

    The last one of a CPU build of torch is PyPI's, which is for CUDA: without its operators, which no model here calls.
    """
    tested, (release, tag, build) = constraint("torchvision"), torch.partition("+")
    if release != constraint("torch"):
        return []
    return [tested + tag + build, *([tested] if build == "cpu" else [])]


def install_torchvision(torch: str) -> str | None:
    """Installs the torchvision that goes with this torch, or finds it installed; returns its version.

    None where there is none: then neither it nor timm, which needs it, stays in .venv.
    """
    builds, tag = torchvision_builds(torch), torch.partition("+")[2]
    present = _output(VENV_PYTHON, "-c", ASK_TORCHVISION).strip()
    if present and (not builds or present in builds):
        return present
    indexes: list[tuple[str, ...]] = [(), *([("--index-url", TORCH_INDEX + tag)] if tag else [])]
    for build in builds:
        for index in indexes:
            if build in offered_versions("torchvision", *index):
                with stage("vision", f"torchvision {build}, for timm"):
                    pip("--no-deps", "--force-reinstall", *index, f"torchvision==={build}")
                return build
    _remove_timm(torch)
    return None


def make_torchvision_import(torch: str) -> None:
    """Lets a torchvision import whose operators do not load beside this torch; where it still does not, it goes."""
    if not _output(VENV_PYTHON, "-c", ASK_TORCHVISION):
        find = "import importlib.util; print(importlib.util.find_spec('torchvision').origin)"
        with Path(_output(VENV_PYTHON, "-c", find).strip()).with_name("extension.py").open("a") as file:
            file.write(SCHEMAS)
        if not _output(VENV_PYTHON, "-c", ASK_TORCHVISION):
            _remove_timm(torch)


def _remove_timm(torch: str) -> None:
    with stage("vision", f"no torchvision matches torch {torch}, so timm is left out too"):
        subprocess.run([VENV_PYTHON, "-m", "pip", "uninstall", "-qqy", "torchvision", "timm"], check=False)


def installed_torch() -> Torch | None:
    """The torch that .venv imports, if it does and if it is as new as pyproject.toml asks."""
    output = _output(VENV_PYTHON, "-c", ASK_TORCH).strip()
    found = Torch(*json.loads(output)) if output else None
    return found if found and _numbers(found.version) >= _numbers(lower_bound("torch")) else None


def offered_versions(package: str, *index: str) -> list[str]:
    """What pip would find for this Python, from names alone: `install --dry-run` may fetch whole wheels to ask them."""
    output = _output(VENV_PYTHON, "-m", "pip", "index", "versions", package, *index)
    found = re.search(r"Available versions: (.*)", output)
    return found[1].split(", ") if found else []


def constraint(package: str) -> str:
    """The version that constraints.txt pins."""
    return _find(rf"(?m)^{package}==(\S+)", ROOT / "constraints.txt")


def lower_bound(package: str) -> str:
    """The lowest version that pyproject.toml allows."""
    return _find(rf'"{package}>=([\d.]+)"', ROOT / "pyproject.toml")


def pip(*arguments: str) -> None:
    """Installs quietly into .venv; DeepSpeed is built without its compiled operators."""
    command = [VENV_PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}).returncode:
        raise RuntimeError(f"pip could not install {arguments[-1]}; its output is above: {' '.join(command)}")


@contextmanager
def stage(name: str, what: str) -> Iterator[None]:
    """Prints one line: what is being done, then how long it took."""
    print(f"{name:8} {what} ...", end="", flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - start:.0f} s", flush=True)


def _output(*command: str) -> str:
    """What a command prints; nothing if it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    return done.stdout if done.returncode == 0 else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:2])


def _find(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text())
    if found is None:
        raise RuntimeError(f"{path.name} has no line like {pattern}")
    return found[1]


def _megabytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) // 1_000_000


if __name__ == "__main__":
    try:
        install()
    except RuntimeError as error:
        sys.exit(f"install: {error}")
