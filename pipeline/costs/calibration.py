"""Rates that were measured, from what `coatnet bench gpu` wrote or from the metrics of a run, in place of assumed ones.

A measurement is a piece of work whose terms are known, and its seconds. The factors of the terms that explain all
measurements best are found by least squares, in relative errors; what few measurements leave open, a weak pull towards
one common factor decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config.parsing import read_resolved
from pipeline.config.schema import Augment, Config, Model, Train, Zero
from pipeline.costs.devices import BY_TORCH_NAME, Device
from pipeline.costs.run_costs import CLASSES
from pipeline.costs.step_time import Rates, scaled, step_terms
from pipeline.errors import UsageError
from pipeline.memory.activations import count_activations, estimates
from pipeline.memory.estimate import Settings
from pipeline.plan import readable_manifest
from pipeline.run.events import BEGIN_EVENTS
from pipeline.run.jsonl import read_lines, read_metrics
from pipeline.run.small_files import NUMBER, has
from pipeline.training.model import count_model

FITTED = ("compute", "memory", "calls", "collectives")
PULL = 0.1
"""Of a factor towards the common one, beside a measurement's relative error."""
_RATE = {"images/s": NUMBER}
_SPEED = {"batch": int, "side": int, "precision": str}


@dataclass(frozen=True)
class Measurement:
    """A step's terms at the assumed rates, and the seconds that it took."""

    terms: dict[str, float]
    seconds: float


def _check_device(file: Path, measured: object, device: Device) -> None:
    """UsageError for a measurement that says that it is of another device."""
    is_other = measured in BY_TORCH_NAME and measured not in device.names
    if measured is not None and (is_other or (measured == "cpu") != (device.kind == "cpu")):
        raise UsageError(
            f"--calibrate {file} was measured on another device than --gpu: {measured}; give a measurement of the"
            " device to plan for"
        )


def calibrated(files: Sequence[Path], device: Device, gpus_per_node: int) -> tuple[Rates, set[str]]:
    """The rates, and the names of those that were measured; UsageError for a file that is no calibration."""
    rates, measured, points = Rates(), set[str](), list[Measurement]()
    for file in files:
        found = list(_run(file, device, gpus_per_node)) if _is_run(file) else list(_bench(file, device))
        decoding = [] if _is_run(file) else _decoded(file)
        if not found and not decoding:
            raise UsageError(
                f"--calibrate {file} has no measurement; give a run's metrics.jsonl with 10 steps or more, or results"
                " of `coatnet bench gpu` that include a speed check"
            )
        points += found
        if decoding:
            rates, measured = replace(rates, decoding=statistics.median(decoding)), {*measured, "decoding"}
    if not points:
        return rates, measured
    factors = fitted(points)
    names = {"calls": "call_seconds"}
    return scaled(rates, factors), {*measured, *(names.get(name, name) for name in factors)}


def fitted(points: Sequence[Measurement]) -> dict[str, float]:
    """How many times as long each term takes as assumed; terms that none of the measurements has are left out."""
    shares = np.array([[_term(point, name) / point.seconds for name in FITTED] for point in points])
    common = float(np.exp(-np.log(shares.sum(axis=1)).mean()))
    present = np.asarray(shares.any(axis=0))
    shares = shares[:, present] * common
    pull = PULL * np.eye(shares.shape[1])
    wanted = np.concatenate([np.ones(len(points)), np.full(len(pull), PULL)])
    factors, *_ = np.linalg.lstsq(np.concatenate([shares, pull]), wanted, rcond=None)
    names = [name for name, is_present in zip(FITTED, present.tolist(), strict=True) if is_present]
    return {name: common * max(float(factor), PULL) for name, factor in zip(names, factors, strict=True)}


def _term(point: Measurement, name: str) -> float:
    return point.terms[name] + (point.terms["optimizer"] if name == "memory" else 0.0)


# --------------------------------------------------------------------------------------------------------------- runs


def _is_run(file: Path) -> bool:
    return file.name == "metrics.jsonl" or file.is_dir()


def _run(file: Path, device: Device, gpus_per_node: int) -> Iterator[Measurement]:
    """The median step of a run's last attempt, without what it waited for data."""
    run = file if file.is_dir() else file.parent
    if not (run / "config.yaml").exists():
        raise UsageError(f"--calibrate {file}: {run / 'config.yaml'} is missing, which says what was measured")
    config = read_resolved(run / "config.yaml")
    events = list(read_lines(run / "events.jsonl", event=str))[::-1]
    began = next((row for row in events if row["event"] == "attempt_started" and has(row, {"world_size": int})), {})
    _check_device(file, began.get("device"), device)
    ranks = began.get("world_size", 1)
    first = next((row["step"] for row in events if row["event"] in BEGIN_EVENTS and has(row, {"step": int})), 0)
    rows = [row for row in read_metrics(run, step_seconds=float, data_wait=float) if row["step"] > first]
    seconds = [row["step_seconds"] * (1 - row["data_wait"]) for row in rows[1:]]  # the first has the start-up
    if seconds and rows[-1]["step"] - rows[0]["step"] >= 9:
        settings = config.train, config.zero, ranks
        yield Measurement(_terms(config, settings, device, gpus_per_node), statistics.median(seconds))


def _terms(config: Config, settings: Settings, device: Device, gpus_per_node: int) -> dict[str, float]:
    manifest = None if config.model.classes else readable_manifest(config.data.train)
    classes = config.model.classes or (len(manifest.classes) if manifest else CLASSES)
    work = estimates(config, classes, device.kind)(settings)[1].work
    parameters = count_model(config.model, config.train, classes).parameters
    return step_terms(work, parameters, settings, device, gpus_per_node, Rates())


# ---------------------------------------------------------------------------------------------------------- bench gpu


def _bench(file: Path, device: Device) -> Iterator[Measurement]:
    """Forwards with backwards of whole networks of ours, without an optimizer."""
    if not file.exists():
        raise UsageError(f"--calibrate {file}: there is no such file")
    _check_device(file, next((row["device"] for row in read_lines(file, command=list, device=str)), None), device)
    for row in _rows(file, "speed of "):
        if row.get("network") == "ours" and has(row, _SPEED):
            batch, size = row["batch"], {"global_batch": row["batch"], "micro_batch": row["batch"]}
            train = Train(steps=1, **size, precision=row["precision"], stochastic_depth=0.0, ema=None)
            model = Model(name=row["size"], resolution=row["side"])
            work = count_activations(model, train, Augment(), CLASSES, device.kind, True).work
            terms = step_terms(work, 0, (train, Zero(), 1), device, 1, Rates())
            yield Measurement(terms, batch / row["images/s"])


def _decoded(file: Path) -> list[float]:
    return [row["images/s"] for row in _rows(file, "DALI")]


def _rows(file: Path, check: str) -> Iterator[dict]:
    """The rows with a rate of the checks whose name begins so."""
    for result in read_lines(file, check=str, rows=list):
        if result["check"].startswith(check):
            rows = (row for row in result["rows"] if has(row, _RATE) and row["images/s"] > 0)
            yield from ({"size": result["check"].rpartition(" ")[2], **row} for row in rows)
