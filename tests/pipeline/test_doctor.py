"""The doctor tells what is wrong on machines where things are wrong, and finds this environment whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.doctor.environment import build_fit, diagnose
from pipeline.doctor.findings import Check, exit_status, rows
from pipeline.doctor.install import ROOT


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of this version with no packages at all."""
    folder = tmp_path_factory.mktemp("bare")
    real = os.path.realpath(sys.executable)
    subprocess.run([real, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def examine(python: Path, folder: Path) -> tuple[dict[str, Check], int]:
    """The findings by name of a doctor that runs where `folder` comes first on the import path, and the exit status."""
    code = "import json, dataclasses, pipeline.doctor.environment as d; f = d.diagnose(); "
    code += "from pipeline.doctor.findings import exit_status; "
    code += "print(json.dumps([[dataclasses.asdict(each) for each in f], exit_status(f)]))"
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    answer = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True)
    findings, status = json.loads(answer.stdout)
    return {each["what"]: Check(**each) for each in findings}, status


def write_torch(folder: Path, text: str) -> Path:
    (folder / "torch.py").write_text(text)
    return folder


def test_this_environment_is_whole() -> None:
    findings = diagnose()
    assert exit_status(findings) == 0, [finding for finding in findings if finding.state in ("missing", "broken")]
    ok = {finding.what for finding in findings if finding.state == "ok"}
    assert ok >= {
        "Python",
        "torch",
        "packages",
        "file://",
        "nvImageCodec",
        "DALI",
        "DeepSpeed",
        "collectives",
        "machine",
    }


def test_without_any_package_everything_needed_is_named_missing(bare_python: Path, tmp_path: Path) -> None:
    findings, status = examine(bare_python, tmp_path)
    missing = {name for name, finding in findings.items() if finding.state == "missing"}
    assert missing >= {"torch", "DALI", "nvImageCodec", "webdataset", "fsspec", "submitit", "numpy", "pydantic"}
    assert all(findings[name].advice == "make install" for name in missing)
    assert status == 1


def test_what_could_not_be_tried_is_not_claimed(bare_python: Path, tmp_path: Path) -> None:
    findings, _ = examine(bare_python, tmp_path)
    assert not {"collectives", "GPU", "file://", "s3://", "packages"} & set(findings)
    assert findings["DeepSpeed"].state == "note"


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV"])
def test_a_torch_that_crashes_is_a_finding(bare_python: Path, tmp_path: Path, name: str) -> None:
    folder = write_torch(tmp_path, f"import os, signal; os.kill(os.getpid(), signal.{name})")
    findings, status = examine(bare_python, folder)
    assert (findings["torch"].state, status) == ("broken", 1)
    assert name in findings["torch"].detail


def test_a_torch_whose_libraries_are_missing_is_broken_in_one_line(bare_python: Path, tmp_path: Path) -> None:
    folder = write_torch(tmp_path, 'raise OSError("libcudart.so.13: cannot open\\n shared object file")')
    findings, _ = examine(bare_python, folder)
    assert findings["torch"].state == "broken"
    assert findings["torch"].detail == "does not import: libcudart.so.13: cannot open shared object file"


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


def test_what_needs_doing_comes_first_in_the_table() -> None:
    findings = [
        Check("a", "ok", ""),
        Check("b", "note", ""),
        Check("c", "broken", "x", "do"),
        Check("d", "ok", ""),
    ]
    assert [row[1] for row in rows(findings)] == ["c", "b", "a", "d"]
    assert rows(findings)[0] == ("BROKEN", "c", "x", "do")
