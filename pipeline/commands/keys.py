"""`coatnet keys`: every key of a configuration with its default and meaning."""

from __future__ import annotations

import json
from typing import NamedTuple

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from pipeline.config.schema import documented_keys

ON_RESUMING = {"immutable": "no", "tracked": "recorded", "mutable": "yes"}


class Row(NamedTuple):
    """A key as text; `on_resuming`: what a run that resumes may do with it."""

    name: str
    default: str
    meaning: str
    on_resuming: str


def key_rows() -> list[Row]:
    """Every key, in order."""
    return [
        Row(
            name,
            "(required)" if facts["default"] is PydanticUndefined else json.dumps(facts["default"]),
            facts["meaning"],
            ON_RESUMING[facts["change"]],
        )
        for name, facts in documented_keys().items()
    ]


def keys_table() -> str:
    """Every key with its default and meaning, and what a run that resumes may do with it."""
    table = Table("key", "default", "meaning", "may change on resuming", box=None, pad_edge=False)
    for row in key_rows():
        table.add_row(*row)
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(table, markup=False)
    return captured.get().rstrip()
