"""Windows of the order, read ahead by threads within a byte budget, and what replaces their broken samples.

A window is read once and kept until its last sample is used. A broken sample is replaced by the next good one of its
window; a window without a good one takes substitutes from its neighbours, elsewhere in the epoch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.memory import READ_AHEAD_BYTES
from data.order import Order, Window
from data.reader import Reader, Sample
from data.shards.manifest import BadSample, Manifest

READ_AHEAD_SAMPLES = 4096
"""Samples that are looked ahead at most; or a window of each slot, where that is more."""
NEIGHBOURS = 8
"""Windows that are tried instead of one without a good sample."""

Found = list[Sample | BadSample]
Failed = Mapping[tuple[str, str], str]
"""By shard and key the samples that DALI failed on, and why."""


@dataclass(frozen=True, eq=False)
class OpenWindow:
    """A window that is being read."""

    indices: list[int]  # which of the window's samples, by row
    numbers: list[int]  # global sample numbers, by row
    reading: Future[tuple[Found, Found]]

    @cached_property
    def samples(self) -> tuple[Found, Found]:
        """Its own, and those that substitutes are taken from, as soon as they are read."""
        return self.reading.result()


@dataclass(frozen=True)
class Places:
    """Where the samples of positions in the endless stream are found: in which row of which open window.

    `ended` is how many samples the windows have whose last row is among them.
    """

    positions: NDArray[np.int64]
    epochs: NDArray[np.int64]
    windows: list[OpenWindow]
    rows: list[int]
    ended: int

    def numbers(self) -> NDArray[np.int64]:
        """The global numbers of the samples."""
        return np.array([window.numbers[row] for window, row in zip(self.windows, self.rows, strict=True)])

    def usable_samples(self) -> tuple[list[Sample], list[BadSample | None]]:
        """The samples, as soon as they are read, and None; where one is broken, the next good substitute, and that."""
        places = zip(self.windows, self.rows, strict=True)
        found = [window.samples[0][window.indices[row]] for window, row in places]
        broken = [each if isinstance(each, BadSample) else None for each in found]
        for i in [i for i, bad in enumerate(broken) if bad]:
            window = self.windows[i]
            following = _following(window.samples[1], window.indices[self.rows[i]])
            found[i] = next(other for other in following if isinstance(other, Sample))
        return cast(list[Sample], found), broken


class OpenWindows:
    """The windows of this rank's slots that are open at the front of the look-ahead.

    `samples_held` counts the samples of all windows whose reading has begun and whose last place was not released.
    """

    def __init__(self, manifest: Manifest, order: Order, pool: ThreadPoolExecutor) -> None:
        self.order, self.reader, self._pool = order, Reader(manifest), pool
        self._starts = order.shard_ends - order.shard_samples
        self._open: dict[tuple[int, ...], OpenWindow] = {}
        self.samples_held = 0

    def places_of(self, positions: NDArray[np.int64]) -> Iterator[Places | None]:
        """The places of positions, after a None for each window that is not open, when its reading has begun."""
        at = self.order.rows_at(positions)
        names = list(zip(*(part.tolist() for part in at[:5]), strict=True))  # a window is known by what its rows share
        new = [name for name in dict.fromkeys(names) if name not in self._open]
        begun = [self.order.epoch(epoch).window(*rest) for epoch, *rest in new]
        for name, window, indices in zip(new, begun, self._indices(begun), strict=True):
            self._open[name] = self._begin(window, indices)
            yield None
        windows, last = [self._open[name] for name in names], at.rows == at.sizes - 1
        for i in np.flatnonzero(last).tolist():
            del self._open[names[i]]
        yield Places(positions, at.epochs, windows, at.rows.tolist(), int(at.sizes[last].sum()))

    def substitute(self, position: int, failed: Failed) -> tuple[Sample, BadSample]:
        """What replaces the sample of a position on which DALI failed, and why: the next good one that did not fail.

        It reads the window once more, which may be closed, and its neighbours if need be; DataError where all failed.
        """
        number, g = self.order.place(position)
        epoch = self.order.epoch(number)
        window, index = epoch.window_at(g), int(epoch.index_in_window(np.array([g]))[0])
        found, substitutes = _read_window(self.reader, self.order, window)
        own = found[index]
        bad = own if isinstance(own, BadSample) else undecodable(own, failed[own.shard, own.key])
        neighbours = (self.reader.read(each.ranges) for each in _neighbours(self.order, window))
        for other in itertools.chain(_following(substitutes, index), itertools.chain.from_iterable(neighbours)):
            if isinstance(other, Sample) and (other.shard, other.key) not in failed:
                return other, bad
        raise DataError(f"{bad.shard}: {bad.key}: {bad.reason}; no sample of {1 + NEIGHBOURS} windows can replace it")

    def release(self, places: Places) -> None:
        """Notes that these places were used; with its last place a window is released."""
        self.samples_held -= places.ended

    def _indices(self, windows: list[Window]) -> Iterator[NDArray[np.int64]]:
        """Which of a window's samples each of its rows is, of all of an epoch by one draw."""
        for number, of_epoch in itertools.groupby(windows, lambda window: window.epoch):
            each = [(w.first_row_of_lane + np.arange(w.samples)) * self.order.global_batch + w.slot for w in of_epoch]
            indices = self.order.epoch(number).index_in_window(np.concatenate(each))
            yield from np.split(indices, np.cumsum([len(places) for places in each])[:-1])

    def _begin(self, window: Window, indices: NDArray[np.int64]) -> OpenWindow:
        numbers = np.concatenate([self._starts[s.shard] + s.first_row + np.arange(s.rows) for s in window.ranges])
        self.samples_held += window.samples
        read = self._pool.submit(_read_window, self.reader, self.order, window)
        return OpenWindow(indices.tolist(), numbers[indices].tolist(), read)


def _read_window(reader: Reader, order: Order, window: Window) -> tuple[Found, Found]:
    """The samples of a window, and those that substitutes are taken from: its own, if one of them is good."""
    found = reader.read(window.ranges)
    if any(isinstance(sample, Sample) for sample in found):
        return found, found
    for neighbour in _neighbours(order, window):
        substitutes = reader.read(neighbour.ranges)
        if any(isinstance(sample, Sample) for sample in substitutes):
            return found, substitutes
    tried = [window, *_neighbours(order, window)]
    names = {reader.manifest.shards[sample_range.shard].name: None for each in tried for sample_range in each.ranges}
    first = next(sample for sample in found if isinstance(sample, BadSample))
    raise DataError(
        f"{first.shard}: all {len(found)} samples of a window are broken, for example {first.key}: {first.reason};"
        f" so are those of the {NEIGHBOURS} windows tried instead, in {', '.join(names)}"
    )


def _neighbours(order: Order, window: Window) -> Iterator[Window]:
    """Windows to take substitutes from: those of the next slots, whose bytes lie elsewhere, then of later rows."""
    epoch, batch = order.epoch(window.epoch), order.global_batch
    first = window.first_row_of_lane * batch + window.slot
    for number in range(1, NEIGHBOURS + 1):
        rows_on = number // batch * (order.window - 1)  # with the row that each round of the slots is
        yield epoch.window_at((first + number + rows_on * batch) % order.samples)


def places_ahead(windows: OpenWindows, positions: Iterable[int], per_chunk: int, slots: int) -> Iterator[Places]:
    """The places of the positions, of at most `slots` slots, in chunks; windows are read ahead within a byte budget.

    The budget is a window of each slot and READ_AHEAD_BYTES. Since the last windows of an epoch are shorter, it reaches
    further ahead towards the epoch's end, where all slots begin a window with the next row.
    """
    in_use = slots * windows.order.window
    most_held = in_use + READ_AHEAD_BYTES / windows.reader.manifest.mean_sample_bytes
    most_ahead = 2 * per_chunk  # grows from chunk to chunk, so that the first is soon there
    ahead: deque[Places] = deque()
    for places in itertools.chain.from_iterable(map(windows.places_of, _chunks(positions, per_chunk))):
        if places is not None:
            ahead.append(places)
        while ahead and (len(ahead) * per_chunk > most_ahead or windows.samples_held > most_held):
            chunk = ahead.popleft()
            yield chunk
            windows.release(chunk)
            del chunk  # else these windows would stay until the next chunk
            most_ahead = min(most_ahead + per_chunk, max(in_use, READ_AHEAD_SAMPLES))
    while ahead:
        yield ahead.popleft()


def _chunks(positions: Iterable[int], per_chunk: int) -> Iterator[NDArray[np.int64]]:
    rest = iter(positions)
    while len(chunk := np.fromiter(itertools.islice(rest, per_chunk), np.int64)):
        yield chunk


def undecodable(sample: Sample, reason: str) -> BadSample:
    """A sample that passed every check, and on which DALI fails."""
    return BadSample(sample.shard, sample.key, f"DALI cannot decode it: {reason}")


def _following(samples: Found, index: int) -> Found:
    """The samples from one on, and around."""
    first = index % len(samples)
    return [*samples[first:], *samples[:first]]
