"""A pack's destination: what lies there already, and which shards of an interrupted pack can be kept.

    .packing/request.json   the request and the files it is of: written first
    .packing/000012.json    shard 12 of the plan is done: its name and size (null if no image of it decodes), and what
                            was left out of it; written when its files are on the disk

With images held out the destination holds two sets, each in its folder (`train/`, `val/`), of one request and plan.

A pack resumes after the last shard up to which all are done and have their sizes, so nothing torn is kept. Files of
other requests are never mixed. When the manifests are there, `.packing` goes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, takewhile
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError, UsageError
from data.shards.manifest import MANIFEST, BadSample, Shard, write_manifest
from data.shards.sample_table import HEADER_BYTES, ROW
from data.storage.remote import Storage, open_fs, write_file
from data.urls import join

TRAIN, VAL = "train/", "val/"
"""The folders of the two sets that a pack makes in its destination with images held out; else its one set is ""."""
_OWN_FILE = re.compile(r"((?:train/|val/)?)\.?(shard-\d{6,})\.(tar|idx|npy)(?:\.[0-9a-f]{8}\.partial)?")
_PACKING = ".packing"
_REQUEST = f"{_PACKING}/request.json"
_READ_AT_ONCE = 16
Request = dict[str, str | int | float | None]


class FinishedShard(NamedTuple):
    """A shard of the plan that is written: `shard` is None where no image of it decodes; and what was left out."""

    shard: Shard | None
    index_bytes: int
    broken: tuple[BadSample, ...]


def check_destination(source: str, destination: str, sets: Sequence[str], overwrite: bool) -> None:
    """UsageError where the sets cannot go into `destination`, or would replace other shards unasked."""
    source_fs, root = open_fs(source)
    fs, folder = open_fs(destination)
    for name in _places(sets):
        place = _inside(folder, name)
        if type(fs) is type(source_fs) and _within(fs, place, root):
            raise UsageError(
                f"{_inside(destination, name)} lies in the source {source}; choose a destination outside it"
            )
        if fs.isfile(place):
            raise UsageError(f"{_inside(destination, name)} is a file; the destination must be a folder")
    names = _sizes(fs, folder, sets)
    unfinished = _PACKING in names and sets[-1] + MANIFEST not in names
    there = [name for name in names if _is_shard(name) or name.rpartition("/")[2] == MANIFEST]
    if there and not unfinished and not overwrite:
        place = _inside(destination, there[0].rpartition("/")[0])
        raise UsageError(f"{place} holds shards already; pack elsewhere, or with --overwrite to replace them")


def resume(destination: str, sets: Sequence[str], request: Request, overwrite: bool) -> list[FinishedShard]:
    """The first shards of the plan, as many as an interrupted pack of the same request left whole; folders are made.

    UsageError where the pack that was interrupted is another, unless it may be overwritten.
    """
    fs, folder = open_fs(destination)
    sizes = _sizes(fs, folder, sets)
    earlier = _read_json(fs, join(folder, _REQUEST)) if _PACKING in sizes else None
    if earlier == request and sets[-1] + MANIFEST not in sizes:
        return _finished_shards(fs, folder, sizes)
    if earlier is not None and not overwrite:
        raise UsageError(
            f"{destination} holds an unfinished pack of another request: {_describe_difference(earlier, request)}; pack"
            " elsewhere, or with --overwrite to begin again"
        )
    try:
        for name in (place + own for place in _places(sets) for own in (_PACKING, MANIFEST)):
            if name in sizes:
                fs.rm(join(folder, name), recursive=True)
        for name in (*sets, _PACKING):
            fs.makedirs(_inside(folder, name), exist_ok=True)
    except Exception as error:  # the back ends' exceptions share no base class
        raise UsageError(f"{destination} cannot be written: {error}") from error
    write_file(fs, join(folder, _REQUEST), json.dumps(request).encode())
    return []


def write_shard(
    destination: str, number: int, name: str, files: dict[str, bytes], done: FinishedShard
) -> FinishedShard:
    """Writes a shard's files (by suffix) to `destination`, and then that shard `number` of the plan is finished."""
    fs, folder = open_fs(destination)
    for suffix, contents in files.items():
        write_file(fs, join(folder, name + suffix), contents)
    record = {
        "shard": done.shard and vars(done.shard),
        "index_bytes": done.index_bytes,
        "broken": [[broken.key, broken.reason] for broken in done.broken],
    }
    write_file(fs, join(folder, _record_name(number)), json.dumps(record).encode())
    return done


def commit(destination: str, classes: Sequence[str], written: dict[str, list[Shard]], labels_per_sample: int) -> None:
    """Removes what earlier packs left, which globs would take for samples, and writes the manifests last.

    `written` are the shards of each set, named from `destination` on.
    """
    fs, folder = open_fs(destination)
    stems = {shard.stem for shards in written.values() for shard in shards}
    for name in _sizes(fs, folder, list(written)):
        own = _OWN_FILE.fullmatch(name)
        if own and (own[1] + own[2] not in stems or name.endswith(".partial")):
            fs.rm_file(join(folder, name))
    field = "labels" if labels_per_sample > 1 else None
    for name, shards in written.items():
        own_names = [replace(shard, name=shard.name.removeprefix(name)) for shard in shards]
        place = _inside(destination, name)
        write_manifest(place, classes, own_names, label_field=field, labels_per_sample=labels_per_sample)
    fs.rm(join(folder, _PACKING), recursive=True)


def _finished_shards(fs: fsspec.AbstractFileSystem, folder: str, sizes: dict[str, int]) -> list[FinishedShard]:
    """The longest run of shards from the first on that are done, and whose files have the sizes noted then."""
    noted = _sizes(fs, join(folder, _PACKING))
    numbers = list(takewhile(lambda number: _record_name(number).rpartition("/")[2] in noted, count()))
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        done = list(pool.map(lambda number: _finished(_read_json(fs, join(folder, _record_name(number)))), numbers))
    return [each for each in takewhile(lambda each: each is not None and _has_its_files(each, sizes), done) if each]


def _finished(record: Any) -> FinishedShard | None:
    try:
        shard = record["shard"] and Shard(**record["shard"])
        if shard and not shard.headers:  # as an older program noted it
            return None
        return FinishedShard(shard, record["index_bytes"], tuple(BadSample(None, *each) for each in record["broken"]))
    except (KeyError, TypeError):
        return None


def _has_its_files(done: FinishedShard, sizes: dict[str, int]) -> bool:
    if done.shard is None:
        return True
    stem, table = done.shard.stem, HEADER_BYTES + ROW.itemsize * done.shard.samples
    expected = {f"{stem}.tar": done.shard.bytes, f"{stem}.npy": table, f"{stem}.idx": done.index_bytes}
    return expected.items() <= sizes.items()


def _is_shard(name: str) -> bool:
    return name.endswith(".tar") and _OWN_FILE.fullmatch(name) is not None


def _record_name(number: int) -> str:
    return f"{_PACKING}/{number:06d}.json"


def _read_json(fs: fsspec.AbstractFileSystem, path: str) -> Any:
    """The JSON at a path; None if it does not exist or is incomplete, as where no rename is atomic."""
    try:
        return json.loads(Storage().with_retries("read", path, lambda: fs.cat_file(path)))
    except (DataError, ValueError):
        return None


def _describe_difference(earlier: Any, request: Request) -> str:
    old = earlier if isinstance(earlier, dict) else {}
    changed = [name for name in request if old.get(name) != request[name] and name != "listing"]
    return ", ".join(f"{name} was {old.get(name)} and is {request[name]}" for name in changed) or (
        "the source has other files, labels or classes now"
    )


def _places(sets: Sequence[str]) -> Sequence[str]:
    """Where shards may lie in a destination: those of its sets, and of a set that was packed into it whole."""
    return list(dict.fromkeys(("", *sets)))


def _inside(folder: str, name: str) -> str:
    """A folder, or one inside it."""
    return join(folder, name.rstrip("/")) if name else folder


def _within(fs: fsspec.AbstractFileSystem, inner: str, outer: str) -> bool:
    if isinstance(fs, LocalFileSystem):
        inner, outer = os.path.realpath(inner), os.path.realpath(outer)
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def _sizes(fs: fsspec.AbstractFileSystem, folder: str, sets: Sequence[str] = ()) -> dict[str, int]:
    """The bytes of each file in a folder and in those of its sets, by its name from there on; folders too."""
    fs.invalidate_cache()
    sizes = {}
    for name in _places(sets):
        place = _inside(folder, name)
        try:
            infos: Iterable[dict[str, Any]] = Storage().with_retries("listed", place, lambda: _ls(fs, place))  # noqa: B023
        except DataError as error:
            raise UsageError(str(error)) from error
        sizes |= {name + info["name"].rstrip("/").rpartition("/")[2]: info["size"] for info in infos}
    return sizes


def _ls(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    try:
        return fs.ls(folder, detail=True)
    except FileNotFoundError:  # object stores have no empty folders
        return []
