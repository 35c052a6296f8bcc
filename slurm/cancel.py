"""`coatnet cancel`: ends a run's jobs, which do not requeue themselves until the run is submitted again."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RunFailed, UsageError
from pipeline.run.lock import lock_holder
from slurm import history, scheduler


def cancel(run: Path) -> int:
    """Cancels the run's jobs and prints them; returns the exit status. UsageError where there is none."""
    history.check_run(run)
    for row in history.submissions(run)[-1:]:
        if not scheduler.can_ask(row["job"], row.get("host")):
            raise UsageError(f"{run}: job {row['job']} was submitted on {row.get('host')}: cancel it there")
    try:
        jobs = scheduler.active_jobs(run)
    except scheduler.ERRORS as error:
        history.cancel(run)
        raise RunFailed(f"{error}; {run} will not be requeued, but may still run: cancel again to end it now") from None
    if not jobs:
        holder = lock_holder(run)
        alive = f"; it is alive without one ({holder}): SIGTERM makes it save and stop" if holder else ""
        raise UsageError(f"{run}: there is no job to cancel{alive}")
    history.cancel(run)  # first, so that no batch script requeues its job
    for job, facts in jobs.items():
        scheduler.cancel_job(job)
        print(f"{run}: cancelled job {job}, which was {facts['JobState'].lower()}")
    print(f"{run}: submit it again to resume from its newest checkpoint")
    return 0
