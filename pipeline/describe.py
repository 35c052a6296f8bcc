"""What small commands print: the list of keys, what was packed, indexed or verified, the doctor's findings.

Next: config.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.errors import BadRequest
from pipeline.launch import is_rank, rank_and_world_size

if TYPE_CHECKING:
    from data.index import Report
    from data.shards import Broken
    from pipeline.doctor import Finding

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


def pack_and_report(source: str, destination: str, workers: int | None, as_json: bool, **request: Any) -> int:
    """Packs with a progress bar, prints the report; returns the exit status. `request` is what else data.pack takes."""
    from data.pack import pack

    with _bar("packing") as progress:
        report = pack(source, destination, workers=workers or _processors(), progress=progress, **request)
    if as_json:
        print(json.dumps(asdict(report)))
        return 0
    _list_broken("left out", report.broken)
    print(
        f"{destination}: {report.samples} samples of {report.classes} classes in {report.shards} shards,"
        f" {report.bytes / 1e6:.1f} MB; {len(report.broken)} left out"
        + (f"; went on behind {report.kept} whole shards" if report.kept else "")
    )
    return 0


def index_and_report(
    url: str,
    out: str | None,
    decode: bool,
    classes: str | None,
    label_field: str | None,
    workers: int | None,
    as_json: bool,
) -> int:
    """Indexes with a progress bar, prints the report; returns the exit status."""
    from data.index import index

    request: dict[str, Any] = {"decode": decode, "classes": classes, "label_field": label_field}
    with _bar("indexing") as progress:
        report = index(url, out, **request, workers=workers or (_processors() if decode else 16), progress=progress)
    if as_json:
        print(json.dumps(asdict(report)))
        return 0
    _list_broken("cannot be used", report.broken)
    print(f"{out or url}: {_counted(report)}, {len(report.broken)} that cannot be used")
    return 0


def verify_and_report(url: str, workers: int | None, as_json: bool) -> int:
    """Checks with a progress bar, prints the report; returns the exit status, 1 if anything is broken."""
    from data.verify import verify

    with _bar("checking") as progress:
        report = verify(url, workers=workers or _processors(), progress=progress)
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _list_broken("broken", report.broken)
        print(f"{url}: {_counted(report)}, {len(report.broken) or 'nothing'} broken")
        if report.unchecked:
            print(
                f"hint: {report.unchecked} samples have no checksum to compare; `coatnet data index URL --decode` of"
                " the tars records them, once their manifest.json is removed"
            )
    return 1 if report.broken else 0


def doctor_report(preset: str | None, overrides: list[str], as_json: bool) -> int:
    """Prints what this machine, or the allocation that this is a rank of, has and lacks; returns the exit status."""
    from pipeline.doctor import exit_status, rows

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


def _findings(preset: str | None, overrides: list[str]) -> list[Finding] | None:
    """Of this machine alone, or on rank 0 of its whole allocation, and None on the other ranks."""
    from pipeline.doctor import diagnose

    ranks = rank_and_world_size()[1] if is_rank() else 1
    if preset is None:
        if ranks > 1:
            raise BadRequest("ranks meet in the run's storage: coatnet doctor CONFIG run.dir=... names it")
        return diagnose()
    from pipeline.overrides import read_config

    config = read_config(preset, overrides)
    if ranks > 1:
        from pipeline.doctor_of_ranks import diagnose_ranks

        return diagnose_ranks(config)
    from pipeline.storage_doctor import examine_storage

    return [*diagnose(), *examine_storage(config)]


def _default(value: object) -> str:
    return "(required)" if value is PydanticUndefined else json.dumps(value)


def _counted(report: Report) -> str:
    size = f"{report.bytes / 1e6:.1f} MB"
    return f"{report.samples} samples of {report.classes} classes in {report.shards} shards, {size}"


def _list_broken(what: str, broken: tuple[Broken, ...]) -> None:
    for each in broken[:MOST_LISTED]:
        place = " ".join(name for name in (each.shard, each.key) if name)
        print(f"{what}: {place}: {each.reason}", file=sys.stderr)
    if len(broken) > MOST_LISTED:
        print(f"and {len(broken) - MOST_LISTED} more; --json lists all", file=sys.stderr)


@contextmanager
def _bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; what it gives takes how much is done, and of how much."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _processors() -> int:
    return len(os.sched_getaffinity(0))
