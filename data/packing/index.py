"""Manifest, sample tables and DALI indexes for shards that other tools wrote, at any fsspec URL.

By their headers alone: a tar is walked over in ranged reads, in which only the labels are read as well. Checksums and
sizes of images stay unknown then; samples are marked so, and decoded once more whenever they are read. With `decode`
every byte is read and every image decoded, once. A sample that cannot be used stays in the table, as the tar has it,
without the mark of one that decoded, and is listed: training replaces it and says so. The tars are not changed, and
the manifest comes last.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any, NamedTuple

from data import codec
from data.errors import DataError, UsageError
from data.packing.label_files import read_classes
from data.packing.pack import split_by_size
from data.packing.tars import Tar, find_tars, walk_headers
from data.packing.unfinished import Done, forget_done, keep_done, read_done
from data.shards.labels import InvalidSample, class_numbers, fields, image_part, label_part, parse_labels
from data.shards.manifest import MANIFEST, BadSample, Shard, write_manifest
from data.shards.sample_table import FLAG_DECODED, FLAG_UNCHECKED, HEADER_BYTES, ROW, table_bytes, table_rows
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

    `kept` of the shards are those that an index which ended early had done.
    """

    shards: int
    samples: int
    bytes: int
    classes: int
    broken: tuple[BadSample, ...]
    unchecked: int
    kept: int = 0


class DamagedTars(DataError):
    """Some tars are damaged, so there is no manifest yet: `report` has them and what else cannot be used."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class _Request:
    """How each tar is indexed; `numbers` has the classes by name, if they are known."""

    storage: Storage
    folder: str
    destination: str
    decode: bool
    label_field: str | None
    numbers: dict[str, int] | None


class _Indexed(NamedTuple):
    """What is known of a tar that was indexed: the highest label in it, and the most labels of one sample."""

    shard: Shard
    highest: int
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

    Manifest, tables and indexes go to `out`, or beside the tars. `classes` is a file with a name in each line; without
    it the classes are called by their numbers. Labels stand in `.cls`, or in the field `label_field` of `.json`.
    `progress(done, total)` counts tars. UsageError where that cannot be; DamagedTars, when all others are done;
    DataError where reading or writing fails. What was done by then is kept for the next try.
    """
    tars = find_tars(url)
    folder = _common_folder([split_query(tar.url)[0] for tar in tars])
    destination = out or folder
    _check_destination(destination)
    names = None if classes is None else list(read_classes(classes))
    numbers = None if names is None else {name: number for number, name in enumerate(names)}
    request = _Request(Storage(), folder, destination, decode, label_field, numbers)
    asked = {"decode": decode, "classes": names, "label_field": label_field}
    done = read_done(destination, asked)
    found: list[_Indexed] = []

    def work(tar: Tar) -> _Indexed:
        return _kept(request, done or {}, tar) or _index_tar(request, tar)

    try:
        found.extend(map_in_threads(work, tars, workers, progress))
        if damaged := sum(each.damaged for each in found):
            raise DamagedTars(
                f"{damaged} of {len(tars)} tars of {url} cannot be indexed, so there is no {MANIFEST} yet; replace"
                " them or take them away: the same command then indexes only what is new",
                _report(found, names or [], decode),
            )
    except BaseException:
        records = zip(tars, found, strict=False)
        more = {split_query(tar.url)[0]: _record(tar, each) for tar, each in records if each.shard.samples}
        if more:
            keep_done(destination, asked, {**(done or {}), **more})
        raise
    full = [each for each in found if each.shard.samples]
    if not full or max(each.highest for each in full) < 0:
        raise UsageError(f"{url} has no sample with a label; is it another --label-field?")
    numbered = [str(number) for number in range(max(each.highest for each in full) + 1)]
    write_manifest(
        destination,
        numbered if names is None else names,
        [each.shard for each in full],
        label_field=label_field,
        labels_per_sample=max(1, *(each.most_labels for each in full)),
        shards_at=None if open_fs(destination) == open_fs(folder) else folder,
    )
    if done is not None:
        forget_done(destination)
    return _report(found, numbered if names is None else names, decode)


def _report(found: Sequence[_Indexed], classes: Sequence[str], decode: bool) -> Report:
    full = [each for each in found if each.shard.samples]
    return Report(
        shards=len(full),
        samples=sum(each.shard.samples for each in full),
        bytes=sum(each.shard.bytes for each in full),
        classes=len(classes),
        broken=tuple(chain.from_iterable(each.broken for each in found)),
        unchecked=0 if decode else sum(each.shard.samples for each in full),
        kept=sum(each.kept for each in full),
    )


# Where to.


def _common_folder(urls: Sequence[str]) -> str:
    """The innermost folder around all tars."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    folder = "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))
    if folder.endswith((":", ":/")):
        raise UsageError(f"{urls[0]} and {urls[-1]} lie in no folder together; index them apart")
    return folder or "/"


def _check_destination(destination: str) -> None:
    fs, folder = open_fs(destination)
    place = join(folder, MANIFEST)
    held = Storage().with_retries("read", destination, lambda: fs.exists(place))
    if held:
        raise UsageError(f"{destination} has a {MANIFEST}; remove it to index again, or write to another --out")


# One tar.


def _record(tar: Tar, found: _Indexed) -> dict[str, Any]:
    """What to keep of a tar for the next try, in JSON; no query, which may be another then."""
    shard = [found.shard.name, found.shard.samples, found.shard.bytes]
    broken = [[each.key, each.reason] for each in found.broken]
    return {"of": [tar.bytes, tar.version], "found": {**found._asdict(), "shard": shard, "broken": broken}}


def _kept(request: _Request, done: Done, tar: Tar) -> _Indexed | None:
    """What an earlier index found in a tar that is still the same, and whose table and index are there."""
    record = done.get(split_query(tar.url)[0])
    if record is None or record["of"] != [tar.bytes, tar.version]:
        return None
    found = record["found"]
    shard = Shard(*found["shard"], query=split_query(tar.url)[1])
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
    try:
        if tar.fault:
            raise DamagedTar(tar.fault)
        samples = walk_headers(request.storage, tar, {label_part(request.label_field)})
    except DamagedTar as damage:
        return _Indexed(Shard(name, 0, tar.bytes), -1, 0, [BadSample(name, "", str(damage))], damaged=True)
    if not samples:
        return _Indexed(Shard(name, 0, tar.bytes), -1, 0, [BadSample(name, "", "has no samples; it is left out")])
    labels, faults = _labels(request, tar, samples)
    if request.decode:
        rows = _read_and_decode(request.storage, tar, samples, faults)
    else:
        rows = table_rows(samples, 0, [(0, 0)] * len(samples), FLAG_UNCHECKED)
    _write(request.destination, name, table_bytes(rows), index_bytes(samples))
    broken = [BadSample(name, printable(key), reason) for key, reason in faults.items()]
    highest = max((max(each) for each in labels), default=-1)
    shard = Shard(name, len(samples), tar.bytes, query)
    return _Indexed(shard, highest, max(map(len, labels), default=0), broken)


def _labels(request: _Request, tar: Tar, samples: list[TarSample]) -> tuple[list[tuple[int, ...]], dict[str, str]]:
    """The labels of those samples that can be used, and why the others cannot, by their keys."""
    labels, faults = [], {}
    names = None
    for sample in samples:
        try:
            image_part(sample.parts)
            parsed = parse_labels({**dict.fromkeys(sample.parts, b""), **sample.contents}, request.label_field)
            if request.numbers is None:
                names = names or next((each for each in parsed if isinstance(each, str)), None)
            labels.append(_numbers(parsed, request.numbers))
        except InvalidSample as unusable:
            faults[sample.key] = str(unusable)
    if names and not labels:
        raise UsageError(f"{tar.url} has names as labels ({names[:20]!r}, for one); --classes FILE must list them")
    if not labels:
        _check_labelled(request, tar, samples[0])
    return labels, faults


def _numbers(parsed: list[int | str], numbers: dict[str, int] | None) -> tuple[int, ...]:
    if numbers is not None:
        return class_numbers(parsed, numbers)
    for label in parsed:
        if not isinstance(label, int) or not 0 <= label < MOST_CLASSES:
            raise InvalidSample(
                f"its label is {str(label)[:20]!r}; without --classes FILE it must be 0 to {MOST_CLASSES - 1}"
            )
    return tuple(each for each in parsed if isinstance(each, int))


def _check_labelled(request: _Request, tar: Tar, first: TarSample) -> None:
    """UsageError where the tar's first sample lacks what labels are looked for in, with what it has instead."""
    where = label_part(request.label_field)
    if request.label_field is None and where in first.parts:
        return
    begin, size, _ = first.parts.get("json", (0, 0, ""))
    has = fields(request.storage.read(tar.url, begin, begin + size)) if size else []
    if request.label_field not in has:
        looked_for = f"field {request.label_field}" if request.label_field else ".cls"
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
