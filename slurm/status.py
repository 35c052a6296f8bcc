"""`coatnet status`: where runs stand, from what their folders say and what Slurm knows of their jobs.

A run's folder is enough where Slurm has forgotten its jobs, is not installed, or was never asked. Nothing heavy is
imported, and nothing of a run is changed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.attempts import recorded_rollbacks, trusted_checkpoints
from pipeline.checkpoint.reader import checkpoints, step_of
from pipeline.errors import UsageError
from pipeline.lineage import lineage_of_run, noted_ancestors
from pipeline.monitoring.progress import eta_seconds
from pipeline.run.jsonl import read_lines
from pipeline.run.lock import LockHolder, lock_holder
from slurm import history, scheduler
from slurm.history import JobStart
from slurm.logs import last_words
from slurm.requeue import FAILURES, STANDSTILLS, Cause
from slurm.scheduler import BUSY, WAITING

SECONDS_BETWEEN_LOOKS = 5.0
DECIDING = (
    "attempt_started",
    "training_started",
    "training_resumed",
    "interrupted",
    "finished",
    "failed",
    "out_of_memory",
    *STANDSTILLS,
)
ENDED_BY_SLURM = {"TIMEOUT": "time limit", "PREEMPTED": "preempted", "NODE_FAIL": "a node was lost"}
Queue = Mapping[str, Mapping[str, str] | None]
"""What show_job says by job; a job that is not there could not be asked for."""


@dataclass(frozen=True)
class RunSnapshot:
    """What a run's folder says."""

    run: Path
    config: dict[str, Any]
    ancestors: list[Any] | None
    """Of a fine-tuning, oldest first; None where they cannot be read."""
    submissions: list[dict[str, Any]]
    starts: list[JobStart]
    failures: list[dict[str, Any]]
    """Of the newest start."""
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, without evaluations."""
    rollbacks: list[dict[str, int]]
    checkpoints: list[int]
    holder: LockHolder | None
    cancelled_at: float | None
    last_sign: float
    """When the run last wrote metrics or events."""
    last_words: str | None

    def of_job(self, job: str) -> list[JobStart]:
        return [start for start in self.starts if start.job == job]

    def last(self, *names: str) -> dict[str, Any]:
        """The newest event of these names, or {}."""
        return next((row for row in reversed(self.events) if row["event"] in names), {})


@dataclass(frozen=True)
class Status:
    """Where a run stands; what is unknown is None, seconds are of training, fractions 0 to 1."""

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
    """Share of the jobs' wall-clock time that went into steps that still count."""
    not_applied: list[int]
    """Steps whose loss or gradient was bad, without those that were skipped afterwards."""
    rollbacks: list[dict[str, int]]
    """To a checkpoint's step, `to`, and from there past the steps from `first` to `last`."""
    checkpoints: dict[str, int | None]
    jobs: list[dict[str, Any]]
    ancestry: list[dict[str, Any]]
    """Oldest first, the run itself last; none before it has begun, or where it cannot be read."""


def runs_of(paths: Sequence[Path]) -> list[Path]:
    """Each path that is a run, and the runs right in each that is not. UsageError where there is none."""
    found: list[Path] = []
    for path in paths:
        inside = [path] if scheduler.is_run(path) else sorted(each for each in path.glob("*") if scheduler.is_run(each))
        if not inside:
            scheduler.check_run(path)
        found += inside
    return list(dict.fromkeys(found))


def read_runs(runs: Sequence[Path]) -> tuple[list[Status], str | None]:
    """Where runs stand, and why Slurm could not be asked, in which case it is not asked again."""
    found, problem = [], None
    for run in runs:
        seen, jobs = read_run(run), {}
        if problem is None:
            try:
                jobs = ask(seen)
            except scheduler.ERRORS as error:
                problem = str(error)
        found.append(status_of(seen, jobs, time.time()))
    return found, problem


def read_run(run: Path) -> RunSnapshot:
    """Reads a run's folder."""
    events = [row for row in read_lines(run / "events.jsonl") if "event" in row and "time" in row]
    starts, submissions = history.starts(run), history.submissions(run)
    failures = sorted(history.failures(run, starts[-1].name), key=lambda row: row["time"]) if starts else []
    cancelled = history.folder(run) / "cancelled"
    return RunSnapshot(
        run,
        _config(run),
        noted_ancestors(run),
        submissions,
        starts,
        failures,
        events,
        [row for row in read_lines(run / "metrics.jsonl") if "loss" in row and "step" in row],
        recorded_rollbacks(run),
        _checkpoints(run),
        lock_holder(run),
        cancelled.stat().st_mtime if history.is_cancelled(run) else None,
        history.last_update(run),
        last_words(run) if submissions and not failures else None,
    )


def ask(seen: RunSnapshot) -> Queue:
    """What Slurm knows of a run's jobs, but for older ones whose end is known. Raises client.ERRORS."""
    final, jobs = {Cause.DONE, Cause.CANCELLED, Cause.BAD_REQUEST}, {}
    for row in {row["job"]: row for row in seen.submissions}.values():
        own, newest = seen.of_job(row["job"]), row["job"] == seen.submissions[-1]["job"]
        if (newest or not own or own[-1].cause not in final) and scheduler.can_ask(row["job"], row.get("host")):
            facts = scheduler.show_job(row["job"])
            if facts is not None and facts["JobState"] in WAITING:
                facts["EstimatedStart"] = scheduler.estimated_start(row["job"]) or ""
            jobs[row["job"]] = facts
    return jobs


# ------------------------------------------------------------------------------------------------------ what follows


def status_of(seen: RunSnapshot, jobs: Queue, now: float) -> Status:
    """Where a run stands. Pure."""
    state, reason = state_of(seen, jobs)
    resumed = max(
        (i for i, row in enumerate(seen.events) if row["event"] in ("training_started", "training_resumed")), default=0
    )
    last = seen.rows[-1] if seen.rows else {}
    step = max(
        [last.get("step", 0), *(row["step"] for row in seen.events[resumed:] if isinstance(row.get("step"), int))]
    )
    steps = _steps(seen, last)
    speeds = [row["step_seconds"] for row in seen.rows]
    left = eta_seconds(step, steps, speeds) if speeds and steps is not None else None
    shown = [_job(seen, job, jobs.get(job)) for job in dict.fromkeys(row["job"] for row in seen.submissions)]
    attempts = sum(row["event"] == "attempt_started" for row in seen.events)
    return Status(
        str(seen.run),
        state,
        reason,
        step,
        steps,
        last.get("loss"),
        last.get("images_per_second"),
        left,
        sum(job["restarts"] for job in shown) if shown else max(0, attempts - 1),
        _goodput(seen, jobs, now),
        _not_applied(seen),
        seen.rollbacks,
        {"newest": max(seen.checkpoints, default=None), "count": len(seen.checkpoints)},
        shown,
        _ancestry(seen, steps),
    )


def state_of(seen: RunSnapshot, jobs: Queue) -> tuple[str, str | None]:
    """The state and why: a living job comes first, then a living process, then what the last of them left."""
    alive = [(job, facts) for job, facts in jobs.items() if facts and facts["JobState"] in BUSY | WAITING]
    if alive:
        return _of_living(seen, *max(alive, key=lambda each: each[1]["JobState"] in BUSY))
    if seen.holder is not None:
        return "running", _being_cancelled(seen)
    newest = seen.submissions[-1] if seen.submissions else None
    last = seen.last(*DECIDING)
    if last.get("event") == "finished" and (newest is None or last["time"] >= newest["time"]):
        return "done", None
    if seen.cancelled_at is not None and seen.last("attempt_started").get("time", 0.0) <= seen.cancelled_at:
        return "cancelled", "it resumes when it is submitted again"
    if newest is not None:
        own = seen.of_job(newest["job"])
        until = own[-1].ended if own else newest["time"]
        if until is None or last.get("time", 0.0) <= until:  # else somebody has started it by hand since then
            return _of_ended(seen, newest["job"], jobs)
    return _of_events(seen)


def _of_living(seen: RunSnapshot, job: str, facts: Mapping[str, str]) -> tuple[str, str | None]:
    own, state, restarts = seen.of_job(job), facts["JobState"], int(facts.get("Restarts", 0))
    last = own[-1] if own else None
    if last is not None and last.cause is not None and last.restart >= restarts:
        if last.cause == Cause.DONE:
            return ("done", None) if state in WAITING or state == "COMPLETING" else ("running", "evaluating")
        if last.cause == Cause.CANCELLED:
            return "cancelled", last.decision
        if last.cause == Cause.BAD_REQUEST:
            return "failed", _failure(seen, last)
    ended = last is not None and last.ended is not None
    if state in WAITING or ended:
        why = [last.decision if last is not None else None, _waiting_for(facts)]
        again = last is not None or restarts > 0
        return "requeued" if again else "pending", "; ".join(filter(None, why)) or None
    return "running", _being_cancelled(seen)


def _of_ended(seen: RunSnapshot, job: str, jobs: Queue) -> tuple[str, str | None]:
    """Of a run whose newest job is gone, or can't be asked for here."""
    own, facts = seen.of_job(job), jobs.get(job) or {}
    last, state, unknown = own[-1] if own else None, facts.get("JobState", ""), job not in jobs
    here = "as its folder says: Slurm can't be asked about it here"
    if last is not None and last.cause == Cause.DONE:
        return "done", f"its evaluation ended as {state}" if state not in ("", "COMPLETED") else None
    if last is not None and last.cause == Cause.BAD_REQUEST:
        return "failed", _failure(seen, last)
    if state == "CANCELLED" or (last is not None and last.cause == Cause.CANCELLED):
        return "cancelled", _waiting_for(facts) or "it resumes when it is submitted again"
    if last is None and unknown:
        return "pending", here
    if last is None and not state:
        return "cancelled", f"job {job} is gone and has never started"
    if last is None:
        return "failed", seen.last_words or f"job {job} ended as {state}"
    if last.cause is None and unknown:
        return "running", here
    if last.again and unknown:
        return "requeued", f"{last.decision}; {here}"
    if (last.again and last.cause not in FAILURES) or state in ENDED_BY_SLURM:
        why = last.cause or ENDED_BY_SLURM.get(state)
        return "stopped", f"{why}, and Slurm did not start it again: submit it again"
    if (
        last.cause is None
        and (stop := seen.last(*DECIDING)).get("event") == "interrupted"
        and stop["time"] >= last.began
    ):
        return "stopped", f"{stop.get('reason') or 'asked to'} after step {stop['step']}: submit it again"
    return "failed", _failure(seen, last)


def _of_events(seen: RunSnapshot) -> tuple[str, str | None]:
    """Of a run that nothing is alive of, and that no job has touched since its last start."""
    last = seen.last(*DECIDING)
    newest = max(seen.checkpoints, default=None)
    again = "the same command " + ("begins again" if newest is None else f"resumes from step {newest}")
    if last.get("event") == "finished":
        return "done", None
    if last.get("event") == "interrupted":
        return "stopped", f"{last.get('reason') or 'asked to'} after step {last['step']}; {again}"
    if last.get("event") in ("failed", "out_of_memory"):
        return "failed", last.get("message") or f"rank {last['rank']} ran out of memory: {last['error']}"
    return "failed", f"{_standstill(last) or 'its process ended without a word'}; {again}"


def _failure(seen: RunSnapshot, start: JobStart) -> str:
    """The first error of the first failing rank, where a rank could say one, and what was decided."""
    first = seen.failures[0] if seen.failures else None
    said = f"rank {first['rank']} on {first['host']}: {' '.join(first['message'].split())}" if first else None
    stood_still = _standstill(seen.last(*DECIDING)) if start.cause == Cause.HANG else None
    why = start.decision or start.cause or "its job ended without a word"
    return "; ".join(filter(None, [said or stood_still or seen.last_words, why]))


def _standstill(event: Mapping[str, Any]) -> str | None:
    """What is said of a frozen rank, or of a run without progress."""
    if event.get("event") not in STANDSTILLS:
        return None
    ranks = ", ".join(f"rank {each['rank']} on {each.get('host', 'its host')}" for each in event.get("ranks", []))
    found = "no heartbeat of" if event["event"] == "heartbeat_lost" else "no progress, what stands out is"
    return f"{found} {ranks or 'no rank'}" + (f"; stacks in {event['stacks']}" if "stacks" in event else "")


def _being_cancelled(seen: RunSnapshot) -> str | None:
    return "it is being cancelled" if seen.cancelled_at is not None else None


def _waiting_for(facts: Mapping[str, str]) -> str | None:
    """Slurm's reason for what a job does, and when it thinks that it starts."""
    reason, start = facts.get("Reason", "None"), facts.get("EstimatedStart")
    said = [reason if reason != "None" else None, f"expected to start {start.replace('T', ' ')}" if start else None]
    return ", ".join(filter(None, said)) or None


def _job(seen: RunSnapshot, job: str, facts: Mapping[str, str] | None) -> dict[str, Any]:
    """A job as Slurm calls its state; None where it does not know it (any more)."""
    own, facts = seen.of_job(job), facts or {}
    reason = _waiting_for(facts) or (own[-1].decision if own else None)
    restarts = max(len(own) - 1, int(facts.get("Restarts", 0)))
    nodes = list(own[-1].nodes) if own and facts.get("JobState") not in WAITING else []
    return {"job": job, "state": facts.get("JobState"), "reason": reason, "restarts": restarts, "nodes": nodes}


def _goodput(seen: RunSnapshot, jobs: Queue, now: float) -> float | None:
    """None where there were no jobs, or steps were done outside of them: metrics have no times to tell those apart."""
    spans = []
    for start in seen.starts:
        facts = jobs.get(start.job)
        lives = start is seen.starts[-1] and (seen.holder is not None or bool(facts and facts["JobState"] in BUSY))
        ended = start.ended or (now if lives else max(start.began, seen.last_sign))
        spans.append((start.began, ended))
    began = [row["time"] for row in seen.events if row["event"] == "attempt_started"]
    inside = all(any(begin <= each <= end for begin, end in spans) for each in began)
    allocated = sum(end - begin for begin, end in spans)
    if not inside or allocated <= 0:
        return None
    before = [0, *(row["step"] for row in seen.rows)]
    useful = sum((row["step"] - past) * row["step_seconds"] for row, past in zip(seen.rows, before, strict=False))
    return max(0.0, min(1.0, useful / allocated))


def _not_applied(seen: RunSnapshot) -> list[int]:
    bad: set[int] = set()
    for row in seen.events:
        if row["event"] == "step_skipped":
            bad.add(row["step"])
        elif row["event"] in ("training_started", "training_resumed"):  # what follows is done again
            bad = {step for step in bad if step <= row["step"]}
    return sorted(bad.difference(*(range(back["first"], back["last"] + 1) for back in seen.rollbacks)))


def _steps(seen: RunSnapshot, row: Mapping[str, Any]) -> int | None:
    """The run's length; one in epochs can be told once the number of samples is stated or shows in the metrics."""
    train, data = seen.config.get("train") or {}, seen.config.get("data") or {}
    if train.get("steps") is not None or train.get("epochs") is None:
        return train.get("steps")
    samples = data.get("train_samples") or (round(row["samples"] / row["epoch"]) if row.get("epoch") else None)
    if samples is None or "global_batch" not in train:
        return None
    from pipeline.config.batch_size import total_steps

    return total_steps(train["epochs"], samples, train["global_batch"])


def _config(run: Path) -> dict[str, Any]:
    """The newest resolved configuration: of the last start, or of a submission that has not started yet."""
    found = [run / "config.yaml", *history.folder(run).glob("config-*.yaml")]
    newest = max((file for file in found if file.exists()), key=lambda file: file.stat().st_mtime, default=None)
    try:
        tree = yaml.safe_load(newest.read_bytes()) if newest else None
    except (yaml.YAMLError, ValueError):  # half-written, or with a date that does not exist
        tree = None
    sections = tree.items() if isinstance(tree, dict) else ()
    return {name: section for name, section in sections if isinstance(section, dict)}


def _ancestry(seen: RunSnapshot, steps: int | None) -> list[dict[str, Any]]:
    begun = seen.last("training_started", "training_resumed")
    if not begun or seen.ancestors is None:  # what has not begun may have a source that it has not noted yet
        return []
    return lineage_of_run(seen.ancestors, seen.config, steps, begun.get("new_augmentations", []))


def _checkpoints(run: Path) -> list[int]:
    try:
        return [step_of(folder) for folder in trusted_checkpoints(run)]
    except UsageError:  # of another format than this program's: they are there nevertheless
        return [step_of(folder) for folder in checkpoints(run / "checkpoints")]
