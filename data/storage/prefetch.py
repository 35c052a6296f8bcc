"""Work that threads do ahead of its consumer, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """`map` in order, with at most this many calls under way ahead of the consumer."""
    under_way: deque[Future[Result]] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) > ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def map_in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, progress: Callable[[int, int], None]
) -> Iterator[Result]:
    """The results in the order of the items, counted by `progress(done, total)`; an error cancels the rest.

    After KeyboardInterrupt nobody waits for calls that are under way: the process is about to end.
    """
    pool, waits = ThreadPoolExecutor(workers), True
    try:
        progress(0, len(items))
        for done, result in enumerate(pool.map(work, items), start=1):
            progress(done, len(items))
            yield result
    except KeyboardInterrupt:
        waits = False
        raise
    finally:
        pool.shutdown(waits, cancel_futures=True)
