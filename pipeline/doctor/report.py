"""`coatnet doctor`: what was found, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.distributed.environment import is_rank, rank_and_world_size
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.doctor.findings import Check


def doctor_report(preset: str | None, overrides: list[str], as_json: bool) -> int:
    """Prints what this machine, or the allocation that this is a rank of, has and lacks; returns the exit status."""
    from pipeline.doctor.findings import exit_status, rows

    findings = _findings(preset, overrides)
    if findings is None:
        return 0
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return exit_status(findings)
    table = Table(box=None, show_header=False, pad_edge=False)
    for overflow in ("ellipsis", "ellipsis", "fold"):
        table.add_column(overflow=overflow)
    for mark, what, detail, advice in rows(findings):
        table.add_row(mark, what, escape(detail + (f"\n-> {advice}" if advice else "")))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
    return exit_status(findings)


def _findings(preset: str | None, overrides: list[str]) -> list[Check] | None:
    """Of this machine alone, or on rank 0 of its whole allocation, and None on the other ranks."""
    from pipeline.doctor.environment import diagnose

    ranks = rank_and_world_size()[1] if is_rank() else 1
    if preset is None:
        if ranks > 1:
            raise UsageError("ranks meet in the run's storage: coatnet doctor CONFIG run.dir=... names it")
        return diagnose()
    from pipeline.config.parsing import read_config

    config = read_config(preset, overrides)
    if ranks > 1:
        from pipeline.doctor.ranks import diagnose_ranks

        return diagnose_ranks(config)
    from pipeline.doctor.storage import check_storage

    return [*diagnose(), *check_storage(config)]
