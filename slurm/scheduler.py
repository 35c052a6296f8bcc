"""A run's jobs as Slurm's client programs report them, or /proc where a job runs on this machine.

A job `local-PID` was submitted with `--cluster local`: it is that process of the host that submitted it. Without
accounting Slurm forgets a job minutes after its end; what is known then stands in the run's folder (history.py).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from pipeline.errors import RunFailed, UsageError
from slurm import history, scheduler

WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
"""States of a job that is to start, or to start again."""
BUSY = {"RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
"""States of a job that has nodes."""
_LOCAL = "local-"
_OVER = ("Invalid job id", "already completing or completed")


def can_ask(job_id: str, host: str | None = None) -> bool:
    """Whether this machine can say anything of a job; of a local one only its `host` can."""
    return host in (None, os.uname().nodename) if job_id.startswith(_LOCAL) else scheduler.is_installed()


def show_job(job_id: str) -> dict[str, str] | None:
    """What Slurm knows of a job, by its own names (JobState, Reason, Restarts ...); None where it knows nothing.

    Of a job array the element that is most alive. Unanswered where Slurm does not answer.
    """
    if job_id.startswith(_LOCAL):
        return {"JobId": job_id, "JobState": "RUNNING"} if _is_batch_process(int(job_id.removeprefix(_LOCAL))) else None
    if not scheduler.is_installed():
        return None
    said = _unless_forgotten("scontrol", "-o", "show", "job", job_id)
    elements = [parsed(line) for line in said.splitlines() if line.strip()]
    return max(elements, key=lambda job: (job["JobState"] in BUSY, job["JobState"] in WAITING), default=None)


def parsed(line: str) -> dict[str, str]:
    """KEY=VALUE pairs; values may hold blanks (names, commands) and equal signs (TRES)."""
    pairs = re.split(r"(?:^|\s)([A-Za-z][\w/:]*)=", line.strip())[1:]
    return {key: value.strip() for key, value in zip(pairs[::2], pairs[1::2], strict=True)}


def estimated_start(job_id: str) -> str | None:
    """When Slurm thinks that a pending job starts; None where it does not say. Unanswered where it does not answer."""
    if job_id.startswith(_LOCAL) or not scheduler.is_installed():
        return None
    said = _unless_forgotten("squeue", "--start", "--noheader", f"--jobs={job_id}", "--format=%S")
    times = [word for word in said.split() if word[:1].isdigit()]
    return min(times, default=None)


def cancel_job(job_id: str) -> None:
    """Ends a job; one that is over already is left alone. Refused or Unanswered by Slurm."""
    if not job_id.startswith(_LOCAL):
        _unless_forgotten("scancel", job_id)
    elif _is_batch_process(process := int(job_id.removeprefix(_LOCAL))):
        os.killpg(process, signal.SIGTERM)


def _unless_forgotten(*command: str) -> str:
    """The answer, empty where Slurm does not know the job (any more)."""
    try:
        return scheduler.run_slurm(*command)
    except scheduler.SlurmRefused as error:
        if any(words in str(error) for words in _OVER):
            return ""
        raise


def active_jobs(run: Path) -> dict[str, dict[str, str]]:
    """The run's jobs that wait or run, newest last, each with what show_job says."""
    asked = {row["job"]: row.get("host") for row in history.submissions(run)}
    shown = {job: show_job(job) for job, host in asked.items() if can_ask(job, host)}
    return {job: facts for job, facts in shown.items() if facts and facts["JobState"] in WAITING | BUSY}


def check_run(run: Path) -> None:
    """UsageError where a folder is no run."""
    if not is_run(run):
        raise UsageError(f"{run} is no run: it has neither events.jsonl nor slurm/jobs.jsonl; name a run's folder")


def is_run(folder: Path) -> bool:
    return (folder / "events.jsonl").exists() or (folder / "slurm" / "jobs.jsonl").exists()


def _is_batch_process(process: int) -> bool:
    """Whether it lives, leads its process group, and is the script or the program of a local submission."""
    folder = Path(f"/proc/{process}")
    try:
        state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    ours = b"slurm.job" in words or any(word.endswith(b"/slurm/local.sh") for word in words)
    return state not in "ZX" and int(group) == process and ours


PATIENCE_SECONDS = 60
SECONDS_BETWEEN_QUESTIONS = 10.0
RESTART_SECONDS = 1800.0
"""How long Slurm's controller may be away before a job that needs its answer gives up."""
_SILENT = ("unable to contact", "socket timed out", "connection refused", "zero bytes were transmitted")


class SlurmRefused(UsageError):
    """Slurm answered no; the message is the last line of what it said."""


class SlurmUnavailable(RunFailed):
    """Slurm's controller does not answer, or its programs are not here."""


ERRORS = (SlurmRefused, SlurmUnavailable)


def is_installed() -> bool:
    """Whether this machine has Slurm's client programs."""
    return shutil.which("scontrol") is not None


def run_slurm(*command: str) -> str:
    """What a client program prints. Refused where Slurm says no, Unanswered where it says nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_SECONDS, check=False,
            env=dict(os.environ) | {"SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmUnavailable(f"{command[0]} is not on this machine's PATH: ask from a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(
            f"{command[0]} gave no answer in {PATIENCE_SECONDS} s: is Slurm's controller up?"
        ) from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = f"{command[0]}: {said[-1].removeprefix(f'{command[0]}: ') if said else f'exit status {done.returncode}'}"
        silent = any(words in last.lower() for words in _SILENT)
        raise SlurmUnavailable(f"Slurm does not answer: {last}") if silent else SlurmRefused(last)
    return done.stdout


def seconds_of(time: str) -> int | None:
    """A time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    None where it is no number, as UNLIMITED.
    """
    days, dash, clock = time.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or not (days.isdigit() or not dash):
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def ask_with_retries(*command: str) -> str:
    """As `ask`, but asks again while Slurm's controller is away, as during its restart."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return run_slurm(*command)
        except SlurmUnavailable as error:
            if time.monotonic() > deadline:
                raise
            print(f"{error}; asking again", flush=True)
            time.sleep(SECONDS_BETWEEN_QUESTIONS)
