"""The bytes of a safetensors file before it is written: from live tensors chunk by chunk, or from one copy on the host.

Either way gives the same bytes. A copy is made into memory of the caller's, so that it can be reused for every file.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate

import numpy as np
import torch

from pipeline.distributed.environment import cpus_per_rank

CHUNK_BYTES = 64 << 20
"""What is on the host at once where there is no copy; a multiple of a checkpoint's blocks."""


class SafetensorsSnapshot:
    """The bytes of a safetensors file of these tensors (float32 or int64): live ones, or a copy of their state."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        sizes = [values.numel() * values.element_size() for values in tensors.values()]
        ends = list(accumulate(sizes, initial=0))
        header = {
            name: {
                "dtype": {torch.float32: "F32", torch.int64: "I64"}[values.dtype],
                "shape": list(values.shape),
                "data_offsets": [begin, end],
            }
            for (name, values), begin, end in zip(tensors.items(), ends, ends[1:], strict=False)
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        first = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8).copy()
        flat = [values.detach().reshape(-1).view(torch.uint8) for values in tensors.values()]
        self._parts = [torch.from_numpy(first), *flat]
        self.offsets = [len(first) + begin for begin in ends[:-1]]
        """Where each tensor begins in the file, in bytes."""
        self.bytes = len(first) + ends[-1]
        self.gpu = next((values.device for values in flat if values.is_cuda), None)
        """The device of the tensors, if that is a GPU."""
        self._copy: torch.Tensor | None = None

    def copy_to(self, memory: torch.Tensor) -> None:
        """Copies all bytes to `memory`, so that later changes of the tensors no longer count."""
        threads = 1 if self.gpu else min(4, cpus_per_rank())
        size = -(-len(memory) // threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda begin: self._fill(memory[begin : begin + size], begin), range(0, len(memory), size)))
        self._copy = memory

    def chunks(self) -> Iterator[np.ndarray]:
        """All bytes in order, in chunks of whole blocks; each is valid until the next one is requested."""
        if self._copy is not None:
            yield self._copy.numpy()
            return
        memory = torch.empty(min(CHUNK_BYTES, self.bytes), dtype=torch.uint8)
        for begin in range(0, self.bytes, len(memory)):
            chunk = memory[: self.bytes - begin]
            self._fill(chunk, begin)
            yield chunk.numpy()

    def _fill(self, memory: torch.Tensor, begin: int) -> None:
        """Copies the bytes from `begin` on; returns once they have arrived."""
        starts, filled = [0, *self.offsets], 0
        part = bisect_right(starts, begin) - 1
        with torch.cuda.device(self.gpu) if self.gpu else nullcontext():  # a new thread's own is the first GPU
            while filled < len(memory):
                skipped = begin + filled - starts[part]
                source = self._parts[part][skipped : skipped + len(memory) - filled]
                _copy(source, memory[filled : filled + len(source)])
                filled, part = filled + len(source), part + 1
            if self.gpu:  # queued behind what training has queued
                torch.cuda.current_stream(self.gpu).record_event().synchronize()


def _copy(source: torch.Tensor, memory: torch.Tensor) -> None:
    if source.is_cuda:
        memory.copy_(source, non_blocking=True)
    else:  # torch would wake a thread on each CPU for every small tensor
        memory.numpy()[:] = source.numpy()
