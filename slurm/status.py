"""`coatnet status`: where runs stand, from what their folders say and what Slurm knows of their jobs.

A run's folder is enough where Slurm has forgotten its jobs, is not installed, or was never asked. Nothing heavy is
imported, and nothing of a run is changed.

Next: ancestry.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.attempts import recorded, trusted
from pipeline.checkpoint import checkpoints, step_of
from pipeline.errors import BadRequest
from pipeline.json_lines import read_lines
from pipeline.progress import seconds_left
from pipeline.words import duration, figure, percent
from slurm import client, queue, records
from slurm.ancestry import entries_of, in_words, noted_ancestors
from slurm.cause import FAILURES, STANDSTILLS, Cause
from slurm.logs import last_words
from slurm.queue import BUSY, WAITING
from slurm.records import Start

SECONDS_BETWEEN_LOOKS = 5.0
DECIDING = ("start", "begin", "resume", "stop", "done", "failed", "out_of_memory", *STANDSTILLS)
ENDED_BY_SLURM = {"TIMEOUT": "time limit", "PREEMPTED": "preempted", "NODE_FAIL": "a node was lost"}
Queue = Mapping[str, Mapping[str, str] | None]
"""What show_job says by job; a job that is not there could not be asked for."""


@dataclass(frozen=True)
class Seen:
    """What a run's folder says."""

    run: Path
    config: dict[str, Any]
    ancestors: list[Any] | None
    """Of a fine-tuning, oldest first; None where they cannot be read."""
    submissions: list[dict[str, Any]]
    starts: list[Start]
    failures: list[dict[str, Any]]
    """Of the newest start."""
    events: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, without evaluations."""
    gone_back: list[dict[str, int]]
    checkpoints: list[int]
    held: bool
    cancelled_at: float | None
    last_sign: float
    """When the run last wrote metrics or events."""
    last_words: str | None

    def of_job(self, job: str) -> list[Start]:
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
    """Steps whose loss or gradient was bad, without those that were passed over afterwards."""
    gone_back: list[dict[str, int]]
    """To a checkpoint's step, `to`, and from there past the steps from `first` to `last`."""
    checkpoints: dict[str, int | None]
    jobs: list[dict[str, Any]]
    ancestry: list[dict[str, Any]]
    """Oldest first, the run itself last; none before it has begun, or where it cannot be read."""


def status(paths: list[Path], as_json: bool, watch: bool) -> int:
    """Prints where runs (or a folder's) stand; returns the exit status, 1 where Slurm did not answer."""
    if as_json and watch:
        raise BadRequest("--json prints one document and --watch many lines: leave out one of them")
    runs, single = runs_of(paths), len(paths) == 1 and queue.is_run(paths[0])
    if watch:
        return _watch(runs, single)
    found, problem = look_at(runs)
    if as_json:
        documents = [asdict(each) for each in found]
        print(json.dumps(documents[0] if single else documents))
    else:
        _console().print(shown(found, single))
    if problem:
        print(f"coatnet: {problem}; this is what the folders say", file=sys.stderr)
    return 1 if problem else 0


def runs_of(paths: Sequence[Path]) -> list[Path]:
    """Each path that is a run, and the runs right in each that is not. BadRequest where there is none."""
    found: list[Path] = []
    for path in paths:
        inside = [path] if queue.is_run(path) else sorted(each for each in path.glob("*") if queue.is_run(each))
        if not inside:
            queue.check_run(path)
        found += inside
    return list(dict.fromkeys(found))


def look_at(runs: Sequence[Path]) -> tuple[list[Status], str | None]:
    """Where runs stand, and why Slurm could not be asked, in which case it is not asked again."""
    found, problem = [], None
    for run in runs:
        seen, jobs = look(run), {}
        if problem is None:
            try:
                jobs = ask(seen)
            except client.ERRORS as error:
                problem = str(error)
        found.append(status_of(seen, jobs, time.time()))
    return found, problem


def look(run: Path) -> Seen:
    """Reads a run's folder."""
    events = [row for row in read_lines(run / "events.jsonl") if "event" in row and "time" in row]
    starts, submissions = records.starts(run), records.submissions(run)
    failures = sorted(records.failures(run, starts[-1].name), key=lambda row: row["time"]) if starts else []
    cancelled = records.folder(run) / "cancelled"
    return Seen(
        run,
        _config(run),
        noted_ancestors(run),
        submissions,
        starts,
        failures,
        events,
        [row for row in read_lines(run / "metrics.jsonl") if "loss" in row and "step" in row],
        recorded(run),
        _checkpoints(run),
        queue.is_held(run),
        cancelled.stat().st_mtime if records.is_cancelled(run) else None,
        records.last_sign_of_life(run),
        last_words(run) if submissions and not failures else None,
    )


def ask(seen: Seen) -> Queue:
    """What Slurm knows of a run's jobs, but for older ones whose end is known. Raises client.ERRORS."""
    final, jobs = {Cause.DONE, Cause.CANCELLED, Cause.BAD_REQUEST}, {}
    for row in {row["job"]: row for row in seen.submissions}.values():
        own, newest = seen.of_job(row["job"]), row["job"] == seen.submissions[-1]["job"]
        if (newest or not own or own[-1].cause not in final) and queue.can_ask(row["job"], row.get("host")):
            facts = queue.show_job(row["job"])
            if facts is not None and facts["JobState"] in WAITING:
                facts["EstimatedStart"] = queue.estimated_start(row["job"]) or ""
            jobs[row["job"]] = facts
    return jobs


# ------------------------------------------------------------------------------------------------------ what follows


def status_of(seen: Seen, jobs: Queue, now: float) -> Status:
    """Where a run stands. Pure."""
    state, reason = state_of(seen, jobs)
    resumed = max((i for i, row in enumerate(seen.events) if row["event"] in ("begin", "resume")), default=0)
    last = seen.rows[-1] if seen.rows else {}
    step = max(
        [last.get("step", 0), *(row["step"] for row in seen.events[resumed:] if isinstance(row.get("step"), int))]
    )
    steps = _steps(seen, last)
    speeds = [row["step_seconds"] for row in seen.rows]
    left = seconds_left(step, steps, speeds) if speeds and steps is not None else None
    shown = [_job(seen, job, jobs.get(job)) for job in dict.fromkeys(row["job"] for row in seen.submissions)]
    attempts = sum(row["event"] == "start" for row in seen.events)
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
        seen.gone_back,
        {"newest": max(seen.checkpoints, default=None), "count": len(seen.checkpoints)},
        shown,
        _ancestry(seen, steps),
    )


def state_of(seen: Seen, jobs: Queue) -> tuple[str, str | None]:
    """The state and why: a living job comes first, then a living process, then what the last of them left."""
    alive = [(job, facts) for job, facts in jobs.items() if facts and facts["JobState"] in BUSY | WAITING]
    if alive:
        return _of_living(seen, *max(alive, key=lambda each: each[1]["JobState"] in BUSY))
    if seen.held:
        return "running", _being_cancelled(seen)
    newest = seen.submissions[-1] if seen.submissions else None
    last = seen.last(*DECIDING)
    if last.get("event") == "done" and (newest is None or last["time"] >= newest["time"]):
        return "done", None
    if seen.cancelled_at is not None and seen.last("start").get("time", 0.0) <= seen.cancelled_at:
        return "cancelled", "it goes on when it is submitted again"
    if newest is not None:
        own = seen.of_job(newest["job"])
        until = own[-1].ended if own else newest["time"]
        if until is None or last.get("time", 0.0) <= until:  # else somebody has started it by hand since then
            return _of_ended(seen, newest["job"], jobs)
    return _of_events(seen)


def _of_living(seen: Seen, job: str, facts: Mapping[str, str]) -> tuple[str, str | None]:
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


def _of_ended(seen: Seen, job: str, jobs: Queue) -> tuple[str, str | None]:
    """Of a run whose newest job is gone, or can't be asked for here."""
    own, facts = seen.of_job(job), jobs.get(job) or {}
    last, state, unknown = own[-1] if own else None, facts.get("JobState", ""), job not in jobs
    here = "as its folder says: Slurm can't be asked about it here"
    if last is not None and last.cause == Cause.DONE:
        return "done", f"its evaluation ended as {state}" if state not in ("", "COMPLETED") else None
    if last is not None and last.cause == Cause.BAD_REQUEST:
        return "failed", _failure(seen, last)
    if state == "CANCELLED" or (last is not None and last.cause == Cause.CANCELLED):
        return "cancelled", _waiting_for(facts) or "it goes on when it is submitted again"
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
    if last.cause is None and (stop := seen.last(*DECIDING)).get("event") == "stop" and stop["time"] >= last.began:
        return "stopped", f"{stop.get('reason') or 'told to'} after step {stop['step']}: submit it again"
    return "failed", _failure(seen, last)


def _of_events(seen: Seen) -> tuple[str, str | None]:
    """Of a run that nothing is alive of, and that no job has touched since its last start."""
    last = seen.last(*DECIDING)
    newest = max(seen.checkpoints, default=None)
    again = "the same command " + ("begins again" if newest is None else f"goes on from step {newest}")
    if last.get("event") == "done":
        return "done", None
    if last.get("event") == "stop":
        return "stopped", f"{last.get('reason') or 'told to'} after step {last['step']}; {again}"
    if last.get("event") in ("failed", "out_of_memory"):
        return "failed", last.get("message") or f"rank {last['rank']} ran out of memory: {last['error']}"
    return "failed", f"{_standstill(last) or 'its process ended without a word'}; {again}"


def _failure(seen: Seen, start: Start) -> str:
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
    found = "no sign of life of" if event["event"] == "frozen" else "no progress, what stands out is"
    return f"{found} {ranks or 'no rank'}" + (f"; stacks in {event['stacks']}" if "stacks" in event else "")


def _being_cancelled(seen: Seen) -> str | None:
    return "it is being cancelled" if seen.cancelled_at is not None else None


def _waiting_for(facts: Mapping[str, str]) -> str | None:
    """Slurm's reason for what a job does, and when it thinks that it starts."""
    reason, start = facts.get("Reason", "None"), facts.get("EstimatedStart")
    said = [reason if reason != "None" else None, f"expected to start {start.replace('T', ' ')}" if start else None]
    return ", ".join(filter(None, said)) or None


def _job(seen: Seen, job: str, facts: Mapping[str, str] | None) -> dict[str, Any]:
    """A job as Slurm calls its state; None where it does not know it (any more)."""
    own, facts = seen.of_job(job), facts or {}
    reason = _waiting_for(facts) or (own[-1].decision if own else None)
    restarts = max(len(own) - 1, int(facts.get("Restarts", 0)))
    nodes = list(own[-1].nodes) if own and facts.get("JobState") not in WAITING else []
    return {"job": job, "state": facts.get("JobState"), "reason": reason, "restarts": restarts, "nodes": nodes}


def _goodput(seen: Seen, jobs: Queue, now: float) -> float | None:
    """None where there were no jobs, or steps were done outside of them: metrics have no times to tell those apart."""
    spans = []
    for start in seen.starts:
        facts = jobs.get(start.job)
        lives = start is seen.starts[-1] and (seen.held or bool(facts and facts["JobState"] in BUSY))
        ended = start.ended or (now if lives else max(start.began, seen.last_sign))
        spans.append((start.began, ended))
    began = [row["time"] for row in seen.events if row["event"] == "start"]
    inside = all(any(begin <= each <= end for begin, end in spans) for each in began)
    allocated = sum(end - begin for begin, end in spans)
    if not inside or allocated <= 0:
        return None
    before = [0, *(row["step"] for row in seen.rows)]
    useful = sum((row["step"] - past) * row["step_seconds"] for row, past in zip(seen.rows, before, strict=False))
    return max(0.0, min(1.0, useful / allocated))


def _not_applied(seen: Seen) -> list[int]:
    bad: set[int] = set()
    for row in seen.events:
        if row["event"] == "skipped":
            bad.add(row["step"])
        elif row["event"] in ("begin", "resume"):  # what follows is done again
            bad = {step for step in bad if step <= row["step"]}
    return sorted(bad.difference(*(range(back["first"], back["last"] + 1) for back in seen.gone_back)))


def _steps(seen: Seen, row: Mapping[str, Any]) -> int | None:
    """The run's length; one in epochs can be told once the number of samples is stated or shows in the metrics."""
    train, data = seen.config.get("train") or {}, seen.config.get("data") or {}
    if train.get("steps") is not None or train.get("epochs") is None:
        return train.get("steps")
    samples = data.get("train_samples") or (round(row["samples"] / row["epoch"]) if row.get("epoch") else None)
    if samples is None or "global_batch" not in train:
        return None
    from pipeline.prepare import steps_of

    return steps_of(train["epochs"], samples, train["global_batch"])


def _config(run: Path) -> dict[str, Any]:
    """The newest resolved configuration: of the last start, or of a submission that has not started yet."""
    found = [run / "config.yaml", *records.folder(run).glob("config-*.yaml")]
    newest = max((file for file in found if file.exists()), key=lambda file: file.stat().st_mtime, default=None)
    try:
        tree = yaml.safe_load(newest.read_bytes()) if newest else None
    except (yaml.YAMLError, ValueError):  # half-written, or with a date that does not exist
        tree = None
    sections = tree.items() if isinstance(tree, dict) else ()
    return {name: section for name, section in sections if isinstance(section, dict)}


def _ancestry(seen: Seen, steps: int | None) -> list[dict[str, Any]]:
    begun = seen.last("begin", "resume")
    if not begun or seen.ancestors is None:  # what has not begun may have a source that it has not noted yet
        return []
    return entries_of(seen.ancestors, seen.config, steps, begun.get("new_augmentations", []))


def _checkpoints(run: Path) -> list[int]:
    try:
        return [step_of(folder) for folder in trusted(run)]
    except BadRequest:  # of another format than this program's: they are there nevertheless
        return [step_of(folder) for folder in checkpoints(run / "checkpoints")]


# ---------------------------------------------------------------------------------------------------------- printing


def shown(found: Sequence[Status], single: bool) -> Group | Table:
    """One run as a few lines, several as a table."""
    if single:
        return Group(*map(Text, lines(found[0])))
    titles = ("run", "state", "step", "loss", "img/s", "left", "restarts", "goodput", "job", "why")
    table = Table(*titles, box=None, pad_edge=False)
    for each in found:
        job = each.jobs[-1]["job"] if each.jobs else ""
        facts = (_step(each), _loss(each), _speed(each), _left(each), str(each.restarts))
        row = (each.run, each.state, *facts, _percent(each.goodput), job, each.reason or "")
        table.add_row(*map(Text, row))
    return table


def lines(status: Status) -> list[str]:
    """What a person wants to know of one run."""
    left = (
        f", {_left(status)} of training left"
        if status.seconds_left and status.state not in ("failed", "cancelled")
        else ""
    )
    newest, count = status.checkpoints["newest"], status.checkpoints["count"]
    said = [f"{status.run}: {status.state}, step {_step(status)}{left}"]
    said += [f"  {status.reason}"] if status.reason else []
    said += [f"  loss {_loss(status)}, {_speed(status)} img/s"] if status.loss is not None else []
    said += [f"  goodput {_percent(status.goodput)}"] if status.goodput is not None else []
    said += [f"  restarted {'once' if status.restarts == 1 else f'{status.restarts} times'}"] if status.restarts else []
    if bad := status.not_applied:
        said.append(f"  {len(bad)} {'step was' if len(bad) == 1 else 'steps were'} not applied, the last {bad[-1]:,}")
    for back in status.gone_back:
        said.append(f"  went back to step {back['to']:,} and past steps {back['first']:,} to {back['last']:,}")
    said += [f"  {count} checkpoints, the newest of step {newest}"] if count else ["  no checkpoint yet"]
    for job in status.jobs:
        where = f" on {', '.join(job['nodes'])}" if job["nodes"] else ""
        why = f" ({job['reason']})" if job["reason"] else ""
        said.append(f"  job {job['job']}: {job['state'] or 'gone'}{where}{why}")
    return said + in_words(status.ancestry)


def _watch(runs: Sequence[Path], single: bool) -> int:
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                found, problem = look_at(runs)
                view = Group(shown(found, single), Text(problem or ""))
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            return 0


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200)


def _step(status: Status) -> str:
    return f"{status.step:,}" if status.steps is None else f"{status.step:,}/{status.steps:,}"


def _loss(status: Status) -> str:
    return "" if status.loss is None else figure(float(status.loss))


def _speed(status: Status) -> str:
    return "" if status.images_per_second is None else figure(status.images_per_second)


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)


def _left(status: Status) -> str:
    return duration(status.seconds_left) if status.seconds_left else ""
