"""The cache on a node's disk: what was read from far away once is read from here, by every rank of the node.

Files are kept as aligned blocks, each under the hash of its set, its URL and its number, with a checksum for every
page. A block is written under a name of its own and renamed; one that is torn or damaged is dropped and fetched again,
so killing a process at any moment does no harm. Locks are the kernel's and end with their process; they only save a
second fetch and keep the size, correctness does not need them. The least recently used blocks go when the limit is
reached. Where the disk cannot be written, the cache says so once and is off.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.storage.durable import ABANDONED_SECONDS
from data.storage.remote import ReadError, Storage
from data.urls import without_secrets

BLOCK_BYTES = 4 << 20
"""One fetch: large enough for an object store, little more than a window of ImageNet needs."""
PAGE_BYTES = 64 << 10
"""What one checksum is of, so that a short range does not read and check a whole block."""
FREED_SHARE = 0.1
"""Share of the limit that is freed at once when it is reached."""
LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process's fetch before fetching the block here."""


class NodeCache:
    """A Storage whose ranges are kept in a folder, at most `max_bytes` of them (None: as the disk has room)."""

    def __init__(
        self,
        storage: Storage,
        folder: Path,
        max_bytes: int | None,
        fingerprint: str,
        size_of: Callable[[str], int | None],
    ) -> None:
        self._storage, self._folder, self._max_bytes = storage, folder, max_bytes
        self._fingerprint, self._size_of = fingerprint, size_of
        self._writes = True
        for left in folder.glob("partial/*"):  # by writers that were killed
            with suppress(OSError):  # those that live rename theirs
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()

    def read(self, url: str, begin: int | None = None, end: int | None = None) -> bytes:
        """As Storage.read; whole files, and those that are not of the set, are not kept."""
        size = self._size_of(url)
        if begin is None or end is None or size is None or not begin < end <= size:
            return self._storage.read(url, begin, end)
        return b"".join(self._from_block(url, size, number, begin, end) for number in _blocks(begin, end))

    def reread(self, url: str, begin: int, end: int, reason: str) -> bytes:
        """As Storage.reread, from the storage itself."""
        self._storage.on_error(ReadError(without_secrets(url), begin, end, 1, reason))
        for number in _blocks(begin, end):
            self._drop(self._path(url, number))
        return self.read(url, begin, end)

    def _from_block(self, url: str, size: int, number: int, begin: int, end: int) -> bytes:
        """What of the range lies in a block: from the disk, or from the storage and then on the disk."""
        start = number * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, size)
        first, last = max(begin, start) - start, min(end, stop) - start
        path = self._path(url, number)
        found = _read_block(path, stop - start, first, last)
        if found is None and self._writes:
            with self._exclusive(path):
                found = _read_block(path, stop - start, first, last)  # another may have fetched it meanwhile
                if found is None:
                    contents = self._storage.read(url, start, stop)
                    self._store(path, contents)
                    found = contents[first:last]
        return self._storage.read(url, start + first, start + last) if found is None else found

    def _path(self, url: str, number: int) -> Path:
        name = hashlib.sha256(f"{self._fingerprint} {url} {number} {BLOCK_BYTES}".encode()).hexdigest()[:40]
        return self._folder / name[:2] / name

    @contextmanager
    def _exclusive(self, path: Path) -> Iterator[None]:
        """Holds the lock of this block on the node, unless that takes LOCK_TIMEOUT or the cache is off."""
        with ExitStack() as locks:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                locks.enter_context(_locked(path.parent / "lock"))
            except OSError as error:
                self._disable(error)
            yield

    def _store(self, path: Path, contents: bytes) -> None:
        checksums = np.array(_checksums(contents, path), "<u4")
        written = checksums.tobytes() + contents
        partial = self._folder / "partial" / f"{path.name}-{os.getpid()}-{threading.get_ident()}"
        try:
            if self._has_room(len(written)):
                try:
                    partial.parent.mkdir(exist_ok=True)
                    partial.write_bytes(written)
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            self._disable(error)

    def _has_room(self, more: int) -> bool:
        """Whether this many bytes may be added, which are then accounted for; old blocks are removed for them."""
        if self._max_bytes is None:
            return True
        with _locked(self._folder / "bytes") as account:
            if account is None or more > self._max_bytes:
                return False
            account.seek(0)
            recorded = account.read()
            held = int(recorded) if recorded.isdigit() else _make_room(self._folder, self._max_bytes - more)
            if held + more > self._max_bytes:
                held = _make_room(self._folder, int((1 - FREED_SHARE) * (self._max_bytes - more)))
            account.truncate(0)
            account.write(str(held + more).encode())
        return True

    def _drop(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._disable(error)

    def _disable(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            print(f"data.cache.dir={self._folder} is no longer written to: {error}", file=sys.stderr)


def _blocks(begin: int, end: int) -> range:
    return range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES))


def _checksums(contents: bytes, path: Path) -> list[int]:
    """Of each page, and of the block's name with it, so that no block passes for another."""
    view, name = memoryview(contents), zlib.crc32(path.name.encode())
    return [zlib.crc32(view[at : at + PAGE_BYTES], name) for at in range(0, len(view), PAGE_BYTES)]


def _read_block(path: Path, size: int, first: int, last: int) -> bytes | None:
    """Bytes first .. last - 1 of a block of `size` bytes; None where it is not there, or was, and is not whole."""
    page, page_end = first // PAGE_BYTES, -(-last // PAGE_BYTES)
    header = 4 * -(-size // PAGE_BYTES)
    try:
        with open(path, "rb") as file:
            expected = np.frombuffer(file.read(header), "<u4")[page:page_end].tolist()
            file.seek(header + page * PAGE_BYTES)
            contents = file.read(min(page_end * PAGE_BYTES, size) - page * PAGE_BYTES)
        if _checksums(contents, path) == expected and len(contents) >= last - page * PAGE_BYTES:
            os.utime(path)
            return contents[first - page * PAGE_BYTES : last - page * PAGE_BYTES]
        path.unlink()
    except (OSError, ValueError):  # not there, or cut within its checksums
        pass
    return None


def _make_room(folder: Path, most: int) -> int:
    """Removes the blocks that were used longest ago, down to `most` bytes; what is left, in bytes."""
    found = []
    for place in folder.glob("??/*"):
        with suppress(FileNotFoundError):  # another has dropped it
            facts = place.stat()
            found.append((facts.st_mtime, facts.st_size, place))
    held = sum(size for _, size, _ in found)
    for _, size, place in sorted(found):
        if held <= most:
            break
        if size:  # the locks have none
            place.unlink(missing_ok=True)
            held -= size
    return held


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO | None]:
    """A file that no other thread or process of this machine has locked; None after LOCK_TIMEOUT.

    The lock belongs to the open file, so it ends with the process, however that ends.
    """
    until = time.monotonic() + LOCK_TIMEOUT
    with open(path, "a+b") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    yield None
                    return
                time.sleep(0.005)
        yield file
