"""Files of one JSON object a line, written by processes that may be killed at any moment.

A killed process may leave half a line; the next start ends it with a newline, and readers skip it, as they skip what
a person has added for people.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from data.storage.durable import write_atomically
from pipeline.run.small_files import has, parse, warn_damaged


class JsonLines:
    """An append-only file of JSON objects; each line is one write, flushed at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # the checkpoint writer's thread writes events too
        self._file = path.open("ab+")
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
                self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps({name: _finite(value) for name, value in row.items()}) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path, **kinds: type | UnionType) -> Iterator[dict[str, Any]]:
    """The objects of a file that have these fields; all else is skipped. A file that can't be read has none."""
    try:
        yield from (row for row in _rows(path) if has(row, kinds))
    except FileNotFoundError:
        return
    except OSError as error:
        warn_damaged(path, error.strerror or str(error), "continuing as if it were empty")


def cut_back(path: Path, step: int) -> None:
    """Removes the rows after a checkpoint's step from metrics.jsonl, and half a last line; rows of no step stay."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in _rows(path) if not _is_later(row.get("step"), step)]
        write_atomically(path, "".join(kept))


def evaluated_steps(path: Path) -> set[int]:
    """The steps whose evaluation metrics.jsonl has."""
    return {row["step"] for row in read_lines(path, step=int) if "eval_loss" in row}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from (row for line in file if (row := parse(line)) is not None)


def _is_later(found: Any, step: int) -> bool:
    return isinstance(found, int) and found > step


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
