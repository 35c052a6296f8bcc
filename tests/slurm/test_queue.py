"""A real Slurm's records of jobs in every stage, through to a cancelled run that stays cancelled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.schema import parse_duration
from pipeline.errors import UsageError
from slurm import history, scheduler
from slurm.cancel import cancel
from slurm.status_view import status
from tests.cluster.slurm import Cluster, running_cluster
from tests.pipeline.runs import wait_until

SCRIPT = '#!/bin/bash\n[ "$1" = end ] || sleep 600\n'


@pytest.fixture(scope="module")
def cluster(slurm_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node of four CPUs."""
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=1, cpus=4) as it:
        yield it


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster as this process's Slurm; no job outlives a test."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.run("scancel", "--me")
    cluster.nodes_idle(1)


def submit(slurm: Cluster, run: Path, *options: str, argument: str = "") -> str:
    (run / "job.sh").write_text(SCRIPT)
    request = ["--parsable", "--mem=100", "--requeue", "--cpus-per-task=4", f"--output={run}/%j_0_log.out", *options]
    job = slurm.run("sbatch", *request, run / "job.sh", argument).partition(";")[0]
    history.record_submission(run, job=job, command="pretrain", nodes=1, dependency=None, host=os.uname().nodename)
    return job


def state(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str | None]:
    assert status([run], True, False) == 0
    found = json.loads(capsys.readouterr().out)
    return found["state"], found["reason"]


def test_a_job_from_the_queue_to_cancelled(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = submit(slurm, tmp_path, "--job-name=with blanks = signs", "--time=5")
    slurm.wait(job, "RUNNING")
    after = submit(slurm, tmp_path, f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    slurm.wait(after, "PENDING")
    facts = scheduler.show_job(job)
    assert facts is not None and (facts["JobName"], facts["JobState"]) == ("with blanks = signs", "RUNNING")
    assert list(scheduler.active_jobs(tmp_path)) == [job, after]
    assert state(tmp_path, capsys) == ("running", None)

    other = tmp_path / "other"
    other.mkdir()
    waiting = submit(slurm, other)
    slurm.wait(waiting, "PENDING")
    wait_until(lambda: state(other, capsys)[1] in ("Resources", "Priority"))
    assert state(other, capsys)[0] == "pending"

    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, "PENDING", "RUNNING")
    assert state(tmp_path, capsys)[0] in ("requeued", "running")
    assert cancel(tmp_path) == 0
    assert history.is_cancelled(tmp_path) and f"cancelled job {after}" in capsys.readouterr().out
    slurm.wait(job, "CANCELLED")
    slurm.wait(after, "CANCELLED")
    assert state(tmp_path, capsys)[0] == "cancelled"
    with pytest.raises(UsageError, match="no job to cancel"):
        cancel(tmp_path)
    scheduler.cancel_job(job)  # again is no error
    scheduler.cancel_job(waiting)
    slurm.wait(waiting, "CANCELLED")
    assert state(other, capsys)[0] == "cancelled", "also by hand, with scancel"


def test_jobs_that_have_ended_or_never_existed(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = submit(slurm, tmp_path, argument="end")
    slurm.wait(job, "COMPLETED")
    assert scheduler.active_jobs(tmp_path) == {}
    (tmp_path / f"{job}_0_log.out").unlink()
    assert scheduler.show_job("999999") is None
    scheduler.cancel_job("999999")
    assert state(tmp_path, capsys) == ("failed", f"job {job} ended as COMPLETED"), "without a recorded start"


def test_of_an_array_the_most_active_element_counts(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "--array=0-5%1")
    slurm.wait(job, "RUNNING", "PENDING")
    wait_until(lambda: (scheduler.show_job(job) or {}).get("JobState") == "RUNNING")
    assert (scheduler.show_job(job) or {})["ArrayTaskId"] == "0"
    assert cancel(tmp_path) == 0
    wait_until(lambda: not scheduler.active_jobs(tmp_path))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-0", 172800), ("1-2:03", 93780), ("1-00:00:01", 86401),
        ("UNLIMITED", None), ("INVALID", None), ("", None), ("30:00\n", 1800),
    ],
)  # fmt: skip
def test_durations_are_parsed_as_slurm_writes_them(time: str, seconds: int | None) -> None:
    assert parse_duration(time) == seconds
