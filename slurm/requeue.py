"""Why a start of a job ended, and what follows from it: one table, without any I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from slurm.history import JobStart

MOST_BACKOFF_SECONDS = 3600.0
SAME_STEP = 3
"""Failures at the same step after which a run is given up."""
NODE_FAILURES = 2
"""Failures on a node after which it is excluded."""


class Cause(StrEnum):
    """Why a start ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    CRASH = "crash"
    KILLED_RANK = "killed rank"
    HANG = "hang"
    NODE_LOST = "node lost"
    CANCELLED = "cancelled"
    BAD_REQUEST = "bad request"


STANDSTILLS = ("heartbeat_lost", "hang")
"""Events of a run that ended since it hung."""
FAILURES = {Cause.CRASH, Cause.KILLED_RANK, Cause.HANG}
"""Which count towards slurm.max_restarts."""


@dataclass(frozen=True)
class Ending:
    """What is known of a start's end."""

    status: int
    """srun's exit status."""
    event: str | None = None
    """The last of `finished`, `interrupted` and STANDSTILLS that the run's events say of this start."""
    reason: str | None = None
    """Of a stop: the signal that asked for it."""
    statuses: tuple[int, ...] = ()
    """Exit statuses that ranks noted as they failed."""
    cancelled: bool = False
    lost: tuple[str, ...] = ()
    """Nodes of the job that Slurm does not count on any more."""
    seconds_left: float | None = None
    """Of the job's time when it was asked to stop."""
    lead: float = 0.0
    """How long before the time limit it is told."""


def classify_exit(ending: Ending) -> Cause:
    """The cause; what a person did comes first, then what the run itself said, then what was seen from outside."""
    if ending.event == "finished" and ending.status == 0:
        return Cause.DONE
    if ending.cancelled or (ending.event == "interrupted" and ending.reason == "SIGINT"):
        return Cause.CANCELLED
    if ending.event == "interrupted":
        left = ending.seconds_left
        return Cause.TIME_LIMIT if left is not None and left <= ending.lead + 60 else Cause.PREEMPTED
    if ending.lost:
        return Cause.NODE_LOST
    if 2 in (ending.status, *ending.statuses):
        return Cause.BAD_REQUEST
    if ending.event in STANDSTILLS:
        return Cause.HANG
    return Cause.CRASH if ending.statuses else Cause.KILLED_RANK


def classify_missing_exit(
    said: Sequence[str], nodes: tuple[str, ...], lost: Sequence[str]
) -> tuple[Cause, tuple[str, ...]]:
    """Why a batch script was killed before it could say, and the nodes whose fault that was.

    `said` are the last lines of its log: Slurm's, as it killed it, or none, where the script's node, the first of
    `nodes`, is gone. `lost` are those that Slurm does not count on now.
    """
    text = "".join(said)
    failed = {*lost, *named_as_failed(said)}
    if "CANCELLED AT" not in text:
        failed.add(nodes[0])
    if failed or "DUE TO NODE FAILURE" in text:
        return Cause.NODE_LOST, tuple(sorted(failed))
    if "DUE TO TIME LIMIT" in text:
        return Cause.TIME_LIMIT, ()
    return (Cause.PREEMPTED if " DUE TO " in text else Cause.CANCELLED), ()


def named_as_failed(said: Sequence[str]) -> list[str]:
    """The nodes that srun says are gone or cannot start ranks; they may be back since."""
    found = [
        re.match(r"srun: error: (?:Node failure on |Task launch for .* failed on node )([^\s:]+)", line)
        for line in said
    ]
    return [match[1] for match in found if match]


def killed_on(said: Sequence[str]) -> list[str]:
    """The nodes of tasks that srun saw killed, as `srun: error: n2: task 3: Killed`, the first one first."""
    found = [re.match(r"srun: error: (\S+): tasks? [\d,-]+: (?!Terminated|Exited)\w+", line) for line in said]
    return [match[1] for match in found if match]


@dataclass(frozen=True)
class Decision:
    """Whether the job is started again, after how many seconds, without which nodes, and why, in words."""

    again: bool
    why: str
    after: float = 0.0
    exclude: tuple[str, ...] = ()


def requeue_decision(cause: Cause, ended: Sequence[JobStart], max_restarts: int, backoff: float) -> Decision:
    """What follows from a start that ended; `ended` are this submission's, the last is the one in question."""
    if cause is Cause.DONE:
        return Decision(False, "done")
    if cause is Cause.CANCELLED:
        return Decision(False, "cancelled; it resumes when it is submitted again")
    if cause is Cause.BAD_REQUEST:
        return Decision(False, "the request is wrong, and would be again")
    if cause in (Cause.PREEMPTED, Cause.TIME_LIMIT):
        return Decision(True, f"{cause}: it resumes")
    if cause is Cause.NODE_LOST:
        return Decision(True, "a node was lost: it resumes on those that are left", exclude=bad_nodes(ended))
    failed = [start for start in ended if start.cause in FAILURES]
    steps = [start.last_step for start in failed]
    if len(steps) >= SAME_STEP and len(set(steps[-SAME_STEP:])) == 1:
        return Decision(False, f"no progress: step {steps[-1]} was reached {SAME_STEP} times, and failed each time")
    if len(failed) > max_restarts:
        return Decision(False, f"it failed {len(failed)} times, slurm.max_restarts={max_restarts}")
    without_progress = next((n for n, step in enumerate(reversed(steps)) if step != steps[-1]), len(steps))
    after = min(MOST_BACKOFF_SECONDS, backoff * 2 ** (without_progress - 1))
    return Decision(True, f"{cause}: failure {len(failed)} of {max_restarts}", after, bad_nodes(ended))


def bad_nodes(ended: Sequence[JobStart]) -> tuple[str, ...]:
    """Nodes on which starts failed more than once."""
    failed = [node for start in ended for node in start.failed_nodes]
    return tuple(sorted({node for node in failed if failed.count(node) >= NODE_FAILURES}))
