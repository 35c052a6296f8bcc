"""Ranks take our packages, whatever the current folder and PYTHONPATH have by the same names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import coatnet_main
from tests.forked import ROOT
from tests.pipeline.runs import PATIENCE_SECONDS, command, events, last_step

SCRIPT = "import sys; from coatnet_main import main; sys.exit(main())"
"""What an installed console script does, with the checkout found as pip would have it found: last."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's folder with packages and modules by our packages' names, and a folder that is no package."""
    for name in ("data", "pipeline", "tests"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not ours')\n")
    for name in ("models", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "slurm").mkdir()
    assert {path.stem for path in tmp_path.iterdir()} == set(coatnet_main.PACKAGES)
    return tmp_path


def train(project: Path, digits: Path, start: list[str], *more: str, **variables: str) -> None:
    """Two ranks train a step there."""
    data = [f"data.train={digits}/train", "data.val=null", "train.steps=1", "run.dir=run"]
    path = os.pathsep.join(["", str(project), str(project / "site")])
    done = subprocess.run(
        [*start, "pretrain", f"{ROOT}/configs/tiny.yaml", *more, *data], cwd=project,
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert last_step(project / "run") == 1
    assert [row["world_size"] for row in events(project / "run", "attempt_started")] == [2]


def test_ranks_of_the_launcher_take_no_module_from_the_folder(project: Path, digits: Path) -> None:
    """As new interpreters: a process with threads, as OpenBLAS makes them here, can't be forked."""
    train(project, digits, command(), "--procs", "2", OPENBLAS_NUM_THREADS="2")


@pytest.mark.torture
def test_ranks_of_torchrun_take_no_module_from_the_folder(project: Path, digits: Path) -> None:
    (project / "coatnet").write_text(f"#!{sys.executable} -P\n{SCRIPT}\n")
    (project / "coatnet").chmod(0o755)
    (project / "site").mkdir()
    (project / "site" / "coatnet_main.py").symlink_to(ROOT / "coatnet_main.py")
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train(project, digits, [*torchrun, "--no-python", "./coatnet"])


@pytest.mark.parametrize("words", ["pretrain --procs 2 configs/tiny.yaml", "models", "data pack photos shards"])
def test_a_current_folder_that_was_removed_is_named(words: str, tmp_path: Path) -> None:
    removed = ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "bash", *command(*words.split())]
    done = subprocess.run(removed, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.stderr == "coatnet: the current folder no longer exists: cd into another one\n"
    assert (done.returncode, done.stdout) == (2, "")
