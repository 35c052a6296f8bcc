"""A listing of any length in a scratch database on disk, so that what is held in memory does not grow with it.

SQLite sorts, joins and groups in bounded memory. Its file has no name and goes with the process; it and what SQLite
sorts by lie where temporary files do ($TMPDIR), some 800 bytes an image in all. Paths are kept as bytes, whose order is
that of their letters, and which can be those of any file system.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from data.packing.archives import Entry, ZipMember
from data.shards.labels import composed

_CACHE_KIB = 2**16
_ROWS_AT_ONCE = 2**10
_TABLES = """
CREATE TABLE files (path BLOB, url BLOB, offset INT, size INT, fault TEXT, zipped TEXT, folder INT, link BLOB);
CREATE TABLE images (id INTEGER PRIMARY KEY, path BLOB, url BLOB, offset INT, size INT, fault TEXT, zipped TEXT,
                     key BLOB, labels TEXT, contents BLOB, held INT DEFAULT 0, copy INT DEFAULT 0);
CREATE TABLE broken (path TEXT, reason TEXT);
"""
"""What was found, in any order; of it the images, in the listing's order, and the files that are none."""
ENTRY = "path, url, offset, size, fault, zipped"
"""The columns that `to_entry` takes, and `to_row` gives."""
_TARGET = f"""
SELECT {ENTRY} FROM files WHERE path = ? AND url = ? AND rowid < ? AND link IS NULL ORDER BY rowid DESC LIMIT 1
"""


class Database:
    """A scratch database for one use; may be written to from several threads."""

    def __init__(self, tables: str) -> None:
        self._connection = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._lock = threading.Lock()
        for setting in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        self._connection.executescript(tables)
        self._connection.execute("BEGIN")  # and never an end: nobody else reads it

    def change(self, statement: str, *values: Any) -> int:
        """The number of rows that a statement changed."""
        with self._lock:
            return self._connection.execute(statement, values).rowcount

    def change_each(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """A statement for each of many rows, which may come from another query."""
        rows = iter(rows)
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            with self._lock:
                self._connection.executemany(statement, some)

    def select(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, a few at a time."""
        with self._lock:
            cursor = self._connection.execute(query, values)
        while True:
            with self._lock:
                some = cursor.fetchmany(_ROWS_AT_ONCE)
            if not some:
                return
            yield from some

    def first(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        """The first row of a query."""
        with self._lock:
            return self._connection.execute(query, values).fetchone()

    def function(self, name: str, of_one: Callable[[int], int]) -> None:
        """Gives queries a function of one number."""
        self._connection.create_function(name, 1, of_one, deterministic=True)


class Catalog(Database):
    """What lies in a source, while it is listed and afterwards."""

    def __init__(self, listed: Callable[[int], None]) -> None:
        super().__init__(_TABLES)
        self._listed, self._count, self._has_links = listed, 0, False
        self.around = OuterFolders()

    def add(self, entries: Iterable[Entry]) -> None:
        """Adds what was found; of two entries of one path in an archive the later one counts."""
        entries = iter(entries)
        while some := list(islice(entries, _ROWS_AT_ONCE)):
            rows = [(*to_row(each), each.folder, each.link and to_bytes(each.link)) for each in some]
            with self._lock:
                self._connection.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
                self._has_links |= any(each.link for each in some)
                for each in some:
                    self.around.see(each.path)
                self._count += len(some)
                self._listed(self._count)

    def entries(self) -> Iterator[Entry]:
        """What was found, in the order of its paths, with hard links as the files that they stand for."""
        if self._has_links:
            self.change("CREATE INDEX places ON files (path)")
        query = f"SELECT {ENTRY}, folder, link, rowid FROM files ORDER BY path, url, rowid"
        for _, same in groupby(self.select(query), key=itemgetter(0, 1)):
            *_, (*row, folder, link, number) = same
            if link is not None and (target := self.first(_TARGET, link, row[1], number)):
                row[1:] = target[1:]
            yield to_entry(*row, folder=bool(folder))

    def broken(self) -> Iterator[tuple[str, str]]:
        """Files that are no images, and why, in the order of their paths."""
        return self.select("SELECT path, reason FROM broken ORDER BY rowid")  # type: ignore[return-value]


class OuterFolders:
    """Which folders lie around everything that was seen, by their names as compared."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._limit: int | None = None

    def see(self, path: str) -> None:
        """Takes note of a path."""
        if self._limit == 0:
            return
        for level, part in enumerate(path.split("/")):
            if level == self._limit:
                return
            name = composed(part)
            if level == len(self._names):
                self._names.append(name)
            elif self._names[level] != name:
                self._limit = level
                del self._names[level:]
                return

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self._names) - 1 if self._limit is None else self._limit


def to_bytes(path: str) -> bytes:
    """A path in the order of its letters, also one that is no UTF-8."""
    return path.encode("utf-8", "surrogatepass")


def to_text(path: bytes) -> str:
    """What `to_bytes` was given."""
    return path.decode("utf-8", "surrogatepass")


def to_row(entry: Entry) -> tuple[Any, ...]:
    """An entry's columns, ENTRY."""
    path, _, url, offset, size, fault, zipped, _ = entry
    return to_bytes(path), to_bytes(url), offset, size, fault, zipped and json.dumps(zipped)


def to_entry(
    path: bytes,
    url: bytes,
    offset: int | None,
    size: int | None,
    fault: str | None,
    zipped: str | None,
    folder: bool = False,
) -> Entry:
    """What `to_row` was given."""
    member = ZipMember(*json.loads(zipped)) if zipped else None
    return Entry(to_text(path), folder, to_text(url), offset, size, fault, member)
