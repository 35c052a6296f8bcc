"""Files of one JSON object a line, written by processes that may be killed at any moment.

A killed process may leave half a line; the next start ends it with a newline, and readers skip it, as they skip what
a person has added for people.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from types import UnionType
from typing import Any

from data.storage.durable import write_atomically
from pipeline.run.appended import AppendedFile
from pipeline.run.small_files import has, parse, warn_damaged


class JsonLines(AppendedFile):
    """An append-only file of JSON objects; each line is one write, at once, or waits in memory (appended.py)."""

    def write(self, row: dict[str, Any]) -> None:
        self.append(json.dumps({name: _finite(value) for name, value in row.items()}).encode() + b"\n")

    def _open(self) -> FileIO:
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


def read_metrics(run: Path, **kinds: type | UnionType) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that have these fields, each step and each evaluation once, in their order."""
    return _newest(row for row in read_lines(run / "metrics.jsonl", **kinds) if _place(row) is not None)


def cut_back(path: Path, step: int) -> None:
    """Removes the rows after a checkpoint's step from metrics.jsonl, and half a last line; rows of no step stay."""
    if path.exists():
        kept = [row for row in _newest(_rows(path)) if (_place(row) or (0,))[0] <= step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def evaluated_steps(run: Path) -> set[int]:
    """The steps whose evaluation metrics.jsonl has."""
    return {row["step"] for row in read_metrics(run) if "eval_loss" in row}


def _newest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of steps that a later start did again: of a file that could not be cut back, or was added to."""
    kept: list[dict[str, Any]] = []
    following: tuple[int, bool] | None = None
    for row in reversed(list(rows)):
        place = _place(row)
        if place is None or following is None or place < following:
            kept.append(row)
            following = place or following
    return kept[::-1]


def _place(row: dict[str, Any]) -> tuple[int, bool] | None:
    """Where among the rows of metrics.jsonl one belongs: an evaluation follows its step; None: somebody else's."""
    step, is_evaluation = row.get("step"), "eval_loss" in row
    return (step, is_evaluation) if isinstance(step, int) and (is_evaluation or "loss" in row) else None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from (row for line in file if (row := parse(line)) is not None)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
