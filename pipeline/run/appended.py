"""Files that are only ever appended to, and that a run which cannot write them does without until it can.

A full disk, a quota, a server that does not answer: a record that cannot be written now waits in memory, and is written
before the next one. Nothing here raises OSError, so that no record of the training ends the training.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from pipeline.formatting import pluralize

MAX_WAITING_BYTES = 64 << 20
Warn = Callable[[Path, str], None]
"""Is told of a file and what is wrong with it."""


def print_warning(path: Path, problem: str) -> None:
    print(f"warning: {path} {problem}", file=sys.stderr)


class AppendedFile:
    """A file with whole records; `warn` is told once that it cannot be written, and in the end what it lacks."""

    def __init__(self, path: Path, warn: Warn = print_warning) -> None:
        self._path, self._warn = path, warn
        self._file: FileIO | None = None
        self._waiting: list[bytes] = []
        self._lost, self._reason = 0, ""
        self._lock = threading.Lock()  # the checkpoint's and the mirror's threads write events
        with self._lock:
            self._flush()

    def append(self, record: bytes) -> None:
        with self._lock:
            if self._reason and sum(map(len, self._waiting)) + len(record) > MAX_WAITING_BYTES:
                self._lost += 1
            else:
                self._waiting.append(record)
            self._flush()

    def close(self) -> None:
        with self._lock:
            self._flush()
            self._release()
            if missing := self._lost + len(self._waiting):
                self._warn(self._path, f"lacks {pluralize(missing, 'record')} of this start: {self._reason}")

    def _flush(self) -> None:
        """Writes what waits, or keeps it."""
        try:
            if self._file is None:
                self._file = self._open()
            _append_whole(self._file, b"".join(self._waiting))
            self._waiting.clear()
        except OSError as error:
            self._release()  # a handle that has become stale stays so
            first, self._reason = not self._reason, error.strerror or str(error)
            if first:
                self._warn(self._path, f"cannot be written: {self._reason}; its records are kept and retried")

    def _open(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(self._path, "ab+")

    def _release(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what NFS reports here, the next write meets again
                self._file.close()
            self._file = None


def _append_whole(file: FileIO, content: bytes) -> None:
    """Appends all or nothing: what a full disk took of it is cut off again."""
    left = content
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):  # else a part of a record stays, which readers skip
            if os.fstat(file.fileno()).st_size == (end := file.tell()):  # no other process has appended since
                file.truncate(end - len(content) + len(left))
        raise
