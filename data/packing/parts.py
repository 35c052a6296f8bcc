"""One part's share of a piece of work, and the end of it by the part that finds all items done.

A part that was killed resumes where it was. One that is run beside others of the same request, a stale twin among them,
writes what they write, and two that finish at once publish the same. One that finds the result published changes
nothing, and takes away what it may have left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from data.errors import DataError, UsageError
from data.packing.work import WHOLE, Part, Work
from data.storage.prefetch import map_in_threads

Result = TypeVar("Result", covariant=True)
Record = dict[str, Any]


class NotLast(Exception):
    """A part is done and there is more to do, or nothing was to do; `standing` is what it says, for programs."""

    def __init__(self, message: str, part: Part, to_go: int) -> None:
        super().__init__(f"{part}: {message}")
        self.standing = {"part": str(part), "to_go": to_go}


class Items(Protocol[Result]):
    """What there is to do: items in an order, in which an item is known by its place."""

    @property
    def work(self) -> Work:
        """Where it is noted."""
        ...

    @property
    def result(self) -> str:
        """The file that is there when all is done."""
        ...

    def is_published(self) -> bool:
        """Whether the result is there."""
        ...

    def plan(self) -> Sequence[int]:
        """The number of each item in the work, which is planned if nobody has."""
        ...

    def is_kept(self, item: int, record: Record) -> bool:
        """Whether an item of this part's share need not be done again."""
        ...

    def do(self, item: int) -> Record:
        """Does an item; what is to be noted of it."""
        ...

    def is_of(self, item: int, record: Record) -> bool:
        """Whether a record is of the item as it is now."""
        ...

    def publish(self, records: Iterator[Record], done: set[int]) -> Result:
        """The result of all records, which come in order and are read to their end before anything is written.

        `done` are the items that were done just now.
        """
        ...


def do_part(items: Items[Result], part: Part | None, workers: int, progress: Callable[[int, int], None]) -> Result:
    """Does what is left of a part's share, in threads of an item each, and publishes if nothing is left of all.

    `progress(done, total)` counts the share. UsageError where others have asked for something else; without a part,
    which is all of it, that is given up. NotLast where there is nothing to publish.
    """
    try:
        if not items.is_published():
            return _go_on(items, part, workers, progress)
    except (DataError, UsageError, NotLast):
        if not items.is_published():  # else the notes are gone because all is done
            raise
    items.work.remove()
    raise NotLast(f"{items.work.url} already has a {items.result}, so there is nothing to do", part or WHOLE, 0)


def check_current(work: Work) -> None:
    """UsageError where the work was begun anew with another request meanwhile."""
    if not work.is_current():
        raise UsageError(f"{work.url}: another command has restarted this work in the meantime")


class _ToGo(Exception):
    """So many items are not done, or have changed since."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = items


def _go_on(items: Items[Result], part: Part | None, workers: int, progress: Callable[[int, int], None]) -> Result:
    work = items.work
    work.join(part is None, "choose another place with --out", f"remove its {work.name} to start over")
    numbers = items.plan()
    share = (part or WHOLE).share(len(numbers))
    done = _do_share(items, numbers, share, workers, progress)
    there = work.numbers()
    to_go = sum(number not in there for number in numbers)
    if to_go == 0 and (part is None or part.number):
        try:
            result = items.publish(_records(items, numbers), done)
            work.remove()
            return result
        except _ToGo as found:
            to_go = found.items
    if part is None:
        raise DataError(f"{work.url}: {to_go} of {len(numbers)} shards changed meanwhile; run the same command again")
    done_now = f"shards done: {len(share)}" if part.number else "the plan is written"
    raise NotLast(f"{done_now}; {to_go} of {len(numbers)} shards to go", part, to_go)


def _do_share(
    items: Items[Any], numbers: Sequence[int], share: range, workers: int, progress: Callable[[int, int], None]
) -> set[int]:
    """The items that were done now; what others had done of the share is kept."""
    there = items.work.numbers()

    def attempt(item: int) -> bool:
        record = items.work.find(numbers[item]) if numbers[item] in there else None
        if record is not None and items.is_kept(item, record):
            return False
        found = items.do(item)
        check_current(items.work)
        items.work.record(numbers[item], **found)
        return True

    return {item for item, now in zip(share, map_in_threads(attempt, share, workers, progress), strict=True) if now}


def _records(items: Items[Any], numbers: Sequence[int]) -> Iterator[Record]:
    """The records of all items in order; an error at their end where not all are there, or they are wanted no more."""
    to_go = 0
    for item, record in enumerate(items.work.find_each(numbers)):
        if record is None or not items.is_of(item, record):
            to_go += 1
        elif not to_go:
            yield record
    if to_go:
        raise _ToGo(to_go)
    check_current(items.work)
