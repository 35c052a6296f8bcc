"""Attempts: each start of a run has the next number, and what an older one finishes after that is not used.

A process that seemed dead (its node unreachable, its memory frozen) can wake up and write, and nothing can prevent
that. So each attempt records in RUN/attempts/N.json which checkpoints it found. A checkpoint is trusted if the attempt
after its writer's found it, or if there is none. A rollback (rollback.py) is a new attempt too, whose record lacks the
checkpoints that it abandons.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reader import CheckpointReader, DamagedCheckpoint, checkpoints, step_of
from pipeline.errors import RunFailed
from pipeline.run.jsonl import read_lines

POLL_SECONDS = 3.0


def allocate(run: Path) -> int:
    """The next attempt's number; no two starts get the same, on any file system with hard links."""
    started = sum(row["event"] == "attempt_started" for row in read_lines(run / "events.jsonl"))
    number = max(latest_attempt(run) + 1, started)  # events count where records are missing
    while not _record(run, number, [folder.name for folder in trusted_checkpoints(run)], recorded_rollbacks(run)):
        number += 1
    return number


def allocate_next(run: Path, attempt: int, to: int, rollbacks: list[dict[str, int]]) -> int:
    """The number after this attempt's, for the same processes; its record has the checkpoints up to step `to`.

    RunFailed where another start has that number.
    """
    found = [folder.name for folder in trusted_checkpoints(run) if step_of(folder) <= to]
    if not _record(run, attempt + 1, found, rollbacks):
        raise_if_superseded(run, attempt)
    return attempt + 1


def recorded_rollbacks(run: Path) -> list[dict[str, int]]:
    """The rollbacks up to the newest attempt: `to`, `first` and `last` of each (loss_guard.RollbackRecord)."""
    newest = latest_attempt(run)
    return _read(run, newest).get("rollbacks", []) if newest >= 0 else []


def _record(run: Path, number: int, found: list[str], rollbacks: list[dict[str, int]]) -> bool:
    """Writes an attempt's record; False where the number is taken."""
    records = run / "attempts"
    records.mkdir(parents=True, exist_ok=True)
    facts = {"process": os.getpid(), "host": os.uname().nodename, "found": found, "rollbacks": rollbacks}
    hidden = records / f".{facts['host']}-{facts['process']}"
    hidden.write_text(json.dumps(facts) + "\n")
    try:
        os.link(hidden, records / f"{number}.json")  # atomic, and fails where the name exists
    except FileExistsError:
        return False
    finally:
        hidden.unlink()
    return True


def latest_attempt(run: Path) -> int:
    """The number of the newest attempt; -1 where there is none."""
    return max(_numbers(run), default=-1)


def latest_of_this_process(run: Path) -> int | None:
    """The newest attempt's number, if this process, as its rank 0, began it; else None."""
    newest = latest_attempt(run)
    facts = _read(run, newest) if newest >= 0 else {}
    return newest if (facts.get("process"), facts.get("host")) == (os.getpid(), os.uname().nodename) else None


def raise_if_superseded(run: Path, attempt: int) -> None:
    """RunFailed where a newer attempt than this one has begun."""
    if (newest := latest_attempt(run)) > attempt:
        raise RunFailed(
            f"{run}: attempt {newest} of this run has begun while this one, attempt {attempt}, was still running;"
            " this one ends, and nothing that it has written since then is used"
        )


class SupersededCheck:
    """Whether a newer attempt of the run has begun: asked at every step, looked up every few seconds."""

    def __init__(self, run: Path) -> None:
        self._run, self._next, self._latest = run, 0.0, -1

    def is_superseded(self, attempt: int) -> bool:
        if time.monotonic() >= self._next:
            self._latest = latest_attempt(self._run)
            self._next = time.monotonic() + POLL_SECONDS
        return self._latest > attempt


def trusted_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints, oldest first, without those that an attempt finished after the next had begun."""
    found = checkpoints(run / "checkpoints")
    if not (numbers := sorted(_numbers(run))):
        return found
    known = set(_read(run, numbers[-1])["found"])
    return [folder for folder in found if folder.name in known or not _is_stale(run, folder, numbers)]


def _is_stale(run: Path, folder: Path, numbers: list[int]) -> bool:
    """Whether an attempt finished this checkpoint after the next of `numbers` had begun."""
    try:
        attempt = CheckpointReader(folder).attempt
    except DamagedCheckpoint:
        return False  # its reader will report the damage
    later = [number for number in numbers if number > attempt]
    return bool(later) and folder.name not in _read(run, later[0])["found"]


def _numbers(run: Path) -> list[int]:
    return [int(file.stem) for file in (run / "attempts").glob("*.json") if file.stem.isdigit()]


def _read(run: Path, number: int) -> dict[str, Any]:
    return json.loads((run / "attempts" / f"{number}.json").read_text())


def latest_step(run: Path) -> int | None:
    """The step of a run's newest trusted checkpoint; None where there is none."""
    folders = trusted_checkpoints(run)
    return step_of(folders[-1]) if folders else None
