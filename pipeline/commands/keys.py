"""`coatnet keys`: every key of a configuration with its default and meaning."""

from __future__ import annotations

import json

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from pipeline.config.schema import documented_keys


def keys_table() -> str:
    """Every key with its default and meaning, and what a run that resumes may do with it."""
    on_resuming = {"immutable": "no", "tracked": "recorded", "mutable": "yes"}
    table = Table("key", "default", "meaning", "may change on resuming", box=None, pad_edge=False)
    for name, facts in documented_keys().items():
        required = facts["default"] is PydanticUndefined
        default = "(required)" if required else json.dumps(facts["default"])
        table.add_row(name, default, facts["meaning"], on_resuming[facts["change"]])
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(table, markup=False)
    return captured.get().rstrip()
