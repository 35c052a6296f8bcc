"""A window of samples as ranged reads: fetched, compared with the sample table, parsed by webdataset.

A run of neighbouring samples is one contiguous byte range of a tar, and such a range is itself a valid tar stream. Its
table rows come by one ranged read, its bytes by another. A sample is a BadSample whose checksum does not agree after a
second read, or that was never decoded and does not decode, or whose label is no class; who replaces it is the loader's
business, since only that knows the window.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.codec import Undecodable, examine
from data.errors import DataError
from data.order import SampleRange
from data.shards.labels import InvalidSample, image_part
from data.shards.manifest import BadSample, Manifest
from data.shards.sample_table import FLAG_DECODED, FLAG_UNCHECKED, read_rows
from data.shards.tar_index import is_part, key_of_line, printable

BLOCK = tarfile.BLOCKSIZE
_HEADER = struct.Struct("100s 24x 12s 12x 8s c 188x B 166x")  # name, size, checksum, type, first byte of the prefix


@dataclass(frozen=True)
class Sample:
    """An image as its encoded bytes, with the numbers of its classes; `height` and `width` are those it decodes to."""

    shard: str
    key: str
    image: bytes
    labels: tuple[int, ...]
    height: int
    width: int


def read_ranges(manifest: Manifest, ranges: Sequence[SampleRange]) -> list[Sample | BadSample]:
    """The samples of neighbouring runs, in order; DataError where storage or table cannot be read."""
    return [sample for sample_range in ranges for sample in _read_range(manifest, sample_range)]


def _read_range(manifest: Manifest, sample_range: SampleRange) -> list[Sample | BadSample]:
    shard = manifest.shards[sample_range.shard]
    storage, url = manifest.storage, manifest.url_of(sample_range.shard)
    rows = read_rows(storage, manifest.url_of(sample_range.shard, ".npy"), sample_range.first_row, sample_range.rows)
    begin, end = int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1])
    found = _parse(_verified(storage.read(url, begin, end), rows))
    if not all(found):
        found = _parse(_verified(storage.reread(url, begin, end, "samples are not those that were packed"), rows))
    keys = [""] * len(rows) if all(found) else _keys(manifest, sample_range)
    return [
        _sample(parts, row, manifest, shard.name)
        if parts
        else BadSample(shard.name, printable(key), "its bytes are not those that were packed or indexed")
        for row, parts, key in zip(rows, found, keys, strict=True)
    ]


def _verified(raw: bytes, rows: np.ndarray) -> list[memoryview | None]:
    """The bytes of each row, or None where they have another checksum."""
    view, first = memoryview(raw), int(rows["offset"][0])
    spans = [view[int(row["offset"]) - first :][: int(row["bytes"])] for row in rows]
    return [
        span if int(row["flags"]) & FLAG_UNCHECKED or zlib.crc32(span) == int(row["crc"]) else None
        for span, row in zip(spans, rows, strict=True)
    ]


def _parse(spans: list[memoryview | None]) -> list[dict[str, Any] | None]:
    """The sample in each span; None where it is damaged or missing."""
    good = [span for span in spans if span is not None]
    samples: list[dict[str, Any] | None] = [*_parse_pieces(good)]
    # webdataset ends at a header that it cannot read; what it made of the rest is found sample by sample.
    if len(samples) != len(good):
        each = [_parse_pieces([span]) for span in good]
        samples = [found[0] if len(found) == 1 else None for found in each]
    answers = iter(samples)
    return [None if span is None else next(answers) for span in spans]


def _parse_pieces(pieces: Sequence[memoryview]) -> list[dict[str, Any]]:
    """The samples of neighbouring pieces of a tar by webdataset, fewer where it is damaged."""
    members: Iterable[dict[str, Any]] | None = _plain_members(pieces)
    if members is None:
        stream = io.BytesIO(b"".join(pieces))
        members = tar_file_expander([{"url": "", "stream": stream}], select_files=is_part)
    found: list[dict[str, Any]] = []
    with contextlib.suppress(tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError):
        found.extend(group_by_keys(members))
    return found


def _plain_members(pieces: Sequence[memoryview]) -> list[dict[str, Any]] | None:
    """As tar_file_expander, in a third of its time; None unless all are ordinary files with short names."""
    members = []
    for piece in pieces:
        after = 0
        while after < len(piece):
            begin = after + BLOCK
            header = bytes(piece[after:begin])
            if len(header) < BLOCK:
                return None
            name, size, checksum, kind, prefix = _HEADER.unpack(header)
            try:
                end = begin + _parse_octal(size)
                is_whole = _parse_octal(checksum) == sum(header) - sum(checksum) + 8 * ord(" ")
            except ValueError:
                return None
            after = -(-end // BLOCK) * BLOCK
            if not is_whole or kind != tarfile.REGTYPE or prefix != 0 or not begin <= end <= after <= len(piece):
                return None
            member = name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            if is_part(member):
                members.append({"fname": member, "data": bytes(piece[begin:end]), "__url__": ""})
    return members


def _parse_octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _sample(parsed: dict[str, Any], row: np.void, manifest: Manifest, shard: str) -> Sample | BadSample:
    key = printable(parsed["__key__"])
    parts = {name: content for name, content in parsed.items() if name not in ("__key__", "__url__")}
    try:
        image, labels = parts[image_part(parts)], manifest.labels_of(parts)
    except InvalidSample as unusable:
        return BadSample(shard, key, str(unusable))
    height, width = int(row["height"]), int(row["width"])
    if not int(row["flags"]) & FLAG_DECODED:  # DALI's decoder may crash on bytes that never decoded
        try:
            _, height, width = examine(image)
        except Undecodable as undecodable:
            return BadSample(shard, key, str(undecodable))
    return Sample(shard, key, image, labels, height, width)


def _keys(manifest: Manifest, sample_range: SampleRange) -> list[str]:
    """The keys of a range by the shard's index, since a damaged sample's own header may be what is damaged."""
    numbers = range(sample_range.first_row, sample_range.first_row + sample_range.rows)
    try:
        index = manifest.storage.read(manifest.url_of(sample_range.shard, ".idx"))
        lines = index.decode("utf-8", "surrogateescape").split("\n")
        return [key_of_line(lines[1 + number]) for number in numbers]
    except (DataError, IndexError):  # the name in a report is not worth the run
        return [f"row {number}" for number in numbers]
