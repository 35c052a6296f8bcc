"""`coatnet status` of work in parts: how far it is by its notes, what Slurm says of its jobs, which parts failed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.parts import DOING, Progress, read_progress
from pipeline.errors import without_secrets
from pipeline.formatting import pluralize
from slurm import history, scheduler
from slurm.logs import tail
from slurm.parts import Submitted, absolute, read_jobs, submitted
from slurm.scheduler import ACTIVE, BUSY, WAITING

MAX_LISTED = 5


@dataclass(frozen=True)
class Place:
    """The destination of work in parts, and the folder of its jobs where that is known."""

    destination: str
    folder: Path | None

    @property
    def shown(self) -> str:
        return without_secrets(self.destination)


@dataclass(frozen=True)
class PartsStatus:
    """The state of work in parts; what is unknown is None."""

    destination: str
    state: str
    """pending, listing, packing (indexing, verifying), done or nothing."""
    reason: str | None
    done: int | None
    """Of the `items`, shards."""
    items: int | None
    images: int | None
    """Of all items."""
    restarts: int
    jobs: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    """Parts (0: the plan) that ended before all of theirs was done: Slurm's state, last line and name of the log."""


def find_place(name: str) -> Place | None:
    """What a person names: a destination, or the folder that --logs named; None where it is neither."""
    if "://" in name:
        return Place(name, None)
    path, here = Path(name), absolute(name)
    if history.is_run(path):
        return None
    if jobs := read_jobs(path):
        return Place(jobs[-1][1].destination, path)
    notes = [f".{each}" for each in DOING.values()]
    if any((path / each).exists() for each in (".slurm", *notes, "manifest.json", "train/manifest.json")):
        return Place(here, path / ".slurm")
    return None


def read_parts(place: Place) -> tuple[PartsStatus, str | None]:
    """The state, and why Slurm could not be asked."""
    problem: str | None = None
    jobs: list[Submitted] = []
    if place.folder is not None:
        try:
            jobs = submitted(place.folder, place.destination)
        except scheduler.ERRORS as error:
            problem = str(error)
            jobs = submitted(place.folder, place.destination, ask=False)
    progress = read_progress(place.destination, jobs[-1].job.command if jobs else None)
    return status_of(place, progress, jobs), problem


def status_of(place: Place, progress: Progress, jobs: list[Submitted]) -> PartsStatus:
    """The state of work by its notes, and by its jobs where none are written yet."""
    state, reason = progress.state, None
    active = {each.number: each.active for each in jobs if each.active}
    records = [record for each in jobs for record in each.records.values()]
    waiting = next((record for record in records if record["JobState"] in WAITING), None)
    if progress.left is None and any(each.job.array is None for each in jobs if each.active):
        state = "listing" if any(record["JobState"] in BUSY for record in records) else "pending"
    if waiting and not any(record["JobState"] in BUSY for record in records):
        reason = None if waiting["Reason"] == "None" else waiting["Reason"]
    elif jobs and not active and state != "done":
        reason = "no job is active; submit it again to do what is missing"
    missing: list[int] = []
    if jobs and state != "done":
        missing = progress.missing(jobs[-1].job.parts) if active or progress.left is not None else [0]
    return PartsStatus(
        destination=place.shown,
        state=state,
        reason=reason,
        done=None if progress.items is None else progress.items - len(progress.left or ()),
        items=progress.items,
        images=progress.images,
        restarts=sum(int(record.get("Restarts", 0)) for record in records),
        jobs=[_job(each) for each in jobs],
        failed=_failed(place.folder, missing, jobs) if state != "done" else [],
    )


def _job(submitted: Submitted) -> dict[str, Any]:
    """A job, Slurm's state of whichever of its parts is most alive, and how many are in which."""
    states = Counter(record["JobState"] for record in submitted.records.values())
    busy = [record for record in submitted.records.values() if record["JobState"] in BUSY]
    return {
        "job": submitted.number,
        "command": submitted.job.command,
        "array": submitted.job.array,
        "state": max(states, key=lambda state: (state in BUSY, state in WAITING, state != "COMPLETED"), default=None),
        "states": dict(states),
        "nodes": sorted({record["NodeList"] for record in busy}),
    }


def _failed(folder: Path | None, missing: list[int], jobs: list[Submitted]) -> list[dict[str, Any]]:
    """What is known of the parts that are missing and in no job any more, and of those whose newest job failed."""
    states: dict[int, str] = {}
    for each in jobs:
        if each.job.parts == jobs[-1].job.parts:
            states |= {part: record["JobState"] for part, record in each.records.items()}
    failed = {part for part, state in states.items() if state != "COMPLETED" and 0 not in missing}
    logs: dict[int, Path] = {}
    for file in sorted(folder.glob("*_log.out") if folder else (), key=lambda file: file.stat().st_mtime):
        if found := re.fullmatch(r"\d+_(\d+)_log", file.stem):
            logs[int(found[1])] = file
    rows = []
    for part in sorted(part for part in failed.union(missing) if states.get(part) not in ACTIVE):
        log = logs.get(part)
        said = tail(log, 20)[1].decode(errors="replace").split("\n") if log else []
        last = next((line for line in reversed(said) if line.strip()), None)
        rows.append({"part": part, "state": states.get(part), "reason": last, "log": log and str(log)})
    return rows


def parts_as_lines(status: PartsStatus) -> list[str]:
    """The status for people."""
    far = f", {status.done:,} of {pluralize(status.items, 'shard')}" if status.items is not None else ""
    images = f", {pluralize(status.images, 'image')} in all" if status.images is not None else ""
    lines = [f"{status.destination}: {status.state}{far}{images}"]
    lines += [f"  {status.reason}"] if status.reason else []
    lines += [f"  {pluralize(status.restarts, 'restart')}"] if status.restarts else []
    for job in status.jobs:
        counts = ", ".join(f"{count} {state}" for state, count in job["states"].items())
        where = f" on {', '.join(job['nodes'])}" if job["nodes"] else ""
        what = f"{job['command']}, " + (f"parts {job['array']}" if job["array"] else "the plan")
        lines.append(f"  job {job['job']} ({what}): {counts or 'gone'}{where}")
    for row in status.failed[:MAX_LISTED]:
        what = f"part {row['part']}" if row["part"] else "the plan"
        said = f": {row['reason']}" if row["reason"] else ""
        lines.append(
            f"  {what} is not done ({row['state'] or 'gone'}){said}" + (f"; {row['log']}" if row["log"] else "")
        )
    if len(status.failed) > MAX_LISTED:
        lines.append(f"  and {len(status.failed) - MAX_LISTED} more parts; --json has all")
    return lines
