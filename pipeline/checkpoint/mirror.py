"""Copies checkpoints to checkpoint.mirror in the background, and restores a run from there when its folder is gone.

URL/checkpoints/step-N/ has the files of a checkpoint, manifest.json last: a copy without it is incomplete. URL itself
has the small files that resuming needs; its run.json says whose mirror it is, and no other run writes or deletes there.
One checkpoint is copied at a time, and the newest is next. A copy that fails is an event and a warning, and training
continues; it waits for none.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from data.storage.durable import publish, remove_partials, sync_folder, write_atomically
from data.storage.prefetch import ordered_map
from data.storage.remote import DEFAULT, NotFound, open_fs, send_file, write_file
from data.urls import without_secrets
from pipeline.checkpoint.attempts import latest_step
from pipeline.checkpoint.reader import (
    CheckpointReader,
    DamagedCheckpoint,
    newest_good,
    prunable,
    step_name,
    step_of,
)
from pipeline.config.parsing import read_resolved
from pipeline.config.schema import Config
from pipeline.errors import DataError, RunFailed, UsageError, first_line
from pipeline.run.identity import NOTE, Identity, from_json, identify, lies_elsewhere, read_identity, settle, to_json
from pipeline.run.lock import acquire_lock

SMALL_FILES = ("config.yaml", "source.json", "metrics.jsonl", "events.jsonl")
PIECE_BYTES, PIECES_AT_ONCE = 16 << 20, 8
_MANIFEST = "manifest.json"

Copies = dict[int, dict[str, int]]
"""The files at a mirror by step: name -> bytes."""


class Mirror:
    """Copies checkpoints of a run to a URL; `emit` writes an event."""

    def __init__(self, url: str, run: Path, keep_last: int, keep_every: int | None, emit: Callable[..., None]) -> None:
        self._url, self._run, self._emit = url, run, emit
        self._keep_last, self._keep_every = keep_last, keep_every
        self._identity: Identity | None = None
        self._waiting: list[Path] = []
        self._current: Path | None = None
        self._abandoned: int | None = None
        """The copies of later steps are still to be deleted."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def copy(self, folder: Path) -> None:
        """Makes a checkpoint the next one to copy; of those that wait only those of `keep_every` are still copied."""
        every = self._keep_every
        with self._lock:
            kept = [each for each in self._waiting if every is not None and step_of(each) % every == 0]
            self._waiting = [*kept, folder]
            self._start()

    def in_use(self) -> set[Path]:
        """The checkpoints that are being copied, or will be."""
        with self._lock:
            return {*self._waiting, *filter(None, [self._current])}

    def wait(self, seconds: float | None = None) -> bool:
        """Whether nothing is left to copy, after so many seconds at most; without `seconds` it waits for that."""
        if (thread := self._thread) is None:
            return True
        thread.join(seconds)
        return not thread.is_alive()

    def leave(self) -> None:
        """Warns that a signal ends the wait for what is being copied."""
        if (current := self._current) is not None:
            reason = "a signal interrupted the copying"
            self._emit("mirror_failed", step=step_of(current), reason=reason)
            print(f"warning: {current.name} has no good copy at the mirror: {reason}", file=sys.stderr)

    def delete_after(self, after: int) -> None:
        """Has the copies of later steps deleted, which a rollback has abandoned, before anything else is copied."""
        with self._lock:
            self._waiting = [each for each in self._waiting if step_of(each) <= after]
            self._abandoned = after if self._abandoned is None else min(after, self._abandoned)
            self._start()

    def _start(self) -> None:
        """Starts the thread, unless it is at work; under the lock."""
        if self._thread is None:
            # A daemon, so that a run that fails does not wait for a copy.
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            task()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            self._current = None
            if self._abandoned is not None:
                after, self._abandoned = self._abandoned, None
                return partial(self._delete_later, after)
            if self._waiting:
                self._current = self._waiting.pop(0)
                return partial(self._copy, self._current)
            self._thread = None
            return None

    def _delete_later(self, after: int) -> None:
        try:
            self._claim()
            for step in list_copies(self._url):
                if step > after:
                    _delete(self._url, step)
        except Exception as error:  # back ends' exceptions have no common base class, and training must continue
            self._warn(after, "copies of later steps, which a rollback has abandoned, are still at the mirror", error)

    def _copy(self, folder: Path) -> None:
        step, began = step_of(folder), time.monotonic()
        try:
            self._claim()
            size = upload(folder, self._run, self._url)
            self._emit("mirrored", step=step, seconds=round(time.monotonic() - began, 3), bytes=size)
            self._prune(step)
        except Exception as error:  # as in _delete_later
            self._warn(step, f"{folder.name} has no good copy at the mirror", error)

    def _claim(self) -> None:
        """Notes at the mirror whose it is; DataError where it is another run's, or this one was started elsewhere."""
        owner, identity = owner_of(self._url), self._identity or settle(self._run)
        if owner is not None and owner != identity and (self._identity or _is_anothers(owner, identity, self._url)):
            raise DataError(f"{self._url} is the mirror of the run in {owner.folder}")
        fs, top = open_fs(self._url)
        if isinstance(fs, LocalFileSystem):
            remove_partials(Path(top))
        if owner != identity:
            DEFAULT.with_retries("made", top, lambda: fs.makedirs(top, exist_ok=True))
            write_file(fs, f"{top}/{NOTE}", to_json(identity).encode())
        self._identity = identity

    def _prune(self, step: int) -> None:
        """Deletes the copies that the one of this step supersedes, as for local ones, and incomplete older ones."""
        found = list_copies(self._url)
        whole = complete(found)
        incomplete = [each for each in found if each not in whole and each < step]
        for old in (*prunable(whole, step, self._keep_last, self._keep_every), *incomplete):
            _delete(self._url, old)

    def _warn(self, step: int, problem: str, error: Exception) -> None:
        reason = without_secrets(first_line(error))
        self._emit("mirror_failed", step=step, reason=reason)
        print(f"warning: {problem}: {reason}; training continues", file=sys.stderr)


def upload(folder: Path, run: Path, url: str) -> int:
    """Copies a checkpoint, its manifest last, and the run's small files; returns its bytes without the manifest."""
    fs, top = open_fs(url)
    place = f"{top}/checkpoints/{folder.name}"
    if step_of(folder) in list_copies(url):
        _delete(url, step_of(folder))  # of the same step, with other bytes
    DEFAULT.with_retries("made", place, lambda: fs.makedirs(place, exist_ok=True))
    files = sorted(file for file in folder.iterdir() if file.name != _MANIFEST)
    for file in files:
        send_file(str(file), fs, f"{place}/{file.name}")
    for small in (run / name for name in SMALL_FILES):
        if small.exists():
            write_file(fs, f"{top}/{small.name}", small.read_bytes())
    write_file(fs, f"{place}/{_MANIFEST}", (folder / _MANIFEST).read_bytes())
    return sum(file.stat().st_size for file in files)


def owner_of(url: str) -> Identity | None:
    """The run whose mirror a URL is; None where nothing says so. DataError where it cannot be read."""
    try:
        return from_json(DEFAULT.read(f"{url.rstrip('/')}/{NOTE}"))
    except NotFound:
        return None


def list_copies(url: str) -> Copies:
    """All copies at a mirror, complete or not; DataError where it cannot be read."""
    fs, top = open_fs(url)
    try:
        fs.invalidate_cache()
        place = f"{top}/checkpoints"
        if isinstance(fs, LocalFileSystem):  # else find leaves out what it may not read
            DEFAULT.with_retries("listed", place, lambda: [os.listdir(path) for path in (top, place)])
        found = DEFAULT.with_retries("listed", place, lambda: fs.find(place, detail=True))
    except DataError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    copies: Copies = {}
    for name, entry in found.items():
        if match := re.search(r"/step-(\d{8,})/([^/]+)$", name):
            copies.setdefault(int(match[1]), {})[match[2]] = entry["size"]
    return copies


def complete(found: Copies) -> Copies:
    return {step: files for step, files in found.items() if _MANIFEST in files}


def _delete(url: str, step: int) -> None:
    fs, top = open_fs(url)
    place = f"{top}/checkpoints/{step_name(step)}"

    def delete() -> None:
        if fs.exists(f"{place}/{_MANIFEST}"):
            fs.rm_file(f"{place}/{_MANIFEST}")  # first, so that what is left does not look complete
        if fs.exists(place):
            fs.rm(place, recursive=True)

    DEFAULT.with_retries("removed", place, delete)


def check_mirror(run: Path, url: str | None) -> None:
    """UsageError where a URL cannot be this run's mirror, whatever is there."""
    if url is None:
        return
    if urlsplit(url).password:  # config.yaml and every checkpoint and export would have it
        raise UsageError(
            "checkpoint.mirror contains a password, which others could read in config.yaml and in checkpoints; pass it"
            " in the environment, such as FSSPEC_FTP_PASSWORD=... for ftp://"
        )
    try:
        fs, top = open_fs(url)
    except UsageError as error:
        raise UsageError(f"checkpoint.mirror: {error}") from None
    place, folder = Path(top).resolve(), run.resolve()
    if isinstance(fs, LocalFileSystem) and (place == folder or place in folder.parents or folder in place.parents):
        raise UsageError(
            f"checkpoint.mirror={url} and run.dir={run} are the same folder, or one contains the other: one would be"
            " deleted or damaged with the other; choose another place, or null"
        )


def find_copies(config: Config) -> Copies:
    """The copies of which one would be restored: none where the folder has a checkpoint.

    UsageError where the URL cannot be this run's mirror, DataError where it cannot be read.
    """
    run, url = Path(config.run.dir), config.checkpoint.mirror
    check_mirror(run, url)
    if url is None:
        return {}
    identity = identify(run)
    if identity.copy_of is not None and _may_mirror_to(Path(identity.copy_of), url):
        raise _not_ours(run, url, identity.copy_of)
    if latest_step(run) is not None:
        return {}
    try:
        found, owner = complete(list_copies(url)), owner_of(url)
    except DataError as error:
        raise DataError(
            f"checkpoint.mirror: {error}; {run} has no checkpoint, and the mirror may have"
            " one: try again, or start without the mirror (checkpoint.mirror=null)"
        ) from None
    if owner is not None:
        known = read_identity(run)
        if known is None and lies_elsewhere(owner, run):  # what is restored would be a copy of it
            known = Identity("", str(run.resolve()), copy_of=owner.folder)
        if known is not None and _is_anothers(owner, known, url):
            raise _not_ours(run, url, owner.folder)
    return found


def restore_from_mirror(config: Config) -> None:
    """Copies the newest good checkpoint and the run's small files from the mirror, if the folder has no checkpoint.

    Of ranks that start at once, one does it. Errors as in find_copies, and RunFailed where none of the checkpoints is
    good, or the folder cannot be written.
    """
    run, url, found = Path(config.run.dir), config.checkpoint.mirror, find_copies(config)
    if url is None or not found:
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / ".mirror.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if latest_step(run) is None:
                with acquire_lock(run):
                    _fetch_newest(run, url.rstrip("/"), found)
    except OSError as error:
        raise RunFailed(
            f"run.dir={run}: the checkpoint at the mirror cannot be copied back: {error.strerror or error};"
            " fix that, then the same command resumes from there"
        ) from None


def _is_anothers(owner: Identity, identity: Identity, url: str) -> bool:
    """Whether the mirror's owner is not this run, nor one that it is a copy of and that mirrors elsewhere."""
    if owner.id == identity.id:
        return False
    if owner.folder == identity.folder:  # a run that was in this folder before
        return bool(list_copies(url))
    return owner.folder != identity.copy_of or _may_mirror_to(Path(owner.folder), url)


def _may_mirror_to(run: Path, url: str) -> bool:
    """Whether another run, if there still is one, has this mirror, by its configuration."""
    try:
        theirs = read_resolved(run / "config.yaml").checkpoint.mirror
    except UsageError:
        return (run / NOTE).exists()
    return theirs is not None and _place(theirs) == _place(url)


def _place(url: str) -> tuple[object, str]:
    fs, top = open_fs(url)
    return fs, str(Path(top).resolve()) if isinstance(fs, LocalFileSystem) else top.rstrip("/")


def _not_ours(run: Path, url: str, owner: str) -> UsageError:
    return UsageError(
        f"checkpoint.mirror={without_secrets(url)} is the mirror of the run in {owner}, and run.dir={run} is another"
        " run: set another checkpoint.mirror, or null, or resume that run in its own folder"
    )


def _fetch_newest(run: Path, url: str, found: Copies) -> None:
    place = without_secrets(url)

    def fetch(folder: Path) -> None:
        hidden = folder.with_name(f".{folder.name}.mirrored")
        try:
            _fetch(f"{url}/checkpoints/{folder.name}", hidden, found[step_of(folder)])
            _fetch_small_files(run, url)
            publish(hidden, folder)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        print(f"{run} had no checkpoint: {folder.name} was restored from {place}")

    def warn(folder: Path, error: DamagedCheckpoint) -> None:
        print(f"the mirror's {folder.name} is damaged ({error}); trying the one before", file=sys.stderr)

    newest_good(
        place,
        [run / "checkpoints" / step_name(step) for step in sorted(found)],
        fetch,
        warn,
        f"copy another one to {run}/checkpoints, or start over without this mirror (checkpoint.mirror=null)",
    )


def _fetch(place: str, folder: Path, listed: dict[str, int]) -> None:
    """Downloads a copy into a folder and verifies all of it; DamagedCheckpoint where it is not what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _MANIFEST, DEFAULT.read(f"{place}/{_MANIFEST}"))
    reader = CheckpointReader(folder)
    for file, size in reader.file_sizes().items():
        if listed.get(file) != size:
            raise DamagedCheckpoint(f"{file}: {listed.get(file, 'no')} bytes instead of {size}")
    with ThreadPoolExecutor(PIECES_AT_ONCE) as pool:
        for file, size in reader.file_sizes().items():
            pieces = [(begin, min(begin + PIECE_BYTES, size)) for begin in range(0, size, PIECE_BYTES)]
            read = partial(_read_piece, f"{place}/{file}")
            write_atomically(folder / file, ordered_map(pool, read, pieces, PIECES_AT_ONCE))
    reader.verify_all()
    sync_folder(folder)


def _read_piece(url: str, piece: tuple[int, int]) -> bytes:
    return DEFAULT.read(url, *piece)


def _fetch_small_files(run: Path, url: str) -> None:
    """Downloads those that the folder lacks."""
    for name in (*SMALL_FILES, NOTE):
        if not (run / name).exists():
            with suppress(NotFound):
                write_atomically(run / name, DEFAULT.read(f"{url}/{name}"))
