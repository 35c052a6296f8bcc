"""`coatnet status` for people and as JSON: a table of runs, the lines of one run, and --watch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.errors import UsageError
from pipeline.formatting import format_duration, format_number, format_percent, pluralize
from pipeline.lineage import format_lineage
from slurm import history
from slurm.status import Status, read_runs, runs_of

POLL_SECONDS = 5.0


def status(paths: list[Path], as_json: bool, watch: bool) -> int:
    """Prints the state of runs, or of a folder's runs; returns the exit status, 1 where Slurm did not answer."""
    if as_json and watch:
        raise UsageError("--json prints one document and --watch many lines: leave out one of them")
    runs, single = runs_of(paths), len(paths) == 1 and history.is_run(paths[0])
    if watch:
        return _watch(runs, single)
    statuses, problem = read_runs(runs)
    if as_json:
        documents = [asdict(each) for each in statuses]
        print(json.dumps(documents[0] if single else documents))
    else:
        _console().print(_render(statuses, single))
    if problem:
        print(f"coatnet: {problem}; showing what the runs' folders have", file=sys.stderr)
    return 1 if problem else 0


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


def _watch(runs: Sequence[Path], single: bool) -> int:
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                statuses, problem = read_runs(runs)
                view = Group(_render(statuses, single), Text(problem or ""))
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            return 0


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200)
