"""The doctor tells what is wrong on machines where things are wrong, and finds this environment whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import Model
from pipeline.doctor.checks import Check, exit_status, render
from pipeline.doctor.environment import build_fit, check_compiler, check_machine
from pipeline.doctor.install import ROOT
from pipeline.errors import UsageError
from pipeline.training.model import check_attention


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of this version with no packages at all."""
    folder = tmp_path_factory.mktemp("bare")
    real = os.path.realpath(sys.executable)
    subprocess.run([real, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def examine(python: Path, folder: Path) -> tuple[dict[str, Check], int]:
    """The checks by name of a doctor that runs where `folder` comes first on the import path, and the exit status."""
    code = "import json, dataclasses, pipeline.doctor.environment as d; found = d.check_machine(); "
    code += "print(json.dumps([dataclasses.asdict(check) for check in found]))"
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
    checks = [Check(**facts) for facts in json.loads(done.stdout)]
    return {check.what: check for check in checks}, exit_status(checks)


def test_this_environment_is_whole() -> None:
    checks = check_machine()
    assert exit_status(checks) == 0, [check for check in checks if check.state in ("missing", "broken")]
    ok = {check.what for check in checks if check.state == "ok"}
    assert ok >= {"Python", "torch", "packages", "nvImageCodec", "DALI", "DeepSpeed", "collectives", "machine"}


def test_without_packages_each_is_missing_and_what_was_not_tried_is_not_claimed(
    bare_python: Path, tmp_path: Path
) -> None:
    checks, status = examine(bare_python, tmp_path)
    missing = {name for name, check in checks.items() if check.state == "missing"}
    assert missing >= {"torch", "DALI", "nvImageCodec", "webdataset", "fsspec", "submitit", "numpy", "pydantic"}
    assert all(checks[name].advice == "make install" for name in missing) and status == 1
    assert not {"collectives", "GPU", "packages"} & set(checks)
    assert checks["DeepSpeed"].state == "note"


@pytest.mark.parametrize(
    ("torch", "detail"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "it crashed: SIGILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it crashed: SIGSEGV"),
        ('raise OSError("libcudart.so.13: not\\n found")', "cannot be imported: libcudart.so.13: not found"),
    ],
)
def test_a_torch_that_crashes_or_lacks_libraries_is_broken(
    bare_python: Path, tmp_path: Path, torch: str, detail: str
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    checks, status = examine(bare_python, tmp_path)
    assert (checks["torch"].state, checks["torch"].detail, status) == ("broken", detail, 1)


@pytest.mark.parametrize(
    ("build", "driver", "devices", "state"),
    [
        (None, None, 0, "ok"),
        ((13, 0), None, 0, "note"),
        (None, (13, 0), 0, "broken"),
        ((13, 0), (12, 8), 0, "broken"),
        ((12, 6), (12, 2), 1, "ok"),  # within a major version an older driver runs a newer build
        ((12, 6), (13, 0), 1, "ok"),
        ((13, 0), (13, 0), 0, "broken"),
    ],
)
def test_a_build_fits_a_driver_of_its_major_version_or_newer(
    build: tuple[int, int] | None, driver: tuple[int, int] | None, devices: int, state: str
) -> None:
    assert build_fit(build, driver, devices).state == state


@pytest.mark.parametrize(("on_gpu", "variable"), [(True, "CC"), (False, "CXX")])
def test_what_compiles_needs_a_compiler_and_the_headers_of_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_gpu: bool, variable: str
) -> None:
    """Triton's launchers on a GPU, torch's kernels on a CPU."""
    for name, program in (("CC", sys.executable), ("CXX", sys.executable), (variable, "no-such-compiler")):
        monkeypatch.setenv(name, program)
    missing = check_compiler(on_gpu)
    assert missing.state == "note" and "no-such-compiler" in missing.advice and variable in missing.advice
    if on_gpu:  # what evaluate, predict and report build, and every rank of a training
        with pytest.raises(UsageError, match=r"model.attention=flex needs to compile, but .* no-such-compiler"):
            check_attention(Model(name="coatnet_0", attention="flex"), torch.device("cuda"))
    monkeypatch.setenv(variable, sys.executable)
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    missing = check_compiler(on_gpu)
    assert missing.state == "note" and f"{tmp_path}/Python.h" in missing.advice
    (tmp_path / "Python.h").touch()
    assert check_compiler(on_gpu) == Check("compiler", "ok", sys.executable)


def test_the_report_has_the_worst_first_with_what_to_do() -> None:
    a, b, d = Check("a", "ok", ""), Check("b", "note", "y", figures={"read": "3 MB/s"}), Check("d", "ok", "z")
    lines = ["BROKEN  c             x", f"{'':22}-> do", "note    b             y; read 3 MB/s"]
    assert render([a, b, Check("c", "broken", "x", "do"), d]).splitlines() == [
        *lines,
        "ok      a",
        "ok      d    " + " " * 9 + "z",
    ]
