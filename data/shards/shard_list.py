"""The shards of a manifest as columns, 65 bytes a shard where an object each takes ten times that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**13
"""Shards of which there are Python objects at once."""
_OPTIONAL = ("query", "table", "headers")
"""What a shard need not have."""


@dataclass(frozen=True)
class Shard:
    """One tar: its file name beside the manifest, its samples, its bytes; the query with which its server gives it.

    `table` and `headers` are checksums (sample_table.shard_checksums), empty in format 1.
    """

    name: str
    samples: int
    bytes: int
    query: str = ""
    table: str = ""
    headers: str = ""

    @property
    def stem(self) -> str:
        """The name without ".tar", under which its table and index lie."""
        return self.name[: -len(".tar")]


class BadShard(ValueError):
    """A shard of which something does not hold, in a few words."""


@dataclass(frozen=True, eq=False)
class Shards(Sequence[Shard]):
    """Any number of shards; one is made where it is asked for. Texts are UTF-8, checksums uint8 [shards, 16] or zeros.

    The names are stems and their suffixes, ".tar" in some case of letters.
    """

    stems: NDArray[np.bytes_]
    suffixes: NDArray[np.bytes_]
    samples: NDArray[np.int64]
    bytes: NDArray[np.int64]
    queries: NDArray[np.bytes_]
    tables: NDArray[np.uint8]
    headers: NDArray[np.uint8]

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> Shards:
        return cls.of_rows([asdict(shard) for shard in shards])

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Shards:
        """By the fields of each; BadShard for a field's value, KeyError and others where it is none, or no row."""
        columns = _columns(rows)
        for is_good, fault in _CHECKS:
            if not is_good(columns):
                bad = next(row for row in rows if not is_good(_columns([row])))
                raise BadShard(fault.format_map({**dict.fromkeys(_OPTIONAL, ""), **bad}))
        suffix = -len(".tar")
        return cls(
            _encoded([name[:suffix] for name in columns["name"]]),
            _encoded([name[suffix:] for name in columns["name"]]),
            np.array(columns["samples"], np.int64),
            np.array(columns["bytes"], np.int64),
            _encoded(columns["query"]),
            _digests(columns["table"]),
            _digests(columns["headers"]),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Shard]:
        for part in self.runs():
            stems, suffixes, queries = (texts.tolist() for texts in (part.stems, part.suffixes, part.queries))
            names = [_decoded(stem + suffix) for stem, suffix in zip(stems, suffixes, strict=True)]
            numbers, checksums = (part.samples.tolist(), part.bytes.tolist()), (part.tables, part.headers)
            yield from map(Shard, names, *numbers, map(_decoded, queries), *map(hexadecimal, checksums))

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> Shards: ...

    def __getitem__(self, index: int | slice) -> Shard | Shards:
        if isinstance(index, slice):
            return Shards(*(column[index] for column in vars(self).values()))
        number = range(len(self))[index]
        return next(iter(self[number : number + 1]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and [*self] == [*other]

    def runs(self) -> Iterator[Shards]:
        """All of them, in order, in runs of which there may be Python objects at once."""
        return (self[first : first + _AT_ONCE] for first in range(0, len(self), _AT_ONCE))


class Growing:
    """Shards to which more are added, at most so many: memory that is reserved and not written is not taken."""

    def __init__(self, most: int) -> None:
        self._most, self._number, self._columns = most, 0, dict[str, NDArray[Any]]()

    def add(self, part: Shards) -> None:
        end = self._number + len(part)
        for name, column in vars(part).items():
            held = self._columns.get(name)
            if held is None or held.dtype < column.dtype:  # a longer text than any before
                self._columns[name] = np.empty((self._most, *column.shape[1:]), column.dtype)
                if held is not None:
                    self._columns[name][: self._number] = held[: self._number]
            self._columns[name][self._number : end] = column
        self._number = end

    def shards(self) -> Shards:
        return Shards(**{name: column[: self._number] for name, column in self._columns.items()})


def hexadecimal(checksums: NDArray[np.uint8]) -> list[str]:
    """Each as a manifest writes it; "" for zeros."""
    return [text.strip("0") and text for text in checksums.tobytes().hex(" ", 16).split()]


_Columns = dict[str, list[Any]]


def _columns(rows: Sequence[Mapping[str, Any]]) -> _Columns:
    columns = {name: [row[name] for row in rows] for name in ("name", "samples", "bytes")}
    return columns | {name: [row.get(name, "") for row in rows] for name in _OPTIONAL}


def _are(kind: type, *columns: list[Any]) -> bool:
    return all(set(map(type, column)) <= {kind} for column in columns)


def _are_numbers(*columns: list[Any]) -> bool:
    return _are(int, *columns) and all(
        min(column, default=1) >= 1 and max(column, default=1) < 2**63 for column in columns
    )


def _are_checksums(texts: list[Any]) -> bool:
    return _are(str, texts) and {*map(len, texts)} <= {0, 32} and _is_hexadecimal("".join(texts))


def _is_hexadecimal(digits: str) -> bool:
    try:
        return bytes.fromhex(digits).hex() == digits
    except ValueError:
        return False


_CHECKS: tuple[tuple[Callable[[_Columns], bool], str], ...] = (
    (
        lambda of: _are(str, of["name"]) and {name[-4:].lower() for name in of["name"]} <= {".tar"},
        "names a shard {name!r}, which is not a .tar",
    ),
    (lambda of: _are(str, of["query"]), "gives {name} the query {query!r}, which is not text"),
    (lambda of: _are_checksums(of["table"]), "gives {name} the table {table!r}, which is not a checksum"),
    (lambda of: _are_checksums(of["headers"]), "gives {name} the headers {headers!r}, which is not a checksum"),
    (
        lambda of: _are_numbers(of["samples"], of["bytes"]),
        "gives {name} {samples!r} samples in {bytes!r} bytes",
    ),
)
"""What must hold of shards, and what is said of one of which it does not."""


def _encoded(texts: list[str]) -> NDArray[np.bytes_]:
    distinct = {*texts}
    if len(distinct) == 1:  # as queries and suffixes mostly are
        return np.full(len(texts), distinct.pop().encode("utf-8", "surrogatepass"))
    return np.array([text.encode("utf-8", "surrogatepass") for text in texts], np.bytes_)


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def _digests(texts: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(text or 32 * "0" for text in texts)), np.uint8).reshape(-1, 16)
