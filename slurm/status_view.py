"""`coatnet status` for people and as JSON: a table of runs, the lines of one run, and --watch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.formatting import format_duration, format_number, format_percent, pluralize
from pipeline.lineage import format_lineage
from slurm import history
from slurm.parts_status import Place, find_place, parts_as_lines, read_parts
from slurm.status import Status, read_runs, runs_of

POLL_SECONDS = 5.0
View = tuple[list[dict[str, Any]], Group | Table, str | None]
"""Documents, the same for people, and why Slurm could not be asked."""


def status(names: Sequence[str | Path], as_json: bool, watch: bool) -> int:
    """Prints the state of runs, of a folder's, or of work in parts; returns the exit status, 1 without Slurm's answer.

    Of one run, and of work in parts, which are shown in detail, the JSON is one object.
    """
    if as_json and watch:
        raise UsageError("--json prints one document and --watch many lines: leave out one of them")
    place = find_place(str(names[0])) if len(names) == 1 else None
    paths = [Path(each) for each in names]
    single = place is not None or (len(paths) == 1 and history.is_run(paths[0]))
    read = partial(_view_of_parts, place) if place else partial(_view_of_runs, runs_of(paths), single)
    if watch:
        return _watch(read)
    documents, shown, problem = read()
    if as_json:
        print(json.dumps(documents[0] if single else documents))
    else:
        _console().print(shown)
    if problem:
        print(f"coatnet: {problem}; showing what the runs' folders have", file=sys.stderr)
    return 1 if problem else 0


def _view_of_parts(place: Place) -> View:
    status, problem = read_parts(place)
    return [asdict(status)], Group(*map(Text, parts_as_lines(status))), problem


def _view_of_runs(runs: Sequence[Path], single: bool) -> View:
    statuses, problem = read_runs(runs)
    return list(map(asdict, statuses)), _render(statuses, single), problem


def as_lines(status: Status) -> list[str]:
    """One run in detail."""
    facts = _facts(status)
    lines = [
        f"{status.run}: {status.state}, step {facts['step']}" + (f", {facts['left']} left" if facts["left"] else "")
    ]
    lines += [f"  {status.reason}"] if status.reason else []
    lines += [f"  loss {facts['loss']}, {facts['img/s']} img/s"] if status.loss is not None else []
    lines += [f"  {pluralize(status.restarts, 'restart')}"] if status.restarts else []
    lines += [f"  goodput {facts['goodput']}"] if status.goodput is not None else []
    if bad := status.not_applied:
        lines.append(f"  {pluralize(len(bad), 'step')} not applied, the last {bad[-1]:,}")
    for back in status.rollbacks:
        lines.append(f"  rolled back to step {back['to']:,}, skipping steps {back['first']:,} to {back['last']:,}")
    count = status.checkpoints["count"] or 0
    newest = f", the newest of step {status.checkpoints['newest']:,}" if count else ""
    lines.append(f"  {pluralize(count, 'checkpoint')}{newest}")
    for job in status.jobs:
        where = f" on {', '.join(job['nodes'])}" if job["nodes"] else ""
        why = f" ({job['reason']})" if job["reason"] else ""
        lines.append(f"  job {job['job']}: {job['state'] or 'gone'}{where}{why}")
    return lines + format_lineage(status.ancestry)


def _facts(status: Status) -> dict[str, str]:
    """A row of the table by its titles; what is unknown is empty."""
    return {
        "run": status.run,
        "state": status.state,
        "step": f"{status.step:,}" if status.steps is None else f"{status.step:,}/{status.steps:,}",
        "loss": "" if status.loss is None else format_number(float(status.loss)),
        "img/s": "" if status.images_per_second is None else format_number(status.images_per_second),
        "left": format_duration(status.seconds_left) if status.seconds_left else "",
        "restarts": str(status.restarts),
        "goodput": "" if status.goodput is None else format_percent(status.goodput),
        "job": status.jobs[-1]["job"] if status.jobs else "",
        "why": status.reason or "",
    }


def _render(statuses: Sequence[Status], single: bool) -> Group | Table:
    if single:
        return Group(*map(Text, as_lines(statuses[0])))
    rows = [_facts(each) for each in statuses]
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def _watch(read: Callable[[], View]) -> int:
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                _, shown, problem = read()
                view = Group(shown, Text(problem or ""))
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            return 0


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200)
