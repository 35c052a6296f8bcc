"""The steps of a run one after the other, each with its data; some are passed over.

Next: ../data/loader.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import AbstractContextManager

from data.loader import Batch

Batches = Callable[[int, int], AbstractContextManager[Iterator[list[Batch]]]]
"""This rank's micro batches of each step from one up to another, read ahead while the context is open."""


def steps_of_batches(
    batches: Batches, first: int, end: int, passed_over: Collection[int]
) -> Generator[tuple[int, list[Batch] | None, float], None, None]:
    """The steps (from 0) from `first` up to `end`: number, micro batches, and the seconds that were waited for them.

    One that is passed over has None in their place; the last one never is.
    """
    left_out = sorted({step for step in passed_over if first <= step < end - 1})
    step = first
    for until in [*left_out, end]:
        if step < until:
            with batches(step, until) as reading:
                for number in range(step, until):
                    began = time.perf_counter()
                    yield number, next(reading), time.perf_counter() - began
        if until < end:
            yield until, None, 0.0
        step = until + 1
