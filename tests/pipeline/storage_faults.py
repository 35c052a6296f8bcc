"""A forward pass around which the file system fails: what a rank writes of some checkpoints is refused, or stalls.

Limits on the size of files are what a full disk is to a write, a pipe without a reader what a server that does not
answer is. Checkpoints must be due at every step, so that the number of a save is that of its step.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.storage.durable import write_atomically
from pipeline.checkpoint import writer
from pipeline.checkpoint.reader import step_name
from pipeline.distributed.environment import rank_and_world_size

FULL_BYTES = 200_000
"""Less than a rank's file of a checkpoint, more than any other file."""
FULL, MUTE = "full", "mute"
SECONDS_FOR_A_SAVE = 2.0
"""Where rank 0 waits for a note that does not come, until the next save is due."""


class StorageFaults:
    """`failing`: the steps (as JSON has them) whose save fails, each with [a rank, FULL] or, where the rank cannot even
    leave a note, [a rank, MUTE]. `stalled`: [a rank, the step whose save it begins, the step before which it ends].
    `blocking`: no copy of the state fits into memory."""

    def __init__(
        self,
        failing: Mapping[str, tuple[int, str]] | None = None,
        stalled: Sequence[int] | None = None,
        blocking: bool = False,
    ) -> None:
        writer.COPY_SHARE, writer.STALLED_SECONDS = 0.0 if blocking else 0.75, 0.5
        self.failing, self.stalled = failing or {}, stalled
        self.rank, self.step = rank_and_world_size()[0], 0

    def __call__(self, engine: Any, batch: Any, config: Any, *more: Any) -> torch.Tensor:
        from pipeline.train import micro_batch_loss

        step = int(batch.positions[0]) // config.train.global_batch + 1
        if step != self.step:
            self.step = step
            self.begin_step(Path(config.run.dir) / "checkpoints")
        return micro_batch_loss(engine, batch, config, *more)

    def begin_step(self, root: Path) -> None:
        stalled, first, end = self.stalled or (-1, 0, 0)
        folder = root / f".{step_name(first if stalled >= 0 else self.step)}.attempt-0.{first or self.step}"
        pipe = folder / f"rank-{stalled:05d}.safetensors"
        if self.rank == stalled and self.step == end:
            threading.Thread(target=pipe.read_bytes).start()
        if not first < self.step < end:
            await_writing(None if self.step == end else SECONDS_FOR_A_SAVE)
        failing, kind = self.failing.get(str(self.step), (-1, FULL))
        limit_files(FULL_BYTES if failing == self.rank else resource.RLIM_INFINITY)
        writer.write_atomically = write_nothing if (failing, kind) == (self.rank, MUTE) else write_atomically
        if self.rank == stalled and self.step == first:
            folder.mkdir(parents=True, exist_ok=True)
            os.mkfifo(pipe)


def write_nothing(path: Path, contents: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def await_writing(seconds: float | None) -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(seconds)


def limit_files(size: int) -> None:
    """No file of this process may grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
