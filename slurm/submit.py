"""`coatnet submit`: checks, copies program and configuration into the run, and hands the job to Slurm."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.finetune import check_compatible_config, check_source, source_of
from pipeline.commands.pretrain import check_config
from pipeline.config.parsing import read_config, to_yaml
from pipeline.config.schema import Config, Slurm
from pipeline.errors import UsageError
from pipeline.plan import config_changes
from pipeline.run.jsonl import read_lines
from pipeline.run.lock import RunLocked, lock_holder
from slurm import history, scheduler
from slurm.job import Request
from slurm.sbatch import batch_command, parameters, script, snapshot, tasks_per_node


@dataclass(frozen=True)
class JobSpec:
    """One job of a chain."""

    command: str
    config: Config
    source: str | None
    """Of a fine-tuning."""
    weights: str | None = None
    """Of its source that it begins from: `ema` or `model`; None: the average where there is one."""
    evaluate: bool = False

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
) -> int:
    """Submits a run, and its fine-tuning after it; returns the exit status."""
    works = [JobSpec(command, read_config(preset, overrides), source, weights)]
    if then is not None:
        after, *changes = shlex.split(then)
        works.append(JobSpec("finetune", read_config(after, changes), str(works[0].run), evaluate=True))
    if cluster not in ("slurm", "local"):
        raise UsageError(f"--cluster is {cluster!r}; it is slurm or local")
    if cluster == "local" and then is not None:
        raise UsageError("--then needs Slurm's dependencies; with --cluster local submit the second run by itself")
    for work, before in zip(works, [None, *works], strict=False):
        check(work, before)
    if then is not None and works[0].config.slurm.requeue == "array":
        raise UsageError(
            "--then waits for one job, and slurm.requeue=array makes many: submit the fine-tuning afterwards"
        )
    dependency: str | None = None
    if not dry_run:
        ending, *_ = [jobs_that_end(work.run) for work in works]
        if cluster == "slurm":
            check_cluster(works[0].config)
            dependency = ":".join(["afterany", *ending]) if ending else None
    for work in works:
        job = submit_one(work, dependency, cluster, dry_run)
        dependency = f"afterok:{job}"
    return 0


def check(work: JobSpec, before: JobSpec | None) -> None:
    """UsageError where the run could not begin or resume with this request, after the one that is `before` it."""
    slurm = work.config.slurm
    if work.command == "finetune" and work.source is None:
        raise UsageError("submit finetune needs --from RUN")
    if work.evaluate and work.config.data.val is None:
        raise UsageError("--then evaluates in the end, so its data.val must be set")
    ranks = slurm.nodes * tasks_per_node(slurm)
    for nodes in range(slurm.min_nodes or slurm.nodes, slurm.nodes + 1):
        check_config(work.config, nodes * tasks_per_node(slurm), quiet=nodes * tasks_per_node(slurm) != ranks)
    config_changes(work.run, work.config, work.command)
    if before is not None:
        ancestors = source_of(before.run, Path(before.source), None).ancestry if before.source else []
        check_compatible_config(work.config, before.config, str(before.run), ancestors)
    elif work.source is not None:
        check_source(work.config, work.source, work.weights)


def jobs_that_end(run: Path) -> list[str]:
    """A run's jobs that were cancelled a moment ago; UsageError where it is alive: a job or a process is to resume."""
    living = scheduler.active_jobs(run)
    if living and history.is_cancelled(run):
        return list(living)
    for job, facts in living.items():
        raise UsageError(
            f"{run}: its job {job} is {facts['JobState'].lower()} and starts again by itself;"
            f" `coatnet cancel {run}` ends it, if another is to take its place"
        )
    if holder := lock_holder(run):
        raise RunLocked(run, holder)
    return []


def check_cluster(config: Config) -> None:
    """UsageError where the cluster could never give what is asked for; Unanswered where it does not answer."""
    if not scheduler.is_installed():
        raise UsageError("no Slurm on this machine's PATH: submit from a login node, or with --cluster local")
    reasons = [unsatisfiable_reason(config.slurm, facts) for facts in partitions(config.slurm.partition)]
    if all(reasons):
        raise UsageError("; ".join(filter(None, reasons)))


def unsatisfiable_reason(slurm: Slurm, partition: Mapping[str, str]) -> str | None:
    """Why a partition will never run the job, which it would let wait all the same. Pure."""
    name = partition["PartitionName"]
    most = min(int(partition[limit]) for limit in ("TotalNodes", "MaxNodes") if partition[limit].isdigit())
    longest, asked = scheduler.seconds_of(partition["MaxTime"]), scheduler.seconds_of(str(slurm.time))
    if partition["State"] != "UP":
        return f"partition {name} is {partition['State']}"
    if (slurm.min_nodes or slurm.nodes) > most:
        return f"slurm.nodes={slurm.nodes} is more than partition {name} gives: {most}"
    if longest is not None and (asked is None or asked > longest):
        return f"slurm.time={slurm.time} is longer than partition {name} allows: {partition['MaxTime']}"
    return None


def partitions(wanted: str | None) -> list[dict[str, str]]:
    """What Slurm knows (State, TotalNodes, MaxTime, GraceTime ...) of the partitions a job may go to.

    `wanted` are names with commas between them; None: the default, or all where there is none. UsageError where one
    does not exist.
    """
    found = [scheduler.parsed(line) for line in scheduler.run_slurm("scontrol", "-o", "show", "partition").splitlines()]
    there = {facts["PartitionName"]: facts for facts in found if facts}
    default = [name for name, facts in there.items() if facts["Default"] == "YES"]
    names = wanted.split(",") if wanted else default or list(there)
    if missing := [name for name in names if name not in there]:
        raise UsageError(f"slurm.partition={missing[0]} does not exist here; there are {', '.join(sorted(there))}")
    return [there[name] for name in names]


def submit_one(work: JobSpec, dependency: str | None, cluster: str, dry_run: bool) -> str:
    """Writes what the job needs into the run's folder and submits it; returns the job's id."""
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            print(prepare(work, Path(folder) / "slurm", dependency)[1])
        return "JOB-BEFORE"
    if cluster == "slurm":
        slurm = work.config.slurm
        for warning in warnings(stop_seconds(work.run), slurm.signal_seconds, grace_seconds(slurm.partition)):
            print(f"warning: {warning}", file=sys.stderr)
    folder = history.folder(work.run)
    wanted, text, command = prepare(work, folder, dependency)
    job = submit_locally(work.run, text) if cluster == "local" else submit_to_slurm(folder, wanted, text, command)
    facts = {"command": work.command, "nodes": work.config.slurm.nodes, "dependency": dependency}
    history.record_submission(work.run, job=job, **facts, host=os.uname().nodename)
    waits = f", {dependency}" if dependency else ""
    print(f"{work.run}: job {job}{waits}; coatnet status {work.run} says where it stands")
    return job


def prepare(work: JobSpec, folder: Path, dependency: str | None) -> tuple[dict[str, Any], str, str]:
    """Copies program and configuration; returns submitit's parameters, the script, and the script's last line."""
    slurm = work.config.slurm
    folder.mkdir(parents=True, exist_ok=True)
    code, number = snapshot(folder), len(list(folder.glob("request-*.json")))
    resolved = folder / f"config-{number}.yaml"
    resolved.write_text(to_yaml(work.config))
    request = folder / f"request-{number}.json"
    source = ["--from", work.source] if work.source else []
    source += ["--weights", work.weights] if work.weights else []
    Request(
        [work.command, str(resolved), *source],
        sys.executable,
        str(code),
        slurm.nodes,
        slurm.min_nodes or slurm.nodes,
        tasks_per_node(slurm),
        slurm.cpus_per_task,
        slurm.command_prefix,
        list(slurm.srun_args),
        slurm.signal_seconds,
        slurm.max_restarts,
        slurm.backoff,
        slurm.requeue,
        slurm.exclude,
        work.config.data.val if work.evaluate else None,
    ).write(request)
    module = "slurm.doctor" if work.command == "doctor" else "slurm.job"
    command = batch_command(sys.executable, code, module, work.run, request)
    wanted = parameters(slurm, f"coatnet-{work.run.name}", dependency)
    return wanted, script(folder, command, wanted), command


def submit_to_slurm(folder: Path, wanted: dict[str, Any], text: str, command: str) -> str:
    """The id that sbatch gives; Refused with its words where it refuses."""
    checked = folder / ".check.sh"
    checked.write_text(text)
    scheduler.run_slurm("sbatch", "--test-only", str(checked))
    checked.unlink()
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**wanted)
    try:
        return executor._submit_command(command).job_id
    except FailedJobError as error:
        raise UsageError(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from None


def submit_locally(run: Path, text: str) -> str:
    """Runs the script on this machine, in a session of its own, so that it outlives this terminal."""
    folder = history.folder(run)
    path = folder / "local.sh"
    path.write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    with (folder / "local.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return f"local-{process.pid}"


def stop_seconds(run: Path) -> float:
    """The longest of a run's last steps and saves together; 0 where it has never trained."""
    steps = [row["step_seconds"] for row in read_lines(run / "metrics.jsonl") if "step_seconds" in row]
    saves = [row["seconds"] for row in read_lines(run / "events.jsonl") if row["event"] == "checkpoint"]
    return max(steps[-20:], default=0.0) + max(saves[-20:], default=0.0)


def warnings(needed: float, lead: float, grace: float) -> list[str]:
    """What a stop that needs so many seconds loses, warned `lead` before a time limit, killed `grace` after SIGTERM."""
    found = []
    if needed > lead:
        found.append(f"a step and a save took up to {needed:.0f} s, and slurm.signal_seconds leaves {lead:.0f} s")
    if needed > grace:
        found.append(
            f"a step and a save took up to {needed:.0f} s, and this cluster kills {grace:.0f} s after a preemption's"
            " SIGTERM: steps since the last checkpoint would be lost; checkpoint more often"
        )
    return found


def grace_seconds(partition: str | None) -> float:
    """Seconds from a preemption's SIGTERM to SIGKILL: the partition's grace and the cluster's wait."""
    waits = re.findall(r"^KillWait\s*=\s*(\d+)", scheduler.run_slurm("scontrol", "show", "config"), re.MULTILINE)
    graces = [float(facts["GraceTime"]) for facts in partitions(partition) if facts["GraceTime"].isdigit()]
    return sum(map(float, waits)) + min(graces, default=0.0)
