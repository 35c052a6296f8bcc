"""`coatnet pretrain` on ranks of which one hangs or fails; its arguments: RANKS FAULT RANK CALL pretrain ...

FAULT is "sleep" (from the CALL-th micro batch of RANK on), "read" (its CALL-th read of shards never ends), or
"slow" (each of its micro batches from the CALL-th on, and each of an evaluation, takes SLOW_SECONDS). Or an error of
that micro batch: "memory", "data", "bug", after which closing fails, too, or, of "stuck", never ends. Of a rank that
fails, leaving the process group never ends, as NCCL waits for the other ranks.
"""

from __future__ import annotations

import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.commands.pretrain import import_training
from pipeline.distributed.launcher import launch
from pipeline.errors import DataError

MODULE = "tests.pipeline.hang_injection"
SLOW_SECONDS = 7.0


def sleep_forever() -> None:
    time.sleep(1e6)


def wait_forever() -> None:
    threading.Event().wait()


def take_long() -> None:
    time.sleep(SLOW_SECONDS)


def run_out_of_memory() -> None:
    torch.empty(1 << 60)


def miss_data() -> None:
    raise DataError("train/shard-000001.tar cannot be read")


def be_a_bug() -> None:
    raise TypeError("a tensor is no number")


def fail_to_close(*_: object) -> None:
    raise ValueError("closing failed")


FAULTS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "sleep": (sleep_forever, []),
    "read": (wait_forever, ["data.windows._read_window"]),
    "slow": (take_long, ["pipeline.training.evaluation.normalize"]),
    "memory": (run_out_of_memory, []),
    "data": (miss_data, []),
    "bug": (be_a_bug, []),
    "stuck": (be_a_bug, []),
}
"""What happens before the forward pass, or before other functions (of "read" in their place)."""
ERRORS = {"memory": "ran out of memory", "data": "shard-000001.tar cannot", "bug": "no number", "stuck": "no number"}
"""What the errors say."""


def from_call(number: int, fault: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, before which, from call `number` on, the fault happens."""
    calls = 0

    def called(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            fault()
        return function(*arguments)

    return called


def main() -> None:
    ranks, name, rank, call, *arguments = sys.argv[1:]
    if "RANK" not in os.environ:
        run = next(Path(each[8:]) for each in arguments if each.startswith("run.dir="))
        sys.exit(launch(sys.argv[1:], int(ranks), run / "logs", import_training, MODULE))
    from pipeline import cli
    from pipeline.train import micro_batch_loss, train

    if os.environ["RANK"] == rank:
        fault, functions = FAULTS[name]
        for function in functions:
            mock.patch(function, from_call(int(call), fault, pkgutil.resolve_name(function))).start()
        if name != "read":
            forward = from_call(int(call), fault, micro_batch_loss)
            mock.patch("pipeline.train.train", partial(train, forward=forward)).start()
        if name in ERRORS:
            mock.patch("torch.distributed.destroy_process_group", wait_forever).start()
            mock.patch("pipeline.ending.CLEANUP_SECONDS", 5.0).start()
            closing = fail_to_close if name != "stuck" else lambda *_: wait_forever()
            mock.patch("pipeline.monitoring.metrics.Metrics.__exit__", closing).start()
    sys.argv[1:] = arguments
    cli.main()


if __name__ == "__main__":
    main()
