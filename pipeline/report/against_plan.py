"""What a run would have cost by `coatnet plan`, beside what it did."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.costs.calibration import calibrated
from pipeline.costs.devices import BY_TORCH_NAME
from pipeline.costs.run_costs import Request, run_costs
from pipeline.costs.step_time import CPU, Rates
from pipeline.errors import UsageError
from pipeline.formatting import format_number, format_percent, format_seconds
from pipeline.memory.oom import format_bytes
from pipeline.report.accounting import PRODUCTIVE, WAITING
from pipeline.report.record import RunRecord
from pipeline.run.small_files import NUMBER, has

_MACHINE = {"device": str, "world_size": int}
_MEASURED = {"step_seconds": NUMBER, "images_per_second": NUMBER}


class AgainstPlan(NamedTuple):
    """What the plan rests on, and rows: what, by plan, of the run ("" where unknown)."""

    basis: str
    rows: list[tuple[str, str, str]]


def against_plan(record: RunRecord) -> AgainstPlan:
    """Of the steps that the run has done, on the ranks and devices of its last attempt; UsageError where that cannot be
    planned."""
    steps = [row for row in record.rows if has(row, _MEASURED)]
    began = next((row for row in reversed(record.of("attempt_started")) if has(row, _MACHINE)), None)
    classes = len(record.state.get("classes", [])) or (record.config.model.classes if record.config else None)
    if record.config is None or began is None or classes is None or not steps:
        raise UsageError("the run's configuration, classes, device or step times are not known")
    name, ranks = began["device"], began["world_size"]
    device = CPU if name == "cpu" else BY_TORCH_NAME.get(name)
    if device is None:
        raise UsageError(f"the device {name} is not known")
    per_node = record.config.slurm.gpus_per_node or min(8, ranks)
    try:
        rates, measured = calibrated([record.run], device, per_node) if device is CPU else (Rates(), set[str]())
    except UsageError:
        raise UsageError("a CPU's speed comes from the run's own steps; its last attempt has fewer than ten") from None
    request = Request(name, device, ranks, per_node, classes, record.samples, None, None, None)
    plan = run_costs(record.config, request, rates, measured)
    return AgainstPlan(_basis(device is CPU, plan["assumed"]), _rows(record, steps, plan, device is CPU))


def _basis(on_cpu: bool, assumed: list[str]) -> str:
    if on_cpu:
        by = "There is no data sheet for this CPU, so a planned step takes what the run's last ones took without waits."
    else:
        by = f"By the data sheet, assuming {'; '.join(assumed)}; measured rates: `coatnet plan --calibrate`."
    return f"{by} A plan does not include evaluations."


def _rows(
    record: RunRecord, steps: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], on_cpu: bool
) -> list[tuple[str, str, str]]:
    accounts, ranks, goodput = record.accounts, plan["gpus"], plan["goodput_as_configured"]
    step = statistics.median(row["step_seconds"] for row in steps)
    images = statistics.median(row["images_per_second"] for row in steps)
    undisturbed, had = record.step * plan["step_seconds"], sum(accounts.seconds[:WAITING])
    of_ranks = sum((each.ranks or 0) * sum(each.seconds[:WAITING]) for each in accounts.attempts)
    stalls = [row["seconds"] for row in record.of("checkpoint_stall")]
    rows = [
        ("time per step", format_seconds(plan["step_seconds"]), format_seconds(step)),
        ("images per second", format_number(plan["images_per_second"]), format_number(images)),
        ("stall per checkpoint", format_seconds(plan["checkpoint_stall_seconds"]), _median(stalls)),
        (f"{record.step:,} steps", format_seconds(undisturbed), format_seconds(accounts.seconds[PRODUCTIVE])),
    ]
    if goodput and accounts.goodput is not None:
        planned = undisturbed / goodput
        rows += [
            ("with saves, failures, restarts", format_seconds(planned), format_seconds(had)),
            ("the same, over all ranks", format_seconds(planned * ranks), format_seconds(of_ranks)),
            ("goodput", format_percent(goodput, 1), format_percent(accounts.goodput, 1)),
        ]
    if not on_cpu:
        most = max(row.get("memory_bytes", 0) for row in steps)
        rows.append(("GPU memory", format_bytes(plan["memory_bytes"]["total"]), format_bytes(most)))
    return rows


def _median(seconds: Sequence[float]) -> str:
    return format_seconds(statistics.median(seconds)) if seconds else ""
