"""Attempts: each start of a run takes the next number, and what an older one finishes after that is not used.

A process that was thought dead (its node unreachable, its memory frozen) can wake up and write; nothing can prevent
that. So a start notes which checkpoints it found, in RUN/attempts/N.json. A checkpoint is trusted if the start after
the one that wrote it had found it, or if there was none: the writer was the newest. A run that rolls back
(rollback.py) takes the next number too, and has not found what it abandons.
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

SECONDS_BETWEEN_LOOKS = 3.0


def allocate(run: Path) -> int:
    """The next attempt's number, taken so that no two starts get the same, on any file system that has links."""
    begun = sum(
        row["event"] == "attempt_started" for row in read_lines(run / "events.jsonl")
    )  # of a run without records, too
    number = max(latest_attempt(run) + 1, begun)
    while not _take(run, number, [folder.name for folder in trusted_checkpoints(run)], recorded_rollbacks(run)):
        number += 1
    return number


def allocate_next(run: Path, attempt: int, to: int, rollbacks: list[dict[str, int]]) -> int:
    """The number after this attempt's, for the same processes, who have found what is not later than step `to`.

    RunFailed where somebody else has it.
    """
    found = [folder.name for folder in trusted_checkpoints(run) if step_of(folder) <= to]
    if not _take(run, attempt + 1, found, rollbacks):
        raise_if_superseded(run, attempt)
    return attempt + 1


def recorded_rollbacks(run: Path) -> list[dict[str, int]]:
    """What the newest attempt knows of rollbacks: `to`, `first` and `last` of each (loss_guard.RollbackRecord)."""
    newest = latest_attempt(run)
    return _record(run, newest).get("rollbacks", []) if newest >= 0 else []


def _take(run: Path, number: int, found: list[str], rollbacks: list[dict[str, int]]) -> bool:
    """Writes an attempt's record; False where that number is taken."""
    records = run / "attempts"
    records.mkdir(parents=True, exist_ok=True)
    facts = {"process": os.getpid(), "host": os.uname().nodename, "found": found, "rollbacks": rollbacks}
    hidden = records / f".{facts['host']}-{facts['process']}"
    hidden.write_text(json.dumps(facts) + "\n")
    try:
        os.link(hidden, records / f"{number}.json")  # whole, or not there
    except FileExistsError:
        return False
    finally:
        hidden.unlink()
    return True


def latest_attempt(run: Path) -> int:
    """The number of the newest attempt; -1 where none has begun."""
    return max(_numbers(run), default=-1)


def latest_of_this_process(run: Path) -> int | None:
    """The newest attempt's number, if this process, as its rank 0, began it; None of one that was overtaken."""
    newest = latest_attempt(run)
    facts = _record(run, newest) if newest >= 0 else {}
    return newest if (facts.get("process"), facts.get("host")) == (os.getpid(), os.uname().nodename) else None


def raise_if_superseded(run: Path, attempt: int) -> None:
    """RunFailed where a newer attempt than this one has begun."""
    if (newest := latest_attempt(run)) > attempt:
        raise RunFailed(
            f"{run}: attempt {newest} of this run has begun while this one, attempt {attempt}, was still there;"
            " this one ends, and nothing that it has done since then is used"
        )


class SupersededCheck:
    """Whether a newer attempt of the run has begun: asked at every step, looked up every few seconds."""

    def __init__(self, run: Path) -> None:
        self._run, self._next, self._latest = run, 0.0, -1

    def is_superseded(self, attempt: int) -> bool:
        if time.monotonic() >= self._next:
            self._latest = latest_attempt(self._run)
            self._next = time.monotonic() + SECONDS_BETWEEN_LOOKS
        return self._latest > attempt


def trusted_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints by rising step, but for those that an attempt finished after the next one had begun."""
    found = checkpoints(run / "checkpoints")
    if not (numbers := sorted(_numbers(run))):
        return found
    known = set(_record(run, numbers[-1])["found"])
    return [folder for folder in found if folder.name in known or not is_stale(run, folder, numbers)]


def is_stale(run: Path, folder: Path, numbers: list[int]) -> bool:
    """Whether an attempt finished this checkpoint after the next of `numbers` had begun."""
    try:
        wrote = CheckpointReader(folder).attempt
    except DamagedCheckpoint:
        return False  # whoever takes it will see what is wrong with it
    later = [number for number in numbers if number > wrote]
    return bool(later) and folder.name not in _record(run, later[0])["found"]


def _numbers(run: Path) -> list[int]:
    return [int(file.stem) for file in (run / "attempts").glob("*.json") if file.stem.isdigit()]


def _record(run: Path, number: int) -> dict[str, Any]:
    return json.loads((run / "attempts" / f"{number}.json").read_text())


def latest_step(path: Path) -> int | None:
    """The step of the newest checkpoint in a run's folder."""
    folders = trusted_checkpoints(path)
    return step_of(folders[-1]) if folders else None
