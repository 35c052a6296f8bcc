"""A run's jobs as Slurm's client programs report them, or /proc where a job runs on this machine.

A job `local-PID` was submitted with `--cluster local`: it is that process of the host that submitted it. Without
accounting Slurm forgets a job minutes after its end; what is known then is in the run's folder (history.py).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import RunFailed, UsageError
from slurm import history
from slurm.environment import outside_jobs

WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
"""States of a job that will start, or start again."""
RUNNING = {"RUNNING", "CONFIGURING", "RESIZING", "SIGNALING", "STOPPED", "SUSPENDED"}
"""States of a job whose script has not ended: it is SIGNALING, say, until all its nodes have confirmed a signal."""
BUSY = RUNNING | {"COMPLETING", "STAGE_OUT"}
"""States of a job that has nodes."""
ACTIVE = WAITING | BUSY
_LOCAL = "local-"
_OVER = ("Invalid job id", "already completing or completed", "not found")
TIMEOUT_SECONDS = 60
RETRY_SECONDS = 10.0
RETRY_TIMEOUT_SECONDS = 1800.0
"""How long Slurm's controller may be away before a job that needs its answer gives up."""
_WHOLE = {"SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}
"""How Slurm prints: no numbers of an array's elements are left out."""
_SILENT = ("unable to contact", "socket timed out", "connection refused", "zero bytes were transmitted")


class SlurmRefused(UsageError):
    """Slurm answered no; the message is the last line of its answer."""


class SlurmUnavailable(RunFailed):
    """Slurm's controller does not answer, or its programs are not installed."""


ERRORS = (SlurmRefused, SlurmUnavailable)


# ---------------------------------------------------------------------------------------------------------------- jobs


def can_ask(job_id: str, host: str | None = None) -> bool:
    """Whether this machine can know of a job; of a local one only its `host` can."""
    return host in (None, os.uname().nodename) if job_id.startswith(_LOCAL) else is_installed()


def show_job(job_id: str) -> dict[str, str] | None:
    """A job's record by Slurm's names (JobState, Reason, Restarts ...); None where Slurm knows nothing.

    Of a job array the element that is most alive, else that ran last. SlurmUnavailable where Slurm does not answer.
    """
    if job_id.startswith(_LOCAL):
        return {"JobId": job_id, "JobState": "RUNNING"} if _is_batch_process(int(job_id.removeprefix(_LOCAL))) else None

    def life(job: dict[str, str]) -> tuple[bool, ...]:
        return job["JobState"] in BUSY, job["JobState"] in WAITING, job.get("NodeList", "(null)") not in ("", "(null)")

    return max(_records(job_id), key=life, default=None)  # scontrol lists the newest first


def show_elements(job_id: str) -> dict[int, dict[str, str]]:
    """The record of each element of a job array, by its number; of another job its own as 0; empty if forgotten.

    Those that wait share one record.
    """
    records = _records(job_id)
    return {number: each for each in reversed(records) for number in parse_elements(each.get("ArrayTaskId", "0"))}


def parse_elements(text: str) -> list[int]:
    """The numbers that Slurm writes as 1,5-7,10-20:2%4."""
    found = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", text.partition("%")[0])
    return [n for first, last, step in found for n in range(int(first), int(last or first) + 1, int(step or 1))]


def _records(job_id: str) -> list[dict[str, str]]:
    output = _unless_forgotten("scontrol", "-o", "show", "job", job_id) if is_installed() else ""
    return [parse_record(line) for line in output.splitlines() if line.strip()]


def parse_record(line: str) -> dict[str, str]:
    """KEY=VALUE pairs; values may contain blanks (names, commands) and equal signs (TRES)."""
    pairs = re.split(r"(?:^|\s)([A-Za-z][\w/:]*)=", line.strip())[1:]
    return {key: value.strip() for key, value in zip(pairs[::2], pairs[1::2], strict=True)}


def cancel_job(job_id: str) -> None:
    """Ends a job; nothing happens to one that is over."""
    if not job_id.startswith(_LOCAL):
        _unless_forgotten("scancel", job_id)
    elif _is_batch_process(process := int(job_id.removeprefix(_LOCAL))):
        os.killpg(process, signal.SIGTERM)


def job_records(run: Path) -> dict[str, dict[str, str] | None]:
    """What show_job returns of each of the run's jobs that can be asked for from here, newest last."""
    hosts = {row["job"]: row.get("host") for row in history.submissions(run)}
    return {job: show_job(job) for job, host in hosts.items() if can_ask(job, host)}


def active_jobs(run: Path) -> dict[str, dict[str, str]]:
    """The records of those jobs that wait or run."""
    return {job: record for job, record in job_records(run).items() if record and record["JobState"] in ACTIVE}


def _is_batch_process(process: int) -> bool:
    """Whether it lives, leads its process group, and is the script or the program of a local submission."""
    folder = Path(f"/proc/{process}")
    try:
        state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        words = (folder / "cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    is_ours = b"slurm.job" in words or any(word.endswith(b"/slurm/local.sh") for word in words)
    return state not in "ZX" and int(group) == process and is_ours


# ----------------------------------------------------------------------------------------------------- client programs


def is_installed() -> bool:
    """Whether this machine has Slurm's client programs."""
    return shutil.which("scontrol") is not None


def run_slurm(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """The output of a client program. SlurmRefused where Slurm says no, SlurmUnavailable where it does not answer."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, check=False,
            env={**(environment or outside_jobs(os.environ)), **_WHOLE},
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmUnavailable(f"{command[0]} is not on this machine's PATH: run this on a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(
            f"{command[0]} did not answer in {TIMEOUT_SECONDS} s: is Slurm's controller up?"
        ) from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        lines = [line for line in said if f'Try "{command[0]} --help"' not in line]  # what follows an unknown option
        last = lines[-1].removeprefix(f"{command[0]}: ") if lines else f"exit status {done.returncode}"
        if any(words in last.lower() for words in _SILENT):
            raise SlurmUnavailable(f"Slurm does not answer: {command[0]}: {last}")
        raise SlurmRefused(f"{command[0]}: {last}")
    return done.stdout


def ask_with_retries(*command: str) -> str:
    """As run_slurm, but asks again while Slurm's controller is away, as during its restart."""
    deadline = time.monotonic() + RETRY_TIMEOUT_SECONDS
    while True:
        try:
            return run_slurm(*command)
        except SlurmUnavailable as error:
            if time.monotonic() > deadline:
                raise
            print(f"{error}; retrying", flush=True)
            time.sleep(RETRY_SECONDS)


def _unless_forgotten(*command: str) -> str:
    """The output of a client program, empty where Slurm does not know the job (any more)."""
    try:
        return run_slurm(*command)
    except SlurmRefused as error:
        if any(words in str(error) for words in _OVER):
            return ""
        raise
