"""A window of samples as ranged reads: fetched, compared with the sample table, parsed by webdataset.

A run of neighbouring samples is one contiguous byte range of a tar, and such a range is itself a valid tar stream. Its
table rows come by one ranged read, its bytes by another. A sample is a BadSample whose checksum does not agree after a
second read, or that was never decoded and does not decode, or whose label is no class; who replaces it is the loader's
business, since only that knows the window.

This runs beside the thread that trains and shares its interpreter, so what can be done for a window at once is.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.codec import Undecodable, examine
from data.errors import DataError
from data.order import SampleRange
from data.shards.labels import InvalidSample, image_part
from data.shards.manifest import BadSample, Manifest
from data.shards.sample_table import FLAG_DECODED, FLAG_UNCHECKED, read_rows
from data.shards.tar_index import is_part, key_of_line, printable

BLOCK = tarfile.BLOCKSIZE
_NAME = slice(0, 100)
# Of a header the eleven digits of its size, the six of its checksum, and what else an ordinary file has in some places.
_PLACES = [*range(124, 135), *range(148, 154), 99, 135, 154, 155, 156, 345]
_LEAST = np.frombuffer(17 * b"0" + b"\0\0\0 0\0", np.uint8)
_MOST = np.array(17 * [7] + 6 * [0], np.uint8)
# The checksum is the sum of the header's bytes while this field had eight spaces.
_WEIGHTS = np.zeros((23, 2), np.int64)
_WEIGHTS[:11, 0], _WEIGHTS[11:17, 1] = 8 ** np.arange(10, -1, -1), 8 ** np.arange(5, -1, -1) + 1
_OF_FIELD = 6 * ord("0") + ord("\0") + ord(" ") - 8 * ord(" ")
_PARTS = re.compile(rb"^(?:((?!__)(?:[^\0\n]*/)?[^./\0\n]+)\.((?!__)[^/\0\n]+)|[^\n]*)$", re.MULTILINE).findall
"""The key and the extension in each of a few lines, nothing where webdataset might see others or none."""
_LABELS_KEPT = 2**14
"""How many samples' labels a reader remembers by their bytes, which most samples have in common."""


class Sample(NamedTuple):
    """An image as its encoded bytes, with the numbers of its classes; `height` and `width` are those it decodes to."""

    shard: str
    key: str
    image: bytes
    labels: tuple[int, ...]
    height: int
    width: int


_Parsed = tuple[str, dict[str, bytes]]
"""What a tar has of a sample: its key, and its parts by their extensions."""


class Reader:
    """Reads the samples of a set; any number of threads may share it."""

    def __init__(self, manifest: Manifest) -> None:
        @lru_cache(_LABELS_KEPT)
        def labels_of(image: str, others: tuple[tuple[str, bytes], ...]) -> tuple[int, ...]:
            return manifest.labels_of({image: b"", **dict(others)})

        self.manifest, self._labels_of = manifest, labels_of

    def read(self, ranges: Sequence[SampleRange]) -> list[Sample | BadSample]:
        """The samples of neighbouring runs, in order; DataError where storage or table cannot be read."""
        return [sample for sample_range in ranges for sample in self._range(sample_range)]

    def _range(self, sample_range: SampleRange) -> list[Sample | BadSample]:
        manifest, number = self.manifest, sample_range.shard
        storage, url, shard = manifest.storage, manifest.url_of(number), manifest.shards[number].name
        rows = read_rows(storage, manifest.url_of(number, ".npy"), sample_range.first_row, sample_range.rows)
        begin, end = int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1])
        found = _parse(storage.read(url, begin, end), rows)
        if None in found:
            found = _parse(storage.reread(url, begin, end, "samples differ from those that were packed"), rows)
        keys = _keys(manifest, sample_range) if None in found else [""] * len(rows)
        facts = zip(found, keys, *(rows[name].tolist() for name in ("height", "width", "flags")), strict=True)
        return [
            self._sample(shard, parsed, height, width, flags)
            if parsed
            else BadSample(shard, printable(key), "its bytes differ from those that were packed or indexed")
            for parsed, key, height, width, flags in facts
        ]

    def _sample(self, shard: str, parsed: _Parsed, height: int, width: int, flags: int) -> Sample | BadSample:
        key, parts = parsed
        try:
            name = _image_part(tuple(parts))
            image = parts.pop(name)
            labels = self._labels_of(name, tuple(parts.items()))
            if not flags & FLAG_DECODED:  # DALI's decoder may crash on bytes that never decoded
                _, height, width = examine(image)
        except (InvalidSample, Undecodable) as unusable:
            return BadSample(shard, printable(key), str(unusable))
        return Sample(shard, printable(key), image, labels, height, width)


def read_ranges(manifest: Manifest, ranges: Sequence[SampleRange]) -> list[Sample | BadSample]:
    """As Reader.read, once."""
    return Reader(manifest).read(ranges)


_image_part = lru_cache(2**10)(image_part)


def _parse(raw: bytes, rows: np.ndarray) -> list[_Parsed | None]:
    """The sample of each row; None where it is damaged or missing."""
    view, begins = memoryview(raw), (rows["offset"] - rows["offset"][0]).astype(np.int64)
    ends = begins + rows["bytes"]
    spans = [view[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
    checks = zip(spans, rows["crc"].tolist(), rows["flags"].tolist(), strict=True)
    whole = np.array([bool(flags & FLAG_UNCHECKED) or zlib.crc32(span) == crc for span, crc, flags in checks])
    found = _plain_samples(raw, begins[whole], ends[whole])
    if found is None:
        found = _webdataset_samples([span for span, is_whole in zip(spans, whole, strict=True) if is_whole])
    samples = iter(found)
    return [next(samples) if is_whole else None for is_whole in whole]


def _webdataset_samples(spans: Sequence[memoryview]) -> list[_Parsed | None]:
    """What webdataset makes of pieces of a tar that have a sample each; None where that is damaged."""
    found = _webdataset_parts(spans)
    # It ends at a header that it cannot read; what it made of the rest is found sample by sample.
    if len(found) == len(spans):
        return [*found]
    each = [_webdataset_parts([span]) for span in spans]
    return [found[0] if len(found) == 1 else None for found in each]


def _webdataset_parts(spans: Sequence[memoryview]) -> list[_Parsed]:
    members = tar_file_expander([{"url": "", "stream": io.BytesIO(b"".join(spans))}], select_files=is_part)
    found = []
    with contextlib.suppress(tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError):
        for sample in group_by_keys(members):
            parts = {name: content for name, content in sample.items() if name not in ("__key__", "__url__")}
            found.append((sample["__key__"], parts))
    return found


def _plain_samples(raw: bytes, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> list[_Parsed] | None:
    """As _webdataset_samples, in a small part of its time; None unless all are ordinary files with short names.

    The headers of the first members of all samples are read at once, then those of the second ones, and so on.
    """
    if not len(begins) or ((begins | ends) % BLOCK).any() or ends.max() > len(raw):
        return None
    blocks = np.frombuffer(raw, np.uint8, len(raw) // BLOCK * BLOCK).reshape(-1, BLOCK)
    keys, parts = [b""] * len(begins), [dict[str, bytes]() for _ in begins]
    numbers = np.arange(len(begins))
    while len(numbers):
        headers = blocks[begins // BLOCK]
        sizes = _plain_sizes(headers)
        if sizes is None:
            return None
        contents = begins + BLOCK
        begins = contents + -(-sizes // BLOCK) * BLOCK
        if (begins > ends).any():
            return None
        names = np.ascontiguousarray(headers[:, _NAME]).view("S100")[:, 0].tolist()
        members = _PARTS(b"\n".join(names))
        if len(members) != len(names):  # a name has a line break
            return None
        places = zip(numbers.tolist(), names, members, contents.tolist(), (contents + sizes).tolist(), strict=True)
        for number, name, (key, extension), first, last in places:
            if key:
                if keys[number] not in (b"", key) or (kind := _text(extension).lower()) in parts[number]:
                    return None
                keys[number], parts[number][kind] = key, raw[first:last]
            elif b"\0" in name or is_part(_text(name)):
                return None
        unread = begins < ends
        numbers, begins, ends = numbers[unread], begins[unread], ends[unread]
    return list(zip(_text(b"\n".join(keys)).split("\n"), parts, strict=True)) if all(keys) else None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _plain_sizes(headers: NDArray[np.uint8]) -> NDArray[np.int64] | None:
    """The sizes of the files; None unless all are headers of ordinary files, in the form in which tar programs write
    them, with their checksum."""
    values = headers[:, _PLACES] - _LEAST
    if (values > _MOST).any():
        return None
    sizes, checksums = (values @ _WEIGHTS).T  # and the digits of these
    return sizes if (headers.sum(axis=1, dtype=np.uint32) == checksums + _OF_FIELD).all() else None


def _keys(manifest: Manifest, sample_range: SampleRange) -> list[str]:
    """The keys of a range by the shard's index, since a damaged sample's own header may be what is damaged."""
    numbers = range(sample_range.first_row, sample_range.first_row + sample_range.rows)
    try:
        index = manifest.storage.read(manifest.url_of(sample_range.shard, ".idx"))
        lines = index.decode("utf-8", "surrogateescape").split("\n")
        return [key_of_line(lines[1 + number]) for number in numbers]
    except (DataError, IndexError):  # the name in a report is not worth the run
        return [f"row {number}" for number in numbers]
