"""Slurm's client programs: their answer, or one of two errors. Nothing else here calls them, but for submitit.

Next: queue.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from pipeline.errors import BadRequest, RunFailed

PATIENCE_SECONDS = 60
SECONDS_BETWEEN_QUESTIONS = 10.0
RESTART_SECONDS = 1800.0
"""How long Slurm's controller may be away before a job that needs its answer gives up."""
_SILENT = ("unable to contact", "socket timed out", "connection refused", "zero bytes were transmitted")


class Refused(BadRequest):
    """Slurm answered no; the message is the last line of what it said."""


class Unanswered(RunFailed):
    """Slurm's controller does not answer, or its programs are not here."""


ERRORS = (Refused, Unanswered)


def is_installed() -> bool:
    """Whether this machine has Slurm's client programs."""
    return shutil.which("scontrol") is not None


def ask(*command: str) -> str:
    """What a client program prints. Refused where Slurm says no, Unanswered where it says nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_SECONDS, check=False,
            env=dict(os.environ) | {"SLURM_TIME_FORMAT": "standard"},
        )  # fmt: skip
    except FileNotFoundError:
        raise Unanswered(f"{command[0]} is not on this machine's PATH: ask from a login node") from None
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{command[0]} gave no answer in {PATIENCE_SECONDS} s: is Slurm's controller up?") from None
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = f"{command[0]}: {said[-1].removeprefix(f'{command[0]}: ') if said else f'exit status {done.returncode}'}"
        silent = any(words in last.lower() for words in _SILENT)
        raise Unanswered(f"Slurm does not answer: {last}") if silent else Refused(last)
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


def insist(*command: str) -> str:
    """As `ask`, but asks again while Slurm's controller is away, as during its restart."""
    deadline = time.monotonic() + RESTART_SECONDS
    while True:
        try:
            return ask(*command)
        except Unanswered as error:
            if time.monotonic() > deadline:
                raise
            print(f"{error}; asking again", flush=True)
            time.sleep(SECONDS_BETWEEN_QUESTIONS)
