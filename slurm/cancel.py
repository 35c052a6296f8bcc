"""`coatnet cancel`: ends jobs of a run, which do not requeue themselves until it is submitted again; or of parts."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RunFailed, UsageError
from pipeline.run.lock import lock_holder
from slurm import history, parts, scheduler
from slurm.parts_status import Place, find_place


def cancel(name: str | Path) -> int:
    """Cancels the jobs of a run, or of work in parts; returns the exit status. UsageError where there is none."""
    place = find_place(str(name))
    return cancel_run(Path(name)) if place is None else cancel_parts(place)


def cancel_parts(place: Place) -> int:
    """Cancels the jobs of work in parts, as their folder lists them."""
    shown, folder = place.shown, place.folder
    active = [each for each in (parts.submitted(folder, place.destination) if folder else []) if each.active]
    if not active:
        raise UsageError(f"{shown}: there is no job to cancel" + ("" if folder else "; pass the --logs folder"))
    for each in active:
        scheduler.cancel_job(each.number)
        print(f"{shown}: cancelled job {each.number}")
    print(f"{shown}: submit it again to do what is missing")
    return 0


def cancel_run(run: Path) -> int:
    """Cancels the run's jobs and prints them."""
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
        alive = f"; it runs without one ({holder}): SIGTERM makes it save and stop" if holder else ""
        raise UsageError(f"{run}: there is no job to cancel{alive}")
    history.cancel(run)  # first, so that no batch script requeues its job
    for job, facts in jobs.items():
        scheduler.cancel_job(job)
        print(f"{run}: cancelled job {job}, which was {facts['JobState'].lower()}")
    print(f"{run}: submit it again to resume from its newest checkpoint")
    return 0
