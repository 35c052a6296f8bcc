"""`coatnet submit`: checks, copies program and configuration into the run, and submits the job to Slurm."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint.mirror import find_copies
from pipeline.commands.finetune import check_compatible_config, check_source, source_of
from pipeline.commands.pretrain import check_config, set_aside_config, set_files_aside
from pipeline.config.parsing import read_config, to_yaml
from pipeline.config.schema import Config, Slurm, parse_duration
from pipeline.errors import DataError, UsageError
from pipeline.plan import config_changes
from pipeline.run.identity import settle
from pipeline.run.jsonl import read_lines, read_metrics
from pipeline.run.lock import RunLocked, lock_holder, try_lock
from pipeline.run.restart import put_back
from pipeline.run.small_files import NUMBER, write_atomically
from slurm import history, scheduler
from slurm.environment import for_sbatch, outside_jobs, replaced_environment
from slurm.job import Request
from slurm.sbatch import batch_command, parameters, script, snapshot, tasks_per_node


@dataclass(frozen=True)
class JobSpec:
    """One job of a chain."""

    command: str
    preset: str
    config: Config
    source: str | None = None
    """What a fine-tuning begins from."""
    weights: str | None = None
    """Of its source: `ema` or `model`; None: the average where there is one."""
    evaluate: bool = False
    array: bool = False
    """Whether its job is an array, whose next element resumes, or one that requeues itself."""

    @property
    def run(self) -> Path:
        return Path(self.config.run.dir).resolve()


def submit(
    command: str,
    preset: str,
    overrides: list[str],
    source: str | None,
    weights: str | None,
    then: str | None,
    cluster: str,
    dry_run: bool,
    restart: bool = False,
) -> int:
    """Submits a run, anew with `restart`, and its fine-tuning after it; returns the exit status."""
    if cluster not in ("slurm", "local"):
        raise UsageError(f"--cluster is {cluster!r}; it must be slurm or local")
    chain = [JobSpec(command, preset, read_config(preset, overrides), source, weights)]
    if then is not None:
        if cluster == "local":
            raise UsageError("--then needs Slurm; with --cluster local, submit the second run separately")
        if chain[0].config.slurm.requeue == "array":
            raise UsageError(
                "--then waits for one job, but slurm.requeue=array makes many: submit the fine-tuning afterwards"
            )
        preset, *changes = shlex.split(then)
        chain.append(JobSpec("finetune", preset, read_config(preset, changes), str(chain[0].run), evaluate=True))
    chain = [replace(job, array=job.config.slurm.requeue == "array") for job in chain]
    anew = set_aside_config(chain[0].config) if restart else chain[0].config
    for job, before in zip([replace(chain[0], config=anew), *chain[1:]], [None, *chain], strict=False):
        check(job, before)
    for job in chain:
        refuse_anothers_mirror(job.config)
    if dry_run:
        for job, dependency in zip(chain, [None, "afterok:JOB-BEFORE"], strict=False):
            with tempfile.TemporaryDirectory() as temporary:
                print(prepare(job, Path(temporary), dependency)[1])
        return 0
    if cluster == "slurm":
        check_cluster(chain[0].config.slurm)
        chain = [with_restarts(job, is_followed=job is not chain[-1]) for job in chain]
    with ExitStack() as locks:
        for job in chain:
            locks.enter_context(submission_lock(job.run))
        ending, *_ = [jobs_being_cancelled(job.run) for job in chain]
        if restart and ending:
            raise UsageError(f"{chain[0].run}: job {ending[0]} is still being cancelled; --restart must wait for it")
        place = set_files_aside(chain[0].config) if restart else None
        dependency = ":".join(["afterany", *ending]) if ending and cluster == "slurm" else None
        for job in chain:
            try:
                dependency = f"afterok:{submit_one(job, dependency, cluster)}"
            except (UsageError, *scheduler.ERRORS):
                if place is not None and job is chain[0] and put_back(job.run, place):
                    print(f"{job.run} is as it was, since nothing was submitted")
                raise
    return 0


@contextmanager
def submission_lock(folder: Path) -> Iterator[None]:
    """One submission at a time into a folder: UsageError while another is at work, whose job the next one finds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".submitting").open("w")
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; choose a folder that can be written") from None
    with file:
        if not try_lock(file):
            raise UsageError(f"{folder}: another `coatnet submit` is running there; coatnet status shows its job")
        yield


def check(job: JobSpec, before: JobSpec | None) -> None:
    """UsageError where the run could not begin or resume with this request, after the job that is `before` it."""
    slurm = job.config.slurm
    if job.command == "finetune" and job.source is None:
        source_of(job.run, None, job.weights)
    if job.evaluate and job.config.data.val is None:
        raise UsageError("--then evaluates at the end, so its data.val must be set")
    for nodes in range(slurm.min_nodes or slurm.nodes, slurm.nodes + 1):
        check_config(job.config, nodes * tasks_per_node(slurm), quiet=nodes != slurm.nodes)
    config_changes(job.run, job.config, job.command)
    if before is not None:
        ancestors = source_of(before.run, Path(before.source), None).ancestry if before.source else []
        check_compatible_config(job.config, before.config, str(before.run), ancestors)
    elif job.source is not None:
        check_source(job.config, job.source, job.weights)


def refuse_anothers_mirror(config: Config) -> None:
    """As the start would; a warning where the mirror cannot be read from here."""
    try:
        find_copies(config)
    except DataError as error:
        print(f"warning: {error}", file=sys.stderr)


def jobs_being_cancelled(run: Path) -> list[str]:
    """A run's active jobs where it is cancelled; UsageError where it is not, or a process trains it."""
    active = scheduler.active_jobs(run)
    if active and history.is_cancelled(run):
        return list(active)
    for job, facts in active.items():
        raise UsageError(
            f"{run}: its job {job} is {facts['JobState'].lower()} and requeues itself;"
            f" to submit another, end it first with `coatnet cancel {run}`"
        )
    if holder := lock_holder(run):
        raise RunLocked(run, holder)
    return []


# ------------------------------------------------------------------------------------------------------------- cluster


def check_cluster(slurm: Slurm) -> None:
    """UsageError where the cluster can never provide what is requested; SlurmUnavailable where it does not answer."""
    if not scheduler.is_installed():
        raise UsageError("no Slurm on this machine's PATH: submit from a login node, or with --cluster local")
    reasons = [unsatisfiable_reason(slurm, partition) for partition in partitions(slurm.partition)]
    if all(reasons):
        raise UsageError("; ".join(filter(None, reasons)))


def unsatisfiable_reason(slurm: Slurm, partition: Mapping[str, str]) -> str | None:
    """Why a job would stay pending in a partition forever. Pure."""
    name = partition["PartitionName"]
    max_nodes = min(int(partition[limit]) for limit in ("TotalNodes", "MaxNodes") if partition[limit].isdigit())
    max_time, time = parse_duration(partition["MaxTime"]), parse_duration(slurm.time)
    if partition["State"] != "UP":
        return f"partition {name} is {partition['State']}"
    if (slurm.min_nodes or slurm.nodes) > max_nodes:
        asked = f"slurm.min_nodes={slurm.min_nodes}" if slurm.min_nodes else f"slurm.nodes={slurm.nodes}"
        return f"{asked} is more than partition {name} allows: {max_nodes}"
    if max_time is not None and (time is None or time > max_time):
        return f"slurm.time={slurm.time} is longer than partition {name} allows: {partition['MaxTime']}"
    return None


def partitions(names: str | None) -> list[dict[str, str]]:
    """Slurm's records (State, TotalNodes, MaxTime, GraceTime ...) of partitions, comma-separated.

    None: a person's or Slurm's default partition, or all where there is none. UsageError where one does not exist.
    """
    lines = scheduler.run_slurm("scontrol", "-o", "show", "partition").splitlines()
    records = {record["PartitionName"]: record for record in map(scheduler.parse_record, lines) if record}
    default = [name for name, record in records.items() if record["Default"] == "YES"]
    names = names or os.environ.get("SBATCH_PARTITION")
    selected = names.split(",") if names else default or list(records)
    if missing := [name for name in selected if name not in records]:
        raise UsageError(f"slurm.partition={missing[0]} does not exist here; choose from {', '.join(sorted(records))}")
    return [records[name] for name in selected]


def with_restarts(job: JobSpec, is_followed: bool) -> JobSpec:
    """With the way to restart that the partition leaves it, and says what it chose."""
    requeue = job.config.slurm.requeue
    cancelling = [record for record in partitions(job.config.slurm.partition) if "CANCEL" in record["PreemptMode"]]
    if not cancelling or requeue == "array":
        return job
    why = f"partition {cancelling[0]['PartitionName']} cancels the jobs it preempts (PreemptMode=CANCEL)"
    if requeue is None and not is_followed:
        print(f"{why}: {job.run} is submitted as a job array, whose next element resumes (slurm.requeue=array)")
        return replace(job, array=True)
    grace = cancelling[0]["GraceTime"]
    print(
        f"warning: {why}: {job.run} requeues itself only if it has saved within GraceTime, {grace} s;"
        " slurm.requeue=array always resumes" + (", but --then cannot follow it" if is_followed else ""),
        file=sys.stderr,
    )
    return job


def stop_seconds(run: Path) -> float:
    """What a stop takes at most, by a run's last steps and saves; 0 where it has never trained.

    A signal that comes just after a step's all-reduce is known to all ranks in the next step's.
    """
    steps = [row["step_seconds"] for row in read_metrics(run, step_seconds=NUMBER)]
    rows = read_lines(run / "events.jsonl", event=str, seconds=NUMBER)
    saves = [row["seconds"] for row in rows if row["event"] == "checkpoint"]
    return 2 * max(steps[-20:], default=0.0) + max(saves[-20:], default=0.0)


def grace_seconds(partition: str | None) -> float:
    """Seconds from a preemption's SIGTERM to SIGKILL: the partition's GraceTime and the cluster's KillWait."""
    waits = re.findall(r"^KillWait\s*=\s*(\d+)", scheduler.run_slurm("scontrol", "show", "config"), re.MULTILINE)
    graces = [float(record["GraceTime"]) for record in partitions(partition) if record["GraceTime"].isdigit()]
    return sum(map(float, waits)) + min(graces, default=0.0)


def warnings(needed: float, signal: float, grace: float) -> list[str]:
    """What a stop that needs so many seconds loses `signal` seconds before a time limit, or killed after `grace`."""
    takes = f"two steps and a save take up to {needed:.0f} s"
    lines = [f"{takes}, but slurm.signal_seconds leaves only {signal:.0f} s"] if needed > signal else []
    if needed > grace:
        lines.append(
            f"{takes}, but this cluster kills {grace:.0f} s after a preemption's SIGTERM: steps since the last"
            " checkpoint would be lost; checkpoint more often"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------- submission


def submit_one(job: JobSpec, dependency: str | None, cluster: str) -> str:
    """Writes what the job needs into the run's folder and submits it; returns the job's id."""
    slurm, folder = job.config.slurm, history.folder(job.run)
    if cluster == "slurm":
        for warning in warnings(stop_seconds(job.run), slurm.signal_seconds, grace_seconds(slurm.partition)):
            print(f"warning: {warning}", file=sys.stderr)
    settle(job.run)  # before the job can start, which does the same
    options, text, command = prepare(job, folder, dependency)
    number = submit_locally(folder, text) if cluster == "local" else submit_to_slurm(options, text, command)
    facts = {"command": job.command, "preset": os.path.abspath(job.preset), "nodes": slurm.nodes}
    history.record_submission(job.run, job=number, **facts, dependency=dependency, host=os.uname().nodename)
    waits = f", {dependency}" if dependency else ""
    print(f"{job.run}: job {number}{waits}; coatnet status {job.run} shows its progress")
    return number


def prepare(job: JobSpec, folder: Path, dependency: str | None) -> tuple[dict[str, Any], str, str]:
    """Copies program and configuration; returns submitit's parameters, the script, and the script's last line."""
    folder.mkdir(parents=True, exist_ok=True)
    code, number = snapshot(folder), _next_number(folder)
    resolved, request = folder / f"config-{number}.yaml", folder / f"request-{number}.json"
    write_atomically(resolved, to_yaml(job.config))
    command = [job.command, str(resolved)]
    command += ["--from", job.source] if job.source else []
    command += ["--weights", job.weights] if job.weights else []
    evaluate = job.config.data.val if job.evaluate else None
    written = Request(command=command, python=sys.executable, code=str(code), slurm=job.config.slurm, evaluate=evaluate)
    write_atomically(request, written.model_dump_json(indent=1) + "\n")
    module = "slurm.doctor" if job.command == "doctor" else "slurm.job"
    last_line = batch_command(sys.executable, code, module, job.run, request)
    options = parameters(job.config.slurm, f"coatnet-{job.run.name}", folder, dependency, job.array)
    return options, script(folder, last_line, options), last_line


def _next_number(folder: Path) -> int:
    """A number that no request has: jobs that wait read theirs when they start."""
    numbers = (re.fullmatch(r"(?:request|config)-(\d+)\.(?:json|yaml)", file.name) for file in folder.iterdir())
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def submit_to_slurm(options: dict[str, Any], text: str, command: str) -> str:
    """The job's id; UsageError with sbatch's words where it refuses."""
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    environment = for_sbatch(os.environ, {*options, *options["additional_parameters"]})
    try:
        with tempfile.TemporaryDirectory() as folder, replaced_environment(environment):
            trial = Path(folder) / "check.sh"
            trial.write_text(text)
            scheduler.run_slurm("sbatch", "--test-only", str(trial), environment=environment)
            executor = SlurmExecutor(folder=folder)  # it takes %j in a folder's name for a pattern: not the run's
            executor.update_parameters(**options)
            return executor._submit_command(command).job_id
    except FailedJobError as error:
        raise UsageError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from None


def submit_locally(folder: Path, text: str) -> str:
    """Runs the script on this machine, in a session of its own, so that it outlives this terminal."""
    path = folder / "local.sh"
    write_atomically(path, text)
    with (folder / "local.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=outside_jobs(os.environ),
            start_new_session=True,
        )  # fmt: skip
    return f"local-{process.pid}"
