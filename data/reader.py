"""A window of samples as ranged reads: fetched, compared with the sample table, parsed by webdataset.

A run of neighbouring samples is one contiguous byte range of a tar, and such a range is itself a valid tar stream. Its
table rows come by one ranged read, its bytes by another. A sample whose checksum does not agree after a second read,
or that never decoded, is Broken; who replaces it is the loader's business, since only that knows the window.

Next: augment.py.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.codec import decodable
from data.errors import DataError
from data.order import Stretch
from data.shards import FLAG_DECODED, Broken, Manifest, join, locate, read_rows

NOT_IMAGES = {"cls", "json", "txt"}


@dataclass(frozen=True)
class Sample:
    """An image as its encoded bytes, with its label; `height` and `width` are those it decodes to."""

    key: str
    image: bytes
    label: int
    height: int
    width: int


def read_stretches(manifest: Manifest, stretches: Sequence[Stretch]) -> list[Sample | Broken]:
    """The samples of neighbouring runs, in order; DataError where storage or table cannot be read."""
    return [sample for stretch in stretches for sample in _read_stretch(manifest, stretch)]


def _read_stretch(manifest: Manifest, stretch: Stretch) -> list[Sample | Broken]:
    shard = manifest.shards[stretch.shard]
    filesystem, root = locate(manifest.url)
    url = join(root, shard.name)
    rows = read_rows(filesystem, url.removesuffix(".tar") + ".npy", stretch.first_row, stretch.rows)
    raw = _read_range(filesystem, url, int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1]))
    spans = _spans(raw, rows)
    if not all(_agrees(span, row) for span, row in zip(spans, rows, strict=True)):
        raw = _read_range(filesystem, url, int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1]))
        spans = _spans(raw, rows)
    good = [_agrees(span, row) for span, row in zip(spans, rows, strict=True)]
    parsed = iter(_parse(b"".join(span for span, is_good in zip(spans, good, strict=True) if is_good), url, sum(good)))
    return [
        _sample(next(parsed), row, manifest, shard.name)
        if is_good
        else Broken(shard.name, _key_of(span, stretch.first_row + i), "its bytes are not those that were packed")
        for i, (span, row, is_good) in enumerate(zip(spans, rows, good, strict=True))
    ]


def _read_range(filesystem: Any, url: str, begin: int, end: int) -> bytes:
    try:
        content = filesystem.cat_file(url, start=begin, end=end)
    except OSError as error:
        raise DataError(f"{url}: bytes {begin} to {end}: {error}") from error
    if len(content) != end - begin:
        raise DataError(f"{url}: bytes {begin} to {end} were asked for and {len(content)} came; pack or index it again")
    return content


def _spans(raw: bytes, rows: np.ndarray) -> list[memoryview]:
    view, first = memoryview(raw), int(rows["offset"][0])
    return [view[int(row["offset"]) - first :][: int(row["bytes"])] for row in rows]


def _agrees(span: memoryview, row: np.void) -> bool:
    return zlib.crc32(span) == int(row["crc"])


def _parse(raw: bytes, url: str, expected: int) -> list[dict[str, Any]]:
    # webdataset ends silently at a header it cannot read, so its answer is counted.
    samples = list(group_by_keys(tar_file_expander([{"url": url, "stream": io.BytesIO(raw)}])))
    if len(samples) != expected:
        raise DataError(f"{url}: {len(samples)} samples were parsed where its table has {expected}; pack or index it again")
    return samples


def _sample(parts: dict[str, Any], row: np.void, manifest: Manifest, shard: str) -> Sample | Broken:
    key = parts["__key__"]
    image = next((parts[name] for name in parts if not name.startswith("__") and name not in NOT_IMAGES), None)
    if image is None or "cls" not in parts:
        return Broken(shard, key, f"has {sorted(p for p in parts if not p.startswith('__'))}; an image and .cls are needed")
    label, classes = int(parts["cls"]), len(manifest.classes)
    if not 0 <= label < classes:
        return Broken(shard, key, f"its label is {label}; there are {classes} classes")
    height, width = int(row["height"]), int(row["width"])
    if not int(row["flags"]) & FLAG_DECODED:  # DALI's decoder may crash on bytes that never decoded
        shape = decodable([image])[0]
        if shape is None:
            return Broken(shard, key, "does not decode")
        height, width = shape
    return Sample(key, image, label, height, width)


def _key_of(span: memoryview, row: int) -> str:
    name = bytes(span[:100]).split(b"\0")[0].decode(errors="replace")
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0] if name else f"row {row}"
