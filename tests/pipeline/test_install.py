"""Which builds of torch, torchvision and DALI a machine gets, and that those of this one work together."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from pipeline.doctor import install
from pipeline.doctor.install import (
    Torch,
    build_fits,
    constraint,
    cuda_major_of,
    dali_extra,
    install_torch,
    install_torchvision,
    lower_bound,
    offered_build,
    pytorch_build,
)

PYPI = ["2.14.0", "2.13.0", "2.12.0"]
BOTH = ["2.14.0", "2.13.0+cpu", "2.13.0", "2.12.0+cpu"]
PYTORCH = ["2.13.0+cu126", "2.13.0+cu130", "2.13.0+cu132", "2.13.0+cpu"]


@pytest.mark.parametrize("offered", [PYPI, BOTH, PYTORCH, ["2.12.0+cpu"], []])
def test_a_machine_without_a_gpu_never_gets_a_cuda_build(offered: list[str]) -> None:
    build = offered_build("2.13.0", offered, None) or pytorch_build("2.13.0", None)
    assert build == "2.13.0+cpu"


@pytest.mark.parametrize(
    ("offered", "driver", "build"),
    [
        (PYPI, (13, 0), "2.13.0"),
        (BOTH, (13, 2), "2.13.0"),  # pip alone would take the CPU build, whose version is higher
        (PYPI, (12, 4), None),
        (BOTH, (12, 8), None),
        (PYTORCH, (12, 4), "2.13.0+cu126"),
        (PYTORCH, (13, 0), "2.13.0+cu132"),
        (["2.13.0+cpu"], (13, 0), None),
        ([], (13, 0), None),
    ],
)
def test_a_gpu_machine_gets_the_newest_offered_build_that_its_driver_runs(
    offered: list[str], driver: tuple[int, int], build: str | None
) -> None:
    assert offered_build("2.13.0", offered, driver) == build


@pytest.mark.parametrize("driver", [None, (12, 0), (12, 9), (13, 0), (13, 2)])
def test_a_build_from_pytorchs_index_fits_the_driver(driver: tuple[int, int] | None) -> None:
    assert build_fits(cuda_major_of(pytorch_build("2.13.0", driver)), driver)


@pytest.mark.parametrize(
    ("present", "driver", "kept"),
    [
        (Torch("2.12.0a0+nv26.01", "13.0", "/usr/lib/python3/dist-packages"), (13, 0), True),  # a container's
        (Torch("2.12.0a0+nv26.01", "13.0", "/usr/lib/python3/dist-packages"), (12, 4), False),
        (Torch("2.12.0", "13.0", f"{install.VENV}/lib/python3.11/site-packages"), (13, 0), False),
        (Torch(f"{constraint('torch')}+cpu", None, f"{install.VENV}/lib/python3.11/site-packages"), None, True),
    ],
)
def test_a_torch_is_kept_if_it_fits_and_is_the_tested_one_or_a_containers(
    monkeypatch: pytest.MonkeyPatch, present: Torch, driver: tuple[int, int] | None, kept: bool
) -> None:
    installed: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "installed_torch", lambda: present)
    monkeypatch.setattr(install, "offered_versions", lambda package: [])
    monkeypatch.setattr(install, "pip", lambda *arguments: installed.append(arguments))
    assert (install_torch(driver) == present.version) == kept == (not installed)


TORCH, VISION = constraint("torch"), constraint("torchvision")


@pytest.mark.parametrize(
    ("torch", "offered", "at_pytorch", "expected"),
    [
        (TORCH, [VISION], [], VISION),
        (f"{TORCH}+cpu", [VISION, f"{VISION}+cpu"], [], f"{VISION}+cpu"),
        (f"{TORCH}+cpu", [VISION], [f"{VISION}+cpu"], f"{VISION}+cpu"),
        (f"{TORCH}+cpu", [VISION], [], VISION),  # without its operators
        (f"{TORCH}+cu126", [VISION], [f"{VISION}+cu126"], f"{VISION}+cu126"),
        (f"{TORCH}+cu126", [VISION], [], None),
        (f"{TORCH}+cpu", [], [], None),
        ("2.12.0a0+nv26.01", [VISION], [], None),  # a container's
    ],
)
def test_torchvision_is_of_torchs_build_or_is_left_out_with_timm(
    monkeypatch: pytest.MonkeyPatch, torch: str, offered: list[str], at_pytorch: list[str], expected: str | None
) -> None:
    installed: list[str] = []
    removed: list[str] = []
    monkeypatch.setattr(install, "_output", lambda *command: " ".join(installed))
    monkeypatch.setattr(install, "offered_versions", lambda _, *index: [*offered, *(at_pytorch if index else [])])
    monkeypatch.setattr(install, "pip", lambda *arguments: installed.append(arguments[-1].partition("===")[2]))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: removed.extend(command[-2:]))
    assert install_torchvision(torch) == expected
    assert installed == ([expected] if expected else [])
    assert removed == ([] if expected else ["torchvision", "timm"])
    assert install_torchvision(torch) == expected and len(installed) <= 1  # a second time it is found


def test_what_is_installed_side_by_side_imports_together() -> None:
    names = ["torch", "torchvision", "timm", "nvidia.dali", "deepspeed", "webdataset", "submitit", "s3fs", "wandb"]
    present = [name for name in names if find_spec(name.partition(".")[0])]
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(present)}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dali_follows_the_driver() -> None:
    extras = {driver: dali_extra(driver) for driver in (None, (12, 4), (13, 0), (14, 0))}
    assert extras == {None: "cuda13", (12, 4): "cuda12", (13, 0): "cuda13", (14, 0): "cuda13"}


def test_a_driver_that_is_too_old_is_refused_with_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA 11\.8.*update it"):
        dali_extra((11, 8))


def test_the_tested_torch_is_one_that_pyproject_allows() -> None:
    tested, lowest = ([int(part) for part in text.split(".")] for text in (constraint("torch"), lower_bound("torch")))
    assert tested >= lowest
