"""What small commands print: the list of keys, a pack's progress and report, the doctor's findings.

Next: config.py.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

MOST_LISTED = 20


def keys_table() -> str:
    """Every key with its default and meaning, and what a run that goes on may do with it."""
    from pipeline.config import documented_keys

    going_on = {"fixed": "no", "recorded": "recorded", "free": "yes"}
    rows = [
        (name, _default(facts["default"]), facts["meaning"], going_on[facts["change"]])
        for name, facts in documented_keys().items()
    ]
    table = Table("key", "default", "meaning", "may change on going on", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(width=160, no_color=True)
    with console.capture() as captured:
        console.print(table, markup=False)
    return captured.get().rstrip()


def pack_and_report(
    source: str,
    destination: str,
    samples_per_shard: int,
    bytes_per_shard: int,
    seed: int,
    workers: int | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Packs with a progress bar, prints the report; returns the exit status."""
    from data.pack import pack

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        report = pack(
            source,
            destination,
            samples_per_shard=samples_per_shard,
            bytes_per_shard=bytes_per_shard,
            seed=seed,
            workers=workers or len(os.sched_getaffinity(0)),
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print(json.dumps(asdict(report)))
        return 0
    for broken in report.broken[:MOST_LISTED]:
        print(f"left out: {broken.key}: {broken.reason}", file=sys.stderr)
    if len(report.broken) > MOST_LISTED:
        print(f"and {len(report.broken) - MOST_LISTED} more; --json lists all", file=sys.stderr)
    print(
        f"{destination}: {report.samples} samples of {report.classes} classes in {report.shards} shards,"
        f" {report.bytes / 1e6:.1f} MB; {len(report.broken)} left out"
    )
    return 0


def doctor_report(as_json: bool) -> int:
    """Prints what this machine has and what is missing; returns the exit status."""
    from pipeline.doctor import diagnose, exit_status, rows

    findings = diagnose()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return exit_status(findings)
    table = Table(box=None, show_header=False, pad_edge=False)
    for mark, what, detail, advice in rows(findings):
        table.add_row(mark, what, escape(detail + (f"\n-> {advice}" if advice else "")))
    Console(highlight=False).print(table)
    return exit_status(findings)


def _default(value: object) -> str:
    return "(required)" if value is PydanticUndefined else json.dumps(value)
