"""`coatnet submit pack|index|verify`: work of `coatnet data` as a job that plans it and an array that does its parts.

    FOLDER/jobs.jsonl          a line for each job: its number, what was asked for, and which of the parts it does
    FOLDER/JOB_PART_log.out    the log of a part; 0 makes the plan
    FOLDER/code-HASH/          the program as it was submitted

FOLDER is DST/.slurm, or what --logs names. No job requeues itself: what is done has its record at the destination
(data/packing/work.py), so Slurm may start an element again, and what is submitted again does only what is missing.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.commands.parts import check_request, read_progress
from pipeline.config.contradictions import check_job
from pipeline.config.parsing import read_slurm
from pipeline.config.schema import Slurm
from pipeline.distributed.launcher import COMMANDS, ROOT, module_command
from pipeline.errors import UsageError, without_secrets
from pipeline.run.jsonl import append_row, read_lines
from slurm import scheduler
from slurm.sbatch import literal, parameters, script, snapshot
from slurm.submit import check_cluster, submission_lock, submit_to_slurm

FITTING = (
    "account", "command_prefix", "cpus_per_task", "exclude", "memory", "partition", "qos", "sbatch", "setup", "time",
)  # fmt: skip
"""The keys of slurm.* that a job of one task may have."""


@dataclass(frozen=True)
class PartsJob:
    """What a job does: the plan of a request, or those elements of `parts` that `array` names."""

    command: str
    words: list[str]
    """Of the request, as they follow `coatnet data COMMAND`."""
    destination: str
    parts: int
    array: str | None = None


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted, and Slurm's record of each of its parts, which are none once it has forgotten it."""

    number: str
    job: PartsJob
    records: dict[int, dict[str, str]]

    @property
    def active(self) -> set[int]:
        """The parts that wait or run."""
        return {part for part, record in self.records.items() if record["JobState"] in scheduler.ACTIVE}


def submit_parts(
    command: str,
    words: list[str],
    options: dict[str, Any],
    keys: list[str],
    parts: int,
    logs: str | None,
    dry_run: bool,
) -> int:
    """Submits what is missing of a request; returns the exit status. `options` has what `words` say, by name."""
    slurm = read_fitting(keys)
    destination = absolute(check_request(command, options))
    folder = folder_for(destination, logs)
    job = PartsJob(command, words, destination, parts)
    if dry_run:
        for each, waits in ((job, None), (replace(job, array=elements(range(1, parts + 1))), "afterok:JOB-BEFORE")):
            print(prepare(each, slurm, folder, ROOT, waits)[1])
        return 0
    check_cluster(slurm)
    with submission_lock(folder):
        is_planned, missing = find_missing(folder, job)
        code = snapshot(folder)
        plan = None if is_planned else submit_one(job, slurm, folder, code, None)
        try:
            submit_one(replace(job, array=elements(missing)), slurm, folder, code, plan and f"afterok:{plan}")
        except (UsageError, *scheduler.ERRORS):
            if plan is not None:
                scheduler.cancel_job(plan)
            raise
    print(f"coatnet status {name_of(folder)} shows its progress")
    return 0


def read_fitting(keys: list[str]) -> Slurm:
    """The slurm section; UsageError for a key that does not fit a job of one task, and for what is no key."""
    for key in keys:
        section, _, name = key.partition("=")[0].partition(".")
        if section != "slurm" or (name in Slurm.model_fields and name not in FITTING):
            fit = ", ".join(f"slurm.{each}" for each in FITTING)
            raise UsageError(f"{key} does not apply: each part is a job of one task; the keys that apply are {fit}")
    slurm = read_slurm(keys).model_copy(update={"signal_seconds": 1})  # nothing listens for it
    check_job(slurm)
    return slurm


def absolute(destination: str) -> str:
    """A folder of this file system by its one name, and a URL as it is."""
    return destination if "://" in destination else os.path.realpath(destination)


def folder_for(destination: str, logs: str | None) -> Path:
    """Where the jobs' files go."""
    if logs is None and "://" in destination:
        raise UsageError(
            f"{destination} is not a folder of this file system: name one that the nodes share, for the jobs' files,"
            " with --logs FOLDER"
        )
    return (Path(logs) if logs else Path(destination) / ".slurm").resolve()


def elements(parts: Sequence[int]) -> str:
    """Parts as sbatch takes the elements of an array."""
    is_range = list(parts) == list(range(parts[0], parts[-1] + 1)) and len(parts) > 1
    return f"{parts[0]}-{parts[-1]}" if is_range else ",".join(map(str, parts))


def name_of(folder: Path) -> Path:
    """By what `coatnet status` knows the work whose jobs have this folder."""
    return folder.parent if folder.name == ".slurm" else folder


def find_missing(folder: Path, job: PartsJob) -> tuple[bool, list[int]]:
    """Whether the plan of this very request is there, and the parts that nobody has done or is doing.

    UsageError where another job is active, or all that is missing is in jobs.
    """
    before, progress = submitted(folder, job.destination), read_progress(job.destination, job.command)
    active = [each for each in before if each.active]
    is_same = [replace(each.job, array=None, parts=job.parts) == job for each in before]
    is_planned = progress.left is not None and bool(before) and is_same[-1]
    everything = list(range(1, job.parts + 1))
    # Where nothing is missing somebody has to finish; where a few parts did not get there, their share is another now.
    some = progress.missing(job.parts) if is_planned and before[-1].job.array == elements(everything) else []
    missing = some or everything
    left = [part for part in missing if not any(part in each.active for each in active)]
    is_beside = all(each.job.array and replace(each.job, array=None) == job for each in active)
    if active and not (is_planned and is_beside and left):
        raise UsageError(
            f"{job.destination}: its job {active[-1].number} has not ended; to submit another, end it first with"
            f" `coatnet cancel {name_of(folder)}`"
        )
    return is_planned, left


def read_jobs(folder: Path) -> list[tuple[str, PartsJob]]:
    """The jobs of a folder with their numbers, the newest last."""
    kinds = {"command": str, "words": list, "destination": str, "parts": int, "array": str | None}
    rows = read_lines(folder / "jobs.jsonl", job=str, **kinds)
    return [(row["job"], PartsJob(**{name: row[name] for name in kinds})) for row in rows]


def submitted(folder: Path, destination: str, ask: bool = True) -> list[Submitted]:
    """Those of a destination, as Slurm has them now, which is asked if wished; SlurmUnavailable without an answer."""
    jobs = [(number, job) for number, job in read_jobs(folder) if job.destination == destination]
    return [Submitted(number, job, scheduler.show_elements(number) if ask else {}) for number, job in jobs]


def submit_one(job: PartsJob, slurm: Slurm, folder: Path, code: Path, dependency: str | None) -> str:
    """Submits a job that runs the program in `code`; returns its number."""
    number = submit_to_slurm(*prepare(job, slurm, folder, code, dependency))
    append_row(folder / "jobs.jsonl", {"job": number, **asdict(job), "host": os.uname().nodename})
    what = f"does parts {job.array} of {job.parts}" if job.array else "makes the plan"
    print(f"{without_secrets(job.destination)}: job {number} {what}" + (f", {dependency}" if dependency else ""))
    return number


def prepare(
    job: PartsJob, slurm: Slurm, folder: Path, code: Path, dependency: str | None
) -> tuple[dict[str, Any], str, str]:
    """submitit's parameters of a job, its script, and the script's last line."""
    words, part = job.words, f"0/{job.parts}"
    options = parameters(slurm, f"coatnet-{job.command}", folder, dependency)
    if job.array is not None:
        more = {"array": job.array, "output": f"{literal(folder)}/%A_%a_log.out"}
        options["additional_parameters"] |= more
        words = [word for word in words if word != "--overwrite"]  # else a part might begin anew what all have done
        part = f'"$SLURM_ARRAY_TASK_ID"/{job.parts}'
    program = module_command(COMMANDS, sys.executable, code)
    command = shlex.join([*shlex.split(slurm.command_prefix or ""), *program, "data", job.command])
    last_line = f"exec {command} --part {part} {shlex.join(words)}"
    return options, script(folder, last_line, options), last_line
