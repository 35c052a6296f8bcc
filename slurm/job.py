"""What a batch script runs: starts the ranks, classifies how they ended, and requeues its own job where that helps.

    python -m slurm.job RUN REQUEST.json

There is no daemon: the job requeues itself. It does not catch SIGTERM, so a job that is cancelled ends here. Where the
batch script is killed (Slurm requeues the job itself, or its node is gone), the next start finds a start without an
end, and records what happened to it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipeline.checkpoint.attempts import latest_step
from pipeline.config.schema import Slurm, parse_duration
from pipeline.distributed.environment import FILE, IDENTITY, START
from pipeline.distributed.launcher import COMMANDS, free_port, module_command
from pipeline.errors import RunFailed, UsageError
from pipeline.run.events import HANG_EVENTS, last_logged_step
from pipeline.run.jsonl import append_row, read_lines
from pipeline.run.small_files import NUMBER, write_atomically
from slurm import history, scheduler
from slurm.history import JobStart
from slurm.requeue import (
    FAILURES,
    Cause,
    Decision,
    Ending,
    classify_exit,
    classify_missing_exit,
    nodes_of_killed_tasks,
    nodes_reported_failed,
    requeue_decision,
    srun_error,
)
from slurm.sbatch import tasks_per_node

MAX_OUTPUT_LINES = 1000
LOG_BY_RANK = 'log="$0-$SLURM_PROCID.log"; true >> "$log" && exec >> "$log" 2>&1; exec "$@"'
"""Not srun's --output: what it makes of a % in a path depends on what follows."""
DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED", "POWERING", "UNKNOWN")
"""Prefixes of the states of nodes that jobs die on; a draining node finishes its jobs."""


class Request(BaseModel):
    """What is submitted: the ranks' command, the program, and how the job is started and requeued."""

    command: list[str]
    python: str
    code: str
    slurm: Slurm
    evaluate: str | None = None
    """Of a chain's last run: the set to evaluate on in the end."""


def read_request(path: Path) -> Request:
    try:
        return Request.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UsageError(f"{path} is damaged: submit the run again, which writes a new one") from None


@dataclass(frozen=True)
class Allocation:
    """Where a start of a job runs; without Slurm this machine, `nodes` empty."""

    job: str
    restart: int
    nodes: tuple[str, ...]
    first_element: int | None = None
    """Of the job array whose element `restart` this is; None where it is none."""

    @property
    def start(self) -> str:
        return f"{self.job}.{self.restart}"


def get_allocation(restart: int = 0) -> Allocation:
    """Of this process; `restart` counts where Slurm does not."""
    environment = os.environ
    if "SLURM_JOB_ID" not in environment:
        return Allocation(f"local-{os.getpid()}", restart, ())
    nodes = scheduler.run_slurm("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
    if "SLURM_ARRAY_JOB_ID" in environment:
        element, first = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN"))
        return Allocation(environment["SLURM_ARRAY_JOB_ID"], element, tuple(nodes), first)
    return Allocation(environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", 0)), tuple(nodes))


def main(run: Path, request: Request) -> int:
    """One start, or without Slurm as many as it takes; returns the exit status of the batch script."""
    restart = 0
    while True:
        allocation = get_allocation(restart)
        log(run, f"{history.START_MARKER} {allocation.start} on {', '.join(allocation.nodes) or 'this machine'}")
        close_stale_starts(run, allocation)
        if element_before_was_cancelled(run, allocation):
            history.cancel(run)
        if history.is_cancelled(run):
            cancel_next_elements(allocation)
            return 1
        history.record_start(run, allocation.start, allocation.nodes)
        status, output = run_ranks(run, request, allocation, request.command)
        ending = read_ending(run, request, allocation, status, output)
        cause = classify_exit(ending)
        failed = ending.lost or first_failed_node(run, allocation, output)
        decision = record_and_decide(run, request, allocation, cause, failed)
        log(run, f"end of {allocation.start}: {decision.why}")
        if not decision.again:
            result = 0 if cause is Cause.DONE else max(1, min(status, 125))
            if cause is Cause.DONE and request.evaluate is not None:
                result = evaluate(run, request, allocation)
            cancel_next_elements(allocation)
            return result
        if allocation.nodes:
            return requeue_job(run, request.slurm, allocation, decision)
        time.sleep(decision.after)
        restart += 1


# -------------------------------------------------------------------------------------------------------------- ranks


def run_ranks(
    run: Path, request: Request, allocation: Allocation, command: list[str], stdout: Path | None = None
) -> tuple[int, list[str]]:
    """Runs a command as the ranks of a start, to its end; returns srun's exit status and last lines.

    With `stdout` all that the ranks print on standard output goes there, else it is logged by rank.
    """
    slurm = request.slurm
    coatnet = module_command(COMMANDS, request.python, Path(request.code))
    program = [*shlex.split(slurm.command_prefix or ""), *coatnet, *command]
    environment = {name: value for name, value in os.environ.items() if name not in IDENTITY} | {
        START: allocation.start,
        FILE: str(history.folder(run).resolve() / "failures.jsonl"),
    }
    with suppress(FileExistsError):  # a stranger's file: the ranks' output is in the batch script's log, then
        (run / "logs").mkdir(parents=True, exist_ok=True)
    if allocation.nodes:
        nodes, per_node = len(allocation.nodes), tasks_per_node(slurm)
        options = [f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}"]
        options += [f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []
        options += ["--kill-on-bad-exit=1", "--wait=60", "--unbuffered"]
        logged = ["/bin/sh", "-c", LOG_BY_RANK, f"{run}/logs/{allocation.job}"] if stdout is None else []
        program = ["srun", *options, *slurm.srun_args, *logged, *program]
        # of the job as it was submitted, and whether sbatch handed an environment on: the ranks get all of this one
        for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_EXPORT_ENV"):
            environment.pop(name, None)
        environment |= {"MASTER_ADDR": allocation.nodes[0], "MASTER_PORT": str(free_port())}  # of this node, the first
    else:
        program += ["--procs", str(tasks_per_node(slurm))]
    output: deque[str] = deque(maxlen=MAX_OUTPUT_LINES)
    with stdout.open("wb") if stdout else nullcontext() as file:
        process = subprocess.Popen(
            program, env=environment, stdout=file, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            output.append(line)
    return process.wait(), list(output)


def evaluate(run: Path, request: Request, allocation: Allocation) -> int:
    """Writes RUN/evaluation.json; returns the exit status."""
    partial = run / ".evaluation.json"
    command = ["evaluate", str(run), "--data", str(request.evaluate), "--json"]
    status, _ = run_ranks(run, request, allocation, command, partial)
    if status == 0:
        write_atomically(run / "evaluation.json", partial.read_bytes())
        partial.unlink()
    log(run, f"evaluated: {run}/evaluation.json" if status == 0 else f"evaluation failed with status {status}")
    return status


# ------------------------------------------------------------------------------------------------------------- endings


def read_ending(run: Path, request: Request, allocation: Allocation, status: int, output: list[str]) -> Ending:
    """What the run's files, Slurm and srun's output know of a start that has just ended."""
    began = history.starts(run)[-1].began
    events = [row for row in read_lines(run / "events.jsonl", event=str, time=NUMBER) if row["time"] >= began]
    last = next((row for row in reversed(events) if row["event"] in ("finished", "interrupted", *HANG_EVENTS)), {})
    refused = srun_error(output)
    had_nothing_to_do = status == 0 and not last and refused is None
    return Ending(
        status,
        "finished" if had_nothing_to_do else last.get("event"),
        last.get("reason"),
        tuple(row["status"] for row in history.failures(run, allocation.start)),
        refused,
        bool(nodes_of_killed_tasks(output)),
        history.is_cancelled(run),
        tuple(sorted({*lost_nodes(allocation.nodes), *nodes_reported_failed(output)})),
        seconds_left() if allocation.nodes else None,
        request.slurm.signal_seconds,
    )


def record_and_decide(
    run: Path, request: Request, allocation: Allocation, cause: Cause, nodes: tuple[str, ...]
) -> Decision:
    """Records why a start ended, on which nodes if those are to blame, and what follows; returns that."""
    *before, start = [start for start in history.starts(run) if start.job == allocation.job]
    failed = nodes if cause in {Cause.NODE_LOST, *FAILURES} else ()
    ended = replace(start, ended=time.time(), cause=cause, last_step=last_logged_step(run), failed_nodes=failed)
    decision = requeue_decision(cause, [*before, ended], request.slurm.max_restarts, request.slurm.backoff)
    record_end(run, replace(ended, decision=decision.why, again=decision.again))
    return decision


def close_stale_starts(run: Path, allocation: Allocation) -> None:
    """Records the ends of starts whose batch script was killed before it could."""
    for start in history.starts(run):
        if start.ended is None and start.name != allocation.start:
            cause, nodes = classify_missing_exit(history.batch_log(run, start), start.nodes, lost_nodes(start.nodes))
            again = start.job == allocation.job and (cause is not Cause.CANCELLED or allocation.first_element is None)
            why = f"{cause}: Slurm started it again" if again else f"{cause}: its job ended"
            at = max(start.began, history.last_update(run))
            ended = replace(start, ended=at, cause=cause, last_step=last_logged_step(run), failed_nodes=nodes)
            record_end(run, replace(ended, decision=why, again=again))


def record_end(run: Path, ended: JobStart) -> None:
    """In starts.jsonl, and in events.jsonl where the job starts again, with the steps that have to be done again."""
    history.record_end(run, ended)
    if ended.again:
        lost = max(0, (ended.last_step or 0) - (latest_step(run) or 0))
        row = {"event": "requeued", "start": ended.name, "cause": ended.cause, "steps_lost": lost}
        append_row(run / "events.jsonl", row)


def first_failed_node(run: Path, allocation: Allocation, output: list[str]) -> tuple[str, ...]:
    """The node of the rank that failed first; others fail because of it."""
    failures = sorted(history.failures(run, allocation.start), key=lambda row: row["time"])
    return tuple([*nodes_of_killed_tasks(output), *(row["host"] for row in failures)][:1])


# --------------------------------------------------------------------------------------------------------------- Slurm


def requeue_job(run: Path, slurm: Slurm, allocation: Allocation, decision: Decision) -> int:
    """Requeues this job; with an array the next of its elements follows by itself."""
    if allocation.first_element is not None:
        time.sleep(decision.after)
        return 1
    facts = scheduler.parse_record(scheduler.ask_with_retries("scontrol", "-o", "show", "job", allocation.job))
    if facts["JobState"] not in scheduler.RUNNING or facts["Restarts"] != str(allocation.restart):
        log(run, f"the job is {facts['JobState']} with {facts['Restarts']} restarts by now; exiting")
        return 1
    min_nodes = slurm.min_nodes or slurm.nodes
    exclude = decision.exclude if len(usable_nodes() - set(decision.exclude)) >= min_nodes else ()
    if exclude != decision.exclude:
        log(run, f"{', '.join(decision.exclude)} failed repeatedly, but there are too few other nodes to exclude them")
    update = ("scontrol", "update", f"jobid={allocation.job}")  # works on a pending job, not on a running one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue ends this process too: survive until all is updated
    scheduler.ask_with_retries("scontrol", "requeue", allocation.job)
    if exclude:
        scheduler.ask_with_retries(*update, f"ExcNodeList={','.join([*filter(None, [slurm.exclude]), *exclude])}")
    if min_nodes < slurm.nodes:  # Slurm would wait for as many as this start had
        tasks = min_nodes * tasks_per_node(slurm)
        scheduler.ask_with_retries(*update, f"NumTasks={tasks}", f"NumNodes={min_nodes}-{slurm.nodes}")
    if decision.after > 0:
        scheduler.ask_with_retries(*update, f"StartTime=now+{round(decision.after)}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)  # not reached
    return 1


def cancel_next_elements(allocation: Allocation) -> None:
    """Those of an array that wait have nothing to do."""
    if allocation.first_element is not None:
        scheduler.ask_with_retries("scancel", "--state=PENDING", allocation.job)


def element_before_was_cancelled(run: Path, allocation: Allocation) -> bool:
    """Whether a person ended the element of an array before this one: that is meant to end the run."""
    if allocation.first_element is None or allocation.restart == allocation.first_element:
        return False
    before = replace(allocation, restart=allocation.restart - 1)
    for start in history.starts(run):
        if start.name == before.start:
            return classify_missing_exit(history.batch_log(run, start), start.nodes, ())[0] is Cause.CANCELLED
    return scheduler.show_job(f"{before.job}_{before.restart}") is None  # what is cancelled as it waits is forgotten


def lost_nodes(nodes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the nodes that are down."""
    if not nodes:
        return ()
    return tuple(sorted(name for name, state in node_states("-n", ",".join(nodes)) if is_down(state)))


def usable_nodes() -> set[str]:
    """The nodes of this job's partition that it may start on, now or later."""
    states = node_states("-p", os.environ["SLURM_JOB_PARTITION"])
    return {name for name, state in states if not is_down(state) and not state.startswith("drain")}


def node_states(*selection: str) -> set[tuple[str, str]]:
    """Name and state of each node; sinfo repeats a node for each of its partitions."""
    lines = scheduler.ask_with_retries("sinfo", "-h", "-N", *selection, "-o", "%N %T").splitlines()
    return {(name, state) for name, state in map(str.split, lines)}


def is_down(state: str) -> bool:
    return state.endswith("*") or state.upper().startswith(DOWN)


def seconds_left() -> float | None:
    """Of this job's time limit; None without one."""
    job = os.environ["SLURM_JOB_ID"]
    return parse_duration(scheduler.ask_with_retries("squeue", "-h", "-j", job, "-o", "%L"))


def log(run: Path, line: str) -> None:
    print(f"{time.strftime('%F %T')} {run.name}: {line}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), read_request(Path(sys.argv[2]))))
    except (UsageError, RunFailed, OSError) as error:
        sys.exit(f"coatnet: {error}")
