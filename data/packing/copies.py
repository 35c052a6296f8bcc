"""Which images of a source have the same bytes, found without reading most of them.

Only images of equal size can be equal. Of those that share their size with another the last 4 KiB are read, where two
photographs hardly ever agree, and of those that agree there too the whole. A zip has a checksum of each image, so that
of these only the latter are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.packing.archives import DamagedMember, Entry
from data.packing.catalog import ENTRY, to_entry
from data.packing.reading import read_image
from data.packing.sources import Source
from data.storage.prefetch import ordered_map

_TAIL_BYTES = 2**12
_READS_AT_ONCE = 16
_SHARED = "FROM images WHERE contents IN (SELECT contents FROM images GROUP BY contents HAVING COUNT(*) > 1)"


def name_contents(found: Source, progress: Callable[[int, int], None]) -> None:
    """Enters a name for the bytes of each image: two images have the same where their bytes are equal.

    `progress(done, total)` counts the reads, first of ends, then of whole images.
    """
    catalog = found.catalog
    catalog.change("CREATE INDEX equal ON images (contents)")
    catalog.change_each("UPDATE images SET contents = ? WHERE id = ?", _sizes(found))
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for read in (_end, _whole):
            catalog.change(f"CREATE TABLE asked AS SELECT id, contents, {ENTRY} {_SHARED}")

            def name(row: tuple[Any, ...], read: Callable[[Source, Entry], bytes] = read) -> tuple[bytes, int]:
                number, known, *entry = row
                return _digest(known + read(found, to_entry(*entry))), number

            total = (catalog.first("SELECT COUNT(*) FROM asked") or (0,))[0]
            asked = catalog.select("SELECT * FROM asked")
            progress(0, total)
            results = ordered_map(pool, name, asked, 2 * _READS_AT_ONCE)
            for done, result in enumerate(results, start=1):
                catalog.change("UPDATE images SET contents = ? WHERE id = ?", *result)
                progress(done, total)
            catalog.change("DROP TABLE asked")


def _sizes(found: Source) -> Iterator[tuple[bytes, int]]:
    for number, *entry in found.catalog.select(f"SELECT id, {ENTRY} FROM images"):
        image = to_entry(*entry)
        size = len(read_image(found.storage, image)) if image.size is None else image.size  # a server may not say
        yield str(size).encode(), number


def _end(found: Source, image: Entry) -> bytes:
    if image.zipped:
        return image.zipped.crc.to_bytes(4, "little")
    if not image.size:
        return read_image(found.storage, image)[-_TAIL_BYTES:]
    begin, end = image.offset or 0, (image.offset or 0) + image.size
    return found.storage.read(image.url, max(begin, end - _TAIL_BYTES), end)


def _whole(found: Source, image: Entry) -> bytes:
    try:
        return _digest(read_image(found.storage, image))
    except DamagedMember:
        return image.path.encode("utf-8", "surrogateescape")  # it is left out, equal to none


def _digest(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=16).digest()
