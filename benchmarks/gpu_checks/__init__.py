"""The checks of `coatnet bench gpu`: what they share. Each yields rows of figures, in a process of its own (one.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Figures by name. `said` is what the summary says of the whole check; `error` says what is wrong, `not here` what this
machine has no figures of."""
ROOT = Path(__file__).resolve().parents[2]


class NotHere(Exception):
    """A check, or the rest of it, cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a check runs: "cuda" or "cpu", where everything is small; and a folder for its files."""

    device: str
    folder: Path

    @property
    def small(self) -> bool:
        return self.device == "cpu"


Check = Callable[[Place], Iterator[Row]]


def not_installed(error: ModuleNotFoundError) -> str | None:
    """What is to be said where a package is missing; None where it is one of ours, which would be a mistake."""
    name = str(error.name)
    ours = (ROOT / name.partition(".")[0]).is_dir()
    return None if ours else f"{'DALI' if name.startswith('nvidia') else name} is not installed"


def attempt(row: Row, work: Callable[[], Row]) -> Row:
    """The row with what the work finds, or with its error: one failing figure does not lose the others."""
    try:
        return row | work()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (absent := not_installed(error)):
            return row | {"not here": absent}
        lines = str(error).strip().splitlines() or [""]
        return row | {"error": f"{type(error).__name__}: {lines[0]}"}
