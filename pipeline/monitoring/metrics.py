"""What a run writes of its steps: metrics.jsonl and samples/rank-N.jsonl, one JSON object a line.

Samples are only ever added to. Metrics are cut back to the checkpoint's step when a run resumes, so that each step
has one row; rows go to TensorBoard too, and to Weights & Biases where log.wandb asks for it.
"""

from __future__ import annotations

import resource
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

import numpy as np
import torch

from data.loader import Batch
from pipeline.config.schema import Config
from pipeline.distributed.collectives import from_rank_zero
from pipeline.distributed.environment import rank_and_world_size
from pipeline.formatting import format_percent
from pipeline.monitoring.mfu import device_name, peak_images_per_second
from pipeline.monitoring.progress import Console
from pipeline.monitoring.tensorboard import TensorBoard
from pipeline.monitoring.wandb import WeightsAndBiases
from pipeline.plan import Plan
from pipeline.run.appended import Warn, print_warning
from pipeline.run.events import Events
from pipeline.run.jsonl import JsonLines, cut_back, evaluated_steps
from pipeline.training.evaluation import EvalMetrics
from pipeline.training.model import count_model


class Sink(Protocol):
    """Where rows of metrics go."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self, done: bool) -> None: ...


class MetricsFile:
    """RUN/metrics.jsonl, cut back to the step that a run resumes from."""

    def __init__(self, run: Path, first_step: int, warn: Warn = print_warning) -> None:
        path = run / "metrics.jsonl"
        try:
            cut_back(path, first_step)
        except OSError as error:  # a file that may only be appended to; a full disk
            warn(path, f"cannot be cut back to step {first_step}: {error.strerror}; each step's last row counts")
        self._lines = JsonLines(path, warn)

    def write(self, row: dict[str, Any]) -> None:
        self._lines.write({**row, "time": round(time.time(), 3)})

    def close(self, done: bool) -> None:
        self._lines.close()


class Metrics:
    """Makes a row for every `log.every`-th step and for every evaluation, prints it, and writes it to all sinks."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        console: Console,
        every: int,
        global_batch: int,
        samples: int,
        peak: float | None,
        consumed: Samples | None,
        evaluated: set[int],
    ) -> None:
        """`samples`: an epoch's. `peak`: images per second of all ranks at their devices' peak, where it is known.

        `evaluated`: the steps that have an evaluation already.
        """
        self._sinks, self._console, self._every, self._consumed = sinks, console, every, consumed
        self._global_batch, self._samples, self._peak = global_batch, samples, peak
        self._evaluated = evaluated
        self._start_interval()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks:
            sink.close(done=error is None)
        if self._consumed is not None:
            self._consumed.close()

    def log_step(
        self, step: int, loss: float, lr: float, grad_norm: SupportsFloat, data_wait: float, last: bool
    ) -> None:
        """Counts a step; `data_wait` are the seconds that it waited for its data. `grad_norm`, which may be on the
        device, is asked for where the step gets a row."""
        self._steps, self._data_wait = self._steps + 1, self._data_wait + data_wait
        if step % self._every and not last:
            return
        now = time.perf_counter()
        seconds = now - self._since  # since the last row or evaluation
        speed = self._steps * self._global_batch / seconds
        row = {
            "step": step,
            "samples": step * self._global_batch,
            "epoch": step * self._global_batch / self._samples,
            "loss": loss,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "images_per_second": speed,
            "data_wait": self._data_wait / seconds,
            "step_seconds": seconds / self._steps,
            **({"mfu": speed / self._peak} if self._peak else {}),
            "memory_bytes": _memory_bytes(),
        }
        self._write(row)
        self._console.print_row(row)

    def is_evaluated(self, step: int) -> bool:
        """Whether the evaluation after a step is recorded, by this start or an earlier one."""
        return step in self._evaluated

    def log_evaluation(self, step: int, result: EvalMetrics, weights: str) -> None:
        """The time of an evaluation does not count as training."""
        row = {"step": step, "top1": result.top1, "top5": result.top5, "eval_loss": result.loss, "weights": weights}
        self._write(row)
        self._evaluated.add(step)
        self._console.print(f"{self._console.at(step)}  top-1 {format_percent(result.top1, 2)}  loss {result.loss:.4f}")

    def log_samples(self, step: int, batches: list[Batch]) -> None:
        """Records this rank's samples of a step, where log.samples asks for it."""
        if self._consumed is not None:
            self._consumed.write(step, batches, self._global_batch, self._samples)

    def _start_interval(self) -> None:
        self._steps, self._data_wait, self._since = 0, 0.0, time.perf_counter()

    def _write(self, row: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(row)
        self._start_interval()


class Samples:
    """RUN/samples/rank-N.jsonl: what this rank consumed, for an audit."""

    def __init__(self, run: Path, events: Events, rank: int, world_size: int, with_checksums: bool) -> None:
        self._lines = JsonLines(run / "samples" / f"rank-{rank}.jsonl", events.warn_unwritten)
        self._facts = {"attempt": events.attempt, "rank": rank, "world_size": world_size}
        self._with_checksums = with_checksums

    def write(self, step: int, batches: list[Batch], global_batch: int, samples: int) -> None:
        positions = np.concatenate([batch.positions for batch in batches])
        row = {
            **self._facts,
            "step": step,
            "slots": (positions % global_batch).tolist(),
            "epochs": (positions // samples).tolist(),
            "keys": [key for batch in batches for key in batch.keys],
        }
        if self._with_checksums:
            pixels = torch.cat([batch.images for batch in batches]).cpu().numpy()
            row["checksums"] = [zlib.crc32(image) for image in pixels]
        self._lines.write(row)

    def close(self) -> None:
        self._lines.close()


def open_metrics(
    config: Config, plan: Plan, events: Events, console: Console, device: torch.device, step: int
) -> Metrics:
    """The metrics of an attempt that resumes from `step`: what the run's files have past it is cut back."""
    run, (rank, world_size) = Path(config.run.dir), rank_and_world_size()
    sinks: list[Sink] = []
    if rank == 0:
        warn = events.warn_unwritten
        sinks = [MetricsFile(run, step, warn), TensorBoard(run / "tensorboard", events.attempt, step, warn)]
        if config.log.wandb is not None:
            sinks.append(WeightsAndBiases(run, config.log.wandb, config.model_dump(mode="json"), events))
    evaluated = from_rank_zero(lambda: {each for each in evaluated_steps(run) if each <= step})
    consumed = Samples(run, events, rank, world_size, config.log.samples == "pixels") if config.log.samples else None
    multiply_adds = count_model(config.model, config.train, len(plan.train.classes)).multiply_adds
    peak = peak_images_per_second(device_name(device), config.train.precision, multiply_adds, world_size)
    batch, samples = config.train.global_batch, plan.train.samples
    return Metrics(sinks, console, config.log.every, batch, samples, peak, consumed, evaluated)


def _memory_bytes() -> int:
    """The most memory that this rank has held: of its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
