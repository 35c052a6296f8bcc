"""What a run's folder records of its Slurm jobs.

    RUN/slurm/jobs.jsonl      a line for each submission: job, command, time, nodes ...
    RUN/slurm/starts.jsonl    two lines for each start of a job: `start` with its nodes, `end` with cause and decision
    RUN/slurm/failures.jsonl  a line by each rank that ended with an error, see ../pipeline/run/failures.py
    RUN/slurm/cancelled       exists from `coatnet cancel` until the next submission
    RUN/slurm/JOB_0_log.out   the batch script's log; ranks: RUN/logs/JOB-RANK.log
    RUN/slurm/code-HASH/      the program as it was submitted, and request-N.json, what to do with it

A start is named JOB.RESTART, as 4711.0. A start without an `end` line is running, or its batch script was killed: by
Slurm, which then requeues the job itself, or with its node.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.run.identity import identify, settle
from pipeline.run.jsonl import append_row, read_lines
from pipeline.run.small_files import NUMBER, has, write_atomically

_END = {"cause": str, "step": int, "failed_nodes": list, "decision": str, "again": bool}
_FAILURE = {"start": str, "time": NUMBER, "rank": int, "host": str, "status": int, "message": str}
START_MARKER = "begins: start"
"""What the batch script logs before it starts the ranks, followed by the start's name."""


@dataclass(frozen=True)
class JobStart:
    """One start of a job, by wall clock (seconds since 1970); `ended` and what follows are None while it runs."""

    name: str
    nodes: tuple[str, ...]
    began: float
    ended: float | None = None
    cause: str | None = None
    last_step: int | None = None
    failed_nodes: tuple[str, ...] = ()
    decision: str | None = None
    again: bool = False
    """Whether the job was to start once more."""

    @property
    def job(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def restart(self) -> int:
        return int(self.name.rpartition(".")[2])


def folder(run: Path) -> Path:
    return run / "slurm"


def check_run(run: Path) -> None:
    """UsageError where a folder is not a run."""
    if not is_run(run):
        raise UsageError(f"{run} is not a run: it has neither events.jsonl nor slurm/jobs.jsonl; pass a run's folder")


def is_run(path: Path) -> bool:
    return (path / "events.jsonl").exists() or (folder(path) / "jobs.jsonl").exists()


def record_submission(run: Path, **facts: Any) -> None:
    """A line in jobs.jsonl, with the run's id; the run is no longer cancelled."""
    append_row(folder(run) / "jobs.jsonl", {"run": settle(run).id, **facts})
    (folder(run) / "cancelled").unlink(missing_ok=True)


def submissions(run: Path) -> list[dict[str, Any]]:
    """The submissions of this run, and not those of the run whose folder was copied."""
    rows = read_lines(folder(run) / "jobs.jsonl", job=str, time=NUMBER)
    return _own(run, (row for row in rows if re.fullmatch(r"(local-)?\d+", row["job"])))


def _own(run: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the run's id; older ones have none, and are not a copy's."""
    identity = identify(run)
    return [row for row in rows if (row["run"] == identity.id if "run" in row else identity.copy_of is None)]


def record_start(run: Path, name: str, nodes: tuple[str, ...]) -> None:
    append_row(folder(run) / "starts.jsonl", {"run": settle(run).id, "start": name, "event": "start", "nodes": nodes})


def record_end(run: Path, ended: JobStart) -> None:
    row = {"time": round(ended.ended or time.time(), 3), "start": ended.name, "event": "end", "cause": ended.cause}
    row |= {"run": settle(run).id, "step": ended.last_step, "failed_nodes": ended.failed_nodes}
    append_row(folder(run) / "starts.jsonl", row | {"decision": ended.decision, "again": ended.again})


def starts(run: Path) -> list[JobStart]:
    """All starts of all jobs of a run, in order."""
    by_name: dict[str, JobStart] = {}
    for row in _own(run, read_lines(folder(run) / "starts.jsonl", start=str, event=str, time=NUMBER)):
        name = row["start"]
        if row["event"] == "start" and has(row, {"nodes": list}) and re.fullmatch(r".+\.\d+", name):
            by_name[name] = JobStart(name, tuple(map(str, row["nodes"])), row["time"])
        elif name in by_name and has(row, _END):
            by_name[name] = replace(
                by_name[name], ended=row["time"], cause=row["cause"], last_step=row["step"],
                failed_nodes=tuple(map(str, row["failed_nodes"])), decision=row["decision"], again=row["again"],
            )  # fmt: skip
    return list(by_name.values())


def failures(run: Path, start: str) -> Iterator[dict[str, Any]]:
    """What failing ranks of a start recorded: `start`, `time`, `rank`, `host`, `status`, `message`."""
    return (row for row in read_lines(folder(run) / "failures.jsonl", **_FAILURE) if row["start"] == start)


def batch_log(run: Path, start: JobStart) -> list[str]:
    """The batch script's log of a start; no lines where there is none."""
    for file in folder(run).glob("*_log.out"):  # an array has one for each of its elements
        if not file.is_file():
            continue
        _, marker, after = file.read_text(errors="replace").partition(f"{START_MARKER} {start.name} ")
        if marker:
            return after.partition(f"{START_MARKER} ")[0].splitlines()
    return []


def last_update(run: Path) -> float:
    """When a run last wrote metrics or events, in seconds since 1970; 0 where it never has."""
    files = [run / "metrics.jsonl", run / "events.jsonl"]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def cancel(run: Path) -> None:
    """Records that a person has cancelled the run: its jobs do not requeue themselves any more."""
    folder(run).mkdir(parents=True, exist_ok=True)
    write_atomically(folder(run) / "cancelled", f"{os.uname().nodename} {time.time():.0f}\n")


def is_cancelled(run: Path) -> bool:
    return (folder(run) / "cancelled").exists()
