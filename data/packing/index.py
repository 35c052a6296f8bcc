"""Manifest, sample tables and DALI indexes for shards that other tools wrote, at any fsspec URL.

By their headers alone: a tar is walked over in ranged reads, in which only the labels are read as well. Checksums and
sizes of images stay unknown then; samples are marked so, and decoded once more whenever they are read. With `decode`
every byte is read and every image decoded, once. A sample that cannot be used stays in the table, as the tar has it,
without the mark of one that decoded, and is listed: training replaces it and says so. The tars are not changed, and
the manifest comes last.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any, NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from data import codec
from data.errors import DataError, UsageError
from data.packing.label_files import read_classes
from data.packing.label_reading import Classes, describe_reading, reading_of
from data.packing.pack import split_by_size
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
from data.shards.manifest import MANIFEST, BadSample, Shard, join, write_manifest
from data.shards.sample_table import FLAG_DECODED, FLAG_UNCHECKED, table_bytes, table_rows
from data.shards.tar_index import DamagedTar, TarSample, index_bytes, index_tar, printable
from data.storage.prefetch import map_in_threads
from data.storage.ranged_file import RangedFile
from data.storage.remote import NotFound, Storage, open_fs, write_file

MOST_CLASSES = 2**20
"""Classes that are made up from the numbers of the labels at most: one wild number would make millions."""
_RUN_BYTES = 2**24


@dataclass(frozen=True)
class Report:
    """What was found (shards, samples, bytes of tar, classes), what of it cannot be used, and has no checksum.

    `labels` says how the labels were read.
    """

    shards: int
    samples: int
    bytes: int
    classes: int
    broken: tuple[BadSample, ...]
    unchecked: int
    labels: str = ""


class Tar(NamedTuple):
    """A tar and its size in bytes."""

    url: str
    bytes: int


@dataclass(frozen=True)
class _Request:
    """How each tar is indexed; `classes` are the given ones."""

    storage: Storage
    folder: str
    destination: str
    decode: bool
    label_field: str | None
    classes: Classes | None


class _Indexed(NamedTuple):
    """What is known of a tar that was indexed: its labels as written, each with its first sample; the most of one."""

    shard: Shard
    labels: dict[str, str]
    label_field: str | None
    most_labels: int
    broken: list[BadSample]


def index(
    url: str,
    out: str | None,
    *,
    decode: bool,
    classes: str | None,
    label_field: str | None,
    workers: int,
    progress: Callable[[int, int], None],
) -> Report:
    """Indexes the tars that `url` names: a folder, a glob or a pattern as in train-{000..123}.tar.

    Manifest, tables and indexes go to `out`, or beside the tars. `classes` is a file with a name in each line, or
    packed shards; without it the classes are the names that occur, or the numbers up to the highest. Labels stand in
    `.cls` (without it or a `.json`, in `.txt`), in the field `label_field` of `.json`, or in a part (`.txt`).
    `progress(done, total)` counts tars. UsageError where that cannot be; DataError where a tar is damaged, or reading
    or writing fails.
    """
    tars = find_tars(url)
    folder = _common_folder([tar.url for tar in tars])
    destination = out or folder
    _check_destination(destination)
    given = None if classes is None else read_classes(classes)
    request = _Request(Storage(), folder, destination, decode, label_field, given)
    found = list(map_in_threads(lambda tar: _index_tar(request, tar), tars, workers, progress))
    full = [each for each in found if each.shard.samples]
    broken = tuple(chain.from_iterable(each.broken for each in found))
    label_field = _common_field(full)
    labels = {label: f"{tar.shard.name} {key}" for tar in reversed(full) for label, key in tar.labels.items()}
    if not labels:
        example = f"; {broken[0].shard} {broken[0].key}, for one: {broken[0].reason}" if broken else ""
        raise UsageError(f"{url} has no sample with a label{example}; is it another --label-field?")
    reading = reading_of(url, labels, given)
    names = _made_up(labels, reading) if given is None else given.names
    write_manifest(
        destination,
        names,
        [each.shard for each in full],
        label_field=label_field,
        labels_per_sample=max(1, *(each.most_labels for each in full)),
        shards_at=None if open_fs(destination) == open_fs(folder) else folder,
        labels=reading,
    )
    return Report(
        shards=len(full),
        samples=sum(each.shard.samples for each in full),
        bytes=sum(each.shard.bytes for each in full),
        classes=len(names),
        broken=broken,
        unchecked=0 if decode else sum(each.shard.samples for each in full),
        labels=describe_reading(reading, label_field or ".cls", names, given is not None),
    )


def _common_field(tars: Sequence[_Indexed]) -> str | None:
    """Where all tars that have labels have them."""
    first = {each.label_field: each.shard.name for each in tars if each.labels}
    if len(first) > 1:
        places = " and ".join(f"those of {name} in {field or '.cls'}" for field, name in first.items())
        raise UsageError(f"labels are in different parts, {places}; index the tars apart, or give --label-field")
    return next(iter(first), None)


def _made_up(labels: Collection[str], reading: Reading) -> Sequence[str]:
    """The classes where none are given: names as they occur, or all numbers up to the highest."""
    if len(labels) > MOST_CLASSES:
        raise UsageError(
            f"there are {len(labels)} different labels, and {MOST_CLASSES} classes at most; are they labels?"
        )
    if reading is Reading.NAMES:
        return sorted(labels)
    return [str(number) for number in range(max(number_of(label) or 0 for label in labels) + 1)]


# Which tars, and where to.


def find_tars(url: str) -> list[Tar]:
    """The tars of a folder, glob or brace pattern, in its order; UsageError where there are none, or one is missing."""
    try:
        patterns = list(braceexpand(url))
    except ValueError as error:
        raise UsageError(f"{url} is no pattern: {error}") from None
    tars = [tar for pattern in patterns for tar in _matching(pattern)]
    if len({tar.url for tar in tars}) < len(tars):
        raise UsageError(f"{url} names a tar twice")
    return tars


def _matching(pattern: str) -> list[Tar]:
    fs, path = open_fs(pattern)
    try:
        found = Storage().with_retries("listed", pattern, lambda: _listed(fs, path))
    except NotFound:
        raise UsageError(f"{pattern} does not exist") from None
    tars = [each for each in found if each["name"].endswith(".tar") and each["type"] != "directory"]
    if not tars:
        raise UsageError(f"{pattern} has no .tar files (a compressed one must be unpacked first: gunzip, unzstd, unxz)")
    return sorted(Tar(_url(fs, tar["name"]), _size(tar)) for tar in tars)


def _listed(fs: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
    if any(sign in path for sign in "*?["):
        return list(fs.glob(path, detail=True).values())
    return [fs.info(path)] if path.endswith(".tar") else fs.ls(path, detail=True)


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if type(fs) is LocalFileSystem else fs.unstrip_protocol(path)


def _size(info: dict[str, Any]) -> int:
    if info["size"] is None:
        raise DataError(f"{info['name']}: its server does not say how large it is")
    return int(info["size"])


def _common_folder(urls: Sequence[str]) -> str:
    """The innermost folder around all tars."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    folder = "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
    if folder.endswith((":", ":/")):
        raise UsageError(f"{urls[0]} and {urls[-1]} have no common folder; index them separately")
    return folder or "/"


def _check_destination(destination: str) -> None:
    fs, folder = open_fs(destination)
    place = join(folder, MANIFEST)
    held = Storage().with_retries("read", destination, lambda: fs.exists(place))
    if held:
        raise UsageError(f"{destination} has a {MANIFEST}; remove it to index again, or write to another --out")


# One tar.


def _index_tar(request: _Request, tar: Tar) -> _Indexed:
    name = tar.url.removeprefix(request.folder.rstrip("/") + "/")
    kinds = {label_part(request.label_field), *(["txt"] if request.label_field is None else [])}
    try:
        samples = walk_headers(request.storage, tar, kinds)
    except DamagedTar as damage:
        raise DamagedTar(f"{tar.url}: {damage}") from damage
    if not samples:
        broken = [BadSample(name, "", "has no samples; it is left out")]
        return _Indexed(Shard(name, 0, tar.bytes), {}, None, 0, broken)
    field = request.label_field or _only_text(samples)
    labels, most, faults = _labels(request, field, samples)
    if not labels:
        _check_labelled(request, tar, samples[0])
    if request.decode:
        rows = _read_and_decode(request.storage, tar, samples, faults)
    else:
        rows = table_rows(samples, 0, [(0, 0)] * len(samples), FLAG_UNCHECKED)
    _write(request.destination, name, table_bytes(rows), index_bytes(samples))
    broken = [BadSample(name, printable(key), reason) for key, reason in faults.items()]
    return _Indexed(Shard(name, len(samples), tar.bytes), labels, field, most, broken)


def walk_headers(storage: Storage, tar: Tar, keep: set[str]) -> list[TarSample]:
    """The samples of a tar by its headers, read in ranges; DamagedTar where webdataset would lose some."""
    return index_tar(RangedFile(lambda begin, end: storage.read(tar.url, begin, end), tar.bytes), keep)


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
        offered = f"--label-field takes one of {', '.join(has)}" if has else "it has no .json either"
        raise UsageError(f"{tar.url}: sample {printable(first.key)} has no {looked_for} for its label; {offered}")


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
    path = join(folder, name.removesuffix(".tar"))
    try:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        write_file(fs, f"{path}.npy", table)
        write_file(fs, f"{path}.idx", lines)
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{destination} cannot be written: {error}; --out takes another place") from error
