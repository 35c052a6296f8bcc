"""`coatnet replay`: one step of a run again, in memory, to see which samples and which layer made it what it was.

Nothing in the run's folder changes, which may be that of a run that is alive. Where the run's figures of the steps that
are done again are not met, up to rounding, that is a finding too, with exit status 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.history import (
    Span,
    Stretch,
    Values,
    attempts_of,
    checkpoints_on,
    path_to,
    read_history,
    recorded_values,
)
from pipeline.checkpoint.reader import step_of
from pipeline.commands.evaluate import launch_apart
from pipeline.commands.finetune import load_source, source_of
from pipeline.distributed.environment import is_rank, rank_and_world_size
from pipeline.errors import UsageError
from pipeline.formatting import format_duration, format_number, format_percent, format_ranges, pluralize
from pipeline.plan import check_ranks, training_set
from pipeline.run.jsonl import JsonLines, read_metrics

if TYPE_CHECKING:
    import torch

    from pipeline.replay import Replay
    from pipeline.train import Forward

SHOWN, ON_THE_SHEET = 8, 48
"""Samples in the table, and on the sheet: the worst ones."""


@dataclass(frozen=True)
class Found:
    """What a run's records say of a step: the path that led to it, the checkpoints on it, the attempts that did it, and
    the values that were recorded of the path's steps."""

    run: Path
    path: list[Span]
    folders: list[Path]
    attempts: list[int]
    recorded: dict[int, Values]

    @property
    def stretch(self) -> Stretch:
        return self.path[0].stretch

    @property
    def step(self) -> int:
        return self.path[0].end


def replay(run: str, step: int, out: str | None, attempt: int | None, from_start: bool, procs: int) -> int:
    """Does the step again and prints what is to be seen; returns the exit status."""
    place = None if out is None else _checked_place(Path(out), Path(run))
    if not is_rank():  # what is wrong with the request is said at once
        found = find(Path(run), step, attempt, from_start)
        _check_data(found)
        check_ranks(found.stretch.config, procs)
        if place is not None:
            _make(place)
        return launch_apart(procs)
    from pipeline.distributed.collectives import from_rank_zero
    from pipeline.training.engine import start_process_group

    device = start_process_group()
    return replay_on_ranks(from_rank_zero(lambda: find(Path(run), step, attempt, from_start)), place, device)


def replay_on_ranks(found: Found, place: Path | None, device: torch.device, forward: Forward | None = None) -> int:
    """The same on every rank, of what rank 0 has found. Collective."""
    from pipeline.distributed.collectives import manifest_from_rank_zero
    from pipeline.replay import replay_step
    from pipeline.train import micro_batch_loss

    rank, world_size = rank_and_world_size()
    check_ranks(found.stretch.config, world_size)
    if rank == 0:
        print("\n".join(_introduction(found, world_size)), flush=True)
    first_weights = None
    if not found.folders and (found.run / "source.json").exists():
        classes = training_set(found.stretch.config, read=manifest_from_rank_zero)[0].classes
        first_weights = partial(load_source, found.stretch.config, classes, source_of(found.run, None, None))
    done = replay_step(found.path, found.folders, device, first_weights, forward or micro_batch_loss)
    lines, differs = _comparison(found, done, world_size)
    if rank == 0:
        print("\n".join([*lines, *_first_not_finite(done), *_samples(done), *_layers(done)]))
        if place is not None:
            write_folder(place, found, done)
            print(
                f"{place}: every sample in samples.jsonl, every layer in layers.jsonl, the worst samples in sheet.png"
            )
    return int(differs and rank == 0)  # after all else: the launcher ends the others soon after one that fails


def find(run: Path, step: int, attempt: int | None, from_start: bool) -> Found:
    """What is known of a step; UsageError where it was not done, or there is no checkpoint to begin from."""
    if not (run / "events.jsonl").exists():
        raise UsageError(f"{run} is not a run: it has no events.jsonl")
    history = read_history(run)
    done_by = attempts_of(history, step)
    numbers = [each.attempt for each in done_by]
    if attempt is not None and attempt not in numbers:
        raise UsageError(
            f"--attempt={attempt}: step {step} was done by attempt {' and '.join(map(str, sorted(numbers)))}"
        )
    path = path_to(history, done_by[-1 if attempt is None else numbers.index(attempt)], step)
    folders = [] if from_start else checkpoints_on(run, path)
    if not folders and not from_start:
        raise UsageError(
            f"{run} no longer has a checkpoint before step {step}; --from-start trains all"
            f" {pluralize(step, 'step')}{_pace(run, step, 1)}"
        )
    return Found(run, path, folders, numbers, recorded_values(run, history, path))


def _check_data(found: Found) -> None:
    try:
        training_set(found.stretch.config)
    except UsageError as error:
        place = found.run / "config.yaml"
        raise UsageError(
            f"{error}. A replay reads the run's data: set data.train in {place} to where it is now"
        ) from None


def _checked_place(place: Path, run: Path) -> Path:
    if place.resolve().is_relative_to(run.resolve()):
        raise UsageError(f"--out={place} is in the run's folder, which a replay must not change; choose another")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UsageError(f"--out={place} already exists; choose a new folder")
    return place


def _make(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out={place} cannot be created: {error.strerror}; choose another folder") from None


def _introduction(found: Found, world_size: int) -> list[str]:
    then, folder, again = found.stretch, found.folders[-1:], ""
    if others := sorted({*found.attempts} - {then.attempt}):
        again = f" (--attempt {' or '.join(map(str, others))} did it too)"
    where = folder[0].relative_to(found.run) if folder else "the first weights"
    steps = found.step - (step_of(folder[0]) if folder else 0)
    return [
        f"step {found.step} of {found.run}, as attempt {then.attempt} did it on {_machines(then)}{again}",
        f"from {where}: {pluralize(steps, 'step')}{_pace(found.run, steps, then.world_size / world_size)}",
    ]


def _machines(stretch: Stretch) -> str:
    with_device = f" ({stretch.device})" * (stretch.device is not None)
    return f"{pluralize(stretch.world_size, 'rank')}{with_device} at ZeRO stage {stretch.config.zero.stage}"


def _pace(run: Path, steps: int, share: float) -> str:
    """About how long steps take at the run's pace, where a rank does `share` times what one did then."""
    seconds = [row["step_seconds"] for row in read_metrics(run, step_seconds=float)]
    return f", about {format_duration(steps * share * statistics.median(seconds))}" if seconds else ""


def _comparison(found: Found, done: Replay, world_size: int) -> tuple[list[str], bool]:
    """What the step was, and how it and those before it agree with what was recorded; and whether they differ."""
    from pipeline.replay import LOSS_TOLERANCE, NORM_TOLERANCE, agreement

    values, then = done.values[found.step], found.stretch
    was = f"step {found.step}: {_values(values)}; {f'not applied: {done.reason}' if done.reason else 'applied'}"
    both = {step: (found.recorded[step], now) for step, now in done.values.items() if step in found.recorded}
    how = {step: agreement(*pair) for step, pair in both.items()}
    if not both:
        return [
            was,
            f"the run recorded none of these steps (log.every={then.config.log.every}): nothing to compare",
        ], False
    if differing := [step for step in both if how[step] == "different"]:
        there, here = both[differing[0]]
        first = "" if done.exact else f" First replay on what the run had: {_machines(then)}."
        wrong = f"WARNING: step {differing[0]} had {_values(there)} in the run and has {_values(here)} now, more than"
        cause = "unless code, packages or data have changed, one of the devices computes wrongly"
        return [was, f"{wrong} rounding explains: {cause}.{first}"], True
    steps = f"step{'s' * (len(both) > 1)} {', '.join(format_ranges(both))}"
    same = f"{steps}: loss and gradient norm match what the run recorded"
    if set(how.values()) == {"equal to the bit"}:
        return [was, f"{same}, to the bit{', as they must be' * done.exact}"], False
    why = f"only {_machines(then)} and torch {then.torch}, as in the run, on the same kind of CPU give the same bits"
    near = f"within {format_percent(LOSS_TOLERANCE)} and {format_percent(NORM_TOLERANCE)}"
    return [was, f"{same}, {near} (here {pluralize(world_size, 'rank')}; {why})"], False


def _values(values: Values) -> str:
    return f"loss {values.loss:.9g}" + ("" if math.isnan(values.grad_norm) else f", norm {values.grad_norm:.9g}")


def _first_not_finite(done: Replay) -> list[str]:
    lines = []
    for each in done.examination.first[:SHOWN]:
        others = f", and {pluralize(len(each['keys']) - 1, 'more sample', 'more samples')} at once"
        lines.append(
            f"first non-finite in the {each['direction']}, at {each['place']}: {each['keys'][0]}"
            + others * (len(each["keys"]) > 1)
        )
    return lines or ["every activation and gradient is finite"]


def _samples(done: Replay) -> list[str]:
    """The worst samples as a table."""
    cells = [("sample", "loss", "logits", "own gradient", "mixed with", "not finite from")]
    for row in done.examination.worst(SHOWN):
        norm, share = row["own_gradient_norm"], format_percent(1 - row["own_share"])
        cells.append((
            row["key"] + " (replaced)" * row["replaced"],
            format_number(row["loss"]),
            f"{format_number(row['lowest_logit'])} to {format_number(row['highest_logit'])}",
            "" if norm is None else format_number(norm),
            f"{share} of {row['mixed_with']}" if row["mixed_with"] else "",
            row["place"] or "",
        ))  # fmt: skip
    return [f"the worst of {len(done.examination.samples)} samples:", *_table(cells)]


def _layers(done: Replay) -> list[str]:
    cells = [("layer", "largest activation", "of", "largest gradient", "of")]
    for row in done.examination.layers:
        numbers = format_number(row["activation"]), f"{row['gradient']:.3g}"
        cells.append((row["layer"], numbers[0], row["activation_of"], numbers[1], row["gradient_of"]))
    return _table(cells)


def _table(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows, the first with headings, without columns that have nothing else."""
    columns = [column for column in zip(*cells, strict=True) if any(column[1:])]
    padded = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    return ["  ".join(("", *row)).rstrip() for row in zip(*padded, strict=True)]


def write_folder(place: Path, found: Found, done: Replay) -> None:
    """Writes what is known of every sample and layer, and the sheet of the worst samples, with their draws."""
    from pipeline.commands.preview import items_at, sheet

    place.mkdir(parents=True, exist_ok=True)
    worst, size = done.examination.worst(ON_THE_SHEET), done.config.train.micro_batch
    for name, rows in (("samples", done.examination.samples), ("layers", done.examination.layers)):
        lines = JsonLines(place / f"{name}.jsonl")
        for row in rows:
            lines.write(row)
        lines.close()
    numbers = sorted({row["position"] // size for row in worst})
    items = items_at(done.config, done.plan.train, done.plan.order, numbers)
    of_position = dict(zip((n * size + i for n in numbers for i in range(size)), items, strict=True))
    shown = [(of_position[row["position"]], [row["key"], f"loss {format_number(row['loss'])}"]) for row in worst]
    title = f"{found.run}: the worst samples of step {found.step}; left: centre crop, right: as the model saw them"
    (place / "sheet.png").write_bytes(sheet([replace(item, lines=lines + item.lines) for item, lines in shown], title))
