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
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from data.errors import UsageError
from data.paths import expand
from data.shards.labels import InvalidSample, Reading, class_numbers, composed, parse_labels
from data.shards.sample_table import HEADER_BYTES, ROW
from data.storage.cache import NodeCache
from data.storage.durable import remove_partials
from data.storage.remote import DEFAULT, ByteSource, NotFound, Storage, open_fs, write_file
from data.urls import has_suffix, join

FORMAT = 2
_OPTIONAL = ("query", "table", "headers")
"""What a shard need not have."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar: its file name beside the manifest, its samples, its bytes; the query with which its server gives it.

    `table` and `headers` are checksums (sample_table.shard_checksums), empty in format 1.
    """

    name: str
    samples: int
    bytes: int
    query: str = ""
    table: str = ""
    headers: str = ""

    @property
    def stem(self) -> str:
        """The name without ".tar", under which its table and index lie."""
        return self.name[: -len(".tar")]


@dataclass(frozen=True)
class Manifest:
    """What lies at `url`; `format_1` is the SHA-256 of the manifest's bytes where it has, or had, that format."""

    url: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    label_field: str | None = None
    labels_per_sample: int = 1
    shards_at: str | None = None
    labels: Reading = Reading.FROM_0
    format_1: str | None = None
    storage: ByteSource = field(default=DEFAULT, compare=False, repr=False)

    @cached_property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def mean_sample_bytes(self) -> float:
        """Bytes of tar a sample takes on average."""
        return sum(shard.bytes for shard in self.shards) / self.samples

    @cached_property
    def fingerprint(self) -> str | None:
        """What the set is, wherever it lies, as a SHA-256; None where the tables' checksums are not known."""
        return self._hash([shard.table for shard in self.shards])

    @cached_property
    def header_fingerprint(self) -> str | None:
        """What `fingerprint` would be by the headers alone; None where that is not known."""
        return self._hash([shard.headers for shard in self.shards])

    def _hash(self, checksums: Sequence[str]) -> str | None:
        if not all(checksums):
            return None
        content = [self.classes, self.label_field, self.labels_per_sample, self.labels]
        rows = [[shard.samples, shard.bytes, each] for shard, each in zip(self.shards, checksums, strict=True)]
        return hashlib.sha256(json.dumps([*content, rows]).encode()).hexdigest()

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
            raise InvalidSample(f"has {len(labels)} labels; {MANIFEST} says {self.labels_per_sample} at most")
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
        contents = storage.read(place)
    except NotFound:
        raise NoManifest(
            f"{place} does not exist; `coatnet data pack` makes shards with a manifest, `coatnet data index` one for"
            " shards that are there already"
        ) from None
    return replace(_parse_manifest(url, place, contents), storage=storage)


def _parse_manifest(url: str, place: str, contents: bytes) -> Manifest:
    try:
        document: Any = json.loads(contents)
    except ValueError as error:
        raise UsageError(f"{place} is not JSON ({error}); pack again") from None
    if not isinstance(document, dict) or "format" not in document:
        raise UsageError(f"{place} is not a manifest of shards: it has no `format`; is the path another?")
    if document["format"] not in (1, FORMAT):
        raise UsageError(f"{place} has format {document['format']}; this version reads formats 1 and {FORMAT}")
    try:
        shards = tuple(
            Shard(each["name"], each["samples"], each["bytes"], *(each.get(name, "") for name in _OPTIONAL))
            for each in document["shards"]
        )
        classes, samples = tuple(map(composed, document["classes"])), document["samples"]
        labels = Reading(document.get("labels", Reading.FROM_0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{place} is not a whole manifest ({error!r}); pack again") from None
    names = ("label_field", "labels_per_sample", "shards_at", "format_1")
    optional = {name: document[name] for name in names if name in document}
    if document["format"] == 1:
        optional["format_1"] = hashlib.sha256(contents).hexdigest()
    manifest = Manifest(url, classes, shards, labels=labels, **optional)
    if fault := _fault(manifest, samples, document["format"]):
        raise UsageError(f"{place} {fault}; pack again")
    return manifest


def _fault(manifest: Manifest, samples: object, number: int) -> str | None:
    """What does not hold of a manifest, in a few words."""
    if not manifest.classes or not all(isinstance(each, str) for each in manifest.classes):
        return "names no classes"
    if len(set(manifest.classes)) < len(manifest.classes):
        return "names a class twice"
    if not manifest.shards:
        return "names no shards"
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or not has_suffix(shard.name, ".tar"):
            return f"names a shard {shard.name!r}, which is no .tar"
        if not isinstance(shard.query, str) or not isinstance(shard.headers, str):
            return f"gives {shard.name} a query or headers that are no text"
        if not isinstance(shard.table, str) or bool(shard.table) != (number > 1):
            return f"has format {number} and gives {shard.name} the table {shard.table!r}"
        if any(type(number) is not int or number < 1 for number in (shard.samples, shard.bytes)):
            return f"gives {shard.name} {shard.samples!r} samples in {shard.bytes!r} bytes"
    if len({shard.stem for shard in manifest.shards}) < len(manifest.shards):
        return "names a shard twice"
    if manifest.samples != samples:
        return f"says {samples!r} samples, and its shards have {manifest.samples}"
    if type(manifest.labels_per_sample) is not int or manifest.labels_per_sample < 1:
        return f"gives a sample {manifest.labels_per_sample!r} labels"
    texts = (manifest.label_field, manifest.shards_at, manifest.format_1)
    if not all(isinstance(each, str | None) for each in texts):
        return "has a label_field, shards_at or format_1 that is no text"
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
    sizes = {manifest.url_of(number): shard.bytes for number, shard in enumerate(manifest.shards)}
    for number, shard in enumerate(manifest.shards):
        sizes[manifest.url_of(number, ".npy")] = HEADER_BYTES + ROW.itemsize * shard.samples
    return sizes.get
