"""Shards on disk: manifest, tar, DALI index and sample table; written, read and checked here, at any fsspec URL.

    manifest.json       {"format": 2, "samples": N, "classes": [...],
                         "shards": [{"name", "samples", "bytes", "table", "headers"}]}
    shard-000000.tar    an ordinary WebDataset tar: KEY.jpg and KEY.cls of each sample
    shard-000000.idx    DALI's own index of it (wds2idx, v1.2)
    shard-000000.npy    one row of 32 bytes a sample; row i lies at byte 256 + 32 i, so any run of rows is one range

Where the tars are other tools' and stay where they are, the manifest says where (`shards_at`), and in which field of
`.json` the labels stand (`label_field`), how many of them a sample has at most (`labels_per_sample`), and what they are
(`labels`) if not the classes' numbers from 0: their names, or numbers from 1. A shard that a web server gives by a
query has that as well (`query`).

`table` is the checksum of a shard's .npy, and `headers` what it would be if only the tar's headers had been read: a set
is the same whether its images were looked at or not. Format 1 has neither, and early ones of format 2 no `headers`:
complete.py completes them. One of format 1 keeps the SHA-256 of what it was (`format_1`), which older checkpoints have
of their training set.

The manifest is written last: where it is, everything that it names is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from data.errors import UsageError
from data.paths import expand
from data.shards.labels import InvalidSample, Reading, class_numbers, composed, parse_labels
from data.shards.sample_table import HEADER_BYTES, ROW
from data.shards.shard_list import BadShard, Growing, Shard, Shards, hexadecimal
from data.storage.cache import NodeCache
from data.storage.durable import remove_partials
from data.storage.remote import DEFAULT, ByteSource, NotFound, Storage, open_fs, write_file
from data.urls import join, split_query

FORMAT = 2
MANIFEST = "manifest.json"
_PIECE_LENGTH = 1 << 17
_LEAST_BYTES = len('{"name":".tar","samples":1,"bytes":1}')
_SHARDS = re.compile(r'"shards"\s*:\s*\[')


@dataclass(frozen=True)
class Manifest:
    """What lies at `url`; `format_1` is the SHA-256 of the manifest's bytes where it has, or had, that format."""

    url: str
    classes: tuple[str, ...]
    shards: Shards
    label_field: str | None = None
    labels_per_sample: int = 1
    shards_at: str | None = None
    labels: Reading = Reading.FROM_0
    format_1: str | None = None
    storage: ByteSource = field(default=DEFAULT, compare=False, repr=False)

    @cached_property
    def samples(self) -> int:
        """Samples of all shards."""
        return int(self.shards.samples.sum())

    @cached_property
    def mean_sample_bytes(self) -> float:
        """Bytes of tar a sample takes on average."""
        return int(self.shards.bytes.sum()) / self.samples

    @cached_property
    def fingerprint(self) -> str | None:
        """What the set is, wherever it lies, as a SHA-256; None where the tables' checksums are not known."""
        return self._hash("tables")

    @cached_property
    def header_fingerprint(self) -> str | None:
        """What `fingerprint` would be by the headers alone; None where that is not known."""
        return self._hash("headers")

    def _hash(self, column: Literal["tables", "headers"]) -> str | None:
        """The SHA-256 of a JSON document that is never in memory as a whole: what comes first, and a row a shard."""
        if not getattr(self.shards, column).any(axis=1).all():
            return None
        content = json.dumps([self.classes, self.label_field, self.labels_per_sample, self.labels])
        digest, before = hashlib.sha256(f"{content[:-1]}, [".encode()), ""
        for run in self.shards.runs():
            columns = run.samples.tolist(), run.bytes.tolist(), hexadecimal(getattr(run, column))
            rows = ", ".join([f'[{samples}, {size}, "{each}"]' for samples, size, each in zip(*columns, strict=True)])
            digest.update(f"{before}{rows}".encode())
            before = ", "
        digest.update(b"]]")
        return digest.hexdigest()

    def is_set_of(self, fingerprint: str, header_fingerprint: str | None) -> bool:
        """Whether a checkpoint with these fingerprints was trained on it; older ones have that of a manifest's bytes.

        What is known of one by its headers alone need not agree with more.
        """
        known = (self.fingerprint, self.header_fingerprint, self.format_1)
        return fingerprint in known or self.fingerprint == header_fingerprint

    def url_of(self, shard: int, suffix: str = ".tar") -> str:
        """Where a shard's tar lies, or its ".npy" or ".idx"."""
        found = self.shards[shard]
        if suffix == ".tar":
            return join(self.shards_at or self.url, found.name + found.query)
        return join(self.url, found.stem + suffix)

    def labels_of(self, parts: Mapping[str, bytes]) -> tuple[int, ...]:
        """The numbers of a sample's classes, by its parts; InvalidSample where it has none, or one that is no class."""
        labels = class_numbers(parse_labels(parts, self.label_field), self._numbers, self.labels)
        if len(labels) > self.labels_per_sample:
            raise InvalidSample(f"has {len(labels)} labels; {MANIFEST} allows at most {self.labels_per_sample}")
        return labels

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used: its shard (None if it never got into one), its key or source file, and why."""

    shard: str | None
    key: str
    reason: str


# The manifest.


class NoManifest(UsageError):
    """Nothing lies where a manifest should."""


def write_manifest(
    url: str,
    classes: Sequence[str],
    shards: Sequence[Shard],
    *,
    label_field: str | None = None,
    labels_per_sample: int = 1,
    shards_at: str | None = None,
    labels: Reading = Reading.FROM_0,
    format_1: str | None = None,
) -> None:
    """Puts the manifest at `url`, to be called when all else is there; the same content gives the same bytes."""
    optional = {"label_field": label_field, "labels_per_sample": labels_per_sample, "shards_at": shards_at}
    optional |= {"labels": None if labels is Reading.FROM_0 else labels, "format_1": format_1}
    lines = "".join(
        f'"{name}": {json.dumps(value, ensure_ascii=False)},\n'
        for name, value in optional.items()
        if value not in (None, 1)
    )
    rows = ",\n".join("  " + json.dumps(_row(shard), ensure_ascii=False) for shard in shards)
    samples, number = sum(shard.samples for shard in shards), FORMAT if all(shard.table for shard in shards) else 1
    text = (
        f'{{"format": {number}, "samples": {samples},\n"classes": {json.dumps(list(classes), ensure_ascii=False)},\n'
        f'{lines}"shards": [\n{rows}\n]}}\n'
    )
    fs, folder = open_fs(url)
    write_file(fs, join(folder, MANIFEST), text.encode())
    if isinstance(fs, LocalFileSystem):
        remove_partials(Path(folder))


def _row(shard: Shard) -> dict[str, str | int]:
    return {name: value for name, value in vars(shard).items() if value != ""}


def read_manifest(url: str, storage: Storage = DEFAULT) -> Manifest:
    """What lies at `url`; UsageError where no manifest is, or one that does not add up; DataError if unreadable."""
    place = join(url, MANIFEST)
    try:
        file = storage.open(place)
    except NotFound:
        inside = join(url, "train")
        if storage.exists(join(inside, MANIFEST)):
            raise NoManifest(f"{place} does not exist; name one of the sets: {inside} or {join(url, 'val')}") from None
        raise NoManifest(
            f"{place} does not exist; `coatnet data pack` makes shards with a manifest, `coatnet data index` makes one"
            " for existing shards"
        ) from None
    with file:
        return replace(_parse_manifest(url, place, file), storage=storage)


def _parse_manifest(url: str, place: str, file: io.BufferedReader) -> Manifest:
    try:
        document, shards = _parse(place, file)
        classes, samples = tuple(map(composed, document["classes"])), document["samples"]
        labels = Reading(document.get("labels", Reading.FROM_0))
    except (json.JSONDecodeError, UnicodeError) as error:
        raise UsageError(f"{place} is not valid JSON ({getattr(error, 'msg', error)}); pack or index again") from None
    except BadShard as error:
        raise UsageError(f"{place} {error}; pack or index again") from None
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{place} is not a complete manifest ({error!r}); pack or index again") from None
    names = ("label_field", "labels_per_sample", "shards_at", "format_1")
    optional = {name: document[name] for name in names if name in document}
    if document["format"] == 1:
        file.seek(0)
        optional["format_1"] = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = Manifest(url, classes, shards, labels=labels, **optional)
    if fault := _fault(manifest, samples, document["format"]):
        raise UsageError(f"{place} {fault}; pack or index again")
    return manifest


def _parse(place: str, file: io.BufferedReader) -> tuple[dict[str, Any], Shards]:
    """A manifest's JSON but for its `shards`, and these, whose text and objects are in memory a piece at a time."""
    encoding, most = json.detect_encoding(file.read(4)), file.seek(0, io.SEEK_END) // _LEAST_BYTES
    file.seek(0)
    text = io.TextIOWrapper(file, encoding, "surrogatepass")
    pieces, head, found = iter(partial(_piece, text), ""), "", None
    while found is None and (piece := next(pieces, "")):
        head += piece
        found = _SHARDS.search(head)
    if found is None:
        _check_format(place, json.loads(head))
        raise KeyError("shards")
    before, rest = head[: found.end() - 1], head[found.end() :]
    _check_format(place, {"format": FORMAT, **json.loads(head[: found.start()].rstrip().removesuffix(",") + "}")})
    shards, ended = Growing(most), False
    while not ended:
        piece = "[" + rest
        if goes_on := _ends_an_object(piece):
            piece = piece.rstrip()[:-1] + "]"
        rows, end = json.JSONDecoder().raw_decode(piece)
        shards.add(Shards.of_rows(rows))
        ended = end < len(piece) or not goes_on
        rest = rest[end - 1 :] if ended else next(pieces, "")
    document = json.loads(before + "null" + rest + "".join(pieces))
    _check_format(place, document)
    text.detach()
    return document, shards.shards()


def _piece(text: io.TextIOWrapper) -> str:
    """The next lines, up to one that ends an object before another; "" at the end.

    Where somebody has written all in one line, that is the piece.
    """
    lines = [text.read(_PIECE_LENGTH), text.readline()]
    while lines[-1] and not _ends_an_object(lines[-1]):
        lines.append(text.readline())
    return "".join(lines)


def _ends_an_object(lines: str) -> bool:
    """Whether an object ends where these lines do, with another to follow: no text in JSON has a line break."""
    return lines.endswith("\n") and lines.rstrip().endswith("},")


def _check_format(place: str, document: Any) -> None:
    if not isinstance(document, dict) or "format" not in document:
        raise UsageError(f"{place} is not a manifest of shards: it has no `format`; is this the right path?")
    if document["format"] not in (1, FORMAT):
        raise UsageError(f"{place} has format {document['format']}; this version can read formats 1 and {FORMAT}")


def _fault(manifest: Manifest, samples: object, number: int) -> str | None:
    """What does not hold of a manifest, beside its shards each for itself, in a few words."""
    shards = manifest.shards
    if not manifest.classes or not all(isinstance(each, str) for each in manifest.classes):
        return "names no classes"
    if len(set(manifest.classes)) < len(manifest.classes):
        return "names a class twice"
    if not shards:
        return "names no shards"
    wrong = np.flatnonzero(shards.tables.any(axis=1) != (number > 1))
    if len(wrong):
        shard = shards[int(wrong[0])]
        return f"has format {number}, but gives {shard.name} the table checksum {shard.table!r}"
    stems = np.sort(shards.stems, kind="stable")
    if (stems[1:] == stems[:-1]).any():
        return "names a shard twice"
    if manifest.samples != samples:
        return f"says {samples!r} samples, but its shards have {manifest.samples}"
    if type(manifest.labels_per_sample) is not int or manifest.labels_per_sample < 1:
        return f"has labels_per_sample {manifest.labels_per_sample!r}; it must be at least 1"
    texts = (manifest.label_field, manifest.shards_at, manifest.format_1)
    if not all(isinstance(each, str | None) for each in texts):
        return "has a label_field, shards_at or format_1 that is not text"
    return None


def with_cache(manifest: Manifest, storage: Storage, folder: str | None, max_bytes: int | None) -> Manifest:
    """The manifest, whose files are read by `storage` through a cache in `folder`, but not where they lie on a disk."""
    files = open_fs(manifest.shards_at or manifest.url)[0]
    if folder is None or isinstance(files, LocalFileSystem):
        return replace(manifest, storage=storage)
    place = Path(expand(folder, "data.cache.dir"))
    version = manifest.fingerprint or manifest.format_1 or ""
    return replace(manifest, storage=NodeCache(storage, place, max_bytes, version, _sizes_of(manifest)))


def _sizes_of(manifest: Manifest) -> Callable[[str], int | None]:
    """The bytes of a set's tars and tables by their URL."""
    shards = manifest.shards
    order = np.argsort(shards.stems)
    at = {".tar": manifest.shards_at or manifest.url, ".npy": manifest.url}
    folders = {suffix: split_query(join(folder, ""))[0] for suffix, folder in at.items()}

    def size_of(url: str) -> int | None:
        for suffix, folder in folders.items():
            stem = split_query(url)[0].removeprefix(folder)[: -len(suffix)].encode("utf-8", "surrogatepass")
            number = int(order[np.searchsorted(shards.stems, stem, sorter=order) % len(shards)])
            if manifest.url_of(number, suffix) == url:
                shard = shards[number]
                return shard.bytes if suffix == ".tar" else HEADER_BYTES + ROW.itemsize * shard.samples
        return None

    return size_of
