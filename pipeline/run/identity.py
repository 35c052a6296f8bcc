"""Which run a folder is: RUN/run.json has its id, and where it lay when it was last started or submitted.

A folder that was moved is the same run at its new place. One that was copied is a run of its own, which gets another id
when it is next started or submitted: it counts as a copy while a run with its id lies where run.json says. Jobs, the
mirror and the page at Weights & Biases belong to an id.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.run.jsonl import append_row, read_lines
from pipeline.run.small_files import DamagedFile, has, parse, read_object, warn_damaged, write_atomically

NOTE = "run.json"
_FIELDS = {"id": str, "folder": str, "copy_of": str | None}


@dataclass(frozen=True)
class Identity:
    """A run's id and folder, and the folder of the run that it was copied from."""

    id: str
    folder: str
    copy_of: str | None = None


def identify(run: Path) -> Identity:
    """Which run a folder is now; with an id that nothing has yet where it is a copy, or has never had one."""
    noted, here = read_identity(run), str(run.resolve())
    if noted is None:
        return Identity(_older_id(run) or os.urandom(8).hex(), here)
    if noted.folder == here or _is_same_file(Path(noted.folder) / NOTE, run / NOTE):
        return noted
    if lies_elsewhere(noted, run):
        return Identity(os.urandom(8).hex(), here, copy_of=noted.folder)
    return replace(noted, folder=here)


def settle(run: Path) -> Identity:
    """The same, written to run.json; a move or a copy is recorded in the run's events. Only for one process at a time.

    Submitting settles it before the job is there, and a start while it holds the run's lock.
    """
    noted, now = read_identity(run), identify(run)
    if noted == now:
        return now
    if noted is not None:
        moved = noted.id == now.id
        event = {"event": "moved" if moved else "copied", "from": noted.folder, "to": now.folder}
        append_row(run / "events.jsonl", event)
        if not moved:
            print(f"{run} is a copy of the run in {noted.folder}; from now on it is a run of its own")
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / NOTE, to_json(now))
    return now


def to_json(identity: Identity) -> str:
    return json.dumps(asdict(identity)) + "\n"


def from_json(contents: str | bytes) -> Identity | None:
    """What a note says; None where it is damaged."""
    row = parse(contents) or {}
    return Identity(*(row[name] for name in _FIELDS)) if has(row, _FIELDS) else None


def read_identity(run: Path) -> Identity | None:
    """What a folder's run.json says, or, where that is damaged, its last start; None where it has none."""
    if not run.is_dir():  # an exported file
        return None
    try:
        row = read_object(run / NOTE, **_FIELDS)
        return Identity(*(row[name] for name in _FIELDS))
    except FileNotFoundError:
        pass
    except DamagedFile as error:
        warn_damaged(run / NOTE, error, "the run's id is taken from its events")
    ids = [row["run"] for row in read_lines(run / "events.jsonl", run=str)]
    return Identity(ids[-1], str(run.resolve())) if ids else None


def lies_elsewhere(noted: Identity, run: Path) -> bool:
    """Whether the noted run lies where it says, which is another folder than this one."""
    there = Path(noted.folder)
    other = read_identity(there) if there != run.resolve() else None
    return other is not None and other.id == noted.id


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether both are one file, which two mounts of a file system may show as different ones; a copy is not."""
    try:
        first, second = one.stat(), other.stat()
    except OSError:
        return False
    return (first.st_ino, first.st_ctime_ns) == (second.st_ino, second.st_ctime_ns)


def _older_id(run: Path) -> str | None:
    """The id of the page at Weights & Biases that a run without run.json has."""
    try:
        return read_object(run / "wandb.json", id=str)["id"]
    except (FileNotFoundError, DamagedFile):
        return None
