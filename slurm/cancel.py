"""`coatnet cancel`: ends a run's jobs so that they stay ended, until the run is submitted again."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RunFailed, UsageError
from pipeline.run.lock import lock_holder
from slurm import history, scheduler


def cancel(run: Path) -> int:
    """Cancels what waits or runs, and says so; returns the exit status. UsageError where there is nothing."""
    scheduler.check_run(run)
    elsewhere = [row for row in history.submissions(run)[-1:] if not scheduler.can_ask(row["job"], row.get("host"))]
    if elsewhere:
        raise UsageError(
            f"{run}: job {elsewhere[0]['job']} was submitted on {elsewhere[0].get('host')}: cancel it there"
        )
    try:
        jobs = scheduler.active_jobs(run)
    except scheduler.ERRORS as error:
        history.cancel(run)
        raise RunFailed(f"{error}; noted that {run} is not to be started again: cancel again to end it now") from None
    if not jobs:
        holder = lock_holder(run)
        alive = f"; it is alive without one ({holder}): SIGTERM makes it save and stop" if holder else ""
        raise UsageError(f"{run}: there is no job to cancel{alive}")
    history.cancel(run)  # before anything ends, so that no batch script requeues its job
    for job, facts in jobs.items():
        scheduler.cancel_job(job)
        print(f"{run}: cancelled job {job}, which was {facts['JobState'].lower()}")
    print(f"{run}: resumes from its newest checkpoint when it is submitted again")
    return 0
