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

import numpy as np

from data.errors import DataError
from data.memory import READ_AHEAD_BYTES
from data.order import Order, Window
from data.reader import Sample, read_ranges
from data.shards.manifest import BadSample, Manifest

READ_AHEAD_SAMPLES = 4096
"""Samples that are looked ahead at most; or a window of each slot, where that is more."""
NEIGHBOURS = 8
"""Windows that are tried instead of one without a good sample."""

Found = list[Sample | BadSample]
Failed = Mapping[tuple[str, str], str]
"""By shard and key the samples that DALI failed on, and why."""


@dataclass(frozen=True)
class OpenWindow:
    """A window that is being read: `samples` gives its own, and those that substitutes are taken from."""

    indices: np.ndarray  # which of the window's samples, by row
    numbers: np.ndarray  # global sample numbers, by index
    samples: Future[tuple[Found, Found]]


@dataclass(frozen=True)
class Place:
    """Where the sample of a position in the endless stream is found: a row of an open window."""

    position: int
    epoch: int
    window: OpenWindow
    row: int


class OpenWindows:
    """The windows of this rank's slots that are open at the front of the look-ahead.

    `samples_held` counts the samples of all windows whose reading has begun and whose last place was not released.
    """

    def __init__(self, manifest: Manifest, order: Order, pool: ThreadPoolExecutor) -> None:
        self.manifest, self.order, self._pool = manifest, order, pool
        self._starts = order.shard_ends - order.shard_samples
        self._open: dict[tuple[int, int], tuple[Window, OpenWindow]] = {}
        self.samples_held = 0

    def place_of(self, position: int) -> Place:
        """The place of a position; the reading of its window begins where it is not open."""
        epoch, g = self.order.place(position)
        row, slot = divmod(g, self.order.global_batch)
        if (epoch, slot) not in self._open:
            window = self.order.epoch(epoch).window_at(g)
            self._open[epoch, slot] = window, self._begin(window)
        window, opened = self._open[epoch, slot]
        row_in_window = row - window.first_row_of_lane
        if row_in_window == window.samples - 1:
            del self._open[epoch, slot]
        return Place(position, epoch, opened, row_in_window)

    def substitute(self, position: int, failed: Failed) -> tuple[Sample, BadSample]:
        """What replaces the sample of a position on which DALI failed, and why: the next good one that did not fail.

        It reads the window once more, which may be closed, and its neighbours if need be; DataError where all failed.
        """
        number, g = self.order.place(position)
        epoch = self.order.epoch(number)
        window, index = epoch.window_at(g), int(epoch.index_in_window(np.array([g]))[0])
        found, substitutes = _read_window(self.manifest, self.order, window)
        own = found[index]
        bad = own if isinstance(own, BadSample) else undecodable(own, failed[own.shard, own.key])
        neighbours = (read_ranges(self.manifest, each.ranges) for each in _neighbours(self.order, window))
        for other in itertools.chain(_following(substitutes, index), itertools.chain.from_iterable(neighbours)):
            if isinstance(other, Sample) and (other.shard, other.key) not in failed:
                return other, bad
        raise DataError(f"{bad.shard}: {bad.key}: {bad.reason}; no sample of {1 + NEIGHBOURS} windows can replace it")

    def release(self, places: list[Place]) -> None:
        """Notes that these places were used; with its last place a window is released."""
        sizes = ((place.row + 1, len(place.window.indices)) for place in places)
        self.samples_held -= sum(size for used, size in sizes if used == size)

    def _begin(self, window: Window) -> OpenWindow:
        rows = window.first_row_of_lane + np.arange(window.samples)
        indices = self.order.epoch(window.epoch).index_in_window(rows * self.order.global_batch + window.slot)
        numbers = np.concatenate([self._starts[s.shard] + s.first_row + np.arange(s.rows) for s in window.ranges])
        self.samples_held += window.samples
        return OpenWindow(indices, numbers, self._pool.submit(_read_window, self.manifest, self.order, window))


def _read_window(manifest: Manifest, order: Order, window: Window) -> tuple[Found, Found]:
    """The samples of a window, and those that substitutes are taken from: its own, if one of them is good."""
    found = read_ranges(manifest, window.ranges)
    if any(isinstance(sample, Sample) for sample in found):
        return found, found
    for neighbour in _neighbours(order, window):
        substitutes = read_ranges(manifest, neighbour.ranges)
        if any(isinstance(sample, Sample) for sample in substitutes):
            return found, substitutes
    tried = [window, *_neighbours(order, window)]
    names = {manifest.shards[sample_range.shard].name: None for each in tried for sample_range in each.ranges}
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


def places_ahead(windows: OpenWindows, positions: Iterable[int], per_chunk: int, slots: int) -> Iterator[list[Place]]:
    """The places of the positions, of at most `slots` slots, in chunks; windows are read ahead within a byte budget.

    The budget is a window of each slot and READ_AHEAD_BYTES. Since the last windows of an epoch are shorter, it reaches
    further ahead towards the epoch's end, where all slots begin a window with the next row.
    """
    in_use = slots * windows.order.window
    most_held = in_use + READ_AHEAD_BYTES / windows.manifest.mean_sample_bytes
    most_ahead = 2 * per_chunk  # grows from chunk to chunk, so that the first is soon there
    ahead: deque[Place] = deque()
    for position in positions:
        ahead.append(windows.place_of(position))
        while len(ahead) >= per_chunk and (len(ahead) > most_ahead or windows.samples_held > most_held):
            chunk = [ahead.popleft() for _ in range(per_chunk)]
            yield chunk
            windows.release(chunk)
            del chunk  # else these windows would stay until the next chunk
            most_ahead = min(most_ahead + per_chunk, max(in_use, READ_AHEAD_SAMPLES))
    while ahead:
        yield [ahead.popleft() for _ in range(min(per_chunk, len(ahead)))]


def usable_sample(place: Place) -> tuple[Sample, BadSample | None]:
    """The sample of a place; or, where it is broken, the next good substitute and the broken one."""
    found, substitutes = place.window.samples.result()
    index = int(place.window.indices[place.row])
    sample = found[index]
    if isinstance(sample, Sample):
        return sample, None
    return next(other for other in _following(substitutes, index) if isinstance(other, Sample)), sample


def undecodable(sample: Sample, reason: str) -> BadSample:
    """A sample that passed every check, and on which DALI fails."""
    return BadSample(sample.shard, sample.key, f"DALI does not decode it: {reason}")


def _following(samples: Found, index: int) -> Found:
    """The samples from one on, and around."""
    first = index % len(samples)
    return [*samples[first:], *samples[:first]]
