"""Which images become which samples of which shards: known from the listing alone, before an image is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from data.errors import UsageError
from data.packing.copies import name_contents
from data.packing.holdout import held_out
from data.packing.resume import TRAIN, VAL
from data.packing.sources import Entry, Source
from data.urls import split_query

Item = TypeVar("Item")


class Candidate(NamedTuple):
    """An image on its way into a shard; `label` is the part that says its classes: extension and contents.

    With images held out `set` is the folder of its set, and `contents` the same for the same bytes.
    """

    image: Entry
    key: str
    labels: tuple[int, ...]
    label: tuple[str, bytes]
    set: str = ""
    contents: bytes = b""


def candidates_of(found: Source) -> list[Candidate]:
    """The images of a listing, in its order."""
    keys = unique_keys([image.path for image in found.images])
    several = any(len(labels) > 1 for labels in found.labels)
    return [
        Candidate(image, key, labels, _label_part(labels, several))
        for image, key, labels in zip(found.images, keys, found.labels, strict=True)
    ]


def split_sets(found: Source, holdout: float, seed: int, progress: Callable[[int, int], None]) -> list[Candidate]:
    """The candidates, each with its contents and set."""
    contents = name_contents(found, progress)
    held = held_out([image.path for image in found.images], found.labels, contents, holdout, seed)
    if not any(held):
        raise UsageError(
            f"--holdout={holdout} takes no image: it is less than half an image of each class of {found.url}, or every"
            " class has only one; take a larger share, or pack other images as an evaluation set"
        )
    return [
        candidate._replace(set=VAL if for_val else TRAIN, contents=name)
        for candidate, for_val, name in zip(candidates_of(found), held, contents, strict=True)
    ]


def _label_part(labels: tuple[int, ...], several: bool) -> tuple[str, bytes]:
    """Of a set in which some sample has several labels, all have them in the same place."""
    return ("json", json.dumps({"labels": labels}).encode()) if several else ("cls", str(labels[0]).encode())


def fingerprint_of(found: Source, candidates: Sequence[Candidate]) -> str:
    """SHA-256 of all that the listing says, where each file is, how large, and its labels, and of the sets."""
    digest = hashlib.sha256(repr((found.classes, found.broken)).encode("utf-8", "surrogateescape"))
    for each in candidates:
        image = each.image._replace(url=split_query(each.image.url)[0])  # a link that is signed anew: the same file
        digest.update(repr((image, each.labels, each.set)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def unique_keys(paths: Iterable[str]) -> list[str]:
    """A key for each path, all different: no suffix, and only letters, digits, "_", "-" and "/".

    webdataset ends a key at its first dot and skips "__x__/..."; DALI's index is split at spaces. Of paths with
    the same key the first keeps it, the next get "-2", "-3", ...
    """
    taken: dict[str, int] = {}
    keys = []
    for path in paths:
        plain = re.sub(r"[^\w/-]", "_", unicodedata.normalize("NFC", os.path.splitext(path)[0]))
        key = plain = re.sub(r"^__+", "_", plain)
        while key in taken:
            taken[plain] += 1
            key = f"{plain}-{taken[plain]}"
        taken[key] = 1
        keys.append(key)
    return keys


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


def image_bytes(candidate: Candidate) -> int:
    """By the listing."""
    return candidate.image.size or 0


def tar_bytes(candidate: Candidate) -> int:
    """What a sample takes in a tar: two headers, and label and image in whole blocks."""
    return 2 * 512 + sum(-(-size // 512) * 512 for size in (len(candidate.label[1]), image_bytes(candidate)))
