"""The throw-away cluster preempts as a real Slurm does, and leaves nothing behind (tests/slurm has all else)."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import GRACE_SECONDS, Cluster, processes, running_cluster
from tests.pipeline.runs import ROOT, wait_until

RANK = """
import os, signal, sys, time
log = open(f"rank-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_PROCID']}", "a", buffering=1)
start = os.environ.get("SLURM_RESTART_COUNT", "0")
signal.signal(signal.SIGTERM, lambda number, frame: print(start, "TERM", time.time(), file=log))
while True:
    print(start, "alive", time.time(), file=log)
    time.sleep(0.1)
"""
"""A rank that logs that it lives, and the TERMs it gets, and continues."""


def submit(cluster: Cluster, folder: Path, script: str, *options: str) -> str:
    """A batch job that runs in the folder and writes JOB_ID.out there."""
    (folder / "rank.py").write_text(RANK)
    (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
    request = ["--mem=100", "--requeue", "--open-mode=append", f"--chdir={folder}", f"--output={folder}/%j.out"]
    return cluster.run("sbatch", "--parsable", *request, *options, folder / "job.sh")


def times(folder: Path, job: str, what: str, start: int = 0, rank: int = 0) -> list[float]:
    """When a rank was alive or got a TERM, after `start` restarts."""
    log = folder / f"rank-{job}-{rank}"
    rows = [line.split() for line in log.read_text().splitlines(True) if line.endswith("\n")] if log.exists() else []
    return [float(when) for restarts, event, when in rows if event == what and int(restarts) == start]


@pytest.mark.torture
def test_a_job_of_high_preempts_one_of_main_after_the_grace_time(cluster: Cluster, tmp_path: Path) -> None:
    whole = ("--nodes=2", "--ntasks-per-node=2", "--exclusive")
    low = submit(cluster, tmp_path, f"srun {sys.executable} rank.py", *whole)
    wait_until(lambda: all(times(tmp_path, low, "alive", rank=rank) for rank in range(4)))
    asked = time.time()
    high = submit(cluster, tmp_path, "true", "--partition=high", *whole)
    cluster.wait(high, "COMPLETED")
    for rank in range(4):
        signalled = times(tmp_path, low, "TERM", rank=rank)[0]
        assert signalled - asked < 5
        assert times(tmp_path, low, "alive", rank=rank)[-1] - signalled > GRACE_SECONDS
    assert cluster.job(low)["Restarts"] == "1"
    cluster.run("scancel", low)
    cluster.nodes_idle(2)


def test_a_cluster_ends_whole_and_leaves_others_alone(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After Ctrl-C, with a client that waits and a rank that is a daemon and ignores TERM."""
    folder = tmp_path_factory.mktemp("other")
    before = processes(cluster.folder).keys()
    with pytest.raises(KeyboardInterrupt), running_cluster(folder, nodes=1) as other:
        job = submit(other, tmp_path, f"setsid {sys.executable} rank.py & wait")
        waiting = subprocess.Popen(["srun", "--quiet", "--mem=100", "sleep", "600"], env=other.environment)
        wait_until(lambda: bool(times(tmp_path, job, "alive")) and other.state("2") == "RUNNING")
        raise KeyboardInterrupt
    died = time.time()
    assert waiting.wait(10) != 0
    assert not processes(folder)
    assert times(tmp_path, job, "alive")[-1] < died
    assert processes(cluster.folder).keys() == before


def test_a_cluster_ends_when_the_tests_are_killed(slurm_here: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("killed")
    code = "import sys; from pathlib import Path; from tests.cluster.slurm import running_cluster\n"
    code += "with running_cluster(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tests:
        assert tests.stdout is not None and tests.stdout.readline() == b"\n"
        assert len(processes(folder)) >= 4, "munged, slurmctld and two slurmd"
        tests.kill()
    wait_until(lambda: not processes(folder))
