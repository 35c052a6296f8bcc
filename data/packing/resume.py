"""A pack's destination: what lies there already, and which shards of an interrupted pack can be kept.

    .packing/request.json   the request and the files it is of: written first
    .packing/000012.json    shard 12 of the plan is done: its name and size (null if no image of it decodes), and what
                            was left out of it; written when its files are on the disk

A pack resumes after the last shard up to which all are done and have their sizes, so nothing torn is kept. Files of
other requests are never mixed. When the manifest is there, `.packing` goes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, takewhile
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError, UsageError
from data.shards.manifest import MANIFEST, BadSample, Shard, write_manifest
from data.shards.sample_table import HEADER_BYTES, ROW
from data.storage.remote import Storage, open_fs, write_file
from data.urls import join

_OWN_FILE = re.compile(r"\.?(shard-\d{6,})\.(tar|idx|npy)(\.partial)?")
_PACKING = ".packing"
_REQUEST = f"{_PACKING}/request.json"
_READ_AT_ONCE = 16
Request = dict[str, str | int | None]


class FinishedShard(NamedTuple):
    """A shard of the plan that is written: `shard` is None where no image of it decodes; and what was left out."""

    shard: Shard | None
    index_bytes: int
    broken: tuple[BadSample, ...]


def check_destination(source: str, destination: str, overwrite: bool) -> None:
    """UsageError where shards cannot go to `destination`, or would replace other shards unasked."""
    (source_fs, root), (fs, folder) = open_fs(source), open_fs(destination)
    if type(fs) is type(source_fs) and _within(fs, folder, root):
        raise UsageError(f"{destination} lies in the source {source}; choose a destination outside it")
    if fs.isfile(folder):
        raise UsageError(f"{destination} is a file; the destination must be a folder")
    names = _sizes(fs, folder)
    foreign = _PACKING not in names and any(_OWN_FILE.fullmatch(name) and name.endswith(".tar") for name in names)
    if (MANIFEST in names or foreign) and not overwrite:
        raise UsageError(f"{destination} holds shards already; pack elsewhere, or with --overwrite to replace them")


def resume(destination: str, request: Request, overwrite: bool) -> list[FinishedShard]:
    """The first shards of the plan, as many as an interrupted pack of the same request left whole; the folder is made.

    UsageError where the pack that was interrupted is another, unless it may be overwritten.
    """
    fs, folder = open_fs(destination)
    sizes = _sizes(fs, folder)
    earlier = _read_json(fs, join(folder, _REQUEST)) if _PACKING in sizes else None
    if earlier == request and MANIFEST not in sizes:
        return _finished_shards(fs, folder, sizes)
    if earlier is not None and not overwrite:
        raise UsageError(
            f"{destination} holds an unfinished pack of another request: {_describe_difference(earlier, request)}; pack"
            " elsewhere, or with --overwrite to begin again"
        )
    try:
        if _PACKING in sizes:
            fs.rm(join(folder, _PACKING), recursive=True)
        if MANIFEST in sizes:
            fs.rm_file(join(folder, MANIFEST))
        fs.makedirs(join(folder, _PACKING), exist_ok=True)
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


def commit(destination: str, classes: Sequence[str], written: Sequence[Shard], labels_per_sample: int) -> None:
    """Removes what earlier packs left, which globs would take for samples, and writes the manifest last."""
    fs, folder = open_fs(destination)
    stems = {shard.stem for shard in written}
    for name in _sizes(fs, folder):
        own = _OWN_FILE.fullmatch(name)
        if own and (own[1] not in stems or name.endswith(".partial")):
            fs.rm_file(join(folder, name))
    field = "labels" if labels_per_sample > 1 else None
    write_manifest(destination, classes, written, label_field=field, labels_per_sample=labels_per_sample)
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
        return FinishedShard(shard, record["index_bytes"], tuple(BadSample(None, *each) for each in record["broken"]))
    except (KeyError, TypeError):
        return None


def _has_its_files(done: FinishedShard, sizes: dict[str, int]) -> bool:
    if done.shard is None:
        return True
    stem, table = done.shard.stem, HEADER_BYTES + ROW.itemsize * done.shard.samples
    expected = {f"{stem}.tar": done.shard.bytes, f"{stem}.npy": table, f"{stem}.idx": done.index_bytes}
    return expected.items() <= sizes.items()


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


def _within(fs: fsspec.AbstractFileSystem, inner: str, outer: str) -> bool:
    if isinstance(fs, LocalFileSystem):
        inner, outer = os.path.realpath(inner), os.path.realpath(outer)
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def _sizes(fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, int]:
    """The bytes of each file in a folder by its name; folders too."""
    fs.invalidate_cache()
    try:
        infos: Iterable[dict[str, Any]] = Storage().with_retries("listed", folder, lambda: _ls(fs, folder))
    except DataError as error:
        raise UsageError(str(error)) from error
    return {info["name"].rstrip("/").rpartition("/")[2]: info["size"] for info in infos}


def _ls(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    try:
        return fs.ls(folder, detail=True)
    except FileNotFoundError:  # object stores have no empty folders
        return []
