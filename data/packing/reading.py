"""The bytes of images as a listing has them, those that lie near each other in one file by one read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data.errors import DataError
from data.packing.archives import DamagedMember, Entry, unzip
from data.storage.ranged_file import NEAR_BYTES
from data.storage.remote import ByteSource, NotFound


def read_image(storage: ByteSource, image: Entry) -> bytes:
    """The bytes of an image's file; DataError if unreadable or not as listed, DamagedMember in a damaged zip."""
    (contents,) = read_images(storage, [image])
    if isinstance(contents, DamagedMember):
        raise contents
    return contents


def read_images(storage: ByteSource, images: Sequence[Entry]) -> Iterator[bytes | DamagedMember]:
    """The bytes of images in the order in which they lie; DataError where one is unreadable or not as listed."""
    for run in _neighbours(images):
        for image, contents in zip(run, _read(storage, run), strict=True):
            if image.size is not None and image.offset is None and len(contents) != image.size:
                had = f"has {len(contents)} bytes, but had {image.size} when listed"
                raise DataError(f"{image.url} {had}; pack again with --overwrite")
            yield _unzipped(contents, image) if image.zipped else contents


def _neighbours(images: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Runs of images that are read at once: in one file, with no more between two than a request would take."""
    run: list[Entry] = []
    for image in images:
        if run and not (image.url == run[-1].url and 0 <= _begin(image) - _end(run[-1]) <= NEAR_BYTES):
            yield run
            run = []
        run.append(image)
    if run:
        yield run


def _begin(image: Entry) -> int:
    return image.offset or 0


def _end(image: Entry) -> int:
    return _begin(image) + ((image.zipped.span if image.zipped else image.size) or 0)


def _read(storage: ByteSource, run: list[Entry]) -> list[bytes]:
    first, last = run[0], run[-1]
    if len(run) == 1 and first.size == 0 and not first.zipped:
        return [b""]
    whole = first.offset is None
    begin, end = (None, None) if whole else (_begin(first), _end(last))
    try:
        contents = storage.read(first.url, begin, end)
    except NotFound as error:
        raise DataError(f"{error}; it was there when listed: pack again with --overwrite") from error
    start = _begin(first)
    return [contents] if whole else [contents[_begin(each) - start : _end(each) - start] for each in run]


def _unzipped(contents: bytes, image: Entry) -> bytes | DamagedMember:
    assert image.zipped
    try:
        return unzip(contents, image.zipped, image.size or 0)
    except DamagedMember as damage:
        return damage
