"""Which images of a source have the same bytes, found without reading most of them.

Only images of equal size can be equal. Of those that share their size with another the last 4 KiB are read, where two
photographs hardly ever agree, and of those that agree there too the whole. A zip has a checksum of each image, so that
of these only the latter are read.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from data.packing.archives import DamagedMember, Entry
from data.packing.sources import Source
from data.storage.prefetch import ordered_map

_TAIL_BYTES = 2**12
_READS_AT_ONCE = 16


def name_contents(found: Source, progress: Callable[[int, int], None]) -> list[bytes]:
    """A name for the bytes of each image: two images have the same where their bytes are equal.

    `progress(done, total)` counts the reads, first of ends, then of whole images.
    """
    names = [_digest(str(_size(found, image)).encode()) for image in found.images]
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for read in (_end, _whole):
            sharing = Counter(names)
            asked = [number for number, name in enumerate(names) if sharing[name] > 1]
            results = ordered_map(pool, lambda number: read(found, found.images[number]), asked, 2 * _READS_AT_ONCE)  # noqa: B023
            progress(0, len(asked))
            for done, (number, contents) in enumerate(zip(asked, results, strict=True), start=1):
                names[number] = _digest(names[number] + contents)
                progress(done, len(asked))
    return names


def _size(found: Source, image: Entry) -> int:
    return len(found.read(image)) if image.size is None else image.size


def _end(found: Source, image: Entry) -> bytes:
    if image.zipped:
        return image.zipped.crc.to_bytes(4, "little")
    if not image.size:
        return found.read(image)[-_TAIL_BYTES:]
    begin, end = image.offset or 0, (image.offset or 0) + image.size
    return found.storage.read(image.url, max(begin, end - _TAIL_BYTES), end)


def _whole(found: Source, image: Entry) -> bytes:
    try:
        return _digest(found.read(image))
    except DamagedMember:
        return image.path.encode("utf-8", "surrogateescape")  # it is left out, equal to none


def _digest(contents: bytes) -> bytes:
    return hashlib.blake2b(contents, digest_size=16).digest()
