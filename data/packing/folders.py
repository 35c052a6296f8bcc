"""What lies in a folder, a tar or a zip, at any fsspec URL: names, sizes and places of its files, none of them read.

A tar in a folder stands for a folder of its name, as a tar in a tar does. Links are followed on a local disk, and
broken ones are listed with the reason. Hidden files are skipped. Which files are images is decided in sources.py.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import PurePath
from typing import Any, BinaryIO, NamedTuple, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError, UsageError
from data.packing.archives import Entry, is_hidden, tar_entries, zip_entries
from data.packing.catalog import Catalog
from data.shards.tar_index import decompressor_for
from data.storage.ranged_file import RangedFile
from data.storage.remote import Storage, open_fs
from data.urls import file_name, has_suffix, is_web, join, split_query

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # with files, and empty
NEEDED = "a folder of class folders, a tar or zip of one, or a list (.csv, .jsonl) is needed"
_BLOCK_BYTES = 2**23
_LISTED_AT_ONCE = 16


def list_entries(storage: Storage, url: str, catalog: Catalog) -> None:
    """Adds what lies in the folder, tar or zip at `url`; UsageError where none is, DataError if it cannot be listed."""
    try:
        fs, root = open_fs(url)
        if fs.isdir(root):
            return _list_folders(storage, fs, root, url, catalog)
        if not fs.isfile(root):
            raise UsageError(f"{url} does not exist; {NEEDED}")
        with _open(storage, fs, root, url) as stream:
            catalog.add(_archive_entries(stream, url))
    except (UsageError, DataError):
        raise
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{url} cannot be listed: {error}") from error


def _archive_entries(stream: BinaryIO, url: str) -> Iterator[Entry]:
    beginning = stream.read(6)
    stream.seek(0)
    try:
        zipped = beginning.startswith(_ZIP) or has_suffix(url, ".zip")
        yield from (zip_entries if zipped else tar_entries)(stream, url)
    except tarfile.TarError as error:
        raise UsageError(f"{url} {_describe_no_tar(beginning, error)}") from None
    except zipfile.BadZipFile as error:
        raise UsageError(f"{url} is not a valid zip ({error}); {NEEDED}") from None


def _describe_no_tar(beginning: bytes, error: tarfile.TarError) -> str:
    if tool := decompressor_for(beginning):
        return f"is compressed; {tool} it first: a folder, a zip or a plain tar is needed"
    return f"is neither a folder nor a valid tar ({error}); {NEEDED}"


def _open(storage: Storage, fs: fsspec.AbstractFileSystem, path: str, url: str) -> BinaryIO:
    """The file to read and seek in; from afar by ranges so long that not every image's header costs a request."""
    if isinstance(fs, LocalFileSystem):
        return cast(BinaryIO, fs.open(path, "rb"))
    size = storage.size(url)
    held = range(0), b""

    def read(begin: int, end: int) -> bytes:
        nonlocal held
        if begin not in held[0] or end - 1 not in held[0]:
            block = range(begin, min(max(end, begin + _BLOCK_BYTES), size))
            held = block, storage.read(url, block.start, block.stop)
        return held[1][begin - held[0].start : end - held[0].start]

    return RangedFile(read, size)


class _Folder(NamedTuple):
    """A folder's place in its file system, its path inside the source with a slash, and its URL."""

    place: str
    inside: str
    url: str


class _Found(NamedTuple):
    """What lies in a folder: files and folders, the folders to look into, and tars that stand for folders, by place."""

    entries: list[Entry]
    folders: list[_Folder]
    tars: list[tuple[str, Entry]]


def _list_folders(storage: Storage, fs: fsspec.AbstractFileSystem, root: str, url: str, catalog: Catalog) -> None:
    """Adds what lies in a folder and in those inside it, several of which are asked for at once."""
    damaged: list[str] = []
    ahead: list[Callable[[], _Found | None]] = [partial(_look_into, storage, fs, _Folder(root.rstrip("/"), "", url))]
    under_way: set[Future[_Found | None]] = set()
    pool = ThreadPoolExecutor(_LISTED_AT_ONCE)
    try:
        while ahead or under_way:
            while ahead and len(under_way) < _LISTED_AT_ONCE:
                under_way.add(pool.submit(ahead.pop()))
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for found in filter(None, (each.result() for each in done)):
                catalog.add(found.entries)
                ahead += [partial(_look_into, storage, fs, folder) for folder in found.folders]
                ahead += [partial(_class_tar, storage, fs, *tar, catalog, damaged) for tar in found.tars]
    finally:
        pool.shutdown(cancel_futures=True)
    if damaged:
        raise UsageError(f"{'; '.join(sorted(damaged))}; fetch each of these again, or remove it")


def _look_into(storage: Storage, fs: fsspec.AbstractFileSystem, folder: _Folder) -> _Found:
    found = _Found([], [], [])
    for info in storage.list_folder(fs, folder.place):
        place = info["name"].rstrip("/")
        name = file_name(place)
        if is_hidden(name) or place == folder.place:  # object stores list a folder in itself
            continue
        where = join(folder.url, split_query(place)[0].rstrip("/").rpartition("/")[2])
        entry = _file_or_folder(fs, info, folder.inside + name, where)
        if entry.folder:
            found.folders.append(_Folder(place, f"{folder.inside}{name}/", where))
        if has_suffix(where, ".tar") and not entry.folder and not entry.fault:
            found.tars.append((place, entry))
        else:
            found.entries.append(entry)
    return found


def _file_or_folder(fs: fsspec.AbstractFileSystem, info: dict[str, Any], path: str, url: str) -> Entry:
    kind, fault = resolve_kind(fs, info)
    if "::" in path and not fault and not (isinstance(fs, LocalFileSystem) or is_web(url)):
        fault = 'fsspec takes "::" in its name for a chain of file systems; rename it'
    return Entry(path, kind == "directory", url, None, info.get("size"), fault)


def _class_tar(
    storage: Storage, fs: fsspec.AbstractFileSystem, place: str, entry: Entry, catalog: Catalog, damaged: list[str]
) -> None:
    """Adds the folder that a tar in a folder stands for, and what is in it; what is wrong with it goes to `damaged`."""
    folder = entry.path[: -len(".tar")]
    catalog.add([Entry(folder, True, entry.url)])
    with _open(storage, fs, place, entry.url) as stream:
        try:
            catalog.add(tar_entries(stream, entry.url, f"{folder}/"))
        except tarfile.TarError as error:
            damaged.append(f"{entry.url} is not a valid tar ({error})")


def resolve_kind(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> tuple[str, str | None]:
    """Type of what was listed, links followed, and why it cannot be used."""
    kind = info["type"]
    if isinstance(fs, LocalFileSystem) and info["islink"]:
        place = PurePath(info["name"])
        if not os.path.exists(place):
            return "other", "a broken link"
        if os.path.realpath(place) in {os.path.realpath(parent) for parent in place.parents}:
            return "other", "a link to a folder that contains it"
        kind = fs.info(str(place))["type"]
    return kind, None if kind in ("file", "directory") else "not a regular file"
