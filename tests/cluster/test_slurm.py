"""The throw-away cluster is a real Slurm: ranks, requeues, dead daemons and nodes, preemption; and it ends whole."""

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


def test_ranks_run_on_all_nodes_and_resolve_their_names(cluster: Cluster, tmp_path: Path) -> None:
    rank = "echo rank $SLURM_PROCID on $(hostname), $SLURM_LOCALID of $SLURM_NTASKS_PER_NODE: "
    rank += "$(getent hosts $(scontrol show hostnames) | xargs)"
    job = submit(cluster, tmp_path, f"srun bash -c '{rank}'", "--nodes=2", "--ntasks-per-node=2")
    record = cluster.wait(job, "COMPLETED", "FAILED")
    lines = sorted((tmp_path / f"{job}.out").read_text().splitlines())
    nodes = "127.0.9.1 n1 127.0.9.2 n2"
    assert lines == [f"rank {i} on n{1 + i // 2}, {i % 2} of 2: {nodes}" for i in range(4)]
    assert (record["JobState"], record["ExitCode"], record["NodeList"]) == ("COMPLETED", "0:0", "n[1-2]")


def test_a_requeued_job_keeps_its_id_and_counts_its_restarts(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "echo start ${SLURM_RESTART_COUNT:-first}; [ $SLURM_RESTART_COUNT ] || sleep 600")
    output = tmp_path / f"{job}.out"
    wait_until(lambda: output.exists() and output.read_text() == "start first\n")
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    first, *between, last = output.read_text().splitlines()
    assert (first, last) == ("start first", "start 1")
    assert "DUE TO JOB REQUEUE" in " ".join(between)


@pytest.mark.torture
def test_jobs_outlive_a_dead_daemon_and_a_node_that_is_powered_off(cluster: Cluster, tmp_path: Path) -> None:
    rank = f"exec {sys.executable} rank.py"
    jobs = {node: submit(cluster, tmp_path, rank, f"--nodelist={node}") for node in cluster.nodes}
    wait_until(lambda: all(times(tmp_path, job, "alive") for job in jobs.values()))
    cluster.kill_slurmd("n1")
    cluster.power_off("n2")
    died = time.time()
    for node, job in jobs.items():
        cluster.wait(job, "PENDING", seconds=60)
        assert cluster.node_state(node).startswith("down")
    assert time.time() - times(tmp_path, jobs["n1"], "alive")[-1] < 1, "a rank lives on without slurmd"
    assert times(tmp_path, jobs["n2"], "alive")[-1] < died

    for node in cluster.nodes:
        cluster.start_node(node)
    for node, job in jobs.items():
        record = cluster.wait(job, "RUNNING")
        assert (record["Restarts"], record["NodeList"]) == ("1", node)
    wait_until(lambda: all(times(tmp_path, job, "alive", start=1) for job in jobs.values()))
    before, after = times(tmp_path, jobs["n1"], "alive"), times(tmp_path, jobs["n1"], "alive", start=1)
    assert before[-1] < after[0], "the new slurmd killed what the dead one had left"
    cluster.run("scancel", *jobs.values())
    cluster.nodes_idle(2)


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
