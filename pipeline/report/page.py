"""A run's page, or that of several side by side: one HTML file that needs nothing else, no script and no network."""

from __future__ import annotations

import base64
import io
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from data.urls import without_secrets
from pipeline.config.parsing import to_yaml
from pipeline.errors import UsageError, first_line
from pipeline.formatting import format_duration, format_number, format_percent, format_seconds, pluralize
from pipeline.lineage import format_lineage
from pipeline.monitoring.summary import training_summary
from pipeline.report import charts
from pipeline.report.accounting import KINDS, PRODUCTIVE
from pipeline.report.against_plan import against_plan
from pipeline.report.charts import Curve, Marks
from pipeline.report.mistakes import Verdicts
from pipeline.report.record import RunRecord, describe_end, differences
from pipeline.run.events import steps_not_applied
from pipeline.training.model import count_model

MOST_ROWS, MOST_CLASSES, MOST_PIXELS = 100, 25, 224
"""Of a table, of a matrix of classes, and of a picture's side: so that the page stays below 2 MB."""
_COLORS = ("#2a9d5c", "#d64550", "#3b82d6", "#c9a000", "#e07b1a", "#7c2d3e", "#8b8f98", "#c3c6cc")
"""Of KINDS."""
_CURVES = (
    ("loss", {"loss": "training", "eval_loss": "evaluation"}, 1.0),
    ("accuracy", {"top1": "top-1", "top5": "top-5"}, None),
    ("learning rate", {"lr": "learning rate"}, 1.0),
    ("norm of the gradient, before clipping", {"grad_norm": "norm"}, 1.0),
    ("images per second", {"images_per_second": "images/s"}, 1.0),
    ("share of the time spent waiting for data", {"data_wait": "waiting"}, None),
    ("model-FLOP utilisation", {"mfu": "MFU"}, None),
    ("memory of rank 0, GB", {"memory_bytes": "memory"}, 1e-9),
)
"""Title, keys of rows with their names, and a factor; None of shares."""


def run_page(record: RunRecord, sheet: Sequence[Any], verdicts: Verdicts | None, missing: Sequence[str]) -> str:
    """The page of one run. `sheet` has training samples (preview.SheetItem), `missing` what is not shown and why."""
    preset, config, missing = record.against_preset(), record.config, [*record.missing, *missing]
    try:
        planned = against_plan(record)
    except UsageError as error:
        planned, missing = None, [*missing, f"the planned cost: {first_line(error)}"]
    return _render(
        title=f"{record.run.resolve().name}: {record.end}",
        tiles=[(name, value) for name, value in _facts(record).items() if value],
        missing=missing,
        summary=_summary(record),
        charts=_charts([record]),
        marked=len(record.accounts.attempts) > 1 or steps_not_applied(record.events),
        spent=_spent([record]),
        planned=planned,
        attempts=_attempts(record),
        skipped=[
            (f"{row['step']:,}", row.get("reason"), _few(row.get("keys", [])))
            for row in steps_not_applied(record.events)
        ][-MOST_ROWS:],
        replaced=_replaced(record),
        verdicts=_verdicts(verdicts) if verdicts is not None and verdicts.samples else None,
        sheet=[{"images": _images(each.original, each.augmented), "lines": each.lines} for each in sheet],
        mixed=config is not None and config.augment.mixup,
        preset={"name": preset[0], "rows": _cells(preset[1])} if preset and preset[1] else None,
        config=to_yaml(config) if config is not None else "",
    )


def comparison_page(records: Sequence[RunRecord]) -> str:
    """The page of several runs."""
    names, facts, differing = _names(records), [_facts(each) for each in records], differences(records)
    return _render(
        title=f"{len(records)} runs: {', '.join(names)}",
        missing=[f"of {name}, {line}" for name, each in zip(names, records, strict=True) for line in each.missing],
        facts={"head": ["", *names], "rows": [(fact, *(each[fact] for each in facts)) for fact in facts[0]]},
        differing={"head": ["key", *names], "rows": _cells(differing)} if differing else None,
        charts=_charts(records),
        spent=_spent(records),
    )


def _render(**found: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: without_secrets(value) if type(value) is str else value,
    )
    made = time.strftime("written %Y-%m-%d %H:%M:%S by coatnet report")
    return environment.get_template("page.html").render(made=made, **found)


def _facts(record: RunRecord) -> dict[str, str]:
    """Where a run stands, in few words; what is unknown is empty."""
    last, evaluated = record.rows[-1] if record.rows else {}, [row for row in record.evaluations if "top1" in row]
    best = max(evaluated, key=lambda row: row["top1"], default=None)
    speeds = [row["images_per_second"] for row in record.rows if "images_per_second" in row]
    goodput, of = record.accounts.goodput, "" if record.steps is None else f" of {record.steps:,}"
    return {
        "state": record.end,
        "step": f"{record.step:,}{of}",
        "newest checkpoint": f"step {record.state['step']:,}" if record.state else "",
        "best top-1": f"{format_percent(best['top1'], 2)} at step {best['step']:,}" if best else "",
        "last top-1": f"{format_percent(evaluated[-1]['top1'], 2)} ({evaluated[-1].get('weights')})" if best else "",
        "last training loss": format_number(last["loss"]) if "loss" in last else "",
        "images per second, median": format_number(statistics.median(speeds)) if speeds else "",
        "wall clock": format_duration(record.accounts.wall),
        "goodput": "" if goodput is None else format_percent(goodput, 1),
        "attempts": str(len(record.accounts.attempts)),
    }


def _summary(record: RunRecord) -> list[str]:
    """What was trained from what, on what."""
    config, classes = record.config, record.state.get("classes", [])
    if config is None:
        return []
    ranks = next((each.ranks for each in reversed(record.accounts.attempts) if each.ranks), None)
    number, lines = len(classes) or config.model.classes, []
    if number and ranks:
        counts = count_model(config.model, config.train, number)
        lines += training_summary(config.model, config.train, config.zero, number, counts, ranks, record.samples)
    lines += [f"trained on {config.data.train}", *([f"evaluated on {config.data.val}"] if config.data.val else [])]
    lines += [f"classes: {_few(classes)}"] if classes else []
    return [*lines, *(line.strip() for line in format_lineage(record.lineage))]


def _charts(records: Sequence[RunRecord]) -> list[Markup]:
    """Of one run, curves of a kind share a chart; of several, each has one with a curve for each run."""
    drawn, names = [], _names(records)
    for title, keys, factor in _CURVES:
        groups = [keys] if len(records) == 1 else [{key: name} for key, name in keys.items()]
        for group in groups:
            found = [
                Curve(
                    label if len(records) == 1 else name,
                    [row["step"] for row in rows],
                    [(factor or 1.0) * row[key] for row in rows],
                    dots=rows is not record.rows and key not in record.rows[0],
                )
                for name, record in zip(names, records, strict=True)
                for key, label in group.items()
                if (
                    rows := [
                        row for row in (*record.rows, *record.evaluations) if isinstance(row.get(key), int | float)
                    ]
                )
            ]
            marks = _marks(records[0]) if len(records) == 1 else Marks()
            head = title if len(groups) == 1 else f"{title}: {', '.join(group.values())}"
            drawn += [Markup(charts.curves(head, found, marks, percent=factor is None))] if found else []
    return drawn


def _marks(record: RunRecord) -> Marks:
    backs = [(row["first"], row["last"]) for row in record.of("rollback")]
    skipped = [row["step"] for row in steps_not_applied(record.events)]
    return Marks([each.first for each in record.accounts.attempts[1:]], backs, skipped)


def _spent(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The seconds of each kind as a bar for each run and as one table."""
    names, accounts = _names(records), [record.accounts for record in records]
    bars = [
        {"name": name, "parts": [(kind, color, f"{100 * seconds / each.wall:.3f}") for kind, color, seconds in parts]}
        for name, each in zip(names, accounts, strict=True)
        if (parts := [part for part in zip(KINDS, _COLORS, each.seconds, strict=True) if part[2]])
    ]
    rows = [
        (_keyed(kind, color), *(_of_all(each.seconds[place], each.wall) for each in accounts))
        for place, (kind, color) in enumerate(zip(KINDS, _COLORS, strict=True))
        if any(each.seconds[place] for each in accounts)
    ]
    rows += [("wall clock", *(format_seconds(each.wall) for each in accounts))]
    goodputs = ("" if each.goodput is None else format_percent(each.goodput, 1) for each in accounts)
    return {
        "bars": bars,
        "head": ["", *(names if len(names) > 1 else ["time"])],
        "rows": [*rows, ("goodput", *goodputs)],
    }


def _of_all(seconds: float, wall: float) -> str:
    return f"{format_seconds(seconds)} ({format_percent(seconds / wall, 1)})" if seconds else ""


def _attempts(record: RunRecord) -> list[tuple[str, ...]]:
    found = record.accounts.attempts
    return [
        (
            str(each.number),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.began)),
            format_seconds(each.ended - each.began),
            "" if each.ranks is None else str(each.ranks),
            f"{each.first + 1:,} to {each.last:,}" if each.last > each.first else "none",
            format_percent(each.seconds[PRODUCTIVE] / max(sum(each.seconds), 1e-9)),
            describe_end(each, record.is_alive and each is found[-1]),
        )
        for each in found[-MOST_ROWS:]
    ]


def _replaced(record: RunRecord) -> list[tuple[str, ...]]:
    """Each sample that was, with the steps, the reason and nothing twice that was done again."""
    steps: dict[tuple[str, str], set[int]] = {}
    for row in record.of("sample_replaced"):
        steps.setdefault((row["key"], row["reason"]), set()).add(row["step"])
    return [
        (key, reason, _few([f"{step:,}" for step in sorted(at)]))
        for (key, reason), at in list(steps.items())[-MOST_ROWS:]
    ]


def _verdicts(found: Verdicts) -> dict[str, Any]:
    confidence, accuracy, share, error = found.calibration()
    by_class, few = found.by_class(), len(found.classes) <= MOST_CLASSES
    return {
        "line": f"{pluralize(found.samples, 'sample')}: top-1 {format_percent(found.top1, 2)}",
        "matrix": Markup(charts.confusion(found.matrix(), found.classes)) if few else None,
        "pairs": [(true, said, f"{n:,}", format_percent(n / of, 1)) for true, said, n, of in found.worst_pairs(15)],
        "classes": [(name, f"{of:,}", format_percent(n / of, 1)) for name, of, n in by_class[:MOST_ROWS]],
        "cut": MOST_ROWS if len(by_class) > MOST_ROWS else None,
        "calibration": f"Expected calibration error {format_percent(error, 2)}.",
        "reliability": Markup(charts.reliability(confidence.tolist(), accuracy.tolist(), share.tolist())),
        "mistakes": [
            {
                "images": _images(each.image),
                "lines": [
                    f"{' or '.join(each.true)}, taken for {each.predicted} at {format_percent(each.confidence, 1)}",
                    each.key,
                ],
            }
            for each in found.mistakes
        ],
    }


def _images(*pictures: np.ndarray) -> list[dict[str, Any]]:
    """Pictures, uint8 [side, side, 3], as data URIs: small ones exactly, others as JPEG."""
    found = []
    for picture in pictures:
        image, photo = Image.fromarray(picture), picture.shape[0] > 64
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
        image.save(file := io.BytesIO(), *(("JPEG",) if photo else ("PNG",)), quality=85)
        kind = "jpeg" if photo else "png"
        found.append({"uri": f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", "photo": photo})
    return found


def _names(records: Sequence[RunRecord]) -> list[str]:
    short = [record.run.resolve().name for record in records]
    return short if len(set(short)) == len(short) else [str(record.run) for record in records]


def _cells(values: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, *(each if isinstance(each, str) else json.dumps(each) for each in row)) for name, row in values.items()
    ]


def _keyed(kind: str, color: str) -> Markup:
    return Markup('<span class="key" style="background: {}"></span>{}').format(color, kind)


def _few(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
