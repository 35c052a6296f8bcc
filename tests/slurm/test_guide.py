"""The guide docs/howto/slurm.md, from a login node to an evaluated model, run on the throw-away Slurm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.history import starts
from tests.cluster.slurm import Cluster
from tests.pipeline.runs import ROOT

FENCED = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


@pytest.mark.torture
def test_every_command_of_the_guide_succeeds(cluster: Cluster, tmp_path: Path) -> None:
    for shared in ("configs", "demo"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    text = (ROOT / "docs" / "howto" / "slurm.md").read_text()
    path = f"{Path(sys.executable).parent}{os.pathsep}{cluster.environment['PATH']}"
    outputs: list[str] = []
    for language, block in FENCED.findall(text):
        if language == "yaml":
            (tmp_path / block.split()[1]).write_text(block)
        elif language == "sh":
            done = subprocess.run(
                ["bash", "-euxo", "pipefail", "-c", block], env=cluster.environment | {"PATH": path}, cwd=tmp_path,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400,
            )  # fmt: skip
            print(block, done.stdout, sep="\n")
            assert done.returncode == 0
            outputs.append(done.stdout)
    for run in ("first", "second"):
        assert [start.cause for start in starts(tmp_path / "runs" / run)] == ["done"]
    assert json.loads((tmp_path / "runs" / "second" / "evaluation.json").read_text())["samples"] == 360
    assert (tmp_path / "digits40.safetensors").stat().st_size > 0
    assert "cancelled job" in outputs[-1] and len(outputs) == 5
