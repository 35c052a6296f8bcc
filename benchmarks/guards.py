"""What guards and metrics cost: one training in which half of the steps go without them, and their time by the clock.

    coatnet bench guards configs/cifar10_cpu.yaml data.train=cifar10/train train.precision=fp32

One rank trains `--steps` steps by the real loop. In a step without, no loss is judged or gated, nothing is all-reduced,
no metrics are counted or written. Beside the two medians stands the time that was spent inside guards and metrics: the
more exact figure, since on a busy machine steps differ by more than a hundredth.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from benchmarks.machine import machine
from data.loader import Batch
from data.pinned import ToHost
from pipeline.attempt import Attempt
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.distributed.launcher import free_port
from pipeline.monitoring.metrics import Metrics
from pipeline.plan import make_plan
from pipeline.train import micro_batch_loss, train
from pipeline.training.loss_guard import Guard, Verdict
from pipeline.training.step import StepReport

WARM_UP = 4


class Meter:
    """The steps' seconds, and those spent inside guards and metrics."""

    def __init__(self) -> None:
        self.step, self.began = -1, 0.0
        self.inside: list[float] = [0.0]
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    @property
    def watched(self) -> bool:
        return self.step.bit_count() % 2 == 0  # no period, as the decoder has, whose batches are of several steps

    def forward(self, engine: Any, batch: Batch, config: Config, *more: Any) -> torch.Tensor:
        """The loop's forward pass, which notes as a step begins."""
        step = int(batch.positions[0]) // config.train.global_batch
        if step != self.step:
            now = time.perf_counter()
            if self.step > WARM_UP:
                self.seconds[self.watched].append(now - self.began)
            self.step, self.began = step, now
            if self.watched:
                self.inside.append(0.0)
        return micro_batch_loss(engine, batch, config, *more)

    def timed(self, function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time taken, or in steps without it what stands in for it."""

        def call(*given: Any) -> Any:
            if not self.watched:
                return instead(*given)
            began = time.perf_counter()
            result = function(*given)
            self.inside[-1] += time.perf_counter() - began
            return result

        return call

    def install(self) -> ExitStack:
        patched = ExitStack()

        def patch(place: Any, name: str, instead: Callable[..., Any]) -> None:
            patched.enter_context(mock.patch.object(place, name, self.timed(getattr(place, name), instead)))

        patch(StepReport, "all_reduce", lambda report, *flags: setattr(report, "_summed", ToHost(report._sums)))
        patch(Guard, "gate", lambda guard, mean_loss: 1.0)
        patch(Guard, "update", lambda guard, step, loss, applied: (Verdict.APPLY, "", guard))
        patch(Attempt, "is_superseded", lambda attempt: False)
        patch(Metrics, "log_step", lambda *given: None)
        return patched


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("settings", nargs="*", help="key=value")
    parser.add_argument("--steps", type=int, default=100)
    wanted = parser.parse_args()
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}}
    with tempfile.TemporaryDirectory() as folder:
        length = [f"train.steps={wanted.steps}", "data.val=null", f"run.dir={folder}/run"]
        config = read_config(wanted.preset, [*wanted.settings, *length])
        meter = Meter()
        with meter.install():
            train(config, make_plan(config, "pretrain", 1, 1), [], forward=meter.forward)
    watched, without = (statistics.median(meter.seconds[which]) for which in (True, False))
    inside = statistics.fmean(meter.inside[WARM_UP:])
    more = f"{100 * (watched / without - 1):+.2f} %"
    print(f"a step with guards and metrics {watched:.4f} s, without {without:.4f} s: {more}")
    print(f"inside guards and metrics {1e3 * inside:.3f} ms a step: {100 * inside / without:.3f} % of one")
    print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())
