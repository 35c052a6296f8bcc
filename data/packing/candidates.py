"""Which images become which samples of which shards: a plan that the listing alone decides, before an image is read.

    DST/.packing/plan/000012.json.gz   {"of", "images": [[key, classes, is a copy, path, where its bytes are], ...]}

The order is one permutation of all images; shards are cut from it by the sizes that the listing gave. SQLite does both
in bounded memory, and a shard's images are written as soon as they are known.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from data import rng
from data.errors import DataError, UsageError
from data.packing.archives import Entry
from data.packing.catalog import ENTRY, to_bytes, to_entry, to_text
from data.packing.copies import name_contents
from data.packing.holdout import held_out, ordered_as_signed
from data.packing.sources import Source, label_numbers
from data.packing.work import Work
from data.storage.prefetch import ordered_map
from data.storage.remote import Storage, write_file
from data.urls import join, split_query

Item = TypeVar("Item")
TRAIN, VAL = "train/", "val/"
"""The folders of the two sets that a pack makes in its destination with images held out; else its one set is ""."""
_DRAWS_AT_ONCE = 2**14
_WRITES_AT_ONCE = 8
_BLOCK = 512
_LISTED = "SELECT url, path, offset, size, fault, zipped, labels, held, copy FROM images ORDER BY id"


class Candidate(NamedTuple):
    """An image on its way into a shard; `label` is the part that says its classes: extension and contents.

    With images held out `is_copy` says that another one before it has the same bytes.
    """

    image: Entry
    key: str
    labels: tuple[int, ...]
    label: tuple[str, bytes]
    is_copy: bool


def hold_out(found: Source, holdout: float, seed: int, progress: Callable[[int, int], None]) -> None:
    """Enters which images are held out, and which are copies of others."""
    name_contents(found, progress)
    catalog = found.catalog
    contents = (each for (each,) in catalog.select("SELECT contents FROM images ORDER BY id"))
    images = ((image.path, labels, each) for (image, labels), each in zip(found.images(), contents, strict=True))
    held = held_out(images, holdout, seed)
    catalog.change_each("UPDATE images SET held = 1 WHERE contents = ?", ((each,) for each in held))
    catalog.change("UPDATE images SET copy = 1 WHERE id NOT IN (SELECT MIN(id) FROM images GROUP BY contents)")
    if not catalog.first("SELECT 1 FROM images WHERE held"):
        raise UsageError(
            f"--holdout={holdout} holds out no image: in each class of {found.url} it comes to less than half an image,"
            " or the class has only one; choose a larger share, or pack other images as the evaluation set"
        )


def fingerprint_of(found: Source) -> str:
    """SHA-256 of all that the listing says, where each file is, how large, and its labels, and of the sets."""
    digest = hashlib.sha256(repr((found.classes, sorted(found.numbers.items()))).encode("utf-8", "surrogateescape"))
    for each in found.catalog.broken():
        digest.update(repr(each).encode("utf-8", "surrogatepass"))
    for url, *more in found.catalog.select(_LISTED):
        url = split_query(to_text(url))[0] if b"?" in url else url  # a link that is signed anew: the same file
        digest.update(repr((url, more)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def write_plan(
    work: Work, found: Source, sets: tuple[str, ...], seed: int, most_samples: int | None, most_bytes: int | None
) -> dict[str, Any]:
    """Writes which images go into which shards, then the plan; returns that."""
    listing = fingerprint_of(found)
    catalog, numbers_of, query = found.catalog, label_numbers(found.numbers), split_query(found.url)[1]
    widest = max((len(json.loads(each)) for (each,) in catalog.select("SELECT DISTINCT labels FROM images")), default=1)
    catalog.function("draw", _draws(seed))
    columns = f"held, key, labels, copy, {ENTRY}"
    shuffled = catalog.select(f"SELECT {columns} FROM images ORDER BY held, draw(id), id")
    label_bytes = lru_cache(2**16)(lambda numbers: _padded(len(label_part(numbers, widest)[1])))
    counts: dict[str, Counter[int]] = {name: Counter() for name in sets}
    names: list[tuple[str, int]] = []

    def rows() -> Iterator[tuple[int, list[Any], int]]:
        for held, key, labels, copy, path, url, offset, size, *more in shuffled:
            numbers = numbers_of(labels)
            for number in numbers:
                counts[sets[held]][number] += 1
            url = _without_query(to_text(url), query)
            row = [to_text(key), numbers, copy, to_text(path), url, offset, size, *more]
            yield held, row, 2 * _BLOCK + _padded(size or 0) + label_bytes(numbers)

    def pieces() -> Iterator[tuple[int, bytes]]:
        for held, of_set in groupby(rows(), key=itemgetter(0)):
            numbered = count()
            for run in split_by_size(of_set, itemgetter(2), most_samples, most_bytes):
                names.append((f"{sets[held]}shard-{next(numbered):06d}", len(run)))
                piece = json.dumps({"of": listing, "images": [row for _, row, _ in run]}).encode()
                yield len(names) - 1, piece

    work.fs.makedirs(join(work.folder, "plan"), exist_ok=True)
    with ThreadPoolExecutor(_WRITES_AT_ONCE) as pool:
        for _ in ordered_map(pool, lambda piece: _write_piece(work, *piece), pieces(), _WRITES_AT_ONCE):
            pass
    return work.publish_plan(
        len(names),
        listing=listing,
        classes=found.classes,
        fixed=found.fixed,
        reading=found.reading,
        broken=list(catalog.broken()),
        labels_per_sample=widest,
        images=sum(images for _, images in names),
        shards=names,
        counts={name: sorted(each.items()) for name, each in counts.items()},
    )


def read_piece(work: Work, plan: dict[str, Any], number: int, query: str) -> list[Candidate]:
    """The images of a shard, on a web server with the source's query."""
    path = _piece(work, number)
    packed = Storage().with_retries("read", path, lambda: work.fs.cat_file(path))
    piece = json.loads(gzip.decompress(packed))
    if piece["of"] != plan["listing"]:
        raise DataError(
            f"{work.url}: two processes listed the images at once and found different ones; pack again with --overwrite"
        )
    widest = plan["labels_per_sample"]
    return [
        Candidate(
            to_entry(to_bytes(path), to_bytes(_with_query(url, query)), *where),
            key,
            tuple(numbers),
            label_part(numbers, widest),
            bool(copy),
        )
        for key, numbers, copy, path, url, *where in piece["images"]
    ]


def _without_query(url: str, query: str) -> str:
    """A URL in the plan, where "?" stands for the source's query, which may be a secret."""
    return url.removesuffix(query) + "?" if query and url.endswith(query) else url


def _with_query(url: str, query: str) -> str:
    return url[:-1] + query if query and url.endswith("?") else url


def label_part(numbers: Iterable[int], labels_per_sample: int) -> tuple[str, bytes]:
    """Of a set in which some sample has several labels, all have them in the same place."""
    labels = tuple(numbers)
    if labels_per_sample > 1:
        return "json", json.dumps({"labels": labels}).encode()
    return "cls", str(labels[0]).encode()


def _write_piece(work: Work, number: int, piece: bytes) -> None:
    write_file(work.fs, _piece(work, number), gzip.compress(piece, compresslevel=1, mtime=0))


def _piece(work: Work, number: int) -> str:
    return join(work.folder, f"plan/{number:06d}.json.gz")


def _draws(seed: int) -> Callable[[int], int]:
    """The number by which image `id` (from 1) is shuffled: that of `rng.permutation` of all images."""
    held: dict[int, list[int]] = {}

    def draw(image: int) -> int:
        block, place = divmod(image - 1, _DRAWS_AT_ONCE)
        if block not in held:
            held.clear()
            first = block * _DRAWS_AT_ONCE // 2  # a group of four words is two numbers
            held[block] = ordered_as_signed(rng.uint64s(seed, rng.Stream.PACK, 0, _DRAWS_AT_ONCE, first_block=first))
        return held[block][place]

    return draw


def split_by_size(
    items: Iterable[Item], bytes_of: Callable[[Item], int], most_items: int | None, most_bytes: int | None
) -> Iterator[list[Item]]:
    """The items in runs of at most this many items and bytes; a run has at least one item."""
    run: list[Item] = []
    size = 0
    for item in items:
        more = bytes_of(item)
        if run and (len(run) == most_items or (most_bytes is not None and size + more > most_bytes)):
            yield run
            run, size = [], 0
        run.append(item)
        size += more
    if run:
        yield run


def _padded(size: int) -> int:
    """What a part of this size takes in a tar beside its header."""
    return -(-size // _BLOCK) * _BLOCK
