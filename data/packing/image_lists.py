"""The images that a CSV or JSONL names, with their sizes and labels, found by listing their folders.

Paths are relative to the list's folder, absolute, or URLs of any fsspec file system. One that is not found as written
is looked for with slashes for backslashes, and with its letters composed or decomposed. None of the images is read.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Literal
from urllib.parse import quote

import fsspec

from data.errors import DataError, UsageError
from data.packing.archives import Entry, normalize_path
from data.packing.catalog import Database, to_bytes, to_text
from data.packing.folders import resolve_kind
from data.packing.label_files import read_rows
from data.storage.prefetch import ordered_map
from data.storage.remote import NotFound, Storage, open_fs
from data.urls import is_web, join, split_query

_REQUESTS_AT_ONCE = 16
_TABLES = """
CREATE TABLE rows (line INT, written BLOB, path BLOB, labels TEXT, url BLOB, place BLOB, size INT, found INT DEFAULT 0);
CREATE TABLE listed (place BLOB PRIMARY KEY, size INT) WITHOUT ROWID;
"""
"""Rows of the list, with the form of their path that was tried last; files of the folders that were listed."""
Labelled = Iterator[tuple[Entry, tuple[str, ...]]]
"""Images with their labels as they are written."""


def list_images(storage: Storage, url: str, listed: Callable[[int], None]) -> Labelled:
    """The images that a list names, with their sizes, and their labels; UsageError with the line that is wrong."""
    rows = Database(_TABLES)
    insert = "INSERT INTO rows (line, written, path, labels) VALUES (?, ?, ?, ?)"
    written = ((row.line, to_bytes(row.path), to_bytes(row.path), json.dumps(row.labels)) for row in read_rows(url))
    rows.change_each(insert, written)
    finder = _Finder(storage, url, rows, listed)
    finder.find()
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    for form in forms:
        changed = ((to_bytes(_in_form(form, path)), row) for row, path in finder.missing())
        rows.change_each("UPDATE rows SET path = ? WHERE rowid = ?", changed)
        finder.find()
    _check_all_there(url, rows)
    for path, place, size, labels in rows.select("SELECT path, url, size, labels FROM rows ORDER BY rowid"):
        name = normalize_path(split_query(to_text(path))[0].rpartition("://")[2])
        yield Entry(name, False, to_text(place), None, size), tuple(json.loads(labels))


def _in_form(form: Literal["NFC", "NFD"], path: str) -> str:
    return unicodedata.normalize(form, path.replace("\\", "/"))


def _check_all_there(url: str, rows: Database) -> None:
    """UsageError where a row names what is no file, or what another row names too."""
    if missing := rows.first("SELECT line, written, COUNT(*) OVER () FROM rows WHERE NOT found ORDER BY rowid LIMIT 1"):
        line, path, count = missing
        more = f"; {count - 1} more are missing too" if count > 1 else ""
        raise UsageError(f"{url} line {line} names {to_text(path)}, but there is no such file{more}")
    twice = rows.first(
        "SELECT place FROM (SELECT rowid AS row, place, ROW_NUMBER() OVER (PARTITION BY place ORDER BY rowid) AS n"
        " FROM rows) WHERE n = 2 ORDER BY row LIMIT 1"
    )
    if twice:
        query = "SELECT line, written FROM rows WHERE place = ? ORDER BY rowid LIMIT 2"
        (first, _), (second, path) = rows.select(query, twice[0])
        raise UsageError(f"{url} names {to_text(path)} twice, on lines {first} and {second}")


class _Finder:
    """Looks for the files of rows: by listing each folder once, or else one by one."""

    def __init__(self, storage: Storage, url: str, rows: Database, listed: Callable[[int], None]) -> None:
        self._storage, self._url, self._rows, self._listed = storage, url, rows, listed
        self._systems: dict[int, fsspec.AbstractFileSystem] = {}
        self._folders: set[tuple[int, str]] = set()
        self._count = 0

    def missing(self) -> Iterator[tuple[int, str]]:
        """The rows that were not found, and the form of their path that was tried last."""
        query = "SELECT rowid, path FROM rows WHERE NOT found"
        return ((row, to_text(path)) for row, path in self._rows.select(query))

    def find(self) -> None:
        """Looks for all that are missing."""
        missing = self.missing()
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            while some := list(islice(missing, 2**10)):
                located = [(row, url, *open_fs(url)) for row, path in some for url in [_resolve(self._url, path)]]
                self._list_folders(pool, ((fs, place) for _, _, fs, place in located))
                found = pool.map(lambda each: self._info(*each[1:]), located)
                files = [
                    (to_bytes(url), _name(fs, place), info["size"], row)
                    for (row, url, fs, place), info in zip(located, found, strict=True)
                    if info is not None and info["type"] == "file"
                ]
                self._rows.change_each("UPDATE rows SET url = ?, place = ?, size = ?, found = 1 WHERE rowid = ?", files)
                self._count += len(files)
                self._listed(self._count)

    def _list_folders(self, pool: ThreadPoolExecutor, places: Iterable[tuple[fsspec.AbstractFileSystem, str]]) -> None:
        """Enters the files of the folders around these places that were not listed before."""
        new = {(id(fs), place.rpartition("/")[0]): fs for fs, place in places}
        new = {key: fs for key, fs in new.items() if key not in self._folders}
        self._folders.update(new)
        self._systems |= {number: fs for (number, _), fs in new.items()}  # alive, so that its number stays its own
        ask = partial(_ls, self._storage)
        for files in ordered_map(pool, lambda each: ask(each[1], each[0][1]), new.items(), _REQUESTS_AT_ONCE):
            self._rows.change_each("INSERT OR IGNORE INTO listed VALUES (?, ?)", files)

    def _info(self, url: str, fs: fsspec.AbstractFileSystem, place: str) -> dict[str, Any] | None:
        """What the file system says of a file; None where it is missing."""
        known = self._rows.first("SELECT size FROM listed WHERE place = ?", _name(fs, place))
        if known and known[0] is not None:
            return {"type": "file", "size": known[0]}
        try:
            return self._storage.info(url)
        except NotFound:
            return None


def _name(fs: fsspec.AbstractFileSystem, place: str) -> bytes:
    """What tells a place from those of other file systems."""
    return to_bytes(f"{id(fs)}:{place}")


def _resolve(url: str, path: str) -> str:
    """Where a list at `url` finds a path."""
    if "://" in path or path.startswith("/"):
        return path
    address, query = split_query(url)
    folder, slash, _ = address.rpartition("/")
    name = quote(normalize_path(path)) if is_web(url) else normalize_path(path)
    return join(folder + query, name) if slash else name


def _ls(storage: Storage, fs: fsspec.AbstractFileSystem, folder: str) -> list[tuple[bytes, int | None]]:
    """Place and size of each file in a folder; none where it cannot be listed."""
    if is_web(folder):  # its page would have no sizes
        return []
    try:
        infos = storage.list_folder(fs, folder)
    except DataError:  # not every server lists its folders
        return []
    return [(_name(fs, each["name"]), each.get("size")) for each in infos if resolve_kind(fs, each) == ("file", None)]
