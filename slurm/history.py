"""What a run's folder says of its Slurm jobs, for the job itself, for `coatnet status` and for a person.

    RUN/slurm/jobs.jsonl      a line for each submission: job, command, time, nodes ...
    RUN/slurm/starts.jsonl    two lines for each start of a job: `start` with its nodes, `end` with cause and decision
    RUN/slurm/failures.jsonl  a line by each rank that ended with an error, see ../pipeline/run/failures.py
    RUN/slurm/cancelled       is there from `coatnet cancel` until the next submission
    RUN/slurm/JOB_0_log.out   what the batch script said; ranks: RUN/logs/JOB-RANK.log
    RUN/slurm/code-HASH/      the program as it was submitted, and request-N.json, what is to be done with it

A start is named JOB.RESTART, as 4711.0. A start without an `end` line is running, or its batch script was killed: by
Slurm, which requeues the job itself then, or with its node.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.run.jsonl import JsonLines, read_lines

BEGINS = "begins: start"
"""What the batch script says before it starts the ranks, and the start's name."""


@dataclass(frozen=True)
class JobStart:
    """One start of a job, by wall clock (seconds since 1970); `ended` and what follows are None while it runs."""

    name: str
    nodes: tuple[str, ...]
    began: float
    first_step: int
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


def record_submission(run: Path, **facts: Any) -> None:
    """A line in jobs.jsonl; a cancelled run is not cancelled any more."""
    _add(folder(run) / "jobs.jsonl", {"time": round(time.time(), 3), **facts})
    (folder(run) / "cancelled").unlink(missing_ok=True)


def submissions(run: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder(run) / "jobs.jsonl"))


def record_start(run: Path, name: str, nodes: tuple[str, ...], first_step: int) -> None:
    facts = {"start": name, "event": "start", "nodes": nodes, "step": first_step}
    _add(folder(run) / "starts.jsonl", {"time": round(time.time(), 3), **facts})


def record_end(
    run: Path,
    name: str,
    cause: str,
    last_step: int,
    failed_nodes: tuple[str, ...] = (),
    decision: str = "",
    again: bool = False,
    at: float | None = None,
) -> None:
    """`at` is when it ended, by seconds since 1970; None: now."""
    facts = {"start": name, "event": "end", "cause": cause, "step": last_step, "failed_nodes": failed_nodes}
    facts |= {"decision": decision, "again": again}
    _add(folder(run) / "starts.jsonl", {"time": round(at or time.time(), 3), **facts})


def starts(run: Path) -> list[JobStart]:
    """All starts of all jobs of a run, in order."""
    found: dict[str, JobStart] = {}
    for row in read_lines(folder(run) / "starts.jsonl"):
        if row["event"] == "start":
            found[row["start"]] = JobStart(row["start"], tuple(row["nodes"]), row["time"], row["step"])
        elif (begun := found.get(row["start"])) is not None:
            found[row["start"]] = replace(
                begun, ended=row["time"], cause=row["cause"], last_step=row["step"],
                failed_nodes=tuple(row["failed_nodes"]), decision=row["decision"], again=row["again"],
            )  # fmt: skip
    return list(found.values())


def failures(run: Path, start: str) -> Iterator[dict[str, Any]]:
    """What ranks of a start said as they ended: `start`, `time`, `rank`, `host`, `status`, `message`."""
    return (row for row in read_lines(folder(run) / "failures.jsonl") if row["start"] == start)


def batch_log(run: Path, start: JobStart) -> list[str]:
    """What the batch script of a start said; no lines where its log is not there."""
    for file in folder(run).glob("*_log.out"):  # an array has one for each of its elements
        _, begins, after = file.read_text(errors="replace").partition(f"{BEGINS} {start.name} ")
        if begins:
            return after.partition(f"{BEGINS} ")[0].splitlines()
    return []


def last_update(run: Path) -> float:
    """When a run last wrote metrics or events, in seconds since 1970; 0 where it never has."""
    files = [run / "metrics.jsonl", run / "events.jsonl"]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def cancel(run: Path) -> None:
    """Notes that a person wants no more of it; a job that sees this is not requeued."""
    folder(run).mkdir(parents=True, exist_ok=True)
    (folder(run) / "cancelled").write_text(f"{os.uname().nodename} {time.time():.0f}\n")


def is_cancelled(run: Path) -> bool:
    return (folder(run) / "cancelled").exists()


def _add(path: Path, row: dict[str, Any]) -> None:
    lines = JsonLines(path)
    lines.write(row)
    lines.close()
