"""Files of one JSON object a line, written by processes that may be killed at any moment.

A killed process may leave half a line; the next start ends it with a newline, and readers skip it, as they skip what
a person has added for people.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from types import UnionType
from typing import Any

from data.storage.durable import write_atomically
from pipeline.run.appended import AppendedFile, Warn, print_warning
from pipeline.run.small_files import has, parse, warn_damaged


class JsonLines(AppendedFile):
    """An append-only file of JSON objects; each line is one write, at once, or waits in memory (appended.py)."""

    def __init__(self, path: Path, warn: Warn = print_warning, prepare: Callable[[], object] = lambda: None) -> None:
        """`prepare` is called once, before anything is written; the lines wait for it, too."""
        self._prepare: Callable[[], object] | None = prepare
        super().__init__(path, warn)

    def write(self, row: dict[str, Any]) -> None:
        self.append(json.dumps({name: _finite(value) for name, value in row.items()}).encode() + b"\n")

    def _open(self) -> FileIO:
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        file = super()._open()
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds one line to a file, with the present time unless the row has one."""
    lines = JsonLines(path)
    lines.write({"time": round(time.time(), 3), **row})
    lines.close()


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
