"""The images that a CSV or JSONL names, with their sizes and labels, found by listing their folders.

Paths are relative to the list's folder, absolute, or URLs of any fsspec file system. One that is not found as written
is looked for with slashes for backslashes, and with its letters composed or decomposed. None of the images is read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import quote

import fsspec

from data.errors import DataError, UsageError
from data.packing.archives import Entry, normalize_path
from data.packing.folders import resolve_kind
from data.packing.label_files import read_rows
from data.storage.remote import NotFound, Storage, open_fs
from data.urls import is_web, join, split_query

_REQUESTS_AT_ONCE = 16
Location = tuple[fsspec.AbstractFileSystem, str]


class _Found(NamedTuple):
    """A path of a list, where that is, and what the file system says of it, if it is there."""

    path: str
    url: str
    location: Location
    info: dict[str, Any] | None

    @property
    def is_file(self) -> bool:
        return self.info is not None and self.info["type"] == "file"


def list_images(storage: Storage, url: str) -> tuple[list[Entry], list[tuple[str, ...]]]:
    """The images that a list names, with their sizes, and their labels; UsageError with the line that is wrong."""
    rows = read_rows(url)
    found = _find(storage, url, [row.path for row in rows])
    for form in ("NFC", "NFD"):
        paths = [
            each.path if each.is_file else unicodedata.normalize(form, each.path.replace("\\", "/")) for each in found
        ]
        changed = [number for number, each in enumerate(found) if each.path != paths[number]]
        for number, again in zip(changed, _find(storage, url, [paths[number] for number in changed]), strict=True):
            found[number] = again
    missing = [row for row, each in zip(rows, found, strict=True) if not each.is_file]
    if missing:
        more = f", nor do {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{url} line {missing[0].line} names {missing[0].path}, which does not exist as a file{more}")
    lines: dict[tuple[int, str], int] = {}
    for row, (_, _, (fs, path), _) in zip(rows, found, strict=True):
        if lines.setdefault((id(fs), path), row.line) != row.line:
            raise UsageError(f"{url} names {row.path} twice, in lines {lines[id(fs), path]} and {row.line}")
    return [_entry(each) for each in found], [row.labels for row in rows]


def _entry(found: _Found) -> Entry:
    path = normalize_path(split_query(found.path)[0].rpartition("://")[2])
    return Entry(path, False, found.url, None, found.info["size"] if found.info else None)


def _find(storage: Storage, url: str, paths: Sequence[str]) -> list[_Found]:
    urls = [_resolve(url, path) for path in paths]
    locations = [open_fs(each) for each in urls]
    return [_Found(*each) for each in zip(paths, urls, locations, _infos(storage, urls, locations), strict=True)]


def _resolve(url: str, path: str) -> str:
    """Where a list at `url` finds a path."""
    if "://" in path or path.startswith("/"):
        return path
    address, query = split_query(url)
    folder, slash, _ = address.rpartition("/")
    name = quote(normalize_path(path)) if is_web(url) else normalize_path(path)
    return join(folder + query, name) if slash else name


def _infos(storage: Storage, urls: list[str], locations: list[Location]) -> list[dict[str, Any] | None]:
    """What the file systems say of each file, None where it is missing: by listing the folders, or else one by one."""
    folders = {(id(fs), path.rpartition("/")[0]): fs for fs, path in locations}
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        listed = pool.map(lambda each: _ls(storage, each[1], each[0][1]), folders.items())
        by_folder = dict(zip(folders, listed, strict=True))

        def info(url: str, place: Location) -> dict[str, Any] | None:
            fs, path = place
            known = by_folder[id(fs), path.rpartition("/")[0]].get(path)
            return known if known and known.get("size") is not None else _info(storage, url)

        return list(pool.map(info, urls, locations))


def _ls(storage: Storage, fs: fsspec.AbstractFileSystem, folder: str) -> dict[str, dict[str, Any]]:
    if is_web(folder):  # its page would have no sizes
        return {}
    try:
        infos = storage.list_folder(fs, folder)
    except DataError:  # not every server lists its folders
        return {}
    return {info["name"]: {**info, "type": "file"} for info in infos if resolve_kind(fs, info) == ("file", None)}


def _info(storage: Storage, url: str) -> dict[str, Any] | None:
    try:
        return storage.info(url)
    except NotFound:
        return None
