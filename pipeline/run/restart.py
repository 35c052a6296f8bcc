"""Beginning a run anew in its folder: what it has is set aside in RUN/restarted-N, and nothing is removed."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

from pipeline.errors import RunFailed
from pipeline.run.identity import NOTE
from pipeline.run.lock import acquire_lock

_STAYS = (".lock", ".submitting", "restarted-")
_OF_A_SUBMISSION = {"slurm", NOTE}


def next_place(run: Path) -> Path:
    """The folder for what is set aside next, which does not exist yet."""
    return next(place for number in count(1) if not (place := run / f"restarted-{number}").exists())


def set_aside(run: Path) -> Path | None:
    """Moves all that a run has to `next_place`, and returns that; None where it has nothing.

    RunLocked where the run is alive.
    """
    if not run.is_dir():
        return None
    with acquire_lock(run):
        there = _contents(run)
        if not there:
            return None
        place = next_place(run)
        try:
            place.mkdir()
            for path in there:
                path.rename(place / path.name)
        except OSError as error:
            raise RunFailed(f"run.dir={run}: {error.filename} cannot be moved to {place}: {error.strerror}") from None
    return place


def put_back(run: Path, place: Path) -> bool:
    """Undoes `set_aside` where a submission then failed, whose files are removed; False where the run has begun."""
    with acquire_lock(run):
        if {path.name for path in _contents(run)} - _OF_A_SUBMISSION:
            return False
        shutil.rmtree(run / "slurm", ignore_errors=True)
        for path in place.iterdir():
            path.replace(run / path.name)
        place.rmdir()
    return True


def _contents(run: Path) -> list[Path]:
    return sorted(path for path in run.iterdir() if not path.name.startswith(_STAYS))
