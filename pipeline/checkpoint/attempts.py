"""Attempts: each start of a run has the next number, and what an older one finishes after that is not used.

A process that seemed dead (its node unreachable, its memory frozen) can wake up and write, and nothing can prevent
that. So each attempt records in RUN/attempts/N.json which checkpoints it found. A checkpoint is trusted if the attempt
after its writer's found it, or if there is none. A rollback (rollback.py) is a new attempt too, whose record lacks the
checkpoints that it abandons. A record that cannot be read keeps its number, and the one after it decides.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.storage.durable import sync_folder, write_atomically
from pipeline.checkpoint.pruning import attempts_of_leftovers
from pipeline.checkpoint.reader import CheckpointReader, DamagedCheckpoint, checkpoints, step_of
from pipeline.errors import RunFailed
from pipeline.run.jsonl import read_lines
from pipeline.run.small_files import DamagedFile, has, read_object, warn_damaged

POLL_SECONDS = 3.0
_ROLLBACK = {"to": int, "first": int, "last": int}


def allocate(run: Path) -> int:
    """The next attempt's number; no two starts get the same, on any file system with hard links."""
    started = sum(row["event"] == "attempt_started" for row in read_lines(run / "events.jsonl", event=str))
    left = max(attempts_of_leftovers(run / "checkpoints"), default=-1)  # which may not be removable
    number = max(latest_attempt(run) + 1, left + 1, started)  # events count where records are missing
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


def recorded_rollbacks(run: Path, attempt: int | None = None) -> list[dict[str, int]]:
    """The rollbacks up to an attempt, or the newest: `to`, `first` and `last` of each (loss_guard.RollbackRecord)."""
    number = latest_attempt(run) if attempt is None else attempt
    if number < 0:
        return []
    if (record := _read(run, number)) is not None:
        return record["rollbacks"]
    rows = [row for row in read_lines(run / "events.jsonl", **_ROLLBACK) if row.get("event") == "rollback"]
    return [{name: row[name] for name in _ROLLBACK} for row in rows if row.get("attempt", 0) < number]


def _record(run: Path, number: int, found: list[str], rollbacks: list[dict[str, int]]) -> bool:
    """Writes an attempt's record; False where the number is taken."""
    records = run / "attempts"
    records.mkdir(parents=True, exist_ok=True)
    facts = {"process": os.getpid(), "host": os.uname().nodename, "found": found, "rollbacks": rollbacks}
    hidden = records / f".{facts['host']}-{facts['process']}"
    try:
        write_atomically(hidden, json.dumps(facts) + "\n")
    except OSError as error:
        error.filename = str(records)  # not the hidden file
        raise
    try:
        os.link(hidden, records / f"{number}.json")  # atomic, and fails where the name exists
    except FileExistsError:
        return False
    finally:
        hidden.unlink()
    sync_folder(records)
    return True


def latest_attempt(run: Path) -> int:
    """The number of the newest attempt; -1 where there is none."""
    return max(_numbers(run), default=-1)


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
    known = (_read(run, numbers[-1]) or {"found": []})["found"]
    return [folder for folder in found if folder.name in known or not _is_stale(run, folder, numbers)]


def _is_stale(run: Path, folder: Path, numbers: list[int]) -> bool:
    """Whether an attempt finished this checkpoint after the next of `numbers` had begun."""
    try:
        attempt = CheckpointReader(folder).attempt
    except DamagedCheckpoint:
        return False  # its reader will report the damage
    records = (_read(run, number) for number in numbers if number > attempt)
    decides = next((record for record in records if record is not None), None)
    return decides is not None and folder.name not in decides["found"]


def _numbers(run: Path) -> list[int]:
    return [int(file.stem) for file in (run / "attempts").glob("*.json") if file.stem.isdecimal()]


def _read(run: Path, number: int) -> dict[str, Any] | None:
    """An attempt's record; None where there is none, or it is damaged."""
    file = run / "attempts" / f"{number}.json"
    try:
        record = {"rollbacks": [], **read_object(file, found=list)}
        if isinstance(record["rollbacks"], list) and all(has(back, _ROLLBACK) for back in record["rollbacks"]):
            return record
        raise DamagedFile(f"{file} is damaged")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn_damaged(file, error, f"without it, checkpoints from before attempt {number} are trusted as they are")
        return None


def newest_state(run: Path) -> dict[str, Any] | None:
    """state.json of the newest trusted checkpoint in which it is good: what a run's lost small files said, too."""
    for folder in reversed(trusted_checkpoints(run)):
        with suppress(DamagedCheckpoint):  # who restores it reports the damage
            return CheckpointReader(folder).state()
    return None


def latest_step(run: Path) -> int | None:
    """The step of a run's newest trusted checkpoint; None where there is none."""
    folders = trusted_checkpoints(run)
    return step_of(folders[-1]) if folders else None
