"""The state of runs, from folders written here and from what Slurm would report of their jobs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.attempt import write_config
from pipeline.checkpoint.attempts import allocate, allocate_next
from pipeline.commands.finetune import Source, pin_source
from pipeline.config.parsing import validate
from pipeline.config.schema import Config
from pipeline.errors import RunFailed, UsageError
from pipeline.lineage import lineage_entry, unknown_lineage
from pipeline.run.jsonl import append_row
from pipeline.run.lock import lock_holder
from slurm import history, scheduler
from slurm.cancel import cancel
from slurm.history import JobStart
from slurm.requeue import Cause
from slurm.status import JobRecords, Status, read_run, status_of
from slurm.status_view import as_lines, status
from tests.pipeline.runs import ROOT, wait_until

NOW = time.time()
STATES = {"pending", "running", "requeued", "stopped", "done", "failed", "cancelled"}
PENDING, RUNNING, COMPLETING, GONE = {"JobState": "PENDING"}, {"JobState": "RUNNING"}, {"JobState": "COMPLETING"}, None


class Run:
    """A run's folder in the making; `at` is minutes before now."""

    def __init__(self, folder: Path) -> None:
        self.path, self.attempt = folder, -1
        (folder / "slurm").mkdir(parents=True)

    def _add(self, file: str, at: float, **row: Any) -> Run:
        append_row(self.path / file, {"time": NOW - 60 * at, **row})
        return self

    def config(self, **train: Any) -> Run:
        text = json.dumps({"data": {"train_samples": None}, "train": {"steps": None, "epochs": None, **train}})
        (self.path / "config.yaml").write_text(text)
        return self

    def submitted(self, at: float, job: str = "7", **facts: Any) -> Run:
        return self._add("slurm/jobs.jsonl", at, **{"job": job, "host": os.uname().nodename, **facts})

    def start(self, at: float, name: str = "7.0", nodes: tuple[str, ...] = ("n1", "n2")) -> Run:
        return self._add("slurm/starts.jsonl", at, start=name, event="start", nodes=nodes)

    def end(
        self, at: float, cause: Cause, name: str = "7.0", decision: str = "decided", again: bool | None = None
    ) -> Run:
        again = cause in (Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_LOST) if again is None else again
        ended = JobStart(name, (), 0.0, NOW - 60 * at, cause, 0, (), decision, again)
        history.record_end(self.path, ended)
        return self

    def failure(self, at: float, rank: int, message: str, name: str = "7.0", host: str = "n1") -> Run:
        facts = {"start": name, "rank": rank, "host": host, "status": 1, "message": message}
        return self._add("slurm/failures.jsonl", at, **facts)

    def event(self, at: float, event: str, **facts: Any) -> Run:
        self.attempt += event == "attempt_started"
        return self._add("events.jsonl", at, attempt=self.attempt, event=event, **facts)

    def begun(self, at: float) -> Run:
        return self.event(at, "attempt_started").event(at, "training_started", step=0)

    def resumed(self, at: float, step: int) -> Run:
        return self.event(at, "attempt_started").event(at, "training_resumed", step=step)

    def rows(self, *steps: int, seconds: float = 1.0, **facts: Any) -> Run:
        for step in steps:
            row = {"step": step, "samples": 8 * step, "epoch": 8 * step / 100, "loss": 1 / step, **facts}
            self._add("metrics.jsonl", 0, **row, images_per_second=8 / seconds, step_seconds=seconds)
        return self

    def checkpoint(self, step: int) -> Run:
        (self.path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        return self

    def status(self, jobs: JobRecords | None = None) -> Status:
        return status_of(read_run(self.path), jobs or {}, NOW)

    def state(self, jobs: JobRecords | None = None) -> tuple[str, str | None]:
        found = self.status(jobs)
        return found.state, found.reason


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "is_installed", lambda: False)


# -------------------------------------------------------------------------------------------------------- without Slurm


def test_steps_that_were_not_applied_and_rollbacks_are_shown(run: Run) -> None:
    run.begun(9).rows(9).event(8, "step_skipped", step=4).event(8, "attempt_started").event(8, "step_skipped", step=4)
    attempt = allocate(run.path)
    assert run.status().not_applied == [4]
    for step in (6, 7, 1008):
        run.event(6, "step_skipped", step=step)
    back = {"to": 5, "first": 6, "last": 1008}
    allocate_next(run.path, attempt, 5, [back])
    found = run.event(5, "step_skipped", step=1010).status()
    assert found.not_applied == [4, 1010] and found.rollbacks == [back]
    assert run.resumed(4, step=1009).status().not_applied == [4], "1010 is done again"
    lines = ["  2 steps not applied, the last 1,010", "  rolled back to step 5, skipping steps 6 to 1,008"]
    assert lines == [line for line in as_lines(found) if "applied" in line or "back" in line]


def test_the_state_of_a_run_without_jobs_follows_from_its_lock_and_events(run: Run) -> None:
    run.begun(9).checkpoint(5)
    (run.path / ".lock").write_text("process 1 on here\n")
    with (run.path / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run.state() == ("running", None)
    state, why = run.state()
    assert state == "failed" and str(why).endswith("the same command resumes from step 5")
    assert run.event(8, "interrupted", step=5, reason="SIGTERM").state()[0] == "stopped"
    assert run.resumed(7, step=5).state()[0] == "failed"
    state, why = run.event(6, "heartbeat_lost", ranks=[{"rank": 1, "host": "n2"}]).state()
    assert state == "failed" and "no heartbeat from rank 1 on n2" in str(why)
    state, why = run.event(5.5, "hang", ranks=[{"rank": 3, "host": "n4"}], stacks="logs/stacks-attempt-1.txt").state()
    assert state == "failed" and "rank 3 on n4; stacks in logs/stacks-attempt-1.txt; the same" in str(why)
    assert run.event(5.2, "out_of_memory", rank=1, error="no more").state()[1] == "rank 1 ran out of memory: no more"
    assert run.event(5.1, "failed", message="steps 3 to 5 were bad").state() == ("failed", "steps 3 to 5 were bad")
    assert run.resumed(5, step=5).event(4, "finished", step=9).state() == ("done", None)
    assert run.status().restarts == 2


def test_saves_that_failed_in_a_row_are_shown_until_one_succeeds(run: Run) -> None:
    run.submitted(90).start(80).begun(79).rows(10, 20, 30).checkpoint(10)
    for number, step in enumerate((20, 30), 1):
        run.event(40 - step, "checkpoint_failed", step=step, reason=f"{run.path} cannot be written", in_a_row=number)
    found = run.status({"7": RUNNING})
    assert (found.state, found.checkpoints["failed_in_a_row"]) == ("running", 2)
    why = f"2 saves failed in a row, the newest good one is of step 10: {run.path} cannot be written"
    assert f"  {why}" in as_lines(found)
    assert run.event(5, "checkpoint", step=40).status({"7": RUNNING}).reason is None


def test_each_step_is_read_once_where_metrics_could_not_be_cut_back(run: Run) -> None:
    run.config(steps=40).begun(9).rows(10, 20, 30).checkpoint(10).resumed(8, step=10).rows(20)
    found = run.status()
    assert (found.step, found.seconds_left) == (20, 20.0)


def test_a_run_whose_events_could_not_be_written_is_done_by_its_last_checkpoint(run: Run) -> None:
    run.config(steps=40).checkpoint(40)
    assert run.state()[0] == "done"
    assert run.config(steps=41).state()[0] == "failed"


def test_reading_the_lock_changes_nothing_and_keeps_no_start_from_it(run: Run) -> None:
    run.begun(1)
    assert lock_holder(run.path) is None and not (run.path / ".lock").exists()
    (run.path / ".lock").write_text("process 1 on here\n")
    assert lock_holder(run.path) is None
    with (run.path / ".lock").open() as mine:
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (run.path / ".lock").read_text() == "process 1 on here\n"


# ---------------------------------------------------------------------------------------------------- the life of a job


def test_status_follows_a_job_from_the_queue_through_a_preemption_to_its_end(run: Run) -> None:
    run.submitted(90).config(steps=40)
    waiting = {"7": {"JobState": "PENDING", "Reason": "Priority"}}
    assert run.state(waiting) == ("pending", "Priority")
    assert run.status(waiting).steps == 40

    run.start(80).begun(79).rows(10, 20).checkpoint(15)
    first = run.status({"7": RUNNING})
    assert (first.state, first.reason, first.step, first.seconds_left) == ("running", None, 20, 20.0)
    assert first.checkpoints == {"newest": 15, "count": 1, "failed_in_a_row": 0}

    run.event(70, "interrupted", step=20, reason="SIGUSR2").end(70, Cause.PREEMPTED, decision="preempted: it resumes")
    assert run.state({"7": COMPLETING})[0] == "requeued"
    again = run.status({"7": {"JobState": "PENDING", "Reason": "BeginTime", "Restarts": "1"}})
    assert (again.state, again.reason, again.restarts) == ("requeued", "preempted: it resumes; BeginTime", 1)
    assert again.jobs == [{"job": "7", "state": "PENDING", "reason": "BeginTime", "restarts": 1, "nodes": []}]

    run.start(60, "7.1", nodes=("n2",)).resumed(59, step=20).rows(30, 40)
    assert run.status({"7": RUNNING}).state == "running"
    run.event(50, "finished", step=40).end(50, Cause.DONE, "7.1", "done")
    assert run.state({"7": RUNNING}) == ("running", "evaluating")
    for facts in (COMPLETING, {"JobState": "COMPLETED"}, GONE):
        last = run.status({"7": facts})
        assert (last.state, last.step, last.seconds_left, last.restarts) == ("done", 40, 0.0, 1)
    assert run.status().state == "done", "Slurm could not be asked"
    assert last.jobs[0]["nodes"] == ["n2"]
    assert last.goodput == pytest.approx((9 + 9) / (10 + 10)), "each start of ten minutes was one of starting up"


def test_a_failed_run_shows_the_first_error_of_the_first_failing_rank(run: Run) -> None:
    run.submitted(9).start(8, "7.3").begun(7)
    run.failure(6.0, 0, "an old one", "7.2").failure(5.0, 0, "it lost rank 3", "7.3")
    run.failure(5.5, 3, "out of\nmemory", "7.3", "n2").end(4, Cause.CRASH, "7.3", "it failed 21 times")
    expected = ("failed", "rank 3 on n2: out of memory; it failed 21 times")
    for jobs in ({"7": {"JobState": "FAILED"}}, {"7": GONE}, {}):
        assert run.state(jobs) == expected


def test_a_failure_that_only_the_batch_log_reports_is_shown(run: Run) -> None:
    log = "start 7.0\ncoatnet: data.train=x: is not there\nsrun: error: n1: task 0: Terminated\nend of 7.0: wrong\n"
    (run.path / "slurm" / "7_0_log.out").write_text(log)
    run.submitted(9).start(8).end(7, Cause.BAD_REQUEST, decision="the request is wrong")
    assert run.state({"7": GONE}) == ("failed", "coatnet: data.train=x: is not there; the request is wrong")
    assert run.state({"7": COMPLETING})[0] == "failed"


@pytest.mark.parametrize(
    ("cause", "job", "state"),
    [
        (None, RUNNING, "running"),
        (None, {"JobState": "PENDING", "Restarts": "1"}, "requeued"),
        (None, {"JobState": "CANCELLED"}, "cancelled"),
        (None, {"JobState": "TIMEOUT"}, "stopped"),
        (None, {"JobState": "PREEMPTED"}, "stopped"),
        (None, {"JobState": "NODE_FAIL"}, "stopped"),
        (None, {"JobState": "FAILED"}, "failed"),
        (None, {"JobState": "OUT_OF_MEMORY"}, "failed"),
        (None, GONE, "failed"),
        (Cause.PREEMPTED, RUNNING, "requeued"),
        (Cause.PREEMPTED, GONE, "stopped"),
        (Cause.TIME_LIMIT, {"JobState": "TIMEOUT"}, "stopped"),
        (Cause.NODE_LOST, GONE, "stopped"),
        (Cause.CRASH, PENDING, "requeued"),
        (Cause.CRASH, RUNNING, "requeued"),
        (Cause.CRASH, {"JobState": "CANCELLED"}, "cancelled"),
        (Cause.CRASH, GONE, "failed"),
        (Cause.KILLED_RANK, GONE, "failed"),
        (Cause.HANG, {"JobState": "FAILED"}, "failed"),
        (Cause.CANCELLED, GONE, "cancelled"),
        (Cause.CANCELLED, COMPLETING, "cancelled"),
        (Cause.BAD_REQUEST, GONE, "failed"),
        (Cause.BAD_REQUEST, {"JobState": "PENDING", "Restarts": "1"}, "requeued"),  # somebody requeued it by hand
        (Cause.DONE, PENDING, "done"),  # the rest of an array
        (Cause.DONE, {"JobState": "FAILED"}, "done"),  # its evaluation failed
    ],
)
def test_the_state_by_how_a_start_ended_and_what_slurm_says(
    run: Run, cause: Cause | None, job: Any, state: str
) -> None:
    run.submitted(9).start(8).begun(7)
    if cause is not None:
        run.end(6, cause)
    assert run.state({"7": job})[0] == state


@pytest.mark.parametrize(
    ("job", "state"),
    [
        (PENDING, "pending"),
        ({"JobState": "PENDING", "Reason": "DependencyNeverSatisfied"}, "pending"),
        ({"JobState": "CONFIGURING"}, "running"),
        (RUNNING, "running"),
        ({"JobState": "CANCELLED", "Reason": "DependencyNeverSatisfied"}, "cancelled"),
        ({"JobState": "FAILED"}, "failed"),
        (GONE, "cancelled"),
    ],
)
def test_the_state_of_a_job_that_never_came_to_start(run: Run, job: Any, state: str) -> None:
    assert run.submitted(9).state({"7": job})[0] == state


@pytest.mark.parametrize(
    ("cause", "again", "state"),
    [
        (None, False, "running"),
        (Cause.PREEMPTED, True, "requeued"),
        (Cause.CRASH, True, "requeued"),
        (Cause.CRASH, False, "failed"),
        (Cause.DONE, False, "done"),
    ],
)
def test_where_slurm_cannot_be_asked_the_folder_is_enough(
    run: Run, no_slurm: None, capsys: pytest.CaptureFixture[str], cause: Cause | None, again: bool, state: str
) -> None:
    assert run.submitted(9).state()[0] == "pending"
    run.start(8).begun(7)
    if cause is not None:
        run.end(6, cause, again=again)
    assert status([run.path], True, False) == 0
    assert json.loads(capsys.readouterr().out)["state"] == state


def test_a_cancelled_run_stays_so_until_it_is_started_again_by_any_means(run: Run) -> None:
    run.submitted(9).start(8).begun(7)
    history.cancel(run.path)
    os.utime(run.path / "slurm" / "cancelled", (NOW - 300, NOW - 300))
    assert run.state({"7": RUNNING}) == ("running", "being cancelled")
    assert run.state({"7": GONE})[0] == "cancelled"
    by_hand = run.resumed(3, step=0).event(2, "interrupted", step=4)
    assert by_hand.state({"7": GONE})[0] in ("stopped", "failed")
    history.record_submission(run.path, job="8")
    assert run.state({"7": GONE, "8": PENDING})[0] == "pending"


def test_a_run_that_was_finished_by_hand_after_its_job_had_failed_is_done(run: Run) -> None:
    run.submitted(9).start(8).begun(7).end(6, Cause.CRASH).resumed(5, step=0)
    assert run.state({"7": GONE})[0] == "failed"
    assert run.event(4, "interrupted", step=3).state({"7": GONE})[0] == "stopped"
    assert run.event(3, "attempt_started").event(2, "finished", step=9).state({"7": GONE}) == ("done", None)


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(("train", "steps"), [({"epochs": 3, "global_batch": 8}, 38), ({"steps": 5}, 5), ({}, None)])
def test_the_length_of_a_run_in_epochs_is_known_once_the_number_of_samples_is(
    run: Run, train: dict[str, Any], steps: int | None
) -> None:
    run.config(**train).begun(1)
    assert run.status().steps == train.get("steps")
    assert run.rows(2).status().steps == steps


def test_half_lines_evaluations_and_losses_that_are_no_numbers_do_no_harm(run: Run, no_slurm: None) -> None:
    run.config(steps=9).submitted(3).start(2).begun(1).rows(3)
    run._add("metrics.jsonl", 0, step=3, top1=0.5, eval_loss=1.0, weights="ema").rows(4, loss="nan")
    for file in ("metrics.jsonl", "events.jsonl", "slurm/jobs.jsonl", "slurm/starts.jsonl", "slurm/failures.jsonl"):
        with (run.path / file).open("a") as lines:
            lines.write('{"step": 5, "time": 1')
    (run.path / "slurm" / "config-0.yaml").write_text("train: {steps: [")
    found = run.status({"7": RUNNING})
    assert (found.state, found.step, found.loss) == ("running", 4, "nan")
    assert status([run.path], False, False) == 0


JOB = st.sampled_from(
    [*sorted(scheduler.WAITING | scheduler.BUSY), "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NEW", None]
)


@given(
    st.lists(st.sampled_from(["start", "end", "plain", "interrupted", "finished", "cancel", "submit"]), max_size=9), JOB
)
def test_whatever_happened_there_is_a_state_and_json_and_lines(
    tmp_path_factory: pytest.TempPathFactory, happened: list[str], job: str | None
) -> None:
    run, number, jobs = Run(tmp_path_factory.mktemp("any") / "run").event(99, "x"), 0, 0
    for at, what in zip(range(90, 0, -10), happened, strict=False):
        if what == "submit":
            jobs += 1
            run.submitted(at, str(jobs))
        elif what == "cancel":
            history.cancel(run.path)
        elif what in ("start", "end"):
            number += what == "start"
            name = f"{jobs}.{number}"
            run.start(at, name) if what == "start" else run.end(at, Cause.CRASH, name)
        else:
            run.event(at, "attempt_started" if what == "plain" else what, step=at)
    facts = None if job is None else {"JobState": job}
    for jobs_known in ({}, {str(jobs): facts} if jobs else {}):
        found = run.status(jobs_known)
        assert found.state in STATES and json.dumps(asdict(found)) and as_lines(found)
        if jobs_known and job == "PENDING":
            assert found.state in ("pending", "requeued")
        if jobs_known and job == "RUNNING":
            assert found.state in ("running", "requeued")


# ------------------------------------------------------------------------------------------------------------ ancestry


def trained(run: str, on: dict[str, Any], resolution: int = 224, stochastic_depth: float = 0.2) -> Config:
    """A configuration with just these augmentations on."""
    off = {"crop": "center", "flip": False, "randaugment": {"layers": 0, "magnitude": 0}}
    tree = {
        "run": {"dir": run},
        "data": {"train": "images"},
        "model": {"name": "coatnet_0", "resolution": resolution},
        "train": {"steps": 12345, "stochastic_depth": stochastic_depth},
        "augment": off | on,
    }
    return validate(tree, "test")


OLD = lineage_entry(trained("runs/old", {"crop": "random_resized", "flip": True, "mixup": 0.8}), 93837, [])
del OLD["augment"]["mixup"]  # as of a run older than mixup
PRE = lineage_entry(trained("runs/pre", {"flip": True, "mixup": 0.8, "allow_new": True}, 160, 0), 10, [OLD])
HERE = trained("runs/here", {"flip": True, "randaugment": {"layers": 2, "magnitude": 5}, "allow_new": True}, 384)


def begun(run: Run, config: Config, ancestors: list[dict[str, Any]]) -> Run:
    """The run as it is once it trains, from these ancestors or from none."""
    write_config(run.path, config)
    if ancestors:
        pin_source(run.path, Source("/source", "/source/checkpoints/step-00000010", ancestors))
    own = lineage_entry(config, 12345, ancestors)
    return run.event(9, "attempt_started").event(
        8, "training_started", step=0, new_augmentations=own["new_augmentations"]
    )


def test_a_fine_tuned_run_shows_the_augmentation_of_itself_and_its_ancestors(
    run: Run, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In JSON as its checkpoints have it."""
    begun(run, HERE, [OLD, PRE])
    assert as_lines(run.status())[-4:] == [
        "  ancestry, oldest first:",
        "    runs/old (224 x 224, 93,837 steps): random crop, flip; stochastic depth 0.2",
        "    runs/pre (160 x 160, 10 steps): flip, mixup 0.8; mixup allowed although new",
        "    runs/here (384 x 384): flip, RandAugment {layers: 2, magnitude: 5.0}; stochastic depth 0.2;"
        " RandAugment allowed although new",
    ]
    assert status([run.path], True, False) == 0
    found = json.loads(capsys.readouterr().out)["ancestry"]
    assert found == [OLD, PRE, lineage_entry(HERE, 12345, [OLD, PRE])]


def test_an_ancestor_of_unknown_augmentation_is_shown_as_unknown(run: Run) -> None:
    unknown = unknown_lineage("timm.safetensors")
    found = begun(run, HERE, [unknown, PRE]).status()
    assert found.ancestry[0] == unknown and len(found.ancestry) == 3
    assert as_lines(found)[-3].startswith("    timm.safetensors: how it was trained is unknown")


def test_a_pretrained_run_shows_its_own_augmentation_once_it_has_begun(run: Run) -> None:
    """Before, it may be a fine-tuning that has not recorded its source yet."""
    config = trained("runs/here", {}, stochastic_depth=0)
    write_config(run.path, config)
    assert run.event(9, "attempt_started").status().ancestry == []
    assert begun(run, config, []).status().ancestry == [lineage_entry(config, 12345, [])]


@given(st.sampled_from(["source.json", "config.yaml"]), st.floats(0, 1, exclude_max=True))
def test_half_a_file_shows_no_ancestry_rather_than_half_of_it(
    tmp_path_factory: pytest.TempPathFactory, file: str, share: float
) -> None:
    run = begun(Run(tmp_path_factory.mktemp("half") / "run"), HERE, [OLD, PRE])
    whole, path = run.status().ancestry, run.path / file
    text = path.read_text().rstrip("\n")
    path.write_text(text[: int(share * len(text))])
    found = run.status()
    assert found.ancestry in ([], whole) and (not found.ancestry or file == "config.yaml")
    assert json.dumps(asdict(found)) and as_lines(found)


@given(st.data())
def test_a_field_of_any_line_that_is_gone_or_of_another_type_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = begun(Run(tmp_path_factory.mktemp("fields") / "run"), HERE, [OLD])
    run.submitted(30).start(29).end(28, Cause.HANG).failure(28, 1, "why").rows(1, 2)
    for event in ("step_skipped", "training_resumed", "interrupted", "checkpoint"):
        run.event(20, event, step=3, reason="SIGTERM", new_augmentations=[])
    run.event(9, "hang", ranks=[{"rank": 1, "host": "n2"}], stacks="logs/stacks.txt")
    run.event(8, "out_of_memory", rank=1, error="none left").event(7, "failed", message="bad")
    path = data.draw(st.sampled_from(sorted(run.path.rglob("*.jsonl"))))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = data.draw(st.integers(1, len(lines)))
    row = lines[last - 1]
    name, other = data.draw(st.sampled_from(sorted(row))), data.draw(st.sampled_from([None, "x", -1, 1.5, [], [0], {}]))
    row[name] = other
    if data.draw(st.booleans()):
        del row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines[:last]))
    for jobs in ({}, {"7": RUNNING}, {"7": GONE}):
        found = run.status(jobs)
        assert found.state in STATES and json.dumps(asdict(found)) and as_lines(found)


@pytest.mark.parametrize("section", ["run", "data", "model", "augment", "train"])
def test_a_damaged_source_or_configuration_shows_no_ancestry(run: Run, section: str) -> None:
    begun(run, HERE, [OLD])
    damaged = [3, None, [3], [{}], *([OLD | other] for other in ({"augment": {}}, {"steps": None}, {"steps": ""}))]
    source = run.path / "source.json"
    intact = source.read_text()
    for text in ("null", "[]", "{}", *(json.dumps({"ancestry": ancestry}) for ancestry in damaged)):
        source.write_text(text)
        assert run.status().ancestry == []
    source.write_text(intact)
    for other in (None, "half", {}):
        (run.path / "config.yaml").write_text(json.dumps({**HERE.model_dump(mode="json"), section: other}))
        assert run.status().ancestry == []


# ------------------------------------------------------------------------------------------------------------ commands


def test_several_runs_are_a_table_or_a_list_and_one_is_lines_or_an_object(
    tmp_path: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(tmp_path / "a").config(steps=9).begun(3).rows(9).event(2, "finished", step=9)
    Run(tmp_path / "b").submitted(1)
    (tmp_path / "neither").mkdir()
    assert status([tmp_path], False, False) == 0
    title, first, second = capsys.readouterr().out.splitlines()
    assert title.split()[:2] == ["run", "state"]
    assert ("done" in first and "9/9" in first) and ("pending" in second)
    assert status([tmp_path], True, False) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["done", "pending"]
    assert status([tmp_path / "a"], True, False) == 0
    keys = {"run", "state", "step", "steps", "loss", "images_per_second", "seconds_left", "restarts", "jobs"}
    assert keys < json.loads(capsys.readouterr().out).keys()
    assert status([tmp_path / "a"], False, False) == 0
    assert f"{tmp_path}/a: done, step 9/9" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UsageError, match="is not a run"):
        status([tmp_path / "neither"], False, False)


def test_a_slurm_that_does_not_answer_is_asked_once_and_the_folders_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client hangs, as it does where the controller is down."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(scheduler, "TIMEOUT_SECONDS", 0.2)
    (tmp_path / "bin").mkdir()
    for program in ("scontrol", "scancel"):
        (tmp_path / "bin" / program).write_text("#!/bin/sh\necho >> $0.asked\nexec sleep 60\n")
        (tmp_path / "bin" / program).chmod(0o755)
    runs = [Run(tmp_path / "runs" / name).submitted(2).start(1).begun(1) for name in "ab"]
    assert status([tmp_path / "runs"], True, False) == 1
    printed = capsys.readouterr()
    assert [row["state"] for row in json.loads(printed.out)] == ["running", "running"]
    assert "scontrol did not answer" in printed.err and len(printed.err.splitlines()) == 1
    assert (tmp_path / "bin" / "scontrol.asked").read_text() == "\n"
    with pytest.raises(RunFailed, match="will not be requeued"):
        cancel(runs[0].path)
    assert history.is_cancelled(runs[0].path)


def test_a_local_job_is_known_by_its_process_and_cancelled_with_its_group(run: Run, no_slurm: None) -> None:
    script = run.path / "slurm" / "local.sh"
    script.write_text("sleep 600 & wait\n")
    with subprocess.Popen(["bash", script], start_new_session=True) as process:
        job = f"local-{process.pid}"
        run.submitted(1, job)
        wait_until(lambda: scheduler.show_job(job) is not None)
        assert run.state({job: scheduler.show_job(job)})[0] == "running"
        assert cancel(run.path) == 0
        process.wait(20)
    assert scheduler.show_job(job) is None and scheduler.show_job(f"local-{os.getpid()}") is None
    assert run.state({job: scheduler.show_job(job)})[0] == "cancelled"
    with pytest.raises(UsageError, match="no job to cancel"):
        cancel(run.path)
    run.submitted(0, "local-1", host="elsewhere")
    with pytest.raises(UsageError, match="submitted on elsewhere"):
        cancel(run.path)


def test_a_run_without_jobs_is_not_recorded_as_cancelled(run: Run, no_slurm: None) -> None:
    run.begun(1)
    with pytest.raises(UsageError, match="no job to cancel"):
        cancel(run.path)
    assert not history.is_cancelled(run.path)


def test_slurm_s_records_are_parsed_with_blanks_and_equal_signs_in_values() -> None:
    line = "JobId=7 JobName=a b UserId=root(0) JobState=PENDING TRES=cpu=4,mem=1G NtasksPerN:B:S:C=0:0:*:*"
    assert scheduler.parse_record(f"{line} Comment=(null) Command=/x/y z.sh \n") == {
        "JobId": "7", "JobName": "a b", "UserId": "root(0)", "JobState": "PENDING", "TRES": "cpu=4,mem=1G",
        "NtasksPerN:B:S:C": "0:0:*:*", "Comment": "(null)", "Command": "/x/y z.sh",
    }  # fmt: skip


def test_status_imports_nothing_heavy() -> None:
    code = "import sys, slurm.status, slurm.logs, slurm.cancel; print({'torch', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
