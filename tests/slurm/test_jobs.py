"""Jobs on a real Slurm of two virtual nodes, with real trainings of two ranks on each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config.parsing import read_config
from slurm.history import starts, submissions
from slurm.submit import JobSpec, grace_seconds, warnings, with_restarts
from tests import forked
from tests.cluster.slurm import GRACE_SECONDS, KILL_SECONDS, Cluster
from tests.pipeline.runs import ROOT, alive, catches, coatnet, curve, events, last_state, rows, wait_until
from tests.slurm.jobs import JOB, causes, command, keys, ranks, read, status, trains

NAME = "50% %j-%2t, [lr=1-2] it's#1"
"""Of a run: Slurm takes much of it for patterns, options or comments."""
Submit = Callable[..., tuple[Path, str]]


@pytest.fixture(scope="module")
def undisturbed(digits: Path) -> Path:
    """The same on four ranks of this machine, without Slurm."""
    done = coatnet("pretrain", "configs/tiny.yaml", "--procs", 4, *keys(digits, digits / "undisturbed"))
    assert done.returncode == 0, done.stderr
    return digits / "undisturbed"


@pytest.fixture
def submitted(cluster: Cluster, digits: Path, tmp_path: Path) -> Iterator[Submit]:
    """Submits a run, and returns it and its job, which is cancelled in the end."""
    jobs: list[str] = []

    def submit(*more: str) -> tuple[Path, str]:
        run = tmp_path / NAME
        done = command(cluster, "submit", "pretrain", "configs/tiny.yaml", *keys(digits, run), *JOB, *more)
        assert done.returncode == 0, done.stderr
        jobs.append(submissions(run)[-1]["job"])
        return run, jobs[-1]

    yield submit
    for job in jobs:
        cluster.run("scancel", job)
        wait_until(lambda job=job: not cluster.run("squeue", "-h", "-j", job))


@pytest.fixture
def training(submitted: Submit) -> Submit:
    """Submits a run, and returns it and its job once it trains."""

    def submit(*more: str) -> tuple[Path, str]:
        run, job = submitted(*more)
        wait_until(trains(run))
        return run, job

    return submit


def end(cluster: Cluster, job: str) -> str:
    return cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=240)["JobState"]


def equals_undisturbed(run: Path, undisturbed: Path) -> bool:
    return curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


def test_a_run_that_is_requeued_resumes_where_it_stopped(cluster: Cluster, training: Submit) -> None:
    run, job = training("train.steps=40", "slurm.tasks_per_node=1")  # a task is an interpreter that imports torch
    cluster.run("scontrol", "requeue", job)
    assert end(cluster, job) == "COMPLETED" and causes(run) == ["preempted", "done"]
    assert events(run, "training_resumed")[0]["step"] == events(run, "interrupted")[0]["step"]
    assert [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row] == list(range(1, 41))
    assert (status(cluster, run)["state"], status(cluster, run)["restarts"]) == ("done", 1)
    assert "done: 40 steps" in command(cluster, "logs", str(run)).stdout


@pytest.mark.torture
def test_a_stop_before_the_first_step_is_no_failure(cluster: Cluster, submitted: Submit) -> None:
    run, job = submitted("train.steps=5", "slurm.max_restarts=0")
    wait_until(lambda: len(found := ranks(run)) == 4 and all(catches(pid, signal.SIGUSR2) for pid in found))
    cluster.run("scancel", "--signal=USR2", job)
    assert end(cluster, job) == "COMPLETED" and causes(run) == ["preempted", "done"]
    assert {row["status"] for row in rows(run / "slurm" / "failures.jsonl")} == {3}


@pytest.mark.torture
def test_a_run_that_is_requeued_and_loses_a_rank_equals_an_undisturbed_one(
    cluster: Cluster, training: Submit, undisturbed: Path
) -> None:
    run, job = training()
    cluster.run("scontrol", "requeue", job)
    wait_until(lambda: bool(events(run, "interrupted")))
    wait_until(trains(run, 1))
    os.kill(ranks(run)[-1], signal.SIGKILL)
    assert end(cluster, job) == "COMPLETED" and cluster.job(job)["Restarts"] == "2"
    assert causes(run) == ["preempted", "killed rank", "done"]
    assert [row["cause"] for row in events(run, "requeued")] == ["preempted", "killed rank"]
    assert equals_undisturbed(run, undisturbed)


@pytest.mark.torture
def test_one_command_leads_to_an_evaluated_model_though_the_checkout_changes(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for package in ("pipeline", "models", "data", "slurm", "configs"):
        shutil.copytree(ROOT / package, checkout / package)
    shutil.copy(ROOT / "coatnet_main.py", checkout)
    first, second = tmp_path / "first", tmp_path / "second"
    fine = ["configs/tiny_finetune.yaml", *keys(digits, second, "train.steps=10", "train.micro_batch=16"), *JOB]
    done = command(
        cluster, "submit", "pretrain", str(checkout / "configs" / "tiny.yaml"),
        *keys(digits, first, "train.steps=20"), *JOB, "--then", " ".join(fine), checkout=checkout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for module in ("train.py", "cli.py"):
        (checkout / "pipeline" / module).write_text("raise SystemExit('edited')\n")
    jobs = [submissions(run)[0]["job"] for run in (first, second)]
    assert (status(cluster, second)["state"], status(cluster, second)["reason"]) == ("pending", "Dependency")
    wait_until(trains(first))
    assert status(cluster, first)["state"] == "running" and 0 < status(cluster, first)["step"] <= 20
    assert end(cluster, jobs[0]) == "COMPLETED" and status(cluster, first)["state"] == "done"
    assert end(cluster, jobs[1]) == "COMPLETED" and status(cluster, second)["state"] == "done"
    assert status(cluster, second)["step"] == 10
    figures = json.loads((second / "evaluation.json").read_text())
    assert figures["samples"] == 360 and 0 <= figures["top1"] <= 1
    assert causes(first) == causes(second) == ["done"]


@pytest.mark.torture
def test_a_run_resumes_on_the_node_that_is_left(cluster: Cluster, training: Submit, undisturbed: Path) -> None:
    run, job = training("slurm.min_nodes=1")
    cluster.power_off("n2")
    try:
        assert end(cluster, job) == "COMPLETED"
    finally:
        cluster.start_node("n2")
        cluster.nodes_idle(2)
    assert causes(run) == ["node lost", "done"]
    assert [start.nodes for start in starts(run)] == [("n1", "n2"), ("n1",)]
    assert [row["world_size"] for row in events(run, "attempt_started")] == [4, 2]
    assert [row[0] for row in curve(run)] == [row[0] for row in curve(undisturbed)]


@pytest.mark.torture
def test_a_run_that_stops_while_slurm_signals_its_job_is_requeued(cluster: Cluster, training: Submit) -> None:
    """As in a preemption one of whose nodes confirms late: until then the job is not RUNNING."""
    run, job = training("train.steps=300")
    os.kill(daemon := cluster.slurmd("n2"), signal.SIGSTOP)
    try:
        cluster.run("scancel", "--signal=CONT", job)
        cluster.wait(job, "SIGNALING")
        for pid in ranks(run):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: cluster.state(job) not in ("SIGNALING", "RUNNING"))
    finally:
        os.kill(daemon, signal.SIGCONT)
    assert end(cluster, job) == "COMPLETED" and causes(run) == ["preempted", "done"]


@pytest.mark.torture
def test_a_run_resumes_when_the_daemon_under_its_batch_script_dies(cluster: Cluster, training: Submit) -> None:
    """Slurm gives the node up and starts the job again, but the batch script and two ranks on it live on."""
    run, job = training("train.steps=300")
    cluster.kill_slurmd("n1")
    cluster.wait(job, "PENDING")
    cluster.start_node("n1")
    assert end(cluster, job) == "COMPLETED"
    assert causes(run)[0] in ("preempted", "node lost") and causes(run)[1:] == ["done"]
    assert cluster.job(job)["Restarts"] == "1"
    assert [row["step"] for row in rows(run / "metrics.jsonl") if "loss" in row] == list(range(1, 301))


@pytest.mark.torture
def test_a_node_that_fails_twice_is_excluded(cluster: Cluster, training: Submit) -> None:
    run, job = training("slurm.min_nodes=1", "slurm.backoff=0")
    for before in (1, 2):
        os.kill(ranks(run, "n2")[0], signal.SIGKILL)
        wait_until(trains(run, before))
    assert [start.failed_nodes for start in starts(run)] == [("n2",), ("n2",), ()]
    assert [start.nodes for start in starts(run)] == [("n1", "n2"), ("n1", "n2"), ("n1",)]
    assert cluster.job(job)["ExcNodeList"] == "n2"


@pytest.mark.torture
def test_where_jobs_must_not_requeue_themselves_an_array_resumes(
    cluster: Cluster, training: Submit, undisturbed: Path
) -> None:
    """With what a site needs around each rank's command: modules, containers, NCCL's settings."""
    around = ["slurm.setup=[export NCCL_SOCKET_IFNAME=ib0]", "slurm.command_prefix=env CONTAINER=yes"]
    run, job = training("slurm.requeue=array", *around, "slurm.srun_args=[--cpu-bind=none]")
    settings = read(Path(f"/proc/{ranks(run)[-1]}/environ")).split(b"\0")
    assert {b"NCCL_SOCKET_IFNAME=ib0", b"CONTAINER=yes", b"SLURM_CPU_BIND_TYPE=none"} <= set(settings)
    os.kill(ranks(run)[-1], signal.SIGKILL)
    wait_until(lambda: causes(run)[-1:] == ["done"])
    assert causes(run) == ["killed rank", "done"] and [start.name for start in starts(run)] == [f"{job}.0", f"{job}.1"]
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job))
    facts = status(cluster, run)
    assert (facts["state"], facts["jobs"][0]["state"]) == ("done", "COMPLETED")
    assert equals_undisturbed(run, undisturbed)


@pytest.mark.torture
def test_a_frozen_rank_is_a_hang_and_the_run_resumes(cluster: Cluster, training: Submit, undisturbed: Path) -> None:
    """Rank 0, which writes the events otherwise."""
    run, job = training()
    (first,) = (pid for pid in ranks(run) if b"SLURM_PROCID=0" in read(Path(f"/proc/{pid}/environ")).split(b"\0"))
    os.kill(first, signal.SIGSTOP)
    assert end(cluster, job) == "COMPLETED"
    assert causes(run) == ["hang", "done"]
    assert equals_undisturbed(run, undisturbed)


@pytest.mark.torture
def test_a_run_longer_than_its_time_limit_resumes_in_the_next_start(cluster: Cluster, training: Submit) -> None:
    """Slurm sends the warning up to a minute early."""
    run, job = training("slurm.time=1", "slurm.signal_seconds=20", "train.steps=3000", "checkpoint.every=1000")
    wait_until(lambda: bool(events(run, "interrupted")))
    assert events(run, "interrupted")[0]["reason"] == "SIGUSR2"
    wait_until(trains(run, 1))
    assert causes(run) == ["time limit", None]
    assert events(run, "training_resumed")[0]["step"] == events(run, "interrupted")[0]["step"]
    assert cluster.job(job)["Restarts"] == "1"


@pytest.mark.torture
def test_a_cancelled_run_resumes_when_it_is_submitted_again(
    cluster: Cluster, training: Submit, submitted: Submit, undisturbed: Path
) -> None:
    run, job = training()
    twice = command(cluster, "submit", "pretrain", str(run / "config.yaml"), *JOB)
    assert twice.returncode == 2 and f"its job {job} is running" in twice.stderr
    done = command(cluster, "cancel", str(run))
    assert done.returncode == 0, done.stderr
    assert end(cluster, job) == "CANCELLED"
    wait_until(lambda: not any(map(alive, ranks(run))))
    assert status(cluster, run)["state"] == "cancelled"
    assert end(cluster, submitted()[1]) == "COMPLETED"
    assert equals_undisturbed(run, undisturbed)


def test_a_bad_request_fails_once_and_status_shows_why(cluster: Cluster, submitted: Submit) -> None:
    """The ranks get the script's environment though sbatch exports none of the submitter's."""
    run, job = submitted("data.train=no/such/data", "slurm.sbatch=[--export=NONE]")
    assert end(cluster, job) == "FAILED"
    assert causes(run) == ["bad request"]
    facts = status(cluster, run)
    assert facts["state"] == "failed" and "no/such/data" in facts["reason"]


def test_a_stop_that_takes_longer_than_the_grace_time_is_warned_about(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    grace = grace_seconds(None)
    assert grace == GRACE_SECONDS + KILL_SECONDS and grace_seconds("high") == KILL_SECONDS
    assert warnings(grace, signal=60, grace=grace) == []
    assert "kills 13 s after" in warnings(14, signal=60, grace=grace)[0]
    assert ["slurm.signal_seconds leaves only 60 s" in warning for warning in warnings(61, 60, grace)] == [True, False]


def test_what_the_cluster_can_never_provide_is_refused_at_submission(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    for request, message in (
        (["slurm.nodes=3", "train.global_batch=96"], "slurm.nodes=3 is more than partition main allows: 2"),
        (["slurm.partition=gpu"], "slurm.partition=gpu does not exist here; choose from cheap, high, main"),
        (["slurm.time=3-00:00:01"], "slurm.time=3-00:00:01 is longer than partition main allows: 3-00:00:00"),
        (["slurm.memory=900G"], "sbatch: "),
        (["slurm.nodes=9"], "too few for 18 ranks"),
        (["slurm.sbatch=[--no-such-option]"], "sbatch: unrecognized option '--no-such-option'"),
    ):
        words = [*keys(digits, tmp_path / "run"), *JOB, *request]
        done = command(cluster, "submit", "pretrain", "configs/tiny.yaml", *words)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert cluster.run("squeue", "-h", "-n", "coatnet-run") == ""


@pytest.mark.torture
def test_a_job_gets_the_same_environment_inside_another_as_outside(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    """The other job has its own memory, tasks and GPUs, torchrun's variables, and a limit on CPU time."""
    outer = ["salloc", "--quiet", "--ntasks=3", "--mem-per-cpu=100", "srun", "--ntasks=1", "--overlap"]
    outer += [
        "env",
        "RANK=5",
        "WORLD_SIZE=8",
        "CUDA_VISIBLE_DEVICES=7",
        "SBATCH_OUTPUT=/dev/null",
        "prlimit",
        "--cpu=7777",
        "env",
    ]
    seen = {}
    for place, words in (("outside", ["env", "--unset=CUDA_VISIBLE_DEVICES"]), ("inside", outer)):
        run, file = tmp_path / place, tmp_path / f"{place}.env"
        submit = [f"PYTHONPATH={ROOT}", sys.executable, "-P", "-m", "slurm.cli", "submit", "pretrain"]
        request = [
            *keys(digits, run),
            *JOB,
            f"slurm.setup=[CPU=$(ulimit -t) env -0 > {file}]",
            "slurm.srun_args=[--version]",
        ]
        cluster.run(*words, *submit, ROOT / "configs/tiny.yaml", *request)
        end(cluster, submissions(run)[-1]["job"])
        seen[place] = dict(pair.split("=", 1) for pair in file.read_text().split("\0") if "=" in pair)
    inside, outside = seen["inside"], seen["outside"]
    assert inside.keys() == outside.keys() and "SLURM_CONF" in inside
    differing = {name for name in inside if inside[name] != outside[name]}
    assert differing <= {f"SLURM_{name}" for name in ("JOB_ID", "JOBID", "JOB_NAME", "SUBMIT_HOST", "TASK_PID")}


def test_what_srun_refuses_is_a_bad_request_and_status_shows_its_line(cluster: Cluster, submitted: Submit) -> None:
    run, job = submitted("slurm.srun_args=[--memory=1G]")
    assert end(cluster, job) == "FAILED" and causes(run) == ["bad request"]
    assert "srun: unrecognized option '--memory=1G'" in status(cluster, run)["reason"]


def test_of_two_submissions_of_a_run_at_once_one_is_refused(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    words = ["submit", "pretrain", "configs/tiny.yaml", *keys(digits, tmp_path), *JOB]
    both = [forked.Command("slurm.cli", *words, env=cluster.environment) for _ in range(2)]
    assert sorted(each.wait(60) for each in both) == [0, 2]
    (submission,) = submissions(tmp_path)
    cluster.run("scancel", submission["job"])


def test_where_preemption_cancels_an_array_is_chosen_or_advised(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])

    def chosen(partition: str, requeue: str, is_followed: bool = False) -> tuple[bool, str]:
        overrides = [f"slurm.partition={partition}", f"slurm.requeue={requeue}", f"run.dir={tmp_path}"]
        job = JobSpec("pretrain", "tiny.yaml", read_config("configs/tiny.yaml", [*overrides, "data.train=here"]))
        is_array = with_restarts(job, is_followed).array
        said = capsys.readouterr()
        return is_array, said.out + said.err

    assert chosen("main", "null") == chosen("high", "scontrol") == (False, "")
    is_array, said = chosen("cheap", "null")
    assert is_array and said.startswith("partition cheap cancels the jobs it preempts")
    for requeue, is_followed in (("scontrol", False), ("null", True)):
        is_array, said = chosen("main,cheap", requeue, is_followed)
        assert not is_array and said.startswith("warning: partition cheap cancels")


def preempt(cluster: Cluster) -> str:
    """A job on all nodes, before which those of main and cheap give way."""
    return cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 3", "--output=/dev/null"
    )


@pytest.mark.torture
@pytest.mark.parametrize("waiting", [True, False])
def test_an_array_survives_preemption_by_cancelling_but_not_a_persons_scancel(
    cluster: Cluster, training: Submit, waiting: bool
) -> None:
    """Of its second element alone, as it waits or as it trains."""
    run, job = training("slurm.partition=cheap", "train.steps=3000")
    other = preempt(cluster)
    cluster.wait(other, "RUNNING")
    if not waiting:
        wait_until(trains(run, 1))
    cluster.run("scancel", f"{job}_1")
    wait_until(lambda: not cluster.run("squeue", "-h", "-j", job))
    assert status(cluster, run)["state"] == "cancelled"
    assert causes(run) == (["preempted"] if waiting else ["preempted", "cancelled"])
