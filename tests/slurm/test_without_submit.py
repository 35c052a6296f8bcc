"""Commands that a person starts in an allocation of their own: ranks where srun starts several tasks, else none."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.distributed.launcher import module_command
from tests.cluster.slurm import Cluster
from tests.pipeline.runs import ROOT, events


@pytest.mark.torture
def test_only_the_tasks_of_srun_are_ranks(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """A batch script of four tasks, the shell of two, and a step; `script` gives srun the terminal that --pty takes."""
    data = [f"data.train={digits}/train", "data.val=null", "train.steps=1", "train.micro_batch=16"]
    coatnet = shlex.join([*module_command("slurm.cli"), "pretrain", f"{ROOT}/configs/tiny.yaml", *data])
    (tmp_path / "typed").write_text(f"{coatnet} run.dir=shell\nexit\n")
    pty = "srun --ntasks=2 --pty"
    lines = [
        f"{coatnet} run.dir=batch --procs 2",
        f"script -qec '{pty} bash -i' /dev/null < typed",
        f"script -qec {shlex.quote(f'{pty} {coatnet} run.dir=pty')} /dev/null",
    ]
    (tmp_path / "job.sh").write_text("\n".join(["#!/bin/bash -e", *lines, ""]))
    job = cluster.run("sbatch", "--parsable", "--nodes=1", "--ntasks=4", f"--chdir={tmp_path}", tmp_path / "job.sh")
    ended = cluster.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert ended["JobState"] == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()
    expected = {"batch": 2, "shell": 1, "pty": 2}
    assert {run: events(tmp_path / run, "attempt_started")[0]["world_size"] for run in expected} == expected
