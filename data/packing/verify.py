"""Everything that a manifest names, read and checked: what is broken in it, by shard and key.

Samples are read as training reads them, and every image is decoded. The headers of the tars, DALI's indexes and the
sample tables must say the same. What cannot be read because storage fails is an error, no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data import codec
from data.order import SampleRange
from data.packing.index import Report
from data.packing.tars import Tar, walk_headers
from data.reader import Sample, read_ranges
from data.shards.manifest import BadSample, Manifest, read_manifest
from data.shards.sample_table import (
    FLAG_DECODED,
    FLAG_UNCHECKED,
    HEADER_BYTES,
    ROW,
    row_checksums,
    table_bytes,
    table_checksum,
)
from data.shards.tar_index import DamagedTar, TarSample, index_bytes, printable
from data.storage.prefetch import map_in_threads
from data.storage.remote import NotFound, Storage

_READ_BYTES = 2**24


@dataclass
class _Findings:
    """What is broken about a shard as a whole, and which samples, by row: (key, reason); `keys` are all of its keys.

    `unchecked` counts the samples that have no checksum to compare.
    """

    shard: str
    keys: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)
    unchecked: int = 0

    def add_fault(self, row: int, reason: str) -> None:
        """Notes the first thing that is wrong with a sample."""
        key = printable(self.keys[row]) if row < len(self.keys) else f"row {row}"
        self.samples.setdefault(row, (key, reason))

    @property
    def broken(self) -> list[BadSample]:
        """Of the shard, then of its samples in their order."""
        whole = [BadSample(self.shard, "", reason) for reason in self.faults]
        return whole + [BadSample(self.shard, *self.samples[row]) for row in sorted(self.samples)]


def verify(url: str, *, workers: int, progress: Callable[[int, int], None]) -> Report:
    """Reads and checks all shards at `url`, in threads of a shard each; `progress(done, total)` counts them.

    UsageError where no manifest is, or one that does not add up; DataError where storage fails.
    """
    manifest = read_manifest(url)
    broken: list[BadSample] = []
    unchecked = 0
    numbers = range(len(manifest.shards))
    for found in map_in_threads(lambda number: _verify_shard(manifest, number), numbers, workers, progress):
        broken += found.broken
        unchecked += found.unchecked
    return Report(
        shards=len(manifest.shards),
        samples=manifest.samples,
        bytes=int(manifest.shards.bytes.sum()),
        classes=len(manifest.classes),
        broken=tuple(broken),
        unchecked=unchecked,
    )


def _verify_shard(manifest: Manifest, number: int) -> _Findings:
    shard, url = manifest.shards[number], manifest.url_of(number)
    found = _Findings(shard.name)
    size = _size(url)
    if size is None:
        found.faults.append("does not exist")
        return found
    if size != shard.bytes:
        found.faults.append(f"has {size} bytes; the manifest says {shard.bytes}")
    headers = _headers(Tar(url, size), found)
    found.keys += [sample.key for sample in headers or []]
    if headers is not None:
        _compare_index(manifest, number, headers, found)
    rows = _table(manifest, number, found)
    if rows is not None:
        found.unchecked = int(np.count_nonzero(rows["flags"] & FLAG_UNCHECKED))
        usable = _usable(rows, headers, size, found)
        at_once = max(1, int(_READ_BYTES / manifest.mean_sample_bytes))
        for sample_range in _ranges(number, usable, at_once):
            _read(manifest, sample_range, rows, found)
    return found


def _size(url: str) -> int | None:
    """The size of a file, None where there is none."""
    try:
        return Storage().size(url)
    except NotFound:
        return None


def _contents(url: str) -> bytes | None:
    """A whole file, None where there is none."""
    try:
        return Storage().read(url)
    except NotFound:
        return None


def _headers(tar: Tar, found: _Findings) -> list[TarSample] | None:
    """The samples by the tar's headers; None where these are damaged, which is noted."""
    try:
        return walk_headers(Storage(), tar, set())
    except DamagedTar as damage:
        found.faults.append(str(damage))
        return None


def _compare_index(manifest: Manifest, number: int, headers: list[TarSample], found: _Findings) -> None:
    listed = manifest.shards[number].samples
    if len(headers) != listed:
        found.faults.append(f"has {len(headers)} samples by its headers; the manifest says {listed}")
    index = _contents(manifest.url_of(number, ".idx"))
    if index is None:
        found.faults.append("has no DALI index (.idx)")
    elif index != index_bytes(headers):
        found.faults.append("its DALI index (.idx) is not that of its headers")


def _table(manifest: Manifest, number: int, found: _Findings) -> NDArray[np.void] | None:
    count = manifest.shards[number].samples
    contents, empty = _contents(manifest.url_of(number, ".npy")), table_bytes(np.zeros(count, ROW))
    if contents is None:
        found.faults.append("has no sample table (.npy)")
        return None
    if len(contents) != len(empty) or contents[:HEADER_BYTES] != empty[:HEADER_BYTES]:
        found.faults.append(f"its sample table (.npy) is not one of {count} samples")
        return None
    rows, noted = np.frombuffer(contents[HEADER_BYTES:], ROW), manifest.shards[number].table
    is_whole = np.array_equal(rows["row_crc"], row_checksums(rows))  # else its damaged rows are listed
    if noted and is_whole and table_checksum(contents) != noted:
        found.faults.append("its sample table (.npy) is another than the manifest's")
    return rows


def _usable(rows: NDArray[np.void], headers: list[TarSample] | None, size: int, found: _Findings) -> NDArray[np.bool_]:
    """Which samples can be read by their rows; the others are noted."""
    whole = rows["row_crc"] == row_checksums(rows)
    inside = rows["offset"] + rows["bytes"] <= size
    agrees = np.ones(len(rows), bool)
    if headers is not None and len(headers) == len(rows):
        agrees = (rows["offset"] == [each.offset for each in headers]) & (rows["bytes"] == [e.bytes for e in headers])
    for fine, reason in (
        (whole, "its row of the sample table is damaged"),
        (inside, "lies past the end of the tar"),
        (agrees, "its row of the sample table is not that of its headers"),
    ):
        for row in np.flatnonzero(~fine):
            found.add_fault(int(row), reason)
    return whole & inside & agrees


def _ranges(shard: int, usable: NDArray[np.bool_], at_once: int) -> Iterator[SampleRange]:
    """The usable samples in runs of at most this many."""
    borders = np.flatnonzero(np.diff(usable, prepend=False, append=False))
    for first, end in borders.reshape(-1, 2).tolist():
        for begin in range(first, end, at_once):
            yield SampleRange(shard, begin, min(at_once, end - begin))


def _read(manifest: Manifest, sample_range: SampleRange, rows: NDArray[np.void], found: _Findings) -> None:
    for row, sample in enumerate(read_ranges(manifest, [sample_range]), start=sample_range.first_row):
        if isinstance(sample, BadSample):
            found.samples.setdefault(row, (sample.key, sample.reason))
        elif rows["flags"][row] & FLAG_DECODED and (fault := _fault(sample)):
            found.add_fault(row, fault)


def _fault(sample: Sample) -> str | None:
    """What is wrong with the image of a sample that was marked as decoded."""
    try:
        picture = codec.examine(sample.image)
    except codec.Undecodable as undecodable:
        return str(undecodable)
    if (picture.height, picture.width) != (sample.height, sample.width):
        return f"decodes to {picture.height} x {picture.width}; its row says {sample.height} x {sample.width}"
    return None
