"""A file that is walked over by ranged reads: what lies near is read through, over what is large one read is a jump.

A request takes longer than the 64 KiB that a short jump would leave out. So these are read along, in reads that grow
from 8 KiB (in which a tar has a few headers) to 1 MiB as long as no longer jump comes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import BinaryIO, cast

from data.errors import DataError

NEAR_BYTES, LEAST_BYTES, MOST_BYTES = 2**16, 2**13, 2**20


def RangedFile(read: Callable[[int, int], bytes], size: int) -> BinaryIO:
    """A file of `size` bytes to read and seek in, by `read(begin, end)`; DataError where that gives fewer bytes."""
    return cast(BinaryIO, _Walked(read, size))


class _Walked(io.RawIOBase):
    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size = read, size
        self._at = self._read_to = self._begin = 0
        self._held = b""
        self._ahead = LEAST_BYTES

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        contents = self.read(len(buffer))
        buffer[: len(contents)] = contents
        return len(contents)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        pieces = []
        while self._at < end:
            if not self._begin <= self._at < self._begin + len(self._held):
                self._hold()
            pieces.append(self._held[self._at - self._begin : end - self._begin])
            self._at = self._read_to = self._at + len(pieces[-1])
        return b"".join(pieces)

    def _hold(self) -> None:
        near = 0 <= self._at - self._read_to <= NEAR_BYTES
        self._ahead = min(2 * self._ahead, MOST_BYTES) if near else LEAST_BYTES
        end = min(self._at + self._ahead, self._size)
        held = self._fetch(self._at, end)
        if len(held) != end - self._at:
            raise DataError(f"bytes {self._at} to {end} were requested, but {len(held)} came")
        self._begin, self._held = self._at, held
