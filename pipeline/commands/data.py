"""`coatnet data`: packs, indexes or verifies with a progress bar, and prints a report or JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.urls import without_secrets
from pipeline.formatting import pluralize

if TYPE_CHECKING:
    from data.packing.index import Report
    from data.packing.pack import HoldoutReport, PackReport, SetReport
    from data.packing.parts import NotLast


MAX_LISTED = 20


def pack_and_report(
    source: str, destination: str, part: str | None, workers: int | None, as_json: bool, **options: Any
) -> int:
    """Packs with a progress bar, prints the report; returns the exit status. `options` are those of `pack`."""
    from data.packing.pack import pack
    from data.packing.parts import NotLast
    from data.packing.work import parse_part

    options |= {"part": part and parse_part(part), "workers": workers or _cpus()}
    try:
        with _bar("packing") as progress:
            report = pack(source, destination, **options, progress=progress, listed=lambda count: progress(count, None))
    except NotLast as ended:
        return _print_part(ended, as_json)
    resumed = f"; resumed after {report.kept} finished shards" if report.kept else ""
    summary = f"{destination}: {_counts(report)}; {len(report.broken)} left out{resumed}"
    if report.holdout:
        summary += f"\n{_describe_holdout(destination, report.holdout)}"
    _print(report, as_json, "left out", summary)
    return 0


def _describe_holdout(destination: str, holdout: HoldoutReport) -> str:
    from data.packing.label_reading import abbreviate
    from data.shards.manifest import join

    lines = [f"{join(destination, name)}: {_counts(getattr(holdout, name))}" for name in ("train", "val")]
    if holdout.copies:
        lines.append(f"byte-for-byte copies of other images, each in the same set as its original: {holdout.copies}")
    if holdout.missing_in_val:
        lines.append(f"classes with too few images to have one in val: {abbreviate(holdout.missing_in_val)}")
    return "\n".join(lines)


def index_and_report(
    url: str,
    out: str | None,
    decode: bool,
    classes: str | None,
    label_field: str | None,
    part: str | None,
    workers: int | None,
    as_json: bool,
) -> int:
    """Indexes with a progress bar, prints the report; returns the exit status."""
    from data.packing.index import DamagedTars, index
    from data.packing.parts import NotLast
    from data.packing.work import parse_part

    options: dict[str, Any] = {"decode": decode, "classes": classes, "label_field": label_field}
    options |= {"part": part and parse_part(part), "workers": workers or (_cpus() if decode else 16)}
    try:
        with _bar("indexing") as progress:
            report = index(url, out, **options, progress=progress)
    except NotLast as ended:
        return _print_part(ended, as_json)
    except DamagedTars as damaged:
        _print(damaged.report, as_json, "cannot be used")
        raise
    kept = f"; {report.kept} shards were already indexed" if report.kept else ""
    summary = f"{out or url}: {_counts(report)}; {len(report.broken)} that cannot be used{kept}"
    _print(report, as_json, "cannot be used", summary)
    return 0


def verify_and_report(url: str, part: str | None, workers: int | None, as_json: bool, **options: Any) -> int:
    """Verifies with a progress bar, prints the report; returns the exit status, 1 if anything is broken.

    `options` are those of `verify`.
    """
    from data.packing.parts import NotLast
    from data.packing.verify import SampledReport, verify
    from data.packing.work import parse_part

    options |= {"part": part and parse_part(part), "workers": workers or _cpus()}
    try:
        with _bar("checking") as progress:
            report = verify(url, **options, progress=progress)
    except NotLast as ended:
        return _print_part(ended, as_json)
    _print(report, as_json, "broken", f"{url}: {_counts(report)}; {len(report.broken) or 'nothing'} broken")
    if isinstance(report, SampledReport) and not as_json:
        print(report.proves)
    if report.unchecked and not as_json:
        print(
            f"hint: {report.unchecked} samples have no recorded checksum; to record them, remove manifest.json and run"
            " `coatnet data index URL --decode` on the tars"
        )
    return 1 if report.broken else 0


def _print_part(ended: NotLast, as_json: bool) -> int:
    print(json.dumps(ended.standing) if as_json else without_secrets(str(ended)))
    return 0


def _counts(report: Report | SetReport) -> str:
    size = f"{report.bytes / 1e6:.1f} MB"
    classes, shards = pluralize(report.classes, "class", "classes"), pluralize(report.shards, "shard")
    return f"{pluralize(report.samples, 'sample')} of {classes} in {shards}, {size}"


def _print(report: Report | PackReport, as_json: bool, label: str, summary: str = "") -> None:
    """The report as JSON; or all shards that are broken as a whole, the first broken samples, and the summary."""
    if as_json:
        print(json.dumps(asdict(report)))
        return
    shards, samples = ([each for each in report.broken if bool(each.key) == part] for part in (False, True))
    for each in (*shards, *samples[:MAX_LISTED]):
        place = " ".join(name for name in (each.shard, each.key) if name)
        print(f"{label}: {place}: {each.reason}", file=sys.stderr)
    if len(samples) > MAX_LISTED:
        print(f"and {len(samples) - MAX_LISTED} more; --json lists all", file=sys.stderr)
    if report.labels:
        print(f"labels: {report.labels}")
    if summary:
        print(without_secrets(summary))


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar, only on a terminal; yields a function of what is done, and of how much, if that is known."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
