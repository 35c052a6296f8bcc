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
    from data.packing.pack import HoldoutReport, PackReport, PartReport, SetReport


MAX_LISTED = 20


def pack_and_report(source: str, destination: str, workers: int | None, as_json: bool, **options: Any) -> int:
    """Packs with a progress bar, prints the report; returns the exit status. `options` are those of `pack`."""
    from data.packing.pack import PartReport, pack

    with _bar("packing") as progress:
        report = pack(
            source,
            destination,
            workers=workers or _cpus(),
            progress=progress,
            listed=lambda count: progress(count, None),
            **options,
        )
    if isinstance(report, PartReport):
        _print(report, as_json, "left out", f"{destination}: {_describe_part(report)}")
        return 0
    resumed = f"; resumed after {report.kept} whole shards" if report.kept else ""
    summary = f"{destination}: {_counts(report)}; {len(report.broken)} left out{resumed}"
    if report.holdout:
        summary += f"\n{_describe_holdout(destination, report.holdout)}"
    _print(report, as_json, "left out", summary)
    return 0


def _describe_part(report: PartReport) -> str:
    if not report.shards_in_all:
        return "complete already; nothing is changed"
    if report.part.startswith("part 0 "):
        images, shards = pluralize(report.images, "image"), pluralize(report.shards_in_all, "shard")
        return f"{images} are planned in {shards}, of which {report.shards_left} are to be packed"
    own = f"{report.part}: {pluralize(report.shards, 'shard')} of {pluralize(report.images, 'image')} done"
    return f"{own}, {len(report.broken)} left out; {report.shards_left} of {report.shards_in_all} shards to go"


def _describe_holdout(destination: str, holdout: HoldoutReport) -> str:
    from data.packing.label_reading import abbreviate
    from data.shards.manifest import join

    lines = [f"{join(destination, name)}: {_counts(getattr(holdout, name))}" for name in ("train", "val")]
    if holdout.copies:
        lines.append(f"copies of other images, byte for byte, each in the same set as its original: {holdout.copies}")
    if holdout.missing_in_val:
        lines.append(f"classes with too few images to have one in val: {abbreviate(holdout.missing_in_val)}")
    return "\n".join(lines)


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
    from data.packing.index import DamagedTars, index

    options: dict[str, Any] = {"decode": decode, "classes": classes, "label_field": label_field}
    try:
        with _bar("indexing") as progress:
            report = index(url, out, **options, workers=workers or (_cpus() if decode else 16), progress=progress)
    except DamagedTars as damaged:
        _print(damaged.report, as_json, "cannot be used")
        raise
    kept = f"; {report.kept} shards were indexed before" if report.kept else ""
    summary = f"{out or url}: {_counts(report)}; {len(report.broken)} that cannot be used{kept}"
    _print(report, as_json, "cannot be used", summary)
    return 0


def verify_and_report(url: str, workers: int | None, as_json: bool) -> int:
    """Verifies with a progress bar, prints the report; returns the exit status, 1 if anything is broken."""
    from data.packing.verify import verify

    with _bar("checking") as progress:
        report = verify(url, workers=workers or _cpus(), progress=progress)
    _print(report, as_json, "broken", f"{url}: {_counts(report)}; {len(report.broken) or 'nothing'} broken")
    if report.unchecked and not as_json:
        print(
            f"hint: {report.unchecked} samples have no checksum to compare; `coatnet data index URL --decode` of"
            " the tars records them, once their manifest.json is removed"
        )
    return 1 if report.broken else 0


def _counts(report: Report | SetReport) -> str:
    size = f"{report.bytes / 1e6:.1f} MB"
    classes, shards = pluralize(report.classes, "class", "classes"), pluralize(report.shards, "shard")
    return f"{pluralize(report.samples, 'sample')} of {classes} in {shards}, {size}"


def _print(report: Report | PackReport | PartReport, as_json: bool, label: str, summary: str = "") -> None:
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
