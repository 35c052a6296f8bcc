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
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Any, NamedTuple

from data import codec
from data.errors import DataError, UsageError
from data.packing.candidates import split_by_size
from data.packing.label_files import read_classes
from data.packing.label_reading import Classes, describe_reading, reading_of
from data.packing.tars import Tar, find_tars, walk_headers
from data.packing.unfinished import Done, forget_done, keep_done, read_done
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
from data.storage.prefetch import map_in_threads
from data.storage.remote import NotFound, Storage, open_fs, write_file
from data.urls import join, split_query

MOST_CLASSES = 2**20
"""Classes that are made up from the numbers of the labels at most: one wild number would make millions."""
_RUN_BYTES = 2**24


@dataclass(frozen=True)
class Report:
    """What was found (shards, samples, bytes of tar, classes), what of it cannot be used, and has no checksum.

    `labels` says how the labels were read; `kept` of the shards are those that an index which ended early had done.
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


class _Indexed(NamedTuple):
    """What is known of a tar that was indexed: its labels as written, each with its first sample; the most of one."""

    shard: Shard
    labels: dict[str, str]
    label_field: str | None
    most_labels: int
    broken: list[BadSample]
    damaged: bool = False
    kept: bool = False


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
    `progress(done, total)` counts tars. UsageError where that cannot be; DamagedTars, when all others are done;
    DataError where reading or writing fails. What was done by then is kept for the next try. A manifest without
    checksums that is there already is completed, and no tar is read.
    """
    tars = find_tars(url)
    folder = _common_folder([split_query(tar.url)[0] for tar in tars])
    destination = out or folder
    if _holds_manifest(destination):
        return _complete(destination)
    given = None if classes is None else read_classes(classes)
    request = _Request(Storage(), folder, destination, decode, label_field, given)
    asked = {"decode": decode, "classes": given and list(given.names), "label_field": label_field, "headers": True}
    done = read_done(destination, asked)
    found: list[_Indexed] = []

    def work(tar: Tar) -> _Indexed:
        return _kept(request, done or {}, tar) or _index_tar(request, tar)

    try:
        found.extend(map_in_threads(work, tars, workers, progress))
        report = _finish(url, request, found)
    except BaseException:
        records = zip(tars, found, strict=False)
        more = {split_query(tar.url)[0]: _record(tar, each) for tar, each in records if each.shard.samples}
        if more:
            keep_done(destination, asked, {**(done or {}), **more})
        raise
    if done is not None:
        forget_done(destination)
    return report


def _finish(url: str, request: _Request, found: Sequence[_Indexed]) -> Report:
    """Writes the manifest when all tars are done, whose labels together say how they are to be read."""
    if damaged := sum(each.damaged for each in found):
        raise DamagedTars(
            f"{damaged} of {len(found)} tars of {url} cannot be indexed, so there is no {MANIFEST} yet; replace them"
            " or take them away: the same command then indexes only what is new",
            _report(request, found, request.classes.names if request.classes else ()),
        )
    full = [each for each in found if each.shard.samples]
    label_field = _common_field(full)
    labels = {label: f"{tar.shard.name} {key}" for tar in reversed(full) for label, key in tar.labels.items()}
    if not labels:
        broken = [bad for each in found for bad in each.broken]
        example = f"; {broken[0].shard} {broken[0].key}, for one: {broken[0].reason}" if broken else ""
        raise UsageError(f"{url} has no sample with a label{example}; is it another --label-field?")
    reading = reading_of(url, labels, request.classes)
    names = request.classes.names if request.classes else _made_up(labels, reading)
    write_manifest(
        request.destination,
        names,
        [each.shard for each in full],
        label_field=label_field,
        labels_per_sample=max(1, *(each.most_labels for each in full)),
        shards_at=None if open_fs(request.destination) == open_fs(request.folder) else request.folder,
        labels=reading,
    )
    described = describe_reading(reading, label_field or ".cls", names, request.classes is not None)
    return _report(request, found, names, described)


def _report(request: _Request, found: Sequence[_Indexed], classes: Sequence[str], labels: str = "") -> Report:
    full = [each for each in found if each.shard.samples]
    samples = sum(each.shard.samples for each in full)
    return Report(
        shards=len(full),
        samples=samples,
        bytes=sum(each.shard.bytes for each in full),
        classes=len(classes),
        broken=tuple(chain.from_iterable(each.broken for each in found)),
        unchecked=0 if request.decode else samples,
        labels=labels,
        kept=sum(each.kept for each in full),
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


# Where to.


def _common_folder(urls: Sequence[str]) -> str:
    """The innermost folder around all tars."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    folder = "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
    if folder.endswith((":", ":/")):
        raise UsageError(f"{urls[0]} and {urls[-1]} have no common folder; index them separately")
    return folder or "/"


def _holds_manifest(destination: str) -> bool:
    fs, folder = open_fs(destination)
    place = join(folder, MANIFEST)
    return Storage().with_retries("read", destination, lambda: fs.exists(place))


def _complete(destination: str) -> Report:
    """Completes an older manifest; UsageError where one is there that lacks nothing."""
    manifest = read_manifest(destination)
    if manifest.header_fingerprint is not None:
        raise UsageError(f"{destination} has a {MANIFEST}; remove it to index again, or write to another --out")
    shards = complete(manifest).shards
    what = f"as {MANIFEST} has them, which was completed with the checksums of its sample tables"
    size = sum(shard.bytes for shard in shards)
    return Report(len(shards), manifest.samples, size, len(manifest.classes), (), 0, what, len(shards))


# One tar.


def _record(tar: Tar, found: _Indexed) -> dict[str, Any]:
    """What to keep of a tar for the next try, in JSON; no query, which may be another then."""
    shard = vars(replace(found.shard, query=""))
    broken = [[each.key, each.reason] for each in found.broken]
    return {"of": [tar.bytes, tar.version], "found": {**found._asdict(), "shard": shard, "broken": broken}}


def _kept(request: _Request, done: Done, tar: Tar) -> _Indexed | None:
    """What an earlier index found in a tar that is still the same, and whose table and index are there."""
    record = done.get(split_query(tar.url)[0])
    if record is None or record["of"] != [tar.bytes, tar.version]:
        return None
    found = record["found"]
    shard = replace(Shard(**found["shard"]), query=split_query(tar.url)[1])
    try:
        table, _ = (request.storage.size(join(request.destination, shard.stem + each)) for each in (".npy", ".idx"))
    except NotFound:
        return None
    if table != HEADER_BYTES + ROW.itemsize * shard.samples:
        return None
    kept: dict[str, Any] = {**found, "shard": shard, "kept": True}
    return _Indexed(**kept)._replace(broken=[BadSample(shard.name, *each) for each in found["broken"]])


def _index_tar(request: _Request, tar: Tar) -> _Indexed:
    address, query = split_query(tar.url)
    name = address.removeprefix(request.folder.rstrip("/") + "/")
    kinds = {label_part(request.label_field), *(["txt"] if request.label_field is None else [])}
    try:
        if tar.fault:
            raise DamagedTar(tar.fault)
        samples = walk_headers(request.storage, tar, kinds)
    except DamagedTar as damage:
        return _Indexed(Shard(name, 0, tar.bytes), {}, None, 0, [BadSample(name, "", str(damage))], damaged=True)
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
    table = table_bytes(rows)
    _write(request.destination, name, table, index_bytes(samples))
    broken = [BadSample(name, printable(key), reason) for key, reason in faults.items()]
    shard = Shard(name, len(samples), tar.bytes, query, *shard_checksums(table))
    return _Indexed(shard, labels, field, most, broken)


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
    path = join(folder, name[: -len(".tar")])
    try:
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        write_file(fs, f"{path}.npy", table)
        write_file(fs, f"{path}.idx", lines)
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{destination} cannot be written: {error}; --out takes another place") from error
