"""`coatnet status` for people and as JSON: the table, the lines of one run, and watching."""

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
from pipeline.formatting import format_duration, format_number, format_percent
from pipeline.lineage import format_lineage
from slurm import scheduler
from slurm.status import SECONDS_BETWEEN_LOOKS, Status, read_runs, runs_of


def status(paths: list[Path], as_json: bool, watch: bool) -> int:
    """Prints where runs (or a folder's) stand; returns the exit status, 1 where Slurm did not answer."""
    if as_json and watch:
        raise UsageError("--json prints one document and --watch many lines: leave out one of them")
    runs, single = runs_of(paths), len(paths) == 1 and scheduler.is_run(paths[0])
    if watch:
        return _watch(runs, single)
    found, problem = read_runs(runs)
    if as_json:
        documents = [asdict(each) for each in found]
        print(json.dumps(documents[0] if single else documents))
    else:
        _console().print(as_table(found, single))
    if problem:
        print(f"coatnet: {problem}; this is what the folders say", file=sys.stderr)
    return 1 if problem else 0


# ---------------------------------------------------------------------------------------------------------- printing


def as_table(found: Sequence[Status], single: bool) -> Group | Table:
    """One run as a few lines, several as a table."""
    if single:
        return Group(*map(Text, as_lines(found[0])))
    titles = ("run", "state", "step", "loss", "img/s", "left", "restarts", "goodput", "job", "why")
    table = Table(*titles, box=None, pad_edge=False)
    for each in found:
        job = each.jobs[-1]["job"] if each.jobs else ""
        facts = (_step(each), _loss(each), _speed(each), _left(each), str(each.restarts))
        row = (each.run, each.state, *facts, _percent(each.goodput), job, each.reason or "")
        table.add_row(*map(Text, row))
    return table


def as_lines(status: Status) -> list[str]:
    """What a person wants to know of one run."""
    left = (
        f", {_left(status)} of training left"
        if status.seconds_left and status.state not in ("failed", "cancelled")
        else ""
    )
    newest, count = status.checkpoints["newest"], status.checkpoints["count"]
    said = [f"{status.run}: {status.state}, step {_step(status)}{left}"]
    said += [f"  {status.reason}"] if status.reason else []
    said += [f"  loss {_loss(status)}, {_speed(status)} img/s"] if status.loss is not None else []
    said += [f"  goodput {_percent(status.goodput)}"] if status.goodput is not None else []
    said += [f"  restarted {'once' if status.restarts == 1 else f'{status.restarts} times'}"] if status.restarts else []
    if bad := status.not_applied:
        said.append(f"  {len(bad)} {'step was' if len(bad) == 1 else 'steps were'} not applied, the last {bad[-1]:,}")
    for back in status.rollbacks:
        said.append(f"  rolled back to step {back['to']:,} and past steps {back['first']:,} to {back['last']:,}")
    said += [f"  {count} checkpoints, the newest of step {newest}"] if count else ["  no checkpoint yet"]
    for job in status.jobs:
        where = f" on {', '.join(job['nodes'])}" if job["nodes"] else ""
        why = f" ({job['reason']})" if job["reason"] else ""
        said.append(f"  job {job['job']}: {job['state'] or 'gone'}{where}{why}")
    return said + format_lineage(status.ancestry)


def _watch(runs: Sequence[Path], single: bool) -> int:
    console = _console()
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                found, problem = read_runs(runs)
                view = Group(as_table(found, single), Text(problem or ""))
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            return 0


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 200)


def _step(status: Status) -> str:
    return f"{status.step:,}" if status.steps is None else f"{status.step:,}/{status.steps:,}"


def _loss(status: Status) -> str:
    return "" if status.loss is None else format_number(float(status.loss))


def _speed(status: Status) -> str:
    return "" if status.images_per_second is None else format_number(status.images_per_second)


def _percent(share: float | None) -> str:
    return "" if share is None else format_percent(share)


def _left(status: Status) -> str:
    return format_duration(status.seconds_left) if status.seconds_left else ""
