"""A window of samples as ranged reads: fetched, compared with the sample table, parsed by webdataset.

A run of neighbouring samples is one contiguous byte range of a tar, and such a range is itself a valid tar stream. Its
table rows come by one ranged read, its bytes by another. A sample whose checksum does not agree after a second read,
or that never decoded, is Broken; who replaces it is the loader's business, since only that knows the window.

Next: augment.py.
"""

from __future__ import annotations

import io
import itertools
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.codec import decodable
from data.errors import DataError
from data.order import Stretch
from data.shards import FLAG_DECODED, Broken, Manifest, locate, read_rows, split_name

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
    filesystem, url = locate(manifest.url_of(stretch.shard))
    rows = _read_rows(filesystem, url.removesuffix(".tar") + ".npy", stretch)
    begin, end = int(rows["offset"][0]), int(rows["offset"][-1]) + int(rows["bytes"][-1])
    spans, good = _checked(_read_range(filesystem, url, begin, end), rows)
    if not all(good):
        spans, good = _checked(_read_range(filesystem, url, begin, end), rows)
    parsed = iter(_parse(b"".join(itertools.compress(spans, good)), url, sum(good)))
    keys = [""] * len(rows) if all(good) else _keys(filesystem, url, stretch)
    return [
        _sample(next(parsed), row, manifest, shard.name)
        if is_good
        else Broken(shard.name, key, "its bytes are not those that were packed")
        for row, is_good, key in zip(rows, good, keys, strict=True)
    ]


def _read_rows(filesystem: Any, url: str, stretch: Stretch) -> np.ndarray:
    try:
        return read_rows(filesystem, url, stretch.first_row, stretch.rows)
    except DataError:
        raise
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{url} cannot be read: {error}") from error


def _read_range(filesystem: Any, url: str, begin: int, end: int) -> bytes:
    try:
        content = filesystem.cat_file(url, start=begin, end=end)
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{url}: bytes {begin} to {end} cannot be read: {error}") from error
    if len(content) != end - begin:
        raise DataError(f"{url}: bytes {begin} to {end} were asked for and {len(content)} came; pack or index it again")
    return content


def _checked(raw: bytes, rows: np.ndarray) -> tuple[list[memoryview], list[bool]]:
    """The bytes of each row, and whether they are those that were packed."""
    view, first = memoryview(raw), int(rows["offset"][0])
    spans = [view[int(row["offset"]) - first :][: int(row["bytes"])] for row in rows]
    return spans, [zlib.crc32(span) == int(row["crc"]) for span, row in zip(spans, rows, strict=True)]


def _parse(raw: bytes, url: str, expected: int) -> list[dict[str, Any]]:
    if not expected:  # tarfile refuses an empty stream
        return []
    # webdataset ends silently at a header it cannot read, so its answer is counted.
    samples = list(group_by_keys(tar_file_expander([{"url": url, "stream": io.BytesIO(raw)}])))
    if len(samples) != expected:
        raise DataError(
            f"{url}: {len(samples)} samples were parsed where its table has {expected}; pack or index it again"
        )
    return samples


def _sample(parts: dict[str, Any], row: np.void, manifest: Manifest, shard: str) -> Sample | Broken:
    key = parts["__key__"]
    image = next((parts[name] for name in parts if not name.startswith("__") and name not in NOT_IMAGES), None)
    if image is None or "cls" not in parts:
        return Broken(
            shard, key, f"has {sorted(p for p in parts if not p.startswith('__'))}; an image and .cls are needed"
        )
    text, classes = parts["cls"].strip(), len(manifest.classes)
    label = int(text) if re.fullmatch(rb"\d{1,9}", text) else classes
    if label >= classes:
        return Broken(shard, key, f"its label is {text[:20].decode(errors='replace')!r}; it must be 0 to {classes - 1}")
    height, width = int(row["height"]), int(row["width"])
    if not int(row["flags"]) & FLAG_DECODED:  # DALI's decoder may crash on bytes that never decoded
        shape = decodable([image])[0]
        if shape is None:
            return Broken(shard, key, "does not decode")
        height, width = shape
    return Sample(key, image, label, height, width)


def _keys(filesystem: Any, url: str, stretch: Stretch) -> list[str]:
    """The keys of a stretch by the shard's index, since a damaged sample's own header may be what is damaged."""
    numbers = range(stretch.first_row, stretch.first_row + stretch.rows)
    try:
        lines = filesystem.cat_file(url.removesuffix(".tar") + ".idx").decode().splitlines()
        return [split_name(lines[1 + number].split(" ")[3])[0] for number in numbers]
    except Exception:  # the name in a report is not worth the run; the back ends' exceptions share no base class
        return [f"row {number}" for number in numbers]
