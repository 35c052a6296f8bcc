"""Files of one JSON object a line, written by processes that may be killed at any moment.

A killed process may leave half a line; the next start ends it with a newline, and readers skip it.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.storage.durable import write_atomically


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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; half lines of killed processes are skipped."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if (row := _parse(line)) is not None:
                yield row


def cut_back(path: Path, step: int) -> None:
    """Removes the rows after a checkpoint's step from metrics.jsonl, and half a last line."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= step]
        write_atomically(path, "".join(kept))


def evaluated_steps(path: Path) -> set[int]:
    """The steps whose evaluation metrics.jsonl has."""
    return {row["step"] for row in read_lines(path) if "eval_loss" in row and "step" in row}


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
