"""Submitting and disturbing runs on the throw-away Slurm, for tests and `coatnet bench preemptions`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm.history import starts
from tests import forked
from tests.cluster.slurm import Cluster
from tests.pipeline.runs import ROOT, events, last_step

JOB = [
    "slurm.nodes=2",
    "slurm.tasks_per_node=2",
    "slurm.memory=1500M",
    "slurm.time=10",
    "slurm.signal_seconds=60",
    "slurm.backoff=1",
]
"""Two nodes with two ranks each."""


def keys(packed: Path, run: Path, *more: str) -> list[str]:
    """A training of four micro batches a step."""
    data = [f"data.train={packed}/train", f"data.val={packed}/val", f"run.dir={run}"]
    length = ["train.steps=60", "train.micro_batch=16", "checkpoint.every=5", "checkpoint.keep_last=100"]
    return [*data, *length, "log.every=1", "evaluate.every=null", "run.hang_timeout=30", *more]


def command(cluster: Cluster, *words: str, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`coatnet ...` on the cluster's login node."""
    if checkout == ROOT:
        return forked.run("slurm.cli", *words, env=cluster.environment, timeout=120)
    environment = {**cluster.environment, "PYTHONPATH": str(checkout)}
    program = [sys.executable, "-P", "-m", "slurm.cli", *words]
    return subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def status(cluster: Cluster, run: Path) -> dict[str, Any]:
    return json.loads(command(cluster, "status", str(run), "--json").stdout)


def ranks(run: Path, node: str | None = None) -> list[int]:
    """Processes of a run's ranks, on this node; None: on any."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = read(entry / "cmdline").split(b"\0")
            here = node is None or f"SLURMD_NODENAME={node}".encode() in read(entry / "environ").split(b"\0")
            if here and b"pipeline.cli" in words and str(run).encode() in b" ".join(words) and b"srun" not in words[0]:
                found.append(int(entry.name))
    return found


def read(path: Path) -> bytes:
    """Empty of a process that has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def trains(run: Path, starts_before: int = 0, steps: int = 3) -> Callable[[], bool]:
    """Whether a start after `starts_before` others has done some steps."""

    def has_trained() -> bool:
        begins = [row["step"] for row in [*events(run, "training_started"), *events(run, "training_resumed")]]
        return len(begins) > starts_before and last_step(run) >= begins[-1] + steps

    return has_trained


def causes(run: Path) -> list[str | None]:
    return [start.cause for start in starts(run)]
