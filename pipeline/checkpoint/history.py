"""What each attempt of a run trained, from the run's records: which did a step, from where, and what was noted of it.

An attempt trains a *stretch*: the steps after the checkpoint that it resumed from, less those that rollbacks skip.
Before that checkpoint the steps are an earlier attempt's. So a step may have been done several times, and what leads
up to one of them is a path through stretches. Nothing here imports torch, or writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.checkpoint.attempts import recorded_rollbacks
from pipeline.checkpoint.reader import CheckpointReader, DamagedCheckpoint, checkpoints, step_of
from pipeline.config.parsing import read_resolved, validate
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.run.events import BEGIN_EVENTS, last_logged_step
from pipeline.run.jsonl import read_lines, read_metrics
from pipeline.run.small_files import has

_ENDS = ("finished", "interrupted", "rollback")
"""Events that follow an attempt's last step."""
TRIED = 3
"""The newest checkpoints before a step that are tried where one is damaged."""


@dataclass(frozen=True)
class Stretch:
    """The steps that an attempt did: those after `start`, less `skipped`, up to `reach` at least, as its records say,
    and no more where they have its end.

    `device` and `torch` are what it computed with; None where an older version did not note it.
    """

    attempt: int
    start: int
    reach: int
    has_end: bool
    skipped: frozenset[int]
    config: Config
    world_size: int
    device: str | None
    torch: str | None


class Span(NamedTuple):
    """The last steps of a path that are one stretch's, up to step `end`."""

    stretch: Stretch
    end: int


class Values(NamedTuple):
    """Of a step: its mean loss, and its gradient's norm before clipping: infinite of one that is not finite, which a
    step that was not applied is given, and NaN where it was not recorded."""

    loss: float
    grad_norm: float


def read_history(run: Path) -> list[Stretch]:
    """The stretches of a run, oldest first; UsageError where it has none, or its configuration cannot be read."""
    rows = list(read_lines(run / "events.jsonl", event=str, attempt=int))
    config = read_resolved(run / "config.yaml")
    configs: dict[int, Config] = {}
    for row in reversed([row for row in rows if row["event"] == "attempt_started"]):
        configs[row["attempt"]] = config
        config = _before(config, row.get("changed", {}), run)
    stretches: list[Stretch] = []
    begun: dict[str, Any] = {}
    for row in rows:
        step = row.get("step")
        if row["event"] == "attempt_started" and has(row, {"world_size": int}):
            begun = row
            if stretches and isinstance(left := row.get("left_step"), int):  # its metrics may be cut back since
                stretches[-1] = _reaching(stretches[-1], left)
        elif row["event"] in BEGIN_EVENTS and begun and isinstance(step, int):
            number = row["attempt"]
            if before := [each for each in stretches if each.start < step]:  # whose checkpoint this is
                stretches[stretches.index(before[-1])] = _reaching(before[-1], step)
            skipped = [range(each["first"], each["last"] + 1) for each in recorded_rollbacks(run, number)]
            made = configs[begun["attempt"]], begun["world_size"], begun.get("device"), begun.get("torch")
            stretches.append(Stretch(number, step, step, False, frozenset().union(*skipped), *made))
        elif stretches and row["attempt"] == stretches[-1].attempt:
            last = _reaching(stretches[-1], step if isinstance(step, int) else 0)
            stretches[-1] = replace(last, has_end=last.has_end or row["event"] in _ENDS)
    if not stretches:
        raise UsageError(f"{run} has not trained a step yet, according to its events.jsonl")
    return [*stretches[:-1], _reaching(stretches[-1], last_logged_step(run))]


def _reaching(stretch: Stretch, step: int) -> Stretch:
    return replace(stretch, reach=max(step, stretch.reach))


def _before(config: Config, changed: dict[str, Any], run: Path) -> Config:
    """The configuration before a start that changed these keys: name -> [old, new]."""
    tree = config.model_dump(mode="json")
    for name, (old, _) in changed.items():
        *sections, leaf = name.split(".")
        reduce(lambda part, section: part.setdefault(section, {}), sections, tree)[leaf] = old
    return validate(tree, f"{run}: the configuration of an earlier start") if changed else config


def attempts_of(history: Sequence[Stretch], step: int) -> list[Stretch]:
    """The stretches that have a step, the one that counts last; UsageError where none has.

    A run notes only every `log.every`-th step, so one that was killed may have done a few more than its records say.
    """
    having = [each for each in history if each.start < step and step not in each.skipped]
    done = [each for each in having if step < each.reach + (1 if each.has_end else each.config.log.every)]
    if done:
        return sorted(done, key=lambda each: (min(each.reach, step), each.attempt))
    reached = max(each.reach for each in history)
    if any(step in each.skipped for each in history):
        raise UsageError(f"no attempt did step {step}: a rollback skipped it")
    raise UsageError(f"step {step} is not in the run, which has done {reached} steps")


def path_to(history: Sequence[Stretch], stretch: Stretch, step: int) -> list[Span]:
    """What led up to a step of a stretch, the newest span first."""
    spans = [Span(stretch, step)]
    while (start := spans[-1].stretch.start) > 0:
        place = history.index(spans[-1].stretch)
        before = [each for each in history[:place] if each.start < start]
        if not before:
            break
        spans.append(Span(before[-1], start))
    return spans


def span_of(path: Sequence[Span], step: int) -> Span:
    """The span that a step of a path belongs to; of steps before what is known the first."""
    return next((span for span in path if span.stretch.start < step <= span.end), path[-1])


def skipped_on(path: Sequence[Span]) -> set[int]:
    """The steps of a path that rollbacks skipped."""
    return {step for span in path for step in span.stretch.skipped if span_of(path, step) is span}


def checkpoints_on(run: Path, path: Sequence[Span]) -> list[Path]:
    """The newest checkpoints before a path's last step that were written on it, oldest first.

    Those too that a rollback has abandoned.
    """
    root, step = run / "checkpoints", path[0].end
    folders = sorted([*checkpoints(root), *checkpoints(root / "abandoned")], key=step_of, reverse=True)

    def is_on(folder: Path) -> bool:
        with suppress(DamagedCheckpoint):
            return CheckpointReader(folder).attempt == span_of(path, step_of(folder)).stretch.attempt
        return False

    return list(islice((folder for folder in folders if step_of(folder) < step and is_on(folder)), TRIED))[::-1]


def recorded_values(run: Path, history: Sequence[Stretch], path: Sequence[Span]) -> dict[int, Values]:
    """What the run noted of the steps of a path, by step. Rows of metrics.jsonl are of the last attempt that did it."""
    found: dict[int, Values] = {}
    events = read_lines(run / "events.jsonl", event=str, step=int, attempt=int, loss=float | str)
    for row in [*read_metrics(run, loss=float | str), *(row for row in events if row["event"] == "step_skipped")]:
        step = row["step"]
        last = next((each.attempt for each in reversed(history) if each.start < step), None)
        if step <= path[0].end and span_of(path, step).stretch.attempt == row.get("attempt", last):
            found[step] = Values(float(row["loss"]), float(row.get("grad_norm", "nan")))
    return found
