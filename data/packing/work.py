"""Work that processes on many machines share: numbered items, of which part i of n does those from i - 1 on by n.

    DST/.packing/request.json   the request: parts with another one are refused
    DST/.packing/plan.json      {"items": N, ...}, what there is to do; written when the whole plan is there
    DST/.packing/000012.json    item 12 is done, and what came of it; written when its files are on the disk

Nobody waits for another or takes a lock, which object stores do not have: a file is there whole or not at all, and the
same request gives the same bytes. So a part may be killed, run twice, or beside a stale twin of itself. What has its
record is kept, what has none is made again, and the part that finds no item left finishes the work. Plan and records
carry the digest of the request that they are of; others are passed over.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import fsspec

from data.errors import UsageError
from data.storage.prefetch import ordered_map
from data.storage.remote import NotFound, Storage, open_fs, write_file
from data.urls import join

REQUEST, PLAN = "request.json", "plan.json"
_RECORD = re.compile(r"(\d{6,})\.json")
_READ_AT_ONCE = 32
Request = dict[str, str | int | float | bool | list[str] | None]


class Part(NamedTuple):
    """Part `number` (from 1) of `of`; number 0 makes the plan and does none of it."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    def share(self, items: int) -> range:
        """The items of this part."""
        return range(self.number - 1, items, self.of) if self.number else range(0)


WHOLE = Part(1, 1)


def parse_part(text: str) -> Part:
    """`3/8` as a Part; UsageError for what is none."""
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(f"--part={text} is not a part; 3/8 is the third of eight, and 0/8 only makes the plan")
    return Part(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Work:
    """The notes of one piece of work, in a folder such as `.packing` at its destination."""

    fs: fsspec.AbstractFileSystem
    folder: str
    url: str
    request: Request

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.rpartition("/")[2]

    @property
    def digest(self) -> str:
        """Of the request; plan and records carry it."""
        return hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()[:16]

    def join(
        self, restart: bool, elsewhere: str = "write elsewhere", anew: str = "pass --overwrite to start over"
    ) -> None:
        """Begins the work, or joins it; UsageError where that of another request is there, unless `restart`.

        `elsewhere` and `anew` are what its message has to offer.
        """
        earlier = self._read(REQUEST)
        if earlier is not None and earlier.get("request") == self.request:
            return
        if earlier is not None and not restart:
            raise UsageError(
                f"{self.url} holds unfinished work of another command: {describe_difference(earlier, self.request)};"
                f" {elsewhere}, or {anew}"
            )
        try:
            self.fs.makedirs(self.folder, exist_ok=True)
        except Exception as error:  # the back ends' exceptions share no base class
            raise UsageError(f"{self.url} cannot be written: {error}; {elsewhere}") from error
        self.write(REQUEST, {"request": self.request})

    def is_current(self) -> bool:
        """Whether the notes are still of this request, and not finished or begun anew by somebody else meanwhile."""
        earlier = self._read(REQUEST)
        return earlier is not None and earlier.get("request") == self.request

    def is_planned(self) -> bool:
        """Whether there is a plan, of this request or another one: without it nothing was made yet."""
        return self._read(PLAN) is not None

    def plan(self) -> dict[str, Any] | None:
        """What there is to do, once that is known."""
        plan = self._read(PLAN)
        return plan if plan is not None and plan.get("of") == self.digest else None

    def publish_plan(self, items: int, **more: Any) -> dict[str, Any]:
        """Notes what there is to do, when all that belongs to it is written."""
        return self.write(PLAN, {"of": self.digest, "items": items, **more})

    def record(self, number: int, **facts: Any) -> dict[str, Any]:
        """Notes that an item is done, when its files are whole."""
        return self.write(f"{number:06d}.json", {"of": self.digest, **facts})

    def numbers(self) -> set[int]:
        """The items that have a record, of this request or another one."""
        self.fs.invalidate_cache()
        names = (info["name"].rstrip("/").rpartition("/")[2] for info in list_folder(self.fs, self.folder))
        return {int(found[1]) for name in names if (found := _RECORD.fullmatch(name))}

    def find(self, number: int) -> dict[str, Any] | None:
        """What came of an item, if it is done."""
        record = self._read(f"{number:06d}.json")
        return record if record is not None and record.get("of") == self.digest else None

    def find_each(self, numbers: Iterable[int]) -> Iterator[dict[str, Any] | None]:
        """What came of each of some items, in their order; a few are held at once."""
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            yield from ordered_map(pool, self.find, numbers, 4 * _READ_AT_ONCE)

    def records(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Those of these items that are done, by number, and what came of them."""
        asked = sorted(self.numbers().intersection(numbers))
        return {number: each for number, each in zip(asked, self.find_each(asked), strict=True) if each}

    def write(self, name: str, document: dict[str, Any]) -> dict[str, Any]:
        """Writes a note."""
        write_file(self.fs, join(self.folder, name), json.dumps(document).encode())
        return document

    def remove(self) -> None:
        """Removes all notes, beside others who may do the same."""
        remove_folder(self.fs, self.folder)

    def _read(self, name: str) -> dict[str, Any] | None:
        """A note; None if it does not exist or is incomplete, as where no rename is atomic."""
        path = join(self.folder, name)
        try:
            document = json.loads(Storage().with_retries("read", path, lambda: self.fs.cat_file(path)))
        except (NotFound, ValueError):
            return None
        return document if isinstance(document, dict) else None


def open_work(destination: str, name: str, request: Request) -> Work:
    """The work of this request in the folder `name` of a destination."""
    fs, folder = open_fs(destination)
    return Work(fs, join(folder, name), destination, request)


def find_work(destination: str, name: str) -> Work | None:
    """The work in the folder `name` of a destination, of whatever request; None where there is none."""
    work = open_work(destination, name, {})
    earlier = work._read(REQUEST)
    return replace(work, request=earlier["request"]) if earlier and isinstance(earlier.get("request"), dict) else None


def describe_difference(earlier: dict[str, Any], request: Request) -> str:
    """In which words of the request an earlier one differs."""
    old = earlier.get("request")
    old = old if isinstance(old, dict) else {}
    changed = [name for name in {**request, **old} if old.get(name) != request.get(name)]
    return ", ".join(f"{name} was {old.get(name)} and is now {request.get(name)}" for name in changed)


def list_folder(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    """What lies in a folder; nothing where there is none, since object stores have no empty folders."""
    try:
        return Storage().list_folder(fs, folder)
    except NotFound:
        return []


def remove_folder(fs: fsspec.AbstractFileSystem, folder: str) -> None:
    """Removes a folder and what is in it, beside others who may do the same."""

    def attempt() -> None:
        if fs.exists(folder):
            try:
                fs.rm(folder, recursive=True)
            except FileNotFoundError:
                raise OSError("removed by two at once") from None  # tried again: more may be left

    Storage().with_retries("removed", folder, attempt)
