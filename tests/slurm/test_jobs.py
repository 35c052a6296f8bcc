"""Jobs on a real Slurm of two virtual nodes, with real trainings of two ranks on each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.json_lines import read_lines
from slurm.records import Start, starts
from tests.cluster.slurm import Cluster
from tests.pipeline.runs import (
    ROOT,
    alive,
    coatnet,
    curve,
    events,
    last_state,
    last_step,
    pack_digits,
    wait_until,
)

STEPS = 60


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_digits(tmp_path_factory.mktemp("digits"))


def keys(digits: Path, run: Path, *more: str) -> list[str]:
    """A training of four micro batches a step."""
    data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={run}"]
    length = [f"train.steps={STEPS}", "train.micro_batch=16", "checkpoint.every=5", "checkpoint.keep_last=100"]
    return [*data, *length, "log.every=1", "evaluate.every=null", "run.hang_timeout=10", *more]


JOB = [
    "slurm.nodes=2",
    "slurm.tasks_per_node=2",
    "slurm.memory=1500M",
    "slurm.time=10",
    "slurm.lead=60",
    "slurm.backoff=1",
]


@pytest.fixture(scope="module")
def undisturbed(digits: Path) -> Path:
    """The same on four ranks of this machine, without Slurm."""
    done = coatnet("pretrain", "configs/tiny.yaml", "--procs", 4, *keys(digits, digits / "undisturbed"))
    assert done.returncode == 0, done.stderr
    return digits / "undisturbed"


@pytest.fixture
def submitted(cluster: Cluster, digits: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits a run of this name, and returns its job; what is left is cancelled in the end."""
    jobs: list[str] = []

    def submit(name: str, *more: str) -> str:
        said = command(cluster, "submit", "pretrain", "configs/tiny.yaml", *keys(digits, tmp_path / name), *JOB, *more)
        assert said.returncode == 0, said.stderr
        jobs.append(next(read_lines(tmp_path / name / "slurm" / "jobs.jsonl"))["job"])
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.run("scancel", job)
        cluster.wait(job, "COMPLETED", "CANCELLED", "FAILED")


def command(cluster: Cluster, *words: str, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "PYTHONPATH": str(checkout)}
    program = [sys.executable, "-P", "-m", "slurm.cli", *words]
    return subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def ranks(run: Path) -> list[int]:
    """Processes of a run's ranks, on whichever node."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            words = _read(entry / "cmdline").split(b"\0")
            if b"pipeline.cli" in words and str(run).encode() in b" ".join(words) and b"srun" not in words[0]:
                found.append(int(entry.name))
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def trains(run: Path, starts_before: int = 0) -> Callable[[], bool]:
    """Whether a start after so many others has done some steps."""

    def does() -> bool:
        went_on = [row["step"] for row in [*events(run, "begin"), *events(run, "resume")]]
        return len(went_on) > starts_before and last_step(run) >= went_on[-1] + 3

    return does


def causes(run: Path) -> list[str | None]:
    return [start.cause for start in starts(run)]


@pytest.mark.torture
def test_a_run_that_is_requeued_and_loses_a_rank_is_the_run_that_never_was(
    cluster: Cluster,
    submitted: Callable[..., str],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    job = submitted("run")
    wait_until(trains(run))
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: bool(events(run, "stop")))
    wait_until(trains(run, 1))
    os.kill(ranks(run)[-1], signal.SIGKILL)
    ended = cluster.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "2"
    assert causes(run) == ["preempted", "killed rank", "done"]
    assert [row["cause"] for row in events(run, "restart")] == ["preempted", "killed rank"]
    assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


@pytest.mark.torture
def test_one_command_leads_to_an_evaluated_model_whatever_happens_to_the_checkout_meanwhile(
    cluster: Cluster,
    digits: Path,
    tmp_path: Path,
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("pipeline", "models", "data", "slurm", "configs"):
        shutil.copytree(ROOT / package, checkout / package)
    first, second = tmp_path / "first", tmp_path / "second"
    fine = ["configs/tiny_finetune.yaml", *keys(digits, second, "train.steps=10", "train.micro_batch=16"), *JOB]
    said = command(
        cluster, "submit", "pretrain", str(checkout / "configs" / "tiny.yaml"),
        *keys(digits, first, "train.steps=10"), *JOB, "--then", " ".join(fine), checkout=checkout,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    for module in ("train.py", "cli.py"):
        (checkout / "pipeline" / module).write_text("raise SystemExit('edited')\n")
    jobs = [next(read_lines(run / "slurm" / "jobs.jsonl"))["job"] for run in (first, second)]
    assert cluster.job(jobs[1])["Reason"] == "Dependency"
    assert cluster.wait(jobs[0], "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert cluster.wait(jobs[1], "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    figures = json.loads((second / "evaluation.json").read_text())
    assert figures["samples"] == 360 and 0 <= figures["top1"] <= 1
    assert causes(first) == causes(second) == ["done"]


@pytest.mark.torture
def test_a_run_goes_on_on_the_node_that_is_left(
    cluster: Cluster,
    submitted: Callable[..., str],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    job = submitted("run", "slurm.min_nodes=1")
    wait_until(trains(run))
    cluster.power_off("n2")
    try:
        assert cluster.wait(job, "COMPLETED", "FAILED", seconds=240)["JobState"] == "COMPLETED"
    finally:
        cluster.start_node("n2")
        cluster.nodes_idle(2)
    assert causes(run) == ["node lost", "done"]
    assert [start.nodes for start in starts(run)] == [("n1", "n2"), ("n1",)]
    assert [row["world_size"] for row in events(run, "start")] == [4, 2]
    assert [row[0] for row in curve(run)] == [row[0] for row in curve(undisturbed)]


@pytest.mark.torture
def test_a_frozen_rank_is_a_hang_and_the_run_comes_back(
    cluster: Cluster,
    submitted: Callable[..., str],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    job = submitted("run")
    wait_until(trains(run))
    os.kill(ranks(run)[-1], signal.SIGSTOP)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=240)["JobState"] == "COMPLETED"
    assert causes(run) == ["hang", "done"]
    assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


@pytest.mark.torture
def test_a_run_longer_than_its_time_limit_goes_on_in_the_next_start(
    cluster: Cluster,
    submitted: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Slurm sends the warning up to a minute early."""
    run = tmp_path / "run"
    job = submitted("run", "slurm.time=1", "slurm.lead=20", "train.steps=3000", "checkpoint.every=1000")
    wait_until(lambda: bool(events(run, "stop")))
    assert events(run, "stop")[0]["reason"] == "SIGUSR2"
    wait_until(trains(run, 1))
    assert causes(run) == ["time limit", None]
    assert events(run, "resume")[0]["step"] == events(run, "stop")[0]["step"]
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.torture
def test_a_cancelled_run_stays_cancelled_and_goes_on_when_it_is_submitted_again(
    cluster: Cluster,
    submitted: Callable[..., str],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    job = submitted("run")
    wait_until(trains(run))
    said = command(cluster, "cancel", str(run))
    assert said.returncode == 0, said.stderr
    assert cluster.wait(job, "CANCELLED", "COMPLETED")["JobState"] == "CANCELLED"
    wait_until(lambda: not any(map(alive, ranks(run))))
    assert json.loads(command(cluster, "status", str(run), "--json").stdout)["state"] == "cancelled"
    again = submitted("run")
    job = list(read_lines(run / "slurm" / "jobs.jsonl"))[-1]["job"]
    assert again and cluster.wait(job, "COMPLETED", "FAILED", seconds=240)["JobState"] == "COMPLETED"
    assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


def test_a_request_that_is_wrong_fails_once_and_status_says_why(
    cluster: Cluster,
    submitted: Callable[..., str],
    tmp_path: Path,
) -> None:
    job = submitted("run", "data.train=no/such/data")
    assert cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "FAILED"
    assert causes(tmp_path / "run") == ["bad request"] and isinstance(starts(tmp_path / "run")[0], Start)
    said = command(cluster, "status", str(tmp_path / "run"), "--json")
    facts = json.loads(said.stdout)
    assert facts["state"] == "failed" and "no/such/data" in facts["reason"]


def test_what_the_cluster_could_never_give_is_refused_before_anything_is_submitted(
    cluster: Cluster,
    digits: Path,
    tmp_path: Path,
) -> None:
    for wanted, told in (
        (
            ["slurm.nodes=3", "train.global_batch=96"],
            "slurm.nodes=3 is more than any partition has: high has 2, main has 2",
        ),
        (["slurm.partition=gpu"], "slurm.partition=gpu does not exist here"),
        (["slurm.memory=900G"], "sbatch: "),
        (["slurm.nodes=9"], "too few for 18 ranks"),
    ):
        said = command(
            cluster, "submit", "pretrain", "configs/tiny.yaml", *keys(digits, tmp_path / "run"), *JOB, *wanted
        )
        assert said.returncode == 2 and told in said.stderr, said.stderr
        assert len(said.stderr.strip().splitlines()) == 1
    assert cluster.run("squeue", "-h", "-n", "coatnet-run") == ""
