"""`coatnet plan`: what a training takes and costs, before it is paid for; on any machine, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pipeline.config.parsing import read_config
from pipeline.costs.calibration import calibrated
from pipeline.costs.devices import find_device
from pipeline.costs.run_costs import CLASSES, DAY, Request, run_costs
from pipeline.costs.step_time import CPU, Rates, peak
from pipeline.errors import UsageError
from pipeline.formatting import format_duration, format_number, format_percent, format_seconds, format_si, pluralize
from pipeline.memory.oom import format_bytes
from pipeline.plan import check_ranks, readable_manifest


def plan_costs(
    preset: str,
    overrides: list[str],
    gpu: str,
    gpus: int,
    gpus_per_node: int,
    calibrations: list[str],
    price: float | None,
    failure_days: float | None,
    as_json: bool,
) -> int:
    """Prints the plan; returns the exit status."""
    config = read_config(preset, overrides)
    check_ranks(config, gpus)
    if gpu == "cpu" and not calibrations:
        raise UsageError(
            "--gpu cpu needs --calibrate, since no data sheet gives this CPU's speed: pass the metrics.jsonl of a run"
            " of at least 10 steps on it"
        )
    device = CPU if gpu == "cpu" else find_device(gpu)
    peak(device, config.train.precision)  # that there is one
    files = [Path(each) for each in calibrations]
    rates, measured = calibrated(files, device, gpus_per_node) if files else (Rates(), set[str]())
    manifest = readable_manifest(config.data.train)
    classes = config.model.classes or (len(manifest.classes) if manifest else None)
    samples = config.data.train_samples or (manifest.samples if manifest else None)
    sample_bytes = manifest.mean_sample_bytes if manifest else None
    request = Request(gpu, device, gpus, gpus_per_node, classes, samples, sample_bytes, price, failure_days)
    document = run_costs(config, request, rates, measured)
    if as_json:
        print(json.dumps(document))
        return 0
    name, side = config.model.name or "custom CoAtNet", config.model.resolution
    print(f"{name}, {side} x {side}, {pluralize(classes or CLASSES, 'class', 'classes')}")
    for heading, lines in groupby(_lines(document), key=itemgetter(0)):
        for number, (_, text) in enumerate(lines):
            print(f"{heading if number == 0 else '':12}{text}")
    if document["steps"] is None:
        print("the size of the training set is not known: set data.train_samples=... to see steps, days and GPU-days")
    return 0


def _lines(plan: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the plan says, a heading and a line each."""
    memory = plan["memory_bytes"]
    yield "parameters", f"{format_si(plan['parameters'])}; {format_si(plan['multiply_adds'])} multiply-adds an image"
    verdict = "fits" if plan["fits"] else "does not fit"
    yield "memory", f"{format_bytes(memory['total'])} of {format_bytes(plan['usable_bytes'])}: {verdict}"
    yield "", ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items() if size and name != "total")
    for change in plan["changes"]:
        takes = f"{format_bytes(change['memory_bytes'])}, {format_seconds(change['step_seconds'])} a step"
        yield "would fit", f"{change['set']}: {takes}"
    if not plan["fits"] and not plan["changes"]:
        yield "would fit", "nothing; use a device with more memory"
    speed = f"{format_number(plan['images_per_second'])} images/s, MFU {format_percent(plan['mfu'])}"
    yield "step", f"{format_seconds(plan['step_seconds'])}, {speed}"
    yield "", ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in plan["step_terms"].items() if seconds)
    if plan["steps"] is not None:
        days, longer = plan["days"], plan["days_with_failures"]
        with_failures = "it never ends" if longer is None else format_duration(DAY * longer)
        steps, gpu_days = pluralize(plan["steps"], "step"), format_number(plan["gpu_days"])
        cost = "" if plan["cost"] is None else f"; {plan['cost']:,.0f} at this price per GPU-hour"
        undisturbed = f"{format_duration(DAY * days)}, {gpu_days} GPU-days"
        yield "length", f"{steps}: {undisturbed}; with failures {with_failures}{cost}"
    stall, write = (format_seconds(plan[f"checkpoint_{name}_seconds"]) for name in ("stall", "write"))
    yield "checkpoint", f"{format_si(plan['checkpoint_bytes'], 'B')}, stalls {stall}, is written in {write}"
    every = f"checkpoint.every={plan['checkpoint_every']} ({format_seconds(plan['checkpoint_interval_seconds'])})"
    best, present = (format_percent(plan[name], 2) for name in ("goodput", "goodput_as_configured"))
    between = format_duration(3600 * plan["hours_between_failures"])
    yield "failures", f"one in {between}: best is {every}, goodput {best}; as configured {present}"
    read = f"{format_si(plan['read_bytes_per_second'], 'B')}/s in {format_number(plan['reads_per_second'])} reads/s"
    yield "input", f"{read}; if the CPU decodes, {format_number(plan['decoding_cores'])} cores a rank"
    if plan["measured"]:
        yield "measured", ", ".join(plan["measured"])
    for line in plan["assumed"]:
        yield "assumed", line
