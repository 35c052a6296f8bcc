"""A run's small files: written whole, and read so that damage is named once, and done without where that is safe.

A full disk, another program or a person can leave any of them empty, cut or replaced. A reader that can do without says
what it takes instead: on standard error, and with the next start in events.jsonl (`damaged_file`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from data.storage.durable import publish, write_atomically
from pipeline.distributed.environment import is_first_process
from pipeline.errors import RunFailed, first_line

__all__ = [
    "NUMBER", "DamagedFile", "has", "parse", "publish", "read_object", "take_damaged", "warn_damaged",
    "write_atomically",
]  # fmt: skip
NUMBER = int | float
Kinds = Mapping[str, type | UnionType]
"""What an object must have at least: name -> type."""

_damaged: dict[Path, tuple[str, str]] = {}
_recorded: set[Path] = set()


class DamagedFile(RunFailed):
    """A small file of a run cannot be read; the message has the file and what is wrong."""


def read_object(path: Path, **kinds: type | UnionType) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError where there is none, DamagedFile where it is not such an object."""
    try:
        row = parse(content := path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{path}: {error.strerror or error}") from None
    if row is None or not has(row, kinds):
        raise DamagedFile(f"{path} is {'damaged' if content.strip() else 'empty'}")
    return row


def parse(text: str | bytes) -> dict[str, Any] | None:
    """The JSON object in a text; None where there is none, or a number in it is none."""
    try:
        row = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def has(row: Any, kinds: Kinds) -> bool:
    """Whether it is an object that has all these fields, of these types."""
    return isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def warn_damaged(path: Path, problem: BaseException | str, instead: str) -> None:
    """Says, once for each file, what is wrong with it and what is done without it."""
    if path in _damaged:
        return
    reason = problem if isinstance(problem, str) else first_line(problem)
    _damaged[path] = reason, instead
    if is_first_process():
        print(f"warning: {reason if str(path) in reason else f'{path}: {reason}'}; {instead}", file=sys.stderr)


def take_damaged(run: Path) -> list[tuple[str, str, str]]:
    """Each file of a run, with what warn_damaged was told of it, since the last call."""
    new = [path for path in _damaged if run in path.parents and path not in _recorded]
    _recorded.update(new)
    return [(str(path), *_damaged[path]) for path in new]


def _refuse(constant: str) -> None:
    raise ValueError(constant)
