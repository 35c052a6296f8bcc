"""Which images are held out for evaluation: a share of each class, by draws that depend on seed and path alone.

So neither the order of the listing nor the order of the classes matters, and an image that is added moves few others.
Images of equal contents count as one. One of several classes counts in each.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter

import numpy as np

from data.packing.catalog import Database, to_bytes, to_text
from data.rng import Stream, uint64s

_DRAWS_AT_ONCE = 2**14
_TABLES = """
CREATE TABLE images (contents BLOB, name BLOB, path BLOB, labels TEXT);
CREATE TABLE groups (draw INT, name BLOB, path BLOB, contents BLOB, labels TEXT);
"""
"""Images, and those of equal contents as one, with the first's name and path and the classes of all."""


def held_out(images: Iterable[tuple[str, Sequence[int], bytes]], fraction: float, seed: int) -> Iterator[bytes]:
    """The contents of the images that are held out; of each image path, classes and contents are given.

    Of a class of n images `fraction` n are held out, rounded, but never all. An image of several classes is taken where
    one of them lacks some, so that others may exceed their share; but never the last that any of them has left.
    """
    scratch = Database(_TABLES)
    rows = ((contents, _name(path), to_bytes(path), json.dumps(labels)) for path, labels, contents in images)
    scratch.change_each("INSERT INTO images VALUES (?, ?, ?, ?)", rows)
    counts = Counter[int]()
    scratch.change_each("INSERT INTO groups VALUES (?, ?, ?, ?, ?)", _groups(scratch, seed, counts))
    wanted = {label: int(count * fraction + 0.5) for label, count in counts.items()}
    taken = Counter[int]()
    for contents, labels in scratch.select("SELECT contents, labels FROM groups ORDER BY draw, name, path"):
        own = json.loads(labels)
        lacking = any(taken[label] < wanted[label] for label in own)
        if lacking and all(taken[label] + 1 < counts[label] for label in own):
            taken.update(own)
            yield contents


def _groups(scratch: Database, seed: int, counts: Counter[int]) -> Iterator[tuple[int, bytes, bytes, bytes, str]]:
    """Images of equal contents as one, each with its draw; `counts` gets how many there are of each class."""
    rows = scratch.select("SELECT contents, name, path, labels FROM images ORDER BY contents, name, path")
    groups = (list(same) for _, same in groupby(rows, key=itemgetter(0)))
    while some := list(islice(groups, _DRAWS_AT_ONCE)):
        for draw, same in zip(_draws([name for (_, name, _, _), *_ in some], seed), some, strict=True):
            contents, name, path, _ = same[0]
            labels = sorted({label for *_, each in same for label in json.loads(each)})
            counts.update(labels)
            yield draw, name, path, contents, json.dumps(labels)


def _name(path: str) -> bytes:
    return to_bytes(unicodedata.normalize("NFC", path))


def _draws(names: Sequence[bytes], seed: int) -> list[int]:
    """A number for each name, in the order of which images are drawn."""
    digests = (hashlib.sha256(to_text(name).encode("utf-8", "surrogateescape")).digest()[:8] for name in names)
    indices = np.frombuffer(b"".join(digests), "<u8")
    return ordered_as_signed(uint64s(seed, Stream.HOLDOUT, indices, 1)[:, 0])


def ordered_as_signed(draws: np.ndarray) -> list[int]:
    """Unsigned numbers of 64 bits as signed ones in the same order, which is what SQLite has."""
    return (draws ^ np.uint64(1 << 63)).view(np.int64).tolist()
