"""The state of runs, from their folders and from Slurm's records of their jobs.

A run's folder is enough where Slurm has forgotten its jobs, is not installed, or was never asked. Nothing heavy is
imported, and nothing of a run is changed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.attempts import recorded_rollbacks, trusted_checkpoints
from pipeline.checkpoint.reader import checkpoints, step_of
from pipeline.config.core_yaml import read_yaml
from pipeline.errors import UsageError
from pipeline.formatting import pluralize
from pipeline.lineage import lineage_of_run, noted_ancestors
from pipeline.monitoring.progress import eta_seconds
from pipeline.report.accounting import Start, account
from pipeline.run.events import BEGIN_EVENTS, HANG_EVENTS, last_saved_step, read_events, steps_not_applied
from pipeline.run.jsonl import read_metrics
from pipeline.run.lock import LockHolder, lock_holder
from pipeline.run.small_files import NUMBER, has, warn_damaged
from slurm import history, scheduler
from slurm.history import JobStart
from slurm.logs import exit_reason
from slurm.requeue import FAILURES, Cause
from slurm.scheduler import ACTIVE, BUSY, WAITING

STATE_EVENTS = ("attempt_started", *BEGIN_EVENTS, "interrupted", "finished", "failed", "out_of_memory", *HANG_EVENTS)
FINAL = {Cause.DONE, Cause.CANCELLED, Cause.BAD_REQUEST}
ENDED_BY_SLURM = {"TIMEOUT": "time limit", "PREEMPTED": "preempted", "NODE_FAIL": "a node was lost"}
ROW_FIELDS = {"step": int, "loss": NUMBER | str, "step_seconds": NUMBER, "images_per_second": NUMBER}
"""Without which a row of metrics.jsonl is not the program's."""
RESUBMIT = "submit it again to resume"
JobRecords = Mapping[str, Mapping[str, str] | None]
"""Slurm's record of each job, None where it has forgotten it; a job is missing where Slurm could not be asked."""


@dataclass(frozen=True)
class RunSnapshot:
    """The content of a run's folder."""

    run: Path
    config: dict[str, Any]
    ancestors: list[Any] | None
    """Of a fine-tuning, oldest first; None where they cannot be read."""
    submissions: list[dict[str, Any]]
    starts: list[JobStart]
    failures: list[dict[str, Any]]
    """Of the newest start, by time."""
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, without evaluations."""
    rollbacks: list[dict[str, int]]
    checkpoints: list[int]
    holder: LockHolder | None
    cancelled_at: float | None
    last_update: float
    """When the run last wrote metrics or events."""
    exit_reason: str | None

    def starts_of(self, job: str) -> list[JobStart]:
        return [start for start in self.starts if start.job == job]

    def last_event(self, *names: str) -> dict[str, Any]:
        """The newest event of these names, or {}."""
        return next((row for row in reversed(self.events) if row["event"] in names), {})


@dataclass(frozen=True)
class Status:
    """The state of a run; what is unknown is None, seconds are of training, fractions 0 to 1."""

    run: str
    state: str
    reason: str | None
    step: int
    steps: int | None
    loss: float | str | None
    images_per_second: float | None
    seconds_left: float | None
    restarts: int
    goodput: float | None
    """Share of productive steps in the time in which the run had its machines (pipeline/report/accounting.py)."""
    not_applied: list[int]
    """Steps with a bad loss or gradient, without those that a rollback skipped."""
    rollbacks: list[dict[str, int]]
    """To a checkpoint's step, `to`, skipping the steps from `first` to `last`."""
    checkpoints: dict[str, int | None]
    """`count` of them, the step of the `newest`, and how many saves have `failed_in_a_row` since."""
    jobs: list[dict[str, Any]]
    ancestry: list[dict[str, Any]]
    """Oldest first, the run itself last; empty before it has begun, or where it cannot be read."""


# ------------------------------------------------------------------------------------------------------------- reading


def runs_of(paths: Sequence[Path]) -> list[Path]:
    """Each path that is a run, and the runs directly in each that is not. UsageError where there is none."""
    selected: list[Path] = []
    for path in paths:
        inside = [path] if history.is_run(path) else sorted(each for each in path.glob("*") if history.is_run(each))
        if not inside:
            history.check_run(path)
        selected += inside
    return list(dict.fromkeys(selected))


def read_runs(runs: Sequence[Path]) -> tuple[list[Status], str | None]:
    """The runs' states, and why Slurm could not be asked; after that it is not asked again."""
    statuses, problem = [], None
    for run in runs:
        snapshot, jobs = read_run(run), {}
        if problem is None:
            try:
                jobs = scheduler.job_records(run)
            except scheduler.ERRORS as error:
                problem = str(error)
        statuses.append(status_of(snapshot, jobs, time.time()))
    return statuses, problem


def read_run(run: Path) -> RunSnapshot:
    starts, submissions = history.starts(run), history.submissions(run)
    failures = sorted(history.failures(run, starts[-1].name), key=lambda row: row["time"]) if starts else []
    cancelled = history.folder(run) / "cancelled"
    return RunSnapshot(
        run=run,
        config=_config(run),
        ancestors=noted_ancestors(run),
        submissions=submissions,
        starts=starts,
        failures=failures,
        events=read_events(run),
        rows=[
            row
            for row in read_metrics(run, **ROW_FIELDS)
            if row["loss"] in ("nan", "inf", "-inf") or not isinstance(row["loss"], str)
        ],
        rollbacks=recorded_rollbacks(run),
        checkpoints=_checkpoints(run),
        holder=lock_holder(run),
        cancelled_at=cancelled.stat().st_mtime if cancelled.exists() else None,
        last_update=history.last_update(run),
        exit_reason=exit_reason(run) if submissions and not failures else None,
    )


def _config(run: Path) -> dict[str, Any]:
    """The newest resolved configuration: of the last start, or of a submission that has not started yet."""
    files = [run / "config.yaml", *history.folder(run).glob("config-*.yaml")]
    for file in sorted(filter(Path.exists, files), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            tree = read_yaml(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            warn_damaged(file, " ".join(str(error).split()), "showing the rest")
            continue
        if isinstance(tree, dict):
            return {name: section for name, section in tree.items() if isinstance(section, dict)}
        warn_damaged(file, "it is empty, or has no sections", "showing the rest")
    return {}


def _checkpoints(run: Path) -> list[int]:
    try:
        return [step_of(folder) for folder in trusted_checkpoints(run)]
    except UsageError:  # written in a newer program's format
        return [step_of(folder) for folder in checkpoints(run / "checkpoints")]
    except OSError as error:
        warn_damaged(run / "checkpoints", error.strerror or str(error), "the run's checkpoints are not shown")
        return []


# --------------------------------------------------------------------------------------------------------------- state


def status_of(snapshot: RunSnapshot, jobs: JobRecords, now: float) -> Status:
    """The state of a run. Pure."""
    state, reason = state_of(snapshot, jobs)
    begun = max((i for i, row in enumerate(snapshot.events) if row["event"] in BEGIN_EVENTS), default=0)
    last = snapshot.rows[-1] if snapshot.rows else {}
    event_steps = [row["step"] for row in snapshot.events[begun:] if isinstance(row.get("step"), int)]
    step, steps = max([last.get("step", 0), *event_steps]), _steps(snapshot, last)
    speeds = [row["step_seconds"] for row in snapshot.rows]
    shown = [_job(snapshot, job, jobs.get(job)) for job in dict.fromkeys(row["job"] for row in snapshot.submissions)]
    attempts = sum(row["event"] == "attempt_started" for row in snapshot.events)
    return Status(
        run=str(snapshot.run),
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        images_per_second=last.get("images_per_second"),
        seconds_left=eta_seconds(step, steps, speeds) if speeds and steps is not None else None,
        restarts=sum(job["restarts"] for job in shown) if shown else max(0, attempts - 1),
        goodput=_goodput(snapshot, jobs, now),
        not_applied=_not_applied(snapshot),
        rollbacks=snapshot.rollbacks,
        checkpoints={
            "newest": max(snapshot.checkpoints, default=None),
            "count": len(snapshot.checkpoints),
            "failed_in_a_row": _failed_saves(snapshot).get("in_a_row", 0),
        },
        jobs=shown,
        ancestry=_ancestry(snapshot, steps),
    )


def state_of(snapshot: RunSnapshot, jobs: JobRecords) -> tuple[str, str | None]:
    """The state and why: an active job decides first, then a living process, then what the last of them left."""
    active = [(job, record) for job, record in jobs.items() if record and record["JobState"] in ACTIVE]
    if active:
        return _of_active_job(snapshot, *max(active, key=lambda each: each[1]["JobState"] in BUSY))
    if snapshot.holder is not None:
        return _running(snapshot)
    last, submission = snapshot.last_event(*STATE_EVENTS), snapshot.submissions[-1] if snapshot.submissions else None
    if last.get("event") == "finished" and (submission is None or last["time"] >= submission["time"]):
        return "done", None
    attempted = snapshot.last_event("attempt_started").get("time", 0.0)
    if snapshot.cancelled_at is not None and attempted <= snapshot.cancelled_at:
        return "cancelled", RESUBMIT
    if submission is not None:
        starts = snapshot.starts_of(submission["job"])
        ended = starts[-1].ended if starts else submission["time"]
        if ended is None or last.get("time", 0.0) <= ended:  # else it was started by hand since then
            return _of_ended_job(snapshot, submission["job"], jobs)
    return _without_job(snapshot)


def _running(snapshot: RunSnapshot) -> tuple[str, str | None]:
    failed, newest = _failed_saves(snapshot), max(snapshot.checkpoints, default=None)
    good = "no checkpoint yet" if newest is None else f"the newest good one is of step {newest}"
    failing = f"{pluralize(failed['in_a_row'], 'save')} failed in a row, {good}: {failed['reason']}" if failed else None
    return "running", "being cancelled" if snapshot.cancelled_at is not None else failing


def _failed_saves(snapshot: RunSnapshot) -> dict[str, Any]:
    """The event of the last save if it failed, or {}."""
    last = snapshot.last_event("checkpoint", "checkpoint_failed", *BEGIN_EVENTS)
    return last if last.get("event") == "checkpoint_failed" else {}


def _of_active_job(snapshot: RunSnapshot, job: str, record: Mapping[str, str]) -> tuple[str, str | None]:
    starts, state, restarts = snapshot.starts_of(job), record["JobState"], int(record.get("Restarts", 0))
    last = starts[-1] if starts else None
    if last is not None and last.cause in FINAL and last.restart >= restarts:
        if last.cause == Cause.DONE and state in BUSY - {"COMPLETING"}:
            return "running", "evaluating"
        return _of_final_start(snapshot, last)
    if state in WAITING or (last is not None and last.ended is not None):
        refusal = snapshot.exit_reason if last is not None and last.cause == Cause.NOT_STARTED else None
        reasons = [refusal, last.decision if last is not None else None, _reason(record)]
        is_requeued = last is not None or restarts > 0
        return "requeued" if is_requeued else "pending", "; ".join(filter(None, reasons)) or None
    return _running(snapshot)


def _of_final_start(snapshot: RunSnapshot, start: JobStart) -> tuple[str, str | None]:
    if start.cause == Cause.DONE:
        return "done", None
    if start.cause == Cause.CANCELLED:
        return "cancelled", RESUBMIT
    return "failed", _failure(snapshot, start)


def _of_ended_job(snapshot: RunSnapshot, job: str, jobs: JobRecords) -> tuple[str, str | None]:
    """Of a run whose newest job is gone, or cannot be asked for from here."""
    starts, record = snapshot.starts_of(job), jobs.get(job) or {}
    last, state = starts[-1] if starts else None, record.get("JobState", "")
    if last is not None and last.cause == Cause.DONE and state not in ("", "COMPLETED"):
        return "done", f"its evaluation ended as {state}"
    if last is not None and last.cause in FINAL:
        return _of_final_start(snapshot, last)
    if state == "CANCELLED":
        return "cancelled", _reason(record) or RESUBMIT
    if job not in jobs and (last is None or last.cause is None or last.again):
        expected = "pending" if last is None else "running" if last.cause is None else "requeued"
        return expected, "according to its folder: Slurm cannot be asked from here"
    if last is None:
        reason = snapshot.exit_reason or f"job {job} ended as {state}"
        return ("failed", reason) if state else ("cancelled", f"job {job} is gone and never started")
    if (last.again and last.cause not in FAILURES) or state in ENDED_BY_SLURM:
        return "stopped", f"{last.cause or ENDED_BY_SLURM.get(state)}, and Slurm did not start it again: {RESUBMIT}"
    if last.cause is None and snapshot.last_event(*STATE_EVENTS).get("event") == "interrupted":
        return _without_job(snapshot)
    return "failed", _failure(snapshot, last)


def _without_job(snapshot: RunSnapshot) -> tuple[str, str | None]:
    """By the last event of a run of which no process is alive."""
    last = snapshot.last_event(*STATE_EVENTS)
    newest = max(snapshot.checkpoints, default=None)
    again = "the same command " + ("starts over" if newest is None else f"resumes from step {newest}")
    if newest is None and (saved := last_saved_step(snapshot.events)) is not None:
        again = f"its checkpoints are gone, the last of step {saved}: copy one back, or start over with --restart"
    steps = _steps(snapshot, snapshot.rows[-1] if snapshot.rows else {})
    if not last and newest is not None and newest == steps:
        return "done", "according to its newest checkpoint: events.jsonl does not say how it ended"
    if last.get("event") == "finished":
        return "done", None
    if last.get("event") == "interrupted":
        return "stopped", f"{last.get('reason') or 'on request'} after step {last['step']}; {again}"
    if last.get("event") in ("failed", "out_of_memory"):
        return "failed", last.get("message") or f"rank {last['rank']} ran out of memory: {last['error']}"
    return "failed", f"{_hang(last) or 'its process was killed'}; {again}"


def _failure(snapshot: RunSnapshot, start: JobStart) -> str:
    """The error of the rank that failed first, as far as it is known, and what was decided."""
    first = snapshot.failures[0] if snapshot.failures else None
    error = f"rank {first['rank']} on {first['host']}: {' '.join(first['message'].split())}" if first else None
    hang = _hang(snapshot.last_event(*STATE_EVENTS)) if start.cause == Cause.HANG else None
    why = start.decision or start.cause or "its batch script was killed"
    return "; ".join(filter(None, [error or hang or snapshot.exit_reason, why]))


def _hang(event: Mapping[str, Any]) -> str | None:
    if event.get("event") not in HANG_EVENTS:
        return None
    known = [each for each in event["ranks"] if has(each, {"rank": int})]
    ranks = ", ".join(f"rank {each['rank']} on {each.get('host', 'its host')}" for each in known)
    what = "no heartbeat from" if event["event"] == "heartbeat_lost" else "no progress, suspect:"
    return f"{what} {ranks or 'unknown'}" + (f"; stacks in {event['stacks']}" if "stacks" in event else "")


def _reason(record: Mapping[str, str]) -> str | None:
    """Slurm's Reason for a job's state."""
    return None if record.get("Reason") in (None, "None") else record["Reason"]


# ------------------------------------------------------------------------------------------------------------- figures


def _job(snapshot: RunSnapshot, job: str, record: Mapping[str, str] | None) -> dict[str, Any]:
    """A job with Slurm's JobState; None where Slurm does not know it (any more)."""
    starts, record = snapshot.starts_of(job), record or {}
    reason = _reason(record) or (starts[-1].decision if starts else None)
    restarts = max(len(starts) - 1, int(record.get("Restarts", 0)))
    nodes = list(starts[-1].nodes) if starts and record.get("JobState") not in WAITING else []
    return {"job": job, "state": record.get("JobState"), "reason": reason, "restarts": restarts, "nodes": nodes}


def _goodput(snapshot: RunSnapshot, jobs: JobRecords, now: float) -> float | None:
    """Of a run that is alive until now."""
    is_alive = snapshot.holder is not None or any((record or {}).get("JobState") in BUSY for record in jobs.values())
    starts = [Start(each.began, each.ended, each.cause, each.again) for each in snapshot.starts]
    hang_timeout = (snapshot.config.get("run") or {}).get("hang_timeout", 0.0)
    return account(snapshot.events, snapshot.rows, starts, (), hang_timeout, now if is_alive else None).goodput


def _not_applied(snapshot: RunSnapshot) -> list[int]:
    bad = {row["step"] for row in steps_not_applied(snapshot.events)}
    return sorted(bad.difference(*(range(back["first"], back["last"] + 1) for back in snapshot.rollbacks)))


def _steps(snapshot: RunSnapshot, row: Mapping[str, Any]) -> int | None:
    """The run's length; in epochs it is known once the number of samples is stated or follows from the metrics."""
    train, data = snapshot.config.get("train") or {}, snapshot.config.get("data") or {}
    if has(train, {"steps": int}) or not has(train, {"epochs": NUMBER, "global_batch": int}):
        return train["steps"] if has(train, {"steps": int}) else None
    is_counted = has(row, {"samples": int, "epoch": NUMBER}) and row["epoch"]
    samples = data.get("train_samples") or (round(row["samples"] / row["epoch"]) if is_counted else None)
    if not isinstance(samples, int):
        return None
    from pipeline.config.batch_size import total_steps

    return total_steps(train["epochs"], samples, train["global_batch"])


def _ancestry(snapshot: RunSnapshot, steps: int | None) -> list[dict[str, Any]]:
    begun = snapshot.last_event(*BEGIN_EVENTS)
    if not begun or snapshot.ancestors is None:  # a fine-tuning records its source as it begins
        return []
    return lineage_of_run(snapshot.ancestors, snapshot.config, steps, begun.get("new_augmentations", []))
