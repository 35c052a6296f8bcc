"""`coatnet submit`: checks, copies program and configuration into the run, and hands the job to Slurm.

Next: request.py.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.json_lines import read_lines
from pipeline.overrides import read_config, to_yaml
from pipeline.run_folder import compare
from pipeline.start import check_config
from slurm import client, queue, records
from slurm.job import Request
from slurm.request import batch_command, parameters, script, tasks_per_node
from slurm.snapshot import snapshot


@dataclass(frozen=True)
class Work:
    """One job of a chain."""

    command: str
    config: Config
    source: str | None
    """Of a fine-tuning."""
    evaluate: bool = False

    @property
    def run(self) -> Path:
        return Path(self.config.run.dir).resolve()


def submit(
    command: str, preset: str, overrides: list[str], source: str | None, then: str | None, cluster: str, dry_run: bool
) -> int:
    """Submits a run, and its fine-tuning after it; returns the exit status."""
    works = [Work(command, read_config(preset, overrides), source)]
    if then is not None:
        after, *changes = shlex.split(then)
        works.append(Work("finetune", read_config(after, changes), str(works[0].run), evaluate=True))
    if cluster not in ("slurm", "local"):
        raise BadRequest(f"--cluster is {cluster!r}; it is slurm or local")
    if cluster == "local" and then is not None:
        raise BadRequest("--then needs Slurm's dependencies; with --cluster local submit the second run by itself")
    for work in works:
        check(work)
    if then is not None and works[0].config.slurm.requeue == "array":
        raise BadRequest(
            "--then waits for one job, and slurm.requeue=array makes many: submit the fine-tuning afterwards"
        )
    if not dry_run:
        for work in works:
            check_idle(work.run)
        if cluster == "slurm":
            check_cluster(works[0].config)
    before: str | None = None
    for work in works:
        before = submit_one(work, before, cluster, dry_run)
    return 0


def check(work: Work) -> None:
    """BadRequest where the run could not begin, or not go on, with this request."""
    slurm = work.config.slurm
    if work.command == "finetune" and work.source is None:
        raise BadRequest("submit finetune needs --from RUN")
    if work.evaluate and work.config.data.val is None:
        raise BadRequest("--then evaluates in the end, so its data.val must be set")
    ranks = slurm.nodes * tasks_per_node(slurm)
    for nodes in range(slurm.min_nodes or slurm.nodes, slurm.nodes + 1):
        check_config(work.config, nodes * tasks_per_node(slurm), quiet=nodes * tasks_per_node(slurm) != ranks)
    compare(work.run, work.config, work.command)


def check_idle(run: Path) -> None:
    """BadRequest where the run is alive: it has a job that waits or runs, or a process trains it."""
    for job, facts in queue.living(run).items():
        raise BadRequest(
            f"{run}: its job {job} is {facts['JobState'].lower()} and starts again by itself;"
            f" `coatnet cancel {run}` ends it, if another is to take its place"
        )
    if queue.is_held(run):
        holder = (run / ".lock").read_text().strip()
        raise BadRequest(f"{run}: this run is alive ({holder}); end it first, or choose another run.dir")


def check_cluster(config: Config) -> None:
    """BadRequest where the cluster could never give what is asked for; Unanswered where it does not answer."""
    if not client.is_installed():
        raise BadRequest("no Slurm on this machine's PATH: submit from a login node, or with --cluster local")
    slurm = config.slurm
    where = ["-p", slurm.partition] if slurm.partition else []
    counts = client.ask("sinfo", "-h", "-o", "%P %D", *where).split("\n")
    nodes = {name.rstrip("*"): int(count) for name, count in map(str.split, filter(None, counts))}
    if not nodes:
        raise BadRequest(f"slurm.partition={slurm.partition} does not exist here; sinfo lists those that do")
    if max(nodes.values()) < (slurm.min_nodes or slurm.nodes):
        most = ", ".join(f"{name} has {count}" for name, count in sorted(nodes.items()))
        raise BadRequest(f"slurm.nodes={slurm.nodes} is more than any partition has: {most}")


def submit_one(work: Work, after: str | None, cluster: str, dry_run: bool) -> str:
    """Writes what the job needs into the run's folder and submits it; returns the job's id."""
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            text = prepare(work, Path(folder) / "slurm", after or "JOB-BEFORE" if work.evaluate else None)[1]
        print(text)
        return "JOB-BEFORE"
    if cluster == "slurm":
        for warning in warnings(work):
            print(f"warning: {warning}", file=sys.stderr)
    folder = records.folder(work.run)
    wanted, text, command = prepare(work, folder, after)
    job = submit_locally(work.run, text) if cluster == "local" else submit_to_slurm(folder, wanted, text, command)
    facts = {"command": work.command, "nodes": work.config.slurm.nodes, "after": after, "host": os.uname().nodename}
    records.note_submission(work.run, job=job, **facts)
    print(f"{work.run}: job {job}{f' after {after}' if after else ''}; coatnet status {work.run} says where it stands")
    return job


def prepare(work: Work, folder: Path, after: str | None) -> tuple[dict[str, Any], str, str]:
    """Copies program and configuration; returns submitit's parameters, the script, and the script's last line."""
    slurm = work.config.slurm
    folder.mkdir(parents=True, exist_ok=True)
    code, number = snapshot(folder), len(list(folder.glob("request-*.json")))
    resolved = folder / f"config-{number}.yaml"
    resolved.write_text(to_yaml(work.config))
    request = folder / f"request-{number}.json"
    source = ["--from", work.source] if work.source else []
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
        slurm.lead,
        slurm.max_restarts,
        slurm.backoff,
        slurm.requeue,
        slurm.exclude,
        work.config.data.val if work.evaluate else None,
    ).write(request)
    module = "slurm.doctor" if work.command == "doctor" else "slurm.job"
    command = batch_command(sys.executable, code, module, work.run, request)
    wanted = parameters(slurm, f"coatnet-{work.run.name}", after)
    return wanted, script(folder, command, wanted), command


def submit_to_slurm(folder: Path, wanted: dict[str, Any], text: str, command: str) -> str:
    """The id that sbatch gives; Refused with its words where it refuses."""
    checked = folder / ".check.sh"
    checked.write_text(text)
    client.ask("sbatch", "--test-only", str(checked))
    checked.unlink()
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**wanted)
    try:
        return executor._submit_command(command).job_id
    except FailedJobError as error:
        raise BadRequest(f"sbatch refused the job: {str(error).strip().splitlines()[-1]}") from None


def submit_locally(run: Path, text: str) -> str:
    """Runs the script on this machine, in a session of its own, so that it outlives this terminal."""
    folder = records.folder(run)
    path = folder / "local.sh"
    path.write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    with (folder / "local.log").open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip
    return f"local-{process.pid}"


def warnings(work: Work) -> list[str]:
    """Where a run has been before: whether a step and a save fit into the time that a stop leaves."""
    steps = [row["step_seconds"] for row in read_lines(work.run / "metrics.jsonl") if "step_seconds" in row]
    saves = [row["seconds"] for row in read_lines(work.run / "events.jsonl") if row["event"] == "checkpoint"]
    needed = max(steps[-20:], default=0.0) + max(saves[-20:], default=0.0)
    found = []
    if needed > work.config.slurm.lead:
        found.append(f"a step and a save took up to {needed:.0f} s, and slurm.lead leaves {work.config.slurm.lead} s")
    grace = kill_wait()
    if needed > grace:
        found.append(
            f"a step and a save took up to {needed:.0f} s, and this cluster kills {grace} s after a preemption's"
            " SIGTERM: steps since the last checkpoint would be lost; checkpoint more often"
        )
    return found


def kill_wait() -> float:
    """Seconds between the cluster's SIGTERM and SIGKILL."""
    found = re.search(r"^KillWait\s*=\s*(\d+)", client.ask("scontrol", "show", "config"), re.MULTILINE)
    return float(found[1]) if found else math.inf
