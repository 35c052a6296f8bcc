"""A shard's samples as rows of fixed width (`.npy`), so that those of a window are one ranged read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.errors import DataError
from data.shards.tar_index import TarSample
from data.storage.remote import ByteSource

HEADER_BYTES = 256
FLAG_DECODED = 1
FLAG_UNCHECKED = 2
"""Only the sample's headers were read: its checksum is not known."""
ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header, an extended header included
        ("bytes", "<u4"),  # from there to the next sample's first header
        ("crc", "<u4"),  # zlib.crc32 of exactly these bytes
        ("height", "<u4"),  # as decoded, EXIF orientation applied
        ("width", "<u4"),
        ("flags", "<u4"),
        ("row_crc", "<u4"),  # zlib.crc32 of the 28 bytes before it: a wrong size would crash DALI's decoder
    ]
)


# The sample table.


def sample_table(
    tar: bytes, samples: Sequence[TarSample], shapes: Sequence[tuple[int, int]], flags: int
) -> NDArray[np.void]:
    """Rows (dtype ROW) of a tar's samples; `shapes` are (height, width), in the samples' order."""
    view = memoryview(tar)
    checksums = [zlib.crc32(view[sample.offset : sample.offset + sample.bytes]) for sample in samples]
    return table_rows(samples, checksums, shapes, flags)


def table_rows(
    samples: Sequence[TarSample],
    checksums: int | Sequence[int],
    shapes: Sequence[tuple[int, int]],
    flags: int | Sequence[int],
) -> NDArray[np.void]:
    """Rows (dtype ROW) from what each sample's bytes were found to be; zeros where that is not known."""
    rows = np.zeros(len(samples), ROW)
    rows["offset"] = [sample.offset for sample in samples]
    rows["bytes"] = [sample.bytes for sample in samples]
    rows["crc"] = checksums
    rows["height"], rows["width"] = np.array(shapes, np.uint32).reshape(-1, 2).T
    rows["flags"] = flags
    rows["row_crc"] = row_checksums(rows)
    return rows


def row_checksums(rows: NDArray[np.void]) -> list[int]:
    """What each row's `row_crc` must be."""
    contents, size = memoryview(rows.tobytes()), ROW.itemsize
    return [zlib.crc32(contents[begin : begin + size - 4]) for begin in range(0, size * len(rows), size)]


def table_bytes(rows: NDArray[np.void]) -> bytes:
    """The rows as an .npy file, which `numpy.load` opens, with a header of exactly 256 bytes."""
    described = repr({"descr": ROW.descr, "fortran_order": False, "shape": rows.shape}).encode()
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + described.ljust(length - 1) + b"\n" + rows.tobytes()


def table_checksum(contents: bytes) -> str:
    """What the manifest has of a sample table: XXH3, 128 bits, of the whole file."""
    return xxhash.xxh3_128_hexdigest(contents)


def shard_checksums(table: bytes) -> tuple[str, str]:
    """Of a sample table, and of what it would be by the tar's headers alone: `table` and `headers` in the manifest."""
    rows = np.frombuffer(table[HEADER_BYTES:], ROW).copy()
    for column in ("crc", "height", "width"):
        rows[column] = 0
    rows["flags"] = FLAG_UNCHECKED
    rows["row_crc"] = row_checksums(rows)
    return table_checksum(table), table_checksum(table_bytes(rows))


def read_rows(storage: ByteSource, url: str, first: int, count: int) -> NDArray[np.void]:
    """Rows first .. first + count - 1 of a sample table by one ranged read; DataError for missing or damaged ones."""
    begin, end = (HEADER_BYTES + ROW.itemsize * row for row in (first, first + count))
    rows = np.frombuffer(storage.read(url, begin, end), ROW)
    if len(_damaged(rows)):
        rows = np.frombuffer(storage.reread(url, begin, end, "rows of a table have the wrong checksum"), ROW)
    if len(damaged := _damaged(rows)):
        raise DataError(f"{url}: row {first + damaged[0]} is damaged; pack or index the shard again")
    return rows


def _damaged(rows: NDArray[np.void]) -> NDArray[np.int64]:
    return np.flatnonzero(rows["row_crc"] != row_checksums(rows))
