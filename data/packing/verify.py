"""Everything that a manifest names, read and checked: what is broken in it, by shard and key.

Samples are read as training reads them, and every image is decoded. The headers of the tars, DALI's indexes and the
sample tables must say the same. What cannot be read because storage fails is an error, no verdict.

Where only a share of the samples is drawn, all shards, tables and indexes are looked at just the same, and a table is
compared with its index. Of the tars only the drawn samples are read, each at its own place; their headers are walked
where something does not agree.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data import codec, rng
from data.errors import UsageError
from data.order import SampleRange
from data.packing.index import Report
from data.packing.parts import Record, do_part
from data.packing.tars import Tar, walk_headers
from data.packing.work import Part, Work, open_work
from data.reader import Reader, Sample
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
from data.storage.remote import NotFound, Storage, write_file
from data.urls import join

VERIFIED = "verified.json"
ONE_IN = 10_000
"""The share of damaged samples that a report of drawn ones speaks of."""
_NOTES = ".verifying"
_VERSION = 1
"""Of what is checked and noted; raised when a program would find something else."""
_READ_BYTES = 2**24
_PART = re.compile(r"(\S*) (\d+) (\d+) (.*?)\.\1(?: |$)")
"""Of a line of DALI's index: extension, offset, size, key."""


@dataclass(frozen=True)
class SampledReport(Report):
    """What drawn samples show, about `sample` of all: `decoded` of them were read and decoded.

    `missed` is the chance that none of them were damaged if one in 10,000 of all were; `proves` says so.
    """

    sample: float = 1.0
    seed: int = 0
    decoded: int = 0
    missed: float = 0.0
    proves: str = ""


@dataclass
class _Findings:
    """What is broken about a shard as a whole, and which samples, by row: (key, reason); `keys` are all of its keys.

    `unchecked` counts the samples that have no checksum to compare, `decoded` those that were read. `is_odd` where
    something does not agree that only the tar's headers can decide.
    """

    shard: str
    keys: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    samples: dict[int, tuple[str, str]] = field(default_factory=dict)
    unchecked: int = 0
    decoded: int = 0
    is_odd: bool = False

    def add_fault(self, row: int, reason: str) -> None:
        """Notes the first thing that is wrong with a sample."""
        key = printable(self.keys[row]) if row < len(self.keys) else f"row {row}"
        self.samples.setdefault(row, (key, reason))

    @property
    def record(self) -> Record:
        """In JSON; `broken` has what the shard has, then its samples in their order."""
        broken = [("", reason) for reason in self.faults] + [self.samples[row] for row in sorted(self.samples)]
        return {"broken": broken, "unchecked": self.unchecked, "decoded": self.decoded}


def verify(
    url: str,
    *,
    workers: int,
    progress: Callable[[int, int], None],
    sample: float | None = None,
    seed: int = 0,
    part: Part | None = None,
    out: str | None = None,
) -> Report:
    """Reads and checks all shards at `url`, in threads of a shard each; `progress(done, total)` counts them.

    With `sample`, of the samples only that share is read, as `seed` draws it: a SampledReport. A `part` checks its
    share of the shards and notes what it found at `out`, or beside the manifest; NotLast unless it finds all of them
    checked then, and writes the report there as `verified.json`.

    UsageError where no manifest is, or one that does not add up; DataError where storage fails.
    """
    if sample is not None and not 0 < sample < 1:
        raise UsageError(f"--sample is {sample}; it must be a share of the samples, above 0 and below 1")
    if out is not None and part is None:
        raise UsageError("--out is where parts write what they found; without --part nothing is written")
    shards = _Shards(read_manifest(url), out or url, sample, seed if sample is not None else 0)
    if part is not None:
        return do_part(shards, part, workers, progress)
    return shards.report(map_in_threads(shards.do, range(len(shards.manifest.shards)), workers, progress))


def chance_of_missing(samples: int, damaged: int, drawn: int) -> float:
    """The chance that none of the damaged ones are among those drawn, all of different samples: hypergeometric."""
    return math.prod(max(0, samples - drawn - each) / (samples - each) for each in range(damaged))


@dataclass(frozen=True)
class _Shards:
    """The shards of a set as items of the work."""

    manifest: Manifest
    destination: str
    sample: float | None
    seed: int
    result = VERIFIED

    @cached_property
    def work(self) -> Work:
        manifest = self.manifest
        asked = {"set": manifest.fingerprint or manifest.format_1, "sample": self.sample, "seed": self.seed}
        return open_work(self.destination, _NOTES, {"version": _VERSION, **asked})

    def is_published(self) -> bool:
        """Whether all of this request are checked; a report of another one is replaced."""
        contents = _contents(join(self.destination, VERIFIED))
        try:
            document = json.loads(contents or "{}")
        except ValueError:  # as where no rename is atomic
            return False
        return {name: document.get(name) for name in self.work.request} == self.work.request

    def plan(self) -> Sequence[int]:
        count = len(self.manifest.shards)
        if self.work.plan() is None:
            self.work.publish_plan(count, images=self.manifest.samples)
        return range(count)

    def is_kept(self, item: int, record: Record) -> bool:
        return True

    def is_of(self, item: int, record: Record) -> bool:
        return True

    def do(self, item: int) -> Record:
        return _verify_shard(self.manifest, item, self._drawn(item)).record

    def _drawn(self, shard: int) -> NDArray[np.bool_] | None:
        """Which samples of a shard are read, by their numbers in the set; None for all."""
        if self.sample is None:
            return None
        first, end = self._borders[shard : shard + 2].tolist()
        return rng.uniforms(self.seed, rng.Stream.VERIFY, np.arange(first, end), 1)[:, 0] < self.sample

    @cached_property
    def _borders(self) -> NDArray[np.int64]:
        return np.concatenate(([0], np.cumsum(self.manifest.shards.samples)))

    def report(self, records: Iterable[Record]) -> Report:
        """What the records of all shards, in their order, come to."""
        manifest, broken, unchecked, decoded = self.manifest, list[BadSample](), 0, 0
        for shard, record in zip(manifest.shards, records, strict=True):
            broken += [BadSample(shard.name, *each) for each in record["broken"]]
            unchecked += record["unchecked"]
            decoded += record["decoded"]
        size = int(manifest.shards.bytes.sum())
        report = Report(len(manifest.shards), manifest.samples, size, len(manifest.classes), tuple(broken), unchecked)
        if self.sample is None:
            return report
        damaged = -(-manifest.samples // ONE_IN)
        missed = chance_of_missing(manifest.samples, damaged, decoded)
        proves = (
            f"{decoded} of {manifest.samples} samples were read and decoded; if 1 in {ONE_IN:,} were damaged ({damaged}"
            f" in all), the chance that this check missed them all is {missed:.2g}"
        )
        return SampledReport(
            **vars(report), sample=self.sample, seed=self.seed, decoded=decoded, missed=missed, proves=proves
        )

    def publish(self, records: Iterator[Record], done: set[int]) -> Report:
        """Writes the report of all shards."""
        report = self.report(records)
        whole = {"proves": "every sample was read and decoded; what is wrong is in `broken`"}
        document = {**whole, **asdict(report), **self.work.request}
        fs, folder = self.work.fs, self.work.folder.rpartition("/")[0]
        write_file(fs, join(folder, VERIFIED), json.dumps(document).encode())
        return report


def _verify_shard(manifest: Manifest, number: int, drawn: NDArray[np.bool_] | None) -> _Findings:
    """All samples of a shard, or those drawn."""
    shard, url = manifest.shards[number], manifest.url_of(number)
    found = _Findings(shard.name)
    size = _size(url)
    if size is None:
        found.faults.append("does not exist")
        return found
    if size != shard.bytes:
        found.faults.append(f"has {size} bytes; the manifest says {shard.bytes}")
    headers = _headers(manifest, number, size, found) if drawn is None else None
    rows = _table(manifest, number, found)
    if rows is not None:
        if drawn is not None:
            found.keys += _keys_by_table(manifest, number, rows, found)
        found.unchecked = int(np.count_nonzero(rows["flags"] & FLAG_UNCHECKED))
        wanted = _usable(rows, headers, size, found) & (True if drawn is None else drawn)
        found.decoded = int(np.count_nonzero(wanted))
        at_once = max(1, int(_READ_BYTES / manifest.mean_sample_bytes))
        reader = Reader(manifest)
        for sample_range in _ranges(number, wanted, at_once):
            _read(reader, sample_range, rows, found)
    if drawn is not None and (found.is_odd or found.faults or found.samples):
        headers = _headers(manifest, number, size, found)
        if rows is not None:
            _usable(rows, headers, size, found)
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


def _headers(manifest: Manifest, number: int, size: int, found: _Findings) -> list[TarSample] | None:
    """The samples by the tar's headers, which its index must be of; None where these are damaged. Notes what is."""
    try:
        headers = walk_headers(Storage(), Tar(manifest.url_of(number), size), set())
    except DamagedTar as damage:
        found.faults.append(str(damage))
        return None
    found.keys[:] = [sample.key for sample in headers]
    listed, index = manifest.shards[number].samples, _contents(manifest.url_of(number, ".idx"))
    if len(headers) != listed:
        found.faults.append(f"has {len(headers)} samples by its headers; the manifest says {listed}")
    if index is None:
        found.faults.append("has no DALI index (.idx)")
    elif index != index_bytes(headers):
        found.faults.append("its DALI index (.idx) does not match its headers")
    return headers


def _keys_by_table(manifest: Manifest, number: int, rows: NDArray[np.void], found: _Findings) -> list[str]:
    """The keys by the index, which must have all parts of a sample where its row is; else it is odd, and has none."""
    index = _contents(manifest.url_of(number, ".idx")) or b""
    first, *lines, last = index.decode("utf-8", "surrogateescape").split("\n") if b"\n" in index else ("", "")
    keys = []
    if (first, len(lines), last) == (f"v1.2 {len(rows)}", len(rows), ""):
        for line, begin, size in zip(lines, rows["offset"].tolist(), rows["bytes"].tolist(), strict=True):
            parts = list(_PART.finditer(line))
            inside = all(begin < int(part[2]) <= int(part[2]) + int(part[3]) <= begin + size for part in parts)
            if inside and len({part[4] for part in parts}) == 1 and "".join(part[0] for part in parts) == line:
                keys.append(parts[0][4])
    if len(keys) == len(rows):
        return keys
    found.is_odd = True
    return []


def _table(manifest: Manifest, number: int, found: _Findings) -> NDArray[np.void] | None:
    count = manifest.shards[number].samples
    contents, empty = _contents(manifest.url_of(number, ".npy")), table_bytes(np.zeros(count, ROW))
    if contents is None:
        found.faults.append("has no sample table (.npy)")
        return None
    if len(contents) != len(empty) or contents[:HEADER_BYTES] != empty[:HEADER_BYTES]:
        found.faults.append(f"its sample table (.npy) does not have {count} samples")
        return None
    rows, noted = np.frombuffer(contents[HEADER_BYTES:], ROW), manifest.shards[number].table
    is_whole = np.array_equal(rows["row_crc"], row_checksums(rows))  # else its damaged rows are listed
    if noted and is_whole and table_checksum(contents) != noted:
        found.faults.append("its sample table (.npy) does not match the manifest's checksum")
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
        (agrees, "its row of the sample table does not match its headers"),
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


def _read(reader: Reader, sample_range: SampleRange, rows: NDArray[np.void], found: _Findings) -> None:
    for row, sample in enumerate(reader.read([sample_range]), start=sample_range.first_row):
        if isinstance(sample, BadSample):
            found.samples.setdefault(row, (sample.key, sample.reason))
        elif rows["flags"][row] & FLAG_DECODED and (fault := _fault(sample)):
            found.add_fault(row, fault)
        elif row < len(found.keys) and sample.key != printable(found.keys[row]):
            found.is_odd = True


def _fault(sample: Sample) -> str | None:
    """What is wrong with the image of a sample that was marked as decoded."""
    try:
        picture = codec.examine(sample.image)
    except codec.Undecodable as undecodable:
        return str(undecodable)
    if (picture.height, picture.width) != (sample.height, sample.width):
        return f"decodes to {picture.height} x {picture.width}; its row says {sample.height} x {sample.width}"
    return None
