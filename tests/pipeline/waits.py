"""What in a step of training would make the host wait for a GPU, counted with the CPU in place of one; and what it has
the device do beside forward and backward.

The host waits where Python asks for a tensor's value, where the size of a result depends on values, where memory that
is not pinned is copied to or from the device, and where DeepSpeed asks the device to finish. Arrays reach the device
through data/pinned.py, so that any other tensor of an array counts.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = {torch.tensor, torch.as_tensor, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.tolist}
AFTER_BACKWARD = {"stage_1_and_2.py", "stage3.py", "utils.py", "coalesced_collectives.py", "adam.py"}
AFTER_BACKWARD |= {"zero.py", "optimizer.py", "ema.py", "norm.py:pop_statistics", "norm.py:apply_statistics"}
"""Where gradients are reduced and weights stepped: files, or functions of one that is also of the network."""
AFTER = "operations after backward"
NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@contextmanager
def counted(seen: Counter[str]) -> Iterator[None]:
    """Inside, this thread's calls are counted as `FUNCTION in FILE:CALLER`."""
    with Copies(seen), Values(seen):
        yield


class Copies(TorchFunctionMode):
    """Between host and device."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = func is torch.Tensor.to and any(isinstance(v, str | torch.device) for v in (*args, *kwargs.values()))
        if moves or func in COPIES:
            self.seen[f"{func.__name__} in {caller()}"] += 1
        return func(*args, **kwargs)


class Values(TorchDispatchMode):
    """Of tensors, asked for by Python or by torch; and operations that compute or copy, AFTER_BACKWARD."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_number = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.int64 for i in args[1])
        if not by_number and not NEEDS_VALUES.isdisjoint(func.tags):
            self.seen[f"{func.overloadpacket.__name__} in {caller()}"] += 1
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.arguments)
        if not is_view and not AFTER_BACKWARD.isdisjoint((name := caller(), name.partition(":")[0])):
            self.seen[AFTER] += 1
        return func(*args, **(kwargs or {}))


def caller() -> str:
    """The innermost function that is neither torch's, but for its optimizers, nor of this file."""
    frame = sys._getframe(1)
    while is_torchs(path := Path(frame.f_code.co_filename)) or path == Path(__file__):
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{path.name}:{frame.f_code.co_name}"


def is_torchs(path: Path) -> bool:
    return "torch" in path.parts and path.parts[-2] != "optim"


class Waits:
    """A forward pass; calls from the first one of a step (from 1) to the first of the next, and those of other threads
    up to then, go to waits-RANK.json in the run's folder."""

    def __init__(self, step: int, rank: int, forward: Callable[..., torch.Tensor]) -> None:
        from deepspeed.accelerator import get_accelerator

        self.step, self.rank, self.forward = step, rank, forward
        self.loop, self.threads = Counter[str](), Counter[str]()
        self.counting: ExitStack | None = None
        run, from_numpy = threading.Thread.run, torch.from_numpy

        def run_counted(thread: threading.Thread) -> None:
            with counted(self.threads):
                run(thread)

        def synchronize(*_: object) -> None:
            self.loop[f"synchronize in {caller()}"] += 1

        def from_numpy_counted(array: np.ndarray) -> torch.Tensor:  # which no mode of torch sees
            if (name := caller()) != "pinned.py:to_device":
                main = threading.current_thread() is threading.main_thread()
                (self.loop if main else self.threads)[f"from_numpy in {name}"] += 1
            return from_numpy(array)

        self.patched = ExitStack()
        self.patched.enter_context(mock.patch.object(torch, "from_numpy", from_numpy_counted))
        self.patched.enter_context(mock.patch.object(threading.Thread, "run", run_counted))
        self.patched.enter_context(mock.patch.object(type(get_accelerator()), "synchronize", synchronize))

    def __call__(self, engine: Any, batch: Any, config: Any, *more: Any) -> torch.Tensor:
        step = int(batch.positions[0]) // config.train.global_batch + 1
        if step == self.step and self.counting is None:
            self.counting = ExitStack()
            self.loop.clear()
            self.counting.enter_context(counted(self.loop))
        elif step > self.step and self.counting is not None:
            self.counting.close()
            self.counting = None
            self.patched.close()
            parameters = len(list(engine.module.parameters()))
            found = {"loop": self.loop, "threads": self.threads, "parameters": parameters}
            Path(config.run.dir, f"waits-{self.rank}.json").write_text(json.dumps(found))
        return self.forward(engine, batch, config, *more)
