"""`coatnet keys`: every key of a configuration with its default and meaning."""

from __future__ import annotations

import json

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table


def keys_table() -> str:
    """Every key with its default and meaning, and what a run that resumes may do with it."""
    from pipeline.config.schema import documented_keys

    on_resuming = {"immutable": "no", "tracked": "recorded", "mutable": "yes"}
    rows = [
        (name, _default(facts["default"]), facts["meaning"], on_resuming[facts["change"]])
        for name, facts in documented_keys().items()
    ]
    table = Table("key", "default", "meaning", "may change on resuming", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(table, markup=False)
    return captured.get().rstrip()


def _default(value: object) -> str:
    return "(required)" if value is PydanticUndefined else json.dumps(value)
