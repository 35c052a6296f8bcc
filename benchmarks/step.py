"""A step by its parts: the operations of torch that each takes, and its time, at ZeRO's stages on one rank.

    OMP_NUM_THREADS=1 coatnet bench step > benchmarks/results/step.txt

Operations are those that compute or copy, views apart. The reduction of gradients is what a backward by the engine
takes beside one of the network alone, in hooks and after it; the end is all that follows: norm, clipping, optimizer,
averages, batch-norm statistics. Times are medians on one rank; the backward's are with its reduction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_checks.rank import be_the_only_rank
from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]


class Operations(TorchDispatchMode):
    """Counts what writes memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in results)
        self.count += not (is_view or not results or func.overloadpacket.__name__.startswith(("empty", "detach")))
        return func(*args, **(kwargs or {}))


def measure(name: str, stage: int, resolution: int, steps: int) -> dict[str, Any]:
    """Operations and milliseconds of each part, and before them operations of a backward of the network alone."""
    from models.coatnet import stochastic_depth_rates
    from pipeline.config.parsing import read_config
    from pipeline.training import ema
    from pipeline.training.engine import build_engine, set_schedule, start_process_group, zero3_init
    from pipeline.training.losses import loss_fn
    from pipeline.training.model import build_model, drop_path_mask, init_weights

    be_the_only_rank()
    device = start_process_group()
    sizes = [f"model.name={name}", f"model.resolution={resolution}", "train.micro_batch=1", "train.global_batch=1"]
    more = ["train.precision=fp32", f"zero.stage={stage}", "data.train=none", "data.val=null"]
    config = read_config(str(ROOT / "configs/imagenet1k/coatnet0.yaml"), [*sizes, *more])
    images, labels = torch.randn(1, 3, resolution, resolution, device=device), torch.zeros(1, 1, dtype=torch.int64)

    def built(sharded: bool) -> Any:
        shard = zero3_init(config.train, config.optim, config.zero) if sharded else None
        return build_model(config.model, config.train, 1000, device, init_weights(0), shard)

    def loss_of(model: Any) -> torch.Tensor:
        mask = drop_path_mask(0, np.zeros(1, np.int64), rates, device)
        return loss_fn(model(images, mask), labels.to(device), config.train.loss, config.train.label_smoothing)

    alone = built(sharded=False)
    rates = stochastic_depth_rates(alone, config.train.stochastic_depth)
    loss = loss_of(alone)
    with Operations() as of_backward:
        loss.backward()
    del alone, loss
    engine = build_engine(built(sharded=True), config.train, config.optim, config.zero)
    set_schedule(engine, 1e-3, 0.99)
    average, losses = ema.clone(ema.statistics(engine.module)), list[torch.Tensor]()

    def end() -> None:
        engine.step()
        ema.sync_batch_norm(engine.module, apply=True)
        ema.update(average, engine.module, 0.99)

    parts = (lambda: losses.append(loss_of(engine)), lambda: engine.backward(losses.pop()), end)
    seconds = [[measured_seconds(part) for part in parts] for _ in range(steps + 2)][2:]
    operations = []
    for part in parts:
        with Operations() as counted:
            part()
        operations.append(counted.count)
    milliseconds = [1e3 * statistics.median(of_part) for of_part in zip(*seconds, strict=True)]
    return {"alone": of_backward.count, "operations": operations, "ms": milliseconds}


def measured_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="coatnet_0")
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.stage:
        return print(json.dumps(measure(asked.name, asked.stage, asked.resolution, asked.steps)))
    print(f"{machine()}, one image of {asked.resolution} x {asked.resolution}, {asked.name} in fp32\n")
    print(f"{'':10}{'operations':>40}{'milliseconds':>46}")
    print(f"{'stage':10}{'forward':>10}{'backward':>10}{'reduction':>10}{'end':>10}", end="")
    print("".join(f"{part:>12}" for part in ("forward", "backward", "end", "step")))
    entry = [sys.executable, "-P", str(ROOT / "coatnet_main.py"), "benchmarks.step"]
    for stage in (1, 2, 3):  # each in a process of its own: ZeRO-3 changes torch for good
        done = subprocess.run([*entry, *sys.argv[1:], "--stage", str(stage)], check=True, stdout=subprocess.PIPE)
        found = json.loads(done.stdout.splitlines()[-1])
        alone, (forward, backward, end) = found["alone"], found["operations"]
        counts = "".join(f"{count:10}" for count in (forward, alone, backward - alone, end))
        print(f"{stage:<10}{counts}" + "".join(f"{ms:12.1f}" for ms in (*found["ms"], sum(found["ms"]))))


if __name__ == "__main__":
    main()
