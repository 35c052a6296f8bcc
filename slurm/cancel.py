"""`coatnet cancel`: ends a run's jobs so that they stay ended, until the run is submitted again.

Next: logs.py.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import BadRequest, RunFailed
from slurm import client, queue, records


def cancel(run: Path) -> int:
    """Cancels what waits or runs, and says so; returns the exit status. BadRequest where there is nothing."""
    queue.check_run(run)
    elsewhere = [row for row in records.submissions(run)[-1:] if not queue.can_ask(row["job"], row.get("host"))]
    if elsewhere:
        raise BadRequest(
            f"{run}: job {elsewhere[0]['job']} was submitted on {elsewhere[0].get('host')}: cancel it there"
        )
    try:
        jobs = queue.living(run)
    except client.ERRORS as error:
        records.cancel(run)
        raise RunFailed(f"{error}; noted that {run} is not to be started again: cancel again to end it now") from None
    if not jobs:
        raise BadRequest(f"{run}: there is no job to cancel{_holder(run)}")
    records.cancel(run)  # before anything ends, so that no batch script requeues its job
    for job, facts in jobs.items():
        queue.cancel_job(job)
        print(f"{run}: cancelled job {job}, which was {facts['JobState'].lower()}")
    print(f"{run}: goes on from its newest checkpoint when it is submitted again")
    return 0


def _holder(run: Path) -> str:
    if not queue.is_held(run):
        return ""
    return f"; it is alive without one ({(run / '.lock').read_text().strip()}): SIGTERM makes it save and stop"
