"""Why a start of a job ended, and whether it is requeued: one table, without I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pipeline.config.contradictions import EARLY_SECONDS
from pipeline.distributed.signals import STOPPED, STOPPING
from pipeline.run.events import HANG_EVENTS
from slurm.history import JobStart

MAX_BACKOFF_SECONDS = 3600.0
_NEVER = (
    "Invalid .*specification|.*specification invalid|More processors requested than permitted|Only allocated"
    "|Memory required by task is not available|Cannot request more threads per core|Requested operation not supported"
)
_REFUSED = re.compile(
    r"srun: (?:unrecognized option|invalid option|option .*(?:requires|allow|ambiguous)"
    r"|fatal: (?!.*configuration (?:source|file))"  # that may lie on a file system or a controller that is away
    rf"|error: (?:(?!Unable to )(?:.*\s)?--[a-z]|(?:Unable to create step .*: )?(?:{_NEVER})))"
)
"""Srun's words, and getopt's in its name, for what it will never do."""
_NOT_STARTED = re.compile(r"srun: (?:fatal: |error: (?:Unable to |.*launch failed))")
"""Its words for what it may do when it is tried again, as when Slurm's controller or a node is back."""
FAILURES_AT_SAME_STEP = 3
"""After which a run is given up."""
NO_PROGRAM = (126, 127)
"""Exit statuses of a shell that could not start a rank's program."""
MAX_NODE_FAILURES = 2
"""After which a node is excluded."""


class Cause(StrEnum):
    """Why a start ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    CRASH = "crash"
    KILLED_RANK = "killed rank"
    HANG = "hang"
    NOT_STARTED = "not started"
    NODE_LOST = "node lost"
    CANCELLED = "cancelled"
    BAD_REQUEST = "bad request"


STOPPED_STATUSES = {STOPPED, *(128 + number for number in STOPPING)}
"""srun's exit status where ranks were asked to stop before their first step, or before they could hear of it."""
FAILURES = {Cause.CRASH, Cause.KILLED_RANK, Cause.HANG, Cause.NOT_STARTED}
"""Which count towards slurm.max_restarts."""


@dataclass(frozen=True)
class Ending:
    """What is known of the end of a start."""

    status: int
    """srun's exit status."""
    event: str | None = None
    """The last of `finished`, `interrupted` and HANG_EVENTS in the run's events since this start began."""
    reason: str | None = None
    """The signal that asked for the stop."""
    statuses: tuple[int, ...] = ()
    """Exit statuses that ranks recorded: of failures, and STOPPED where a signal ended one with no step to save."""
    srun_error: str | None = None
    """Why srun started no ranks."""
    killed: bool = False
    """Whether srun saw a task killed, by none of the signals that request a stop."""
    cancelled: bool = False
    lost: tuple[str, ...] = ()
    """The job's nodes that are down."""
    seconds_left: float | None = None
    """Of the job's time limit."""
    signal_seconds: float = 0.0
    """How long before the time limit the job is signalled."""


def classify_exit(ending: Ending) -> Cause:
    """A person's decision comes first, then what the run recorded, then what was seen from outside."""
    if ending.event == "finished" and ending.status == 0:
        return Cause.DONE
    if ending.cancelled or (ending.event == "interrupted" and ending.reason == "SIGINT"):
        return Cause.CANCELLED
    left = ending.seconds_left
    stopped = (
        Cause.TIME_LIMIT if left is not None and left <= ending.signal_seconds + EARLY_SECONDS else Cause.PREEMPTED
    )
    if ending.event == "interrupted":
        return stopped
    if ending.lost:
        return Cause.NODE_LOST
    if 2 in (ending.status, *ending.statuses):
        return Cause.BAD_REQUEST
    if ending.event in HANG_EVENTS:
        return Cause.HANG
    if set(ending.statuses) - {STOPPED}:  # srun then ends the others by SIGTERM
        return Cause.CRASH
    if ending.srun_error is not None and _REFUSED.match(ending.srun_error):
        return Cause.BAD_REQUEST
    if ending.srun_error is not None or ending.status in NO_PROGRAM:
        return Cause.NOT_STARTED
    return stopped if ending.status in STOPPED_STATUSES and not ending.killed else Cause.KILLED_RANK


def classify_missing_exit(
    log: Sequence[str], nodes: tuple[str, ...], lost: Sequence[str]
) -> tuple[Cause, tuple[str, ...]]:
    """Why a batch script was killed before it recorded an end, and the nodes that failed.

    `log` are the last lines of its log: Slurm's as it killed the script, or none where the script's node (the first of
    `nodes`, empty without Slurm) is gone. `lost` are the nodes that are down now.
    """
    if not nodes:  # without Slurm nothing says what killed it
        return Cause.KILLED_RANK, ()
    text = "".join(log)
    failed = {*lost, *nodes_reported_failed(log)}
    if not re.search(r"\*\*\* JOB .* CANCELLED AT", text):  # srun ends steps itself
        failed.add(nodes[0])
    if failed or "DUE TO NODE FAILURE" in text:
        return Cause.NODE_LOST, tuple(sorted(failed))
    if "DUE TO TIME LIMIT" in text:
        return Cause.TIME_LIMIT, ()
    return (Cause.PREEMPTED if re.search(r"CANCELLED AT .* DUE TO ", text) else Cause.CANCELLED), ()


def nodes_reported_failed(log: Sequence[str]) -> list[str]:
    """The nodes that srun reports as gone or unable to start ranks; they may be back by now."""
    failed = r"srun: error: (?:Node failure on |Task launch for .* failed on node )([^\s:]+)"
    return [match[1] for line in log if (match := re.match(failed, line))]


def srun_error(log: Sequence[str]) -> str | None:
    """Srun's line where it started no ranks: as it never will, or else as Slurm gave it no step."""
    matching = (line.strip() for words in (_REFUSED, _NOT_STARTED) for line in log if words.match(line))
    return next(matching, None)


def nodes_of_killed_tasks(log: Sequence[str]) -> list[str]:
    """The nodes of tasks that srun saw killed, as in `srun: error: n2: task 3: Killed`, in order."""
    killed = r"srun: error: (\S+): tasks? [\d,-]+: (?!Terminated|Exited|User defined signal [12]|Hangup|Interrupt)\w+"
    return [match[1] for line in log if (match := re.match(killed, line))]


@dataclass(frozen=True)
class Decision:
    """Whether the job is requeued and why, after how many seconds, and without which nodes."""

    again: bool
    why: str
    after: float = 0.0
    exclude: tuple[str, ...] = ()


def requeue_decision(cause: Cause, ended: Sequence[JobStart], max_restarts: int, backoff: float) -> Decision:
    """What follows from the last of a job's starts, all of which have ended."""
    if cause is Cause.DONE:
        return Decision(False, "done")
    if cause is Cause.CANCELLED:
        return Decision(False, "cancelled; it resumes when it is submitted again")
    if cause is Cause.BAD_REQUEST:
        return Decision(False, "the request is invalid, and a restart would not change that")
    if cause in (Cause.PREEMPTED, Cause.TIME_LIMIT):
        return Decision(True, f"{cause}: it resumes")
    if cause is Cause.NODE_LOST:
        return Decision(True, "a node was lost: it resumes on those that are left", exclude=bad_nodes(ended))
    failed = [start for start in ended if start.cause in FAILURES]
    steps = [start.last_step for start in failed]
    if len(steps) >= FAILURES_AT_SAME_STEP and len(set(steps[-FAILURES_AT_SAME_STEP:])) == 1:
        return Decision(False, f"no progress: it failed {FAILURES_AT_SAME_STEP} times at step {steps[-1]}")
    if len(failed) > max_restarts:
        return Decision(False, f"it failed {len(failed)} times, more than slurm.max_restarts={max_restarts}")
    without_progress = next((n for n, step in enumerate(reversed(steps)) if step != steps[-1]), len(steps))
    after = min(MAX_BACKOFF_SECONDS, backoff * 2 ** (without_progress - 1))
    return Decision(True, f"{cause}: failure {len(failed)} of {max_restarts}", after, bad_nodes(ended))


def bad_nodes(ended: Sequence[JobStart]) -> tuple[str, ...]:
    """Nodes on which MAX_NODE_FAILURES starts failed."""
    failed = [node for start in ended for node in start.failed_nodes]
    return tuple(sorted({node for node in failed if failed.count(node) >= MAX_NODE_FAILURES}))
