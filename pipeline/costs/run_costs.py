"""What a training costs on devices that one may not have: memory, time, money, checkpoints, reads.

Arithmetic on counts and rates, as JSON's values; what was assumed is listed with it. Evaluations are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from data.memory import granted_bytes
from pipeline.config.batch_size import known_steps
from pipeline.config.schema import Config
from pipeline.costs.devices import Device
from pipeline.costs.reliability import best_interval, goodput
from pipeline.costs.step_time import GIGA, Rates, peak, step_seconds, step_terms
from pipeline.memory.activations import estimates
from pipeline.memory.estimate import Settings, states_of
from pipeline.memory.suggest import MARGIN, changed, fits, suggest_settings
from pipeline.training.model import count_model

DAY = 86400
GPU_DAYS_BETWEEN_FAILURES = 2000.0
"""419 interruptions in 54 days on 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4) are one in 2,110."""
RESTART_SECONDS = 300.0
WRITE_RATE = 1.0
"""GB/s that a node writes to the shared file system."""
CLASSES = 1000
"""Where neither the configuration nor a manifest says."""
SAMPLE_BYTES = 110_000
"""Of ImageNet's images on average; 140 GB are 1.28 million."""
DECODING_THREADS = 16
"""Of a rank on a GPU's machine."""


@dataclass(frozen=True)
class Request:
    """What is asked, beside the configuration. Classes, `samples` and `sample_bytes` are None where not known."""

    gpu: str
    device: Device
    gpus: int
    gpus_per_node: int
    classes: int | None
    samples: int | None
    sample_bytes: float | None
    price: float | None
    failure_days: float | None


def run_costs(config: Config, request: Request, rates: Rates, measured: set[str]) -> dict[str, Any]:
    """The document that `coatnet plan --json` prints."""
    device, settings = request.device, (config.train, config.zero, request.gpus)
    classes = request.classes or CLASSES
    counts = count_model(config.model, config.train, classes)
    estimate = estimates(config, classes, device.kind, DECODING_THREADS)

    def terms_of(settings: Settings) -> dict[str, float]:
        work = estimate(settings)[1].work
        return step_terms(work, counts.parameters, settings, device, request.gpus_per_node, rates)

    needed, activations = estimate(settings)
    usable = device.gibibytes * 2**30 or granted_bytes() // min(request.gpus, request.gpus_per_node)
    suggestions = [] if fits(needed.total, usable) else suggest_settings(settings, estimate, usable)
    changes = [
        {
            "set": str(each).replace("ranks=", "--gpus="),
            "memory_bytes": each.bytes + round(MARGIN * each.bytes),
            "step_seconds": step_seconds(terms_of(changed(settings, each.changes))),
        }
        for each in suggestions
    ]
    terms = terms_of(settings)
    seconds = step_seconds(terms)
    train, images = config.train, config.train.global_batch / seconds
    steps = known_steps(train, request.samples)
    reserve = round(MARGIN * needed.total)
    document: dict[str, Any] = {
        "gpu": request.gpu,
        "gpus": request.gpus,
        "parameters": counts.parameters,
        "multiply_adds": counts.multiply_adds,
        "memory_bytes": {**needed.components, "reserve": reserve, "total": needed.total + reserve},
        "activations_bytes": {part: size for part, size in activations.peak.items() if size},
        "usable_bytes": usable,
        "fits": fits(needed.total, usable),
        "changes": sorted(changes, key=lambda change: change["step_seconds"]),
        "step_terms": terms,
        "step_seconds": seconds,
        "images_per_second": images,
        "mfu": 6 * counts.multiply_adds * images / request.gpus / peak(device, train.precision),
        "steps": steps,
    }
    saving = checkpoint_costs(config, request, counts.parameters, seconds, rates)
    return (
        document
        | saving
        | length_costs(request, steps, seconds, saving["goodput"])
        | input_costs(config, request, images, rates)
        | {"measured": sorted(measured), "assumed": assumptions(config, request, rates, measured)}
    )


def length_costs(request: Request, steps: int | None, seconds: float, share: float) -> dict[str, Any]:
    """Days of undisturbed training, and what it comes to with the time that failures and saves take; null: unknown, or
    without end."""
    days = None if steps is None else steps * seconds / DAY
    with_failures = None if days is None or share == 0 else days / share
    hours = None if with_failures is None else 24 * with_failures * request.gpus
    return {
        "days": days,
        "gpu_days": None if days is None else days * request.gpus,
        "days_with_failures": with_failures,
        "cost": None if hours is None or request.price is None else hours * request.price,
    }


def checkpoint_costs(config: Config, request: Request, parameters: int, seconds: float, rates: Rates) -> dict[str, Any]:
    """What a checkpoint takes, how often one is best made, and the goodput there and at checkpoint.every.

    The copy to the host's memory stalls the training; the writing does not, but what it has not finished is lost.
    """
    averages = config.train.ema is not None
    size = states_of(parameters, request.gpus, config.zero.stage, averages).checkpoint
    stall = size / request.gpus / (rates.host * GIGA)
    write = size / (WRITE_RATE * GIGA * -(-request.gpus // request.gpus_per_node))
    between = (request.failure_days or GPU_DAYS_BETWEEN_FAILURES) * DAY / request.gpus
    interval = max(best_interval(stall, between), write, seconds)
    return {
        "checkpoint_bytes": size,
        "checkpoint_stall_seconds": stall,
        "checkpoint_write_seconds": write,
        "hours_between_failures": between / 3600,
        "checkpoint_interval_seconds": interval,
        "checkpoint_every": max(round(interval / seconds), math.ceil(write / seconds)),
        "goodput": goodput(interval, stall, RESTART_SECONDS + write, between),
        "goodput_as_configured": goodput(config.checkpoint.every * seconds, stall, RESTART_SECONDS + write, between),
    }


def input_costs(config: Config, request: Request, images: float, rates: Rates) -> dict[str, Any]:
    """Bytes and reads a second of all ranks: a window of a lane is one read. Cores a rank, where a CPU decodes."""
    return {
        "read_bytes_per_second": images * (request.sample_bytes or SAMPLE_BYTES),
        "reads_per_second": images / config.data.shuffle_window,
        "decoding_cores": images / request.gpus / rates.core_decoding,
    }


def assumptions(config: Config, request: Request, rates: Rates, measured: set[str]) -> list[str]:
    """What was assumed, a line each, of that which counts here."""
    nodes = request.gpus > request.gpus_per_node
    lines = {
        "compute": f"matrix products at {rates.compute:.0%} of the peak",
        "memory": f"memory at {rates.memory:.0%} of its rate",
        "call_seconds": f"{1e6 * rates.call_seconds:.3g} us for each operation",
        "decoding": f"a GPU's decoder delivers {rates.decoding:,.0f} images a second" if request.device.names else None,
        "collectives": f"collectives at {rates.collectives:.0%} of the links' rates" if request.gpus > 1 else None,
        "network": f"a network of {rates.network:g} GB/s per GPU between nodes" if nodes else None,
        "core_decoding": f"a CPU core decodes {rates.core_decoding:g} images a second",
        "host": f"{rates.host:g} GB/s from a GPU to host memory",
        "write": f"a node writes {WRITE_RATE:g} GB/s to the shared file system",
        "classes": None if request.classes else f"{CLASSES:,} classes",
        "sample": None if request.sample_bytes else f"{SAMPLE_BYTES:,} bytes per sample",
        "failures": None if request.failure_days else f"a failure every {GPU_DAYS_BETWEEN_FAILURES:,.0f} GPU-days",
        "restart": f"{RESTART_SECONDS:g} s to restart",
        "compile": "train.compile changes nothing" if config.train.compile else None,
    }
    return [line for name, line in lines.items() if line and name not in measured]
