"""What a run writes of its steps: metrics.jsonl and samples/rank-N.jsonl. One JSON object a line.

Samples are only ever added to. Metrics are cut back to the checkpoint's step when a run resumes, so that
each step stands there once; their rows go to TensorBoard too, and where it is wanted to Weights & Biases.
"""

from __future__ import annotations

import resource
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data.loader import Batch
from pipeline.config.schema import Config
from pipeline.monitoring.tensorboard import TensorBoard
from pipeline.monitoring.wandb import WeightsAndBiases
from pipeline.run.jsonl import JsonLines, cut_back
from pipeline.training.evaluation import EvalMetrics


class Sink(Protocol):
    """Where rows of metrics go."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self, done: bool) -> None: ...


class MetricsFile:
    """RUN/metrics.jsonl, whose rows past the step that a run resumes from are taken back."""

    def __init__(self, run: Path, first_step: int) -> None:
        cut_back(run / "metrics.jsonl", first_step)
        self._lines = JsonLines(run / "metrics.jsonl")

    def write(self, row: dict[str, Any]) -> None:
        self._lines.write(row)

    def close(self, done: bool) -> None:
        self._lines.close()


def build_sinks(run: Path, config: Config, attempt: int, first_step: int) -> list[Sink]:
    """All that the rows of a run go to; what they have past the step that it resumes from is taken back."""
    sinks: list[Sink] = [MetricsFile(run, first_step), TensorBoard(run / "tensorboard", attempt, first_step)]
    if config.log.wandb is not None:
        sinks.append(WeightsAndBiases(run, config.log.wandb, config.model_dump(mode="json")))
    return sinks


class Metrics:
    """Makes a row for every `every`-th step and for every evaluation."""

    def __init__(self, sinks: Sequence[Sink], every: int, global_batch: int, samples: int, peak: float | None) -> None:
        """`peak`: images that all ranks could train in a second at their devices' peak, where that is known."""
        self._sinks, self._every, self._global_batch, self._samples = sinks, every, global_batch, samples
        self._peak = peak
        self._start_interval()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks:
            sink.close(done=error is None)

    def step(
        self, step: int, loss: float, lr: float, grad_norm: float, waited: float, last: bool
    ) -> dict[str, Any] | None:
        """Counts a step that is done, and returns its row where one is due."""
        self._steps, self._waited = self._steps + 1, self._waited + waited
        if step % self._every and not last:
            return None
        now = time.perf_counter()
        seconds = now - self._since  # since the last row or evaluation
        speed = self._steps * self._global_batch / seconds
        row = {
            "step": step,
            "samples": step * self._global_batch,
            "epoch": step * self._global_batch / self._samples,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "images_per_second": speed,
            "data_wait": self._waited / seconds,
            "step_seconds": seconds / self._steps,
            **({"mfu": speed / self._peak} if self._peak else {}),
            "memory_bytes": _memory_bytes(),
        }
        self._write(row)
        self._start_interval()
        return row

    def evaluation(self, step: int, figures: EvalMetrics, weights: str) -> None:
        """Writes the row of an evaluation, whose time does not count as training."""
        row = {"step": step, "top1": figures.top1, "top5": figures.top5, "eval_loss": figures.loss, "weights": weights}
        self._write(row)
        self._start_interval()

    def _start_interval(self) -> None:
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()

    def _write(self, row: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(row)


class Samples:
    """RUN/samples/rank-N.jsonl: what this rank consumed, so that anybody can audit it."""

    def __init__(self, run: Path, attempt: int, rank: int, world_size: int, with_checksums: bool) -> None:
        self._lines = JsonLines(run / "samples" / f"rank-{rank}.jsonl")
        self._facts = {"attempt": attempt, "rank": rank, "world_size": world_size}
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


def _memory_bytes() -> int:
    """The most memory that this rank has held: of its GPU, or resident where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
