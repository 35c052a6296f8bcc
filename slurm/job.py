"""What a batch script runs: starts the ranks, sees how they ended, and starts its own job again where that helps.

    python -m slurm.job RUN REQUEST.json

There is no daemon: the job requeues itself. It does not catch SIGTERM, so that a job that is cancelled ends here.
Where the batch script is killed (Slurm requeues the job itself, or its node is gone), the next start finds a start
without an end, and says what it was.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.checkpoint.attempts import latest_step
from pipeline.distributed.environment import FILE, START, slurm_port
from pipeline.run.jsonl import JsonLines, read_lines
from slurm import history, scheduler
from slurm.requeue import (
    FAILURES,
    STANDSTILLS,
    Cause,
    Decision,
    Ending,
    classify_exit,
    classify_missing_exit,
    killed_on,
    named_as_failed,
    requeue_decision,
)

MOST_WORDS = 1000
DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED", "POWERING", "UNKNOWN")
"""How states begin of nodes that jobs die on; one that drains ends what it has begun."""


@dataclass(frozen=True)
class Request:
    """What a submission wants: the ranks' command and how they are started and started again."""

    command: list[str]
    python: str
    code: str
    nodes: int
    min_nodes: int
    tasks_per_node: int
    cpus_per_task: int | None
    command_prefix: str | None
    srun_args: list[str]
    lead: int
    max_restarts: int
    backoff: float
    requeue: str
    exclude: str | None
    evaluate: str | None
    """Of a chain's last run: the set that it is evaluated on in the end."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_request(path: Path) -> Request:
    return Request(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Allocation:
    """Where a start of a job runs; without Slurm this machine, `nodes` empty."""

    job: str
    restart: int
    nodes: tuple[str, ...]

    @property
    def start(self) -> str:
        return f"{self.job}.{self.restart}"


def allocation(restart: int = 0) -> Allocation:
    """This process's own."""
    environment = os.environ
    if "SLURM_JOB_ID" not in environment:
        return Allocation(f"local-{os.getpid()}", restart, ())
    nodes = scheduler.run_slurm("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
    if "SLURM_ARRAY_JOB_ID" in environment:
        return Allocation(environment["SLURM_ARRAY_JOB_ID"], int(environment["SLURM_ARRAY_TASK_ID"]), tuple(nodes))
    return Allocation(environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", 0)), tuple(nodes))


def main(run: Path, request: Request) -> int:
    """One start, or without Slurm as many as it takes; returns the exit status of the batch script."""
    restart = 0
    while True:
        where = allocation(restart)
        say(run, f"{history.BEGINS} {where.start} on {', '.join(where.nodes) or 'this machine'}")
        close_stale_starts(run, where)
        if history.is_cancelled(run):
            return 1
        history.record_start(run, where.start, where.nodes, latest_step(run) or 0)
        status, said = run_ranks(run, request, where, request.command)
        ending = ending_of(run, request, where, status, said)
        cause = classify_exit(ending)
        decision = record_and_decide(run, request, where, cause, ending.lost or first_failed(run, where, said))
        say(run, f"end of {where.start}: {decision.why}")
        if not decision.again:
            if request.requeue == "array":
                scheduler.ask_with_retries(
                    "scancel", "--state=PENDING", where.job
                )  # the elements that nobody needs any more
            if cause is Cause.DONE and request.evaluate is not None:
                return evaluate(run, request, where)
            return 0 if cause is Cause.DONE else max(1, min(status, 125))
        if where.nodes:
            return requeue_job(run, request, where, decision)
        time.sleep(decision.after)
        restart += 1


# -------------------------------------------------------------------------------------------------------------- ranks


def run_ranks(
    run: Path, request: Request, where: Allocation, command: list[str], output: Path | None = None
) -> tuple[int, list[str]]:
    """Runs a command as the ranks of a start, to its end; returns the exit status, and srun's own last words.

    With `output` all that the ranks print on standard output goes there, else it is logged by rank.
    """
    program = [*shlex.split(request.command_prefix or ""), request.python, "-P", "-m", "pipeline.cli", *command]
    environment = dict(os.environ) | {
        "PYTHONPATH": request.code,
        START: where.start,
        FILE: str(history.folder(run).resolve() / "failures.jsonl"),
    }
    (run / "logs").mkdir(parents=True, exist_ok=True)
    if where.nodes:
        tasks = len(where.nodes) * request.tasks_per_node
        sizes = [f"--nodes={len(where.nodes)}", f"--ntasks={tasks}", f"--ntasks-per-node={request.tasks_per_node}"]
        sizes += [f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task else []
        ends = ["--kill-on-bad-exit=1", "--wait=60", "--unbuffered", "--open-mode=append"]
        ends += [f"--output={run}/logs/{where.job}-%t.log"] if output is None else []
        program = ["srun", *sizes, *ends, *request.srun_args, *program]
        for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"):  # of the job as it was submitted
            environment.pop(name, None)
        environment |= {"MASTER_ADDR": where.nodes[0], "MASTER_PORT": str(slurm_port(os.environ))}
    else:
        program += ["--procs", str(request.tasks_per_node)]
    said: deque[str] = deque(maxlen=MOST_WORDS)
    with output.open("wb") if output else nullcontext() as file:
        process = subprocess.Popen(
            program, env=environment, stdout=file, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            said.append(line)
    return process.wait(), list(said)


def evaluate(run: Path, request: Request, where: Allocation) -> int:
    """Writes RUN/evaluation.json; returns the exit status."""
    hidden = run / ".evaluation.json"
    wanted = ["evaluate", str(run), "--data", str(request.evaluate), "--json"]
    status, _ = run_ranks(run, request, where, wanted, hidden)
    if status == 0:
        hidden.rename(run / "evaluation.json")
    say(run, f"evaluated: {run}/evaluation.json" if status == 0 else f"evaluation failed with status {status}")
    return status


# ---------------------------------------------------------------------------------------------------------- conclusions


def ending_of(run: Path, request: Request, where: Allocation, status: int, said: list[str]) -> Ending:
    """What can be known of a start that just ended, from its records, Slurm and srun's last words."""
    began = history.starts(run)[-1].began
    rows = [row for row in read_lines(run / "events.jsonl") if row["time"] >= began]
    ends = [row for row in rows if row["event"] in ("finished", "interrupted", *STANDSTILLS)]
    last = ends[-1] if ends else {}
    noted = tuple(row["status"] for row in history.failures(run, where.start))
    finished = status == 0 and not ends  # there was nothing left to do
    return Ending(
        status,
        "finished" if finished else last.get("event"),
        last.get("reason"),
        noted,
        history.is_cancelled(run),
        tuple(sorted({*lost_nodes(where.nodes), *named_as_failed(said)})),
        seconds_left(where),
        request.lead,
    )


def record_and_decide(run: Path, request: Request, where: Allocation, cause: Cause, nodes: tuple[str, ...]) -> Decision:
    """Writes down why a start ended, on which nodes if that was their fault, and what follows; returns that."""
    own = [start for start in history.starts(run) if start.job == where.job]
    last_step = last_step_done(run)
    failed = nodes if cause in {Cause.NODE_LOST, *FAILURES} else ()
    ended = [*own[:-1], replace(own[-1], cause=cause, last_step=last_step, failed_nodes=failed)]
    decision = requeue_decision(cause, ended, request.max_restarts, request.backoff)
    history.record_end(run, where.start, cause, last_step, failed, decision.why, decision.again)
    if decision.again:
        record_requeue(run, where.start, cause, last_step)
    return decision


def close_stale_starts(run: Path, where: Allocation) -> None:
    """Says how starts ended whose batch script was killed before it could."""
    for start in history.starts(run):
        if start.ended is None and start.name != where.start:
            cause, nodes = classify_missing_exit(history.batch_log(run, start), start.nodes, lost_nodes(start.nodes))
            again, last_step = start.job == where.job, last_step_done(run)
            why = f"{cause}: Slurm started it again" if again else f"{cause}: its job ended"
            at = max(start.began, history.last_update(run))
            history.record_end(run, start.name, cause, last_step, nodes, why, again, at)
            if again:
                record_requeue(run, start.name, cause, last_step)


def first_failed(run: Path, where: Allocation, said: list[str]) -> tuple[str, ...]:
    """The node of the rank that failed first; others fail because of it."""
    noted = sorted(history.failures(run, where.start), key=lambda row: row["time"])
    return tuple([*killed_on(said), *(row["host"] for row in noted)][:1])


def record_requeue(run: Path, start: str, cause: Cause, last_step: int) -> None:
    """In events.jsonl, with the steps that have to be done again."""
    lost = max(0, last_step - (latest_step(run) or 0))
    lines = JsonLines(run / "events.jsonl")
    lines.write(
        {"time": round(time.time(), 3), "event": "requeued", "start": start, "cause": cause, "steps_lost": lost}
    )
    lines.close()


def last_step_done(run: Path) -> int:
    return max((row["step"] for row in read_lines(run / "metrics.jsonl")), default=0)


# --------------------------------------------------------------------------------------------------------------- Slurm


def requeue_job(run: Path, request: Request, where: Allocation, decision: Decision) -> int:
    """Requeues this job; with an array the next of its elements follows by itself."""
    if request.requeue == "array":
        time.sleep(decision.after)
        return 1
    facts = scheduler.parsed(scheduler.ask_with_retries("scontrol", "-o", "show", "job", where.job))
    if (facts["JobState"], facts["Restarts"]) != ("RUNNING", str(where.restart)):
        say(run, "cancelled, or started again, meanwhile: this start does nothing more")
        return 1
    exclude = decision.exclude if len(usable_nodes() - set(decision.exclude)) >= request.min_nodes else ()
    if exclude != decision.exclude:
        say(run, f"{', '.join(decision.exclude)} failed repeatedly, but there are too few other nodes")
    change = ("scontrol", "update", f"jobid={where.job}")  # of a job that is to start, not of one that runs
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue ends this process too; live until all is changed
    scheduler.ask_with_retries("scontrol", "requeue", where.job)
    if exclude:
        scheduler.ask_with_retries(
            *change, f"ExcNodeList={','.join([*([request.exclude] if request.exclude else []), *exclude])}"
        )
    if request.min_nodes < request.nodes:  # Slurm would wait for as many as this start had
        fewest = request.min_nodes * request.tasks_per_node
        scheduler.ask_with_retries(*change, f"NumTasks={fewest}", f"NumNodes={request.min_nodes}-{request.nodes}")
    if decision.after > 0:
        scheduler.ask_with_retries(*change, f"StartTime=now+{round(decision.after)}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)  # not reached
    return 1


def lost_nodes(nodes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the nodes that Slurm does not count on any more."""
    if not nodes:
        return ()
    states = scheduler.ask_with_retries("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%N %T")
    return tuple(sorted(name for name, state in node_states(states) if is_down(state)))


def usable_nodes() -> set[str]:
    """Of this job's partition those that it may start on, now or later."""
    states = scheduler.ask_with_retries("sinfo", "-h", "-N", "-p", os.environ["SLURM_JOB_PARTITION"], "-o", "%N %T")
    return {name for name, state in node_states(states) if not is_down(state) and not state.startswith("drain")}


def node_states(text: str) -> set[tuple[str, str]]:
    """Name and state of each node, from sinfo's lines, which repeat a node for each partition."""
    return {(name, state) for name, state in (line.split() for line in text.splitlines())}


def is_down(state: str) -> bool:
    return state.endswith("*") or state.upper().startswith(DOWN)


def seconds_left(where: Allocation) -> float | None:
    """Of the job's time limit; None without one."""
    if not where.nodes:
        return None
    return scheduler.seconds_of(
        scheduler.ask_with_retries("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%L")
    )


def say(run: Path, line: str) -> None:
    print(f"{time.strftime('%F %T')} {run.name}: {line}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), read_request(Path(sys.argv[2]))))
    except scheduler.ERRORS as error:
        sys.exit(f"coatnet: {error}")
