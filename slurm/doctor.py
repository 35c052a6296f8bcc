"""`coatnet submit doctor`: the doctor on every rank of the allocation that a run would get, and its report here.

As a module it is what that job's batch script runs: python -m slurm.doctor RUN REQUEST.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from pipeline.config.parsing import read_config
from pipeline.errors import RunFailed, UsageError
from slurm import history, job, scheduler
from slurm.submit import JobSpec, check_cluster, prepare, submission_lock, submit_to_slurm

MINUTES = "15"
POLL_SECONDS = 2.0


def submit_doctor(preset: str, overrides: list[str], dry_run: bool) -> int:
    """Submits, waits for the report and prints it; returns the exit status, 1 where something is missing or broken."""
    config = read_config(preset, overrides)
    config = config.model_copy(update={"slurm": config.slurm.model_copy(update={"time": MINUTES, "min_nodes": None})})
    spec = JobSpec("doctor", preset, config)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            print(prepare(spec, Path(folder), None)[1])
        return 0
    check_cluster(config.slurm)
    folder = history.folder(spec.run) / "doctor"
    with submission_lock(folder):
        number = submit_to_slurm(*prepare(spec, folder, None))
    log, report = folder / f"{number}_0_log.out", folder / f"{number}.txt"
    print(f"job {number} checks {config.slurm.nodes} nodes; the report comes here and into {report}", flush=True)
    try:
        facts = wait_for(number)
    except KeyboardInterrupt:
        raise RunFailed(f"job {number} keeps running and writes {report}; scancel {number} ends it") from None
    if not report.exists() or not report.read_text().strip():
        lines = log.read_text(errors="replace").strip().splitlines()[-5:] if log.exists() else []
        state = facts.get("JobState", "gone")
        raise RunFailed("\n".join([f"job {number} ended without a report ({state}); the end of {log}:", *lines]))
    print(report.read_text(), end="")
    return int(facts.get("ExitCode", "0:0").partition(":")[0])


def wait_for(number: str) -> dict[str, str]:
    """Slurm's record of a job that has ended; meanwhile prints what it waits for."""
    shown: str | None = None
    while (facts := scheduler.show_job(number)) and facts["JobState"] in scheduler.ACTIVE:
        why = "" if facts["Reason"] == "None" else f": {facts['Reason']}"
        state = f"is waiting{why}" if facts["JobState"] in scheduler.WAITING else "is running"
        if state != shown:
            print(f"job {number} {state}", file=sys.stderr, flush=True)
            shown = state
        time.sleep(POLL_SECONDS)
    return facts or {}


def main(run: Path, request: job.Request) -> int:
    """In the allocation: one report of all ranks."""
    allocation = job.get_allocation()
    report = history.folder(run) / "doctor" / f"{allocation.job}.txt"
    return job.run_ranks(run, request, allocation, request.command, report)[0]


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), job.read_request(Path(sys.argv[2]))))
    except (UsageError, RunFailed, OSError) as error:
        sys.exit(f"coatnet: {error}")
