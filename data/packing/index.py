"""Manifest, sample tables and DALI indexes for shards that other tools wrote, at any fsspec URL.

By their headers alone: a tar is walked over in ranged reads, in which only the labels are read as well. Checksums and
sizes of images stay unknown then; samples are marked so, and decoded once more whenever they are read. With `decode`
every byte is read and every image decoded, once. A sample that cannot be used stays in the table, as the tar has it,
without the mark of one that decoded, and is listed: training replaces it and says so. The tars are not changed, and
the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

from data import codec
from data.errors import DataError, UsageError
from data.packing.candidates import split_by_size
from data.packing.label_files import read_classes
from data.packing.label_reading import Classes, describe_reading, reading_of
from data.packing.parts import Record, check_current, do_part
from data.packing.tars import Tar, find_tars, walk_headers
from data.packing.work import Part, Work, open_work
from data.packing.work import Request as Asked
from data.shards.complete import complete
from data.shards.labels import (
    MOST_SHOWN,
    InvalidSample,
    Reading,
    fields,
    image_part,
    label_part,
    number_of,
    parse_labels,
)
from data.shards.manifest import MANIFEST, BadSample, Shard, read_manifest, write_manifest
from data.shards.sample_table import (
    FLAG_DECODED,
    FLAG_UNCHECKED,
    HEADER_BYTES,
    ROW,
    shard_checksums,
    table_bytes,
    table_rows,
)
from data.shards.tar_index import DamagedTar, TarSample, index_bytes, printable
from data.storage.remote import NotFound, Storage, open_fs, write_file
from data.urls import join, split_query

MOST_CLASSES = 2**20
"""Classes that are made up from the numbers of the labels at most: one wild number would make millions."""
_RUN_BYTES = 2**24
_NOTES = ".indexing"
_VERSION = 1
"""Of what is noted of a tar; raised when a program would write other tables or notes."""


@dataclass(frozen=True)
class Report:
    """What was found (shards, samples, bytes of tar, classes), what of it cannot be used, and has no checksum.

    `labels` says how the labels were read; `kept` of the shards were done before, by other parts or an earlier start.
    """

    shards: int
    samples: int
    bytes: int
    classes: int
    broken: tuple[BadSample, ...]
    unchecked: int
    labels: str = ""
    kept: int = 0


class DamagedTars(DataError):
    """Some tars are damaged, so there is no manifest yet: `report` has them and what else cannot be used."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class _Request:
    """How each tar is indexed; `classes` are the given ones."""

    storage: Storage
    folder: str
    destination: str
    decode: bool
    label_field: str | None
    classes: Classes | None
    work: Work

    def name_of(self, tar: Tar) -> str:
        """From the folder around all tars on."""
        return split_query(tar.url)[0].removeprefix(self.folder.rstrip("/") + "/")


class _Indexed(NamedTuple):
    """What is known of a tar that was indexed: its labels as written, each with its first sample; the most of one.

    `broken` are keys and reasons.
    """

    shard: Shard
    labels: dict[str, str]
    label_field: str | None
    most_labels: int
    broken: list[tuple[str, str]]
    damaged: bool = False


@dataclass
class _Found:
    """What all tars have, in their order; `fields` are the places of labels, each with the first shard that has it."""

    shards: list[Shard] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    fields: dict[str | None, str] = field(default_factory=dict)
    most_labels: int = 1
    broken: list[BadSample] = field(default_factory=list)
    tars: int = 0
    damaged: int = 0
    kept: int = 0


def index(
    url: str,
    out: str | None,
    *,
    decode: bool,
    classes: str | None,
    label_field: str | None,
    workers: int,
    progress: Callable[[int, int], None],
    part: Part | None = None,
) -> Report:
    """Indexes the tars that `url` names: a folder, a glob or a pattern as in train-{000..123}.tar.

    Manifest, tables and indexes go to `out`, or beside the tars. `classes` is a file with a name in each line, or
    packed shards; without it the classes are the names that occur, or the numbers up to the highest. Labels stand in
    `.cls` (without it or a `.json`, in `.txt`), in the field `label_field` of `.json`, or in a part (`.txt`).
    `progress(done, total)` counts tars. UsageError where that cannot be; DamagedTars, when all others are done;
    DataError where reading or writing fails. What was done by then is kept for the next try. A manifest without
    checksums that is there already is completed, and no tar is read. A `part` indexes its share of the tars; NotLast
    unless it finds all of them done then, or where the manifest is there.
    """
    tars = find_tars(url)
    folder = _common_folder([split_query(tar.url)[0] for tar in tars])
    destination = out or folder
    if part is None and _holds_manifest(destination):
        return _complete(destination)
    given = None if classes is None else read_classes(classes)
    asked: Asked = {"version": _VERSION, "tars": folder, "decode": decode, "label_field": label_field}
    asked |= {"classes": None if given is None else _fingerprint(given)}
    work = open_work(destination, _NOTES, asked)
    request = _Request(Storage(), folder, destination, decode, label_field, given, work)
    return do_part(_Tars(url, request, tars), part, workers, progress)


@dataclass(frozen=True)
class _Tars:
    """The tars as items of the work; the plan has the names of those that were ever seen, by their numbers."""

    url: str
    request: _Request
    tars: Sequence[Tar]
    result = MANIFEST

    @property
    def work(self) -> Work:
        return self.request.work

    def is_published(self) -> bool:
        return _holds_manifest(self.request.destination)

    def plan(self) -> Sequence[int]:
        names = [self.request.name_of(tar) for tar in self.tars]
        plan = self.work.plan()
        known: list[str] = plan["names"] if plan else []
        numbers = {name: number for number, name in enumerate(known)}
        for name in names:
            numbers.setdefault(name, len(numbers))
        if len(numbers) > len(known):
            self.work.publish_plan(len(numbers), names=list(numbers))
        return [numbers[name] for name in names]

    def do(self, item: int) -> Record:
        found = _index_tar(self.request, self.tars[item])
        shard = vars(replace(found.shard, query=""))  # which may be another the next time
        return {"tar": self._version(item), "found": {**found._asdict(), "shard": shard}}

    def is_of(self, item: int, record: Record) -> bool:
        return record["tar"] == self._version(item)

    def is_kept(self, item: int, record: Record) -> bool:
        """Whether it has samples, is the same still, and its table and index are there."""
        shard = Shard(**record["found"]["shard"])
        if not self.is_of(item, record) or not shard.samples:
            return False
        places = (join(self.request.destination, shard.stem + suffix) for suffix in (".npy", ".idx"))
        try:
            table, _ = map(self.request.storage.size, places)
        except NotFound:
            return False
        return table == HEADER_BYTES + ROW.itemsize * shard.samples

    def publish(self, records: Iterator[Record], done: set[int]) -> Report:
        """Writes the manifest when all tars are whole, whose labels together say how they are to be read."""
        found = _Found()
        for item, record in enumerate(records):
            shard = Shard(**record["found"]["shard"])
            tar = _Indexed(**record["found"])._replace(shard=replace(shard, query=split_query(self.tars[item].url)[1]))
            _add(found, tar, item not in done)
        return _finish(self.url, self.request, found)

    def _version(self, item: int) -> list[str | int]:
        tar = self.tars[item]
        return [self.request.name_of(tar), tar.bytes, tar.version]


def _fingerprint(classes: Classes) -> str:
    """Class names and what may stand for them, in few words."""
    text = json.dumps([classes.names, classes.counted])
    return f"{len(classes.names)} of {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _add(found: _Found, tar: _Indexed, kept: bool) -> None:
    found.broken += [BadSample(tar.shard.name, *each) for each in tar.broken]
    found.tars += 1
    found.damaged += tar.damaged
    if tar.shard.samples:
        found.shards.append(tar.shard)
        for label, key in tar.labels.items():
            found.labels.setdefault(label, f"{tar.shard.name} {key}")
        if tar.labels:
            found.fields.setdefault(tar.label_field, tar.shard.name)
        found.most_labels = max(found.most_labels, tar.most_labels)
        found.kept += kept


def _finish(url: str, request: _Request, found: _Found) -> Report:
    if found.damaged:
        raise DamagedTars(
            f"{found.damaged} of {found.tars} tars of {url} cannot be indexed, so there is no {MANIFEST} yet; replace"
            " or remove them, then run the same command again: it indexes only what is new",
            _report(request, found, request.classes.names if request.classes else ()),
        )
    label_field = _common_field(found)
    labels = found.labels
    if not labels:
        example = next((f"; for example, {bad.shard} {bad.key}: {bad.reason}" for bad in found.broken), "")
        raise UsageError(f"{url} has no sample with a label{example}; does it need another --label-field?")
    reading = reading_of(url, labels, request.classes)
    names = request.classes.names if request.classes else _made_up(labels, reading)
    write_manifest(
        request.destination,
        names,
        found.shards,
        label_field=label_field,
        labels_per_sample=found.most_labels,
        shards_at=None if open_fs(request.destination) == open_fs(request.folder) else request.folder,
        labels=reading,
    )
    described = describe_reading(reading, label_field or ".cls", names, request.classes is not None)
    return _report(request, found, names, described)


def _report(request: _Request, found: _Found, classes: Sequence[str], labels: str = "") -> Report:
    samples = sum(shard.samples for shard in found.shards)
    return Report(
        shards=len(found.shards),
        samples=samples,
        bytes=sum(shard.bytes for shard in found.shards),
        classes=len(classes),
        broken=tuple(found.broken),
        unchecked=0 if request.decode else samples,
        labels=labels,
        kept=found.kept,
    )


def _common_field(found: _Found) -> str | None:
    """Where all tars that have labels have them."""
    if len(found.fields) > 1:
        places = " and ".join(f"those of {name} in {place or '.cls'}" for place, name in found.fields.items())
        raise UsageError(f"labels are in different parts, {places}; index the tars separately, or pass --label-field")
    return next(iter(found.fields), None)


def _made_up(labels: Collection[str], reading: Reading) -> Sequence[str]:
    """The classes where none are given: names as they occur, or all numbers up to the highest."""
    if len(labels) > MOST_CLASSES:
        raise UsageError(
            f"there are {len(labels)} different labels, but at most {MOST_CLASSES} classes are supported; are these"
            " really labels?"
        )
    if reading is Reading.NAMES:
        return sorted(labels)
    return [str(number) for number in range(max(number_of(label) or 0 for label in labels) + 1)]


# Where to.


def folder_of_tars(url: str) -> str:
    """The innermost folder around the tars that `url` names."""
    return _common_folder([split_query(tar.url)[0] for tar in find_tars(url)])


def _common_folder(urls: Sequence[str]) -> str:
    """The innermost folder around all tars."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    folder = "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
    if folder.endswith((":", ":/")):
        raise UsageError(f"{urls[0]} and {urls[-1]} have no common folder; index them separately")
    return folder or "/"


def _holds_manifest(destination: str) -> bool:
    return Storage().exists(join(destination, MANIFEST))


def _complete(destination: str) -> Report:
    """Completes an older manifest; UsageError where one is there that lacks nothing."""
    manifest = read_manifest(destination)
    if manifest.header_fingerprint is not None:
        raise UsageError(f"{destination} already has a {MANIFEST}; remove it to index again, or choose another --out")
    shards = complete(manifest).shards
    what = f"as before; the checksums of the sample tables were added to {MANIFEST}"
    size = sum(shard.bytes for shard in shards)
    return Report(len(shards), manifest.samples, size, len(manifest.classes), (), 0, what, len(shards))


# One tar.


def _index_tar(request: _Request, tar: Tar) -> _Indexed:
    name = request.name_of(tar)
    kinds = {label_part(request.label_field), *(["txt"] if request.label_field is None else [])}
    try:
        if tar.fault:
            raise DamagedTar(tar.fault)
        samples = walk_headers(request.storage, tar, kinds)
    except DamagedTar as damage:
        return _Indexed(Shard(name, 0, tar.bytes), {}, None, 0, [("", str(damage))], damaged=True)
    if not samples:
        return _Indexed(Shard(name, 0, tar.bytes), {}, None, 0, [("", "has no samples; it is left out")])
    place = request.label_field or _only_text(samples)
    labels, most, faults = _labels(request, place, samples)
    if not labels:
        _check_labelled(request, tar, samples[0])
    if request.decode:
        rows = _read_and_decode(request.storage, tar, samples, faults)
    else:
        rows = table_rows(samples, 0, [(0, 0)] * len(samples), FLAG_UNCHECKED)
    table = table_bytes(rows)
    check_current(request.work)
    _write(request.destination, name, table, index_bytes(samples))
    broken = [(printable(key), reason) for key, reason in faults.items()]
    shard = Shard(name, len(samples), tar.bytes, "", *shard_checksums(table))
    return _Indexed(shard, labels, place, most, broken)


def _only_text(samples: list[TarSample]) -> str | None:
    """`.txt` as the place of the labels, where samples have no other."""
    kinds = {part.rpartition(".")[2] for sample in samples for part in sample.parts}
    return ".txt" if "txt" in kinds and not kinds & {"cls", "json"} else None


def _labels(
    request: _Request, field: str | None, samples: list[TarSample]
) -> tuple[dict[str, str], int, dict[str, str]]:
    """The labels of samples that can be used, with the first's key; the most of one; why others cannot, by key."""
    labels: dict[str, str] = {}
    most, faults = 0, {}
    for sample in samples:
        try:
            image_part(sample.parts)
            written = parse_labels({**dict.fromkeys(sample.parts, b""), **sample.contents}, field)
            for label in written:
                _check_label(label, request.classes)
            labels |= {label: printable(sample.key) for label in written if label not in labels}
            most = max(most, len(written))
        except InvalidSample as unusable:
            faults[sample.key] = str(unusable)
    return labels, most, faults


def _check_label(label: str, classes: Classes | None) -> None:
    """InvalidSample for a label that is no class in any reading."""
    number = number_of(label)
    if classes is None and number is not None and not 0 <= number < MOST_CLASSES:
        raise InvalidSample(
            f"its label is {label!r}; without --classes FILE it must be 0 to {MOST_CLASSES - 1} or a name"
        )
    if classes and label not in classes.named and (number is None or not 0 <= number <= len(classes.names)):
        raise InvalidSample(
            f"its label is {label[:MOST_SHOWN]!r}; it must be 0 to {len(classes.names) - 1} or the name of a class"
        )


def _check_labelled(request: _Request, tar: Tar, first: TarSample) -> None:
    """UsageError where the tar's first sample lacks what labels are looked for in, with what it has instead."""
    kinds = {part.rpartition(".")[2]: part for part in first.parts}
    where = label_part(request.label_field)
    if where in kinds and where != "json":
        return
    begin, size, _ = first.parts.get(kinds.get("json", ""), (0, 0, ""))
    has = fields(request.storage.read(tar.url, begin, begin + size)) if size else []
    if request.label_field not in has:
        looked_for = f"field {request.label_field}" if where == "json" else f".{where}"
        has += [".txt"] if "txt" in kinds else []
        offered = f"--label-field can be one of {', '.join(has)}" if has else "it has no .json either"
        raise UsageError(f"{tar.url}: sample {printable(first.key)} has no {looked_for} with its label; {offered}")


def _read_and_decode(storage: Storage, tar: Tar, samples: list[TarSample], faults: dict[str, str]) -> Any:
    """The table's rows, with checksums and sizes; images that do not decode are added to `faults`."""
    checksums, shapes, flags = [], [], []
    for run in split_by_size(samples, lambda sample: sample.bytes, None, _RUN_BYTES):
        first, end = run[0].offset, run[-1].offset + run[-1].bytes
        contents = memoryview(storage.read(tar.url, first, end))
        for sample in run:
            checksums.append(zlib.crc32(contents[sample.offset - first :][: sample.bytes]))
            try:
                begin, size, _ = sample.parts[image_part(sample.parts)]
                picture = codec.examine(bytes(contents[begin - first :][:size]))
                shapes.append((picture.height, picture.width))
                flags.append(FLAG_DECODED)
            except (InvalidSample, codec.Undecodable) as fault:
                faults.setdefault(sample.key, str(fault))
                shapes.append((0, 0))
                flags.append(0)
    return table_rows(samples, checksums, shapes, flags)


def _write(destination: str, name: str, table: bytes, lines: bytes) -> None:
    fs, folder = open_fs(destination)
    path = join(folder, name[: -len(".tar")])
    try:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        write_file(fs, f"{path}.npy", table)
        write_file(fs, f"{path}.idx", lines)
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{destination} cannot be written: {error}; choose another place with --out") from error
