"""From a position in the endless stream to a sample, by arithmetic: nothing to store, nothing to replay.

For an epoch the shards are permuted; laid end to end, and rotated by a drawn offset, they are one virtual array
of N samples. It is cut into B lanes (contiguous, equal to within one sample), one for each slot of the global batch,
dealt by a permutation of the slots. Inside a lane, samples are shuffled within windows of W rows, whose borders are
staggered from slot to slot:

    position P = e * N + g     step P // B, slot P % B of the batch    (e, g: epoch, position in it)
    g = row * B + s            row of the lane dealt to the epoch's slot s
    row -> window (row + s % W) // W -> one of the window's rows by its permutation -> virtual array -> shard, row

Promised: an epoch has every sample exactly once; the samples of a step depend on nothing but seed, shards, B and W
(the number of ranks is not among them); position 3,000,000,000 costs what position 10 costs; memory is O(shards + B).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data import rng
from data.rng import Stream

Positions = TypeVar("Positions", int, NDArray[np.int64])
_KEYS_AT_ONCE = 2**18


def steps(epochs: int, samples: int, global_batch: int) -> int:
    """Steps that `epochs` passes over the samples take; the last one is filled from the epoch after."""
    return -(-epochs * samples // global_batch)


def positions_of_step(step: int, global_batch: int) -> NDArray[np.int64]:
    """Positions of a step in the endless stream, by slot: int64 [global_batch]."""
    return np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)


def rank_micro_batches(micro_batches: int, rank: int, world_size: int) -> range:
    """Numbers of the micro batches of a step that a rank takes: in accumulation step p, p * world_size + rank."""
    return range(rank, micro_batches, world_size)


def accumulation_steps(micro_batches: int, world_size: int) -> int:
    """Micro batches of the busiest rank in a step; in the last one some ranks may have none."""
    return -(-micro_batches // world_size)


class SampleRange(NamedTuple):
    """Neighbouring samples of one shard: `rows` of them from `first_row` on."""

    shard: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Window:
    """Rows of a lane that are read and shuffled together.

    It has the rows `first_row_of_lane` .. `first_row_of_lane + samples - 1` of its slot's lane; its samples are
    numbered through the ranges. `slot` is the epoch's (g % B), `number` counts the lane's windows.
    """

    epoch: int
    slot: int
    number: int
    first_row_of_lane: int
    samples: int
    ranges: tuple[SampleRange, ...]


class Rows(NamedTuple):
    """Positions as rows of windows: epoch, slot, the window's number, first row in its lane and rows, and which row."""

    epochs: NDArray[np.int64]
    slots: NDArray[np.int64]
    windows: NDArray[np.int64]
    first_rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """The endless order of a data set's samples; `shard_samples` is int64 [shards], in the manifest's order."""

    seed: int
    shard_samples: NDArray[np.int64]
    global_batch: int
    window: int

    def __post_init__(self) -> None:
        sizes = np.array(self.shard_samples, np.int64)
        sizes.setflags(write=False)
        object.__setattr__(self, "shard_samples", sizes)
        if sizes.ndim != 1 or not sizes.any() or sizes.min() < 0:
            raise ValueError("shard_samples needs one count per shard, none negative and not all zero")
        for name in ("global_batch", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        # Lane and number share 64 bits in the draw of a window.
        if self.samples // self.global_batch // self.window >= 2**32 - 1:
            raise ValueError(f"window is {self.window}; {self.samples} samples need more, or a larger global_batch")

    @cached_property
    def samples(self) -> int:
        """Samples in an epoch, N."""
        return int(self.shard_samples.sum())

    @cached_property
    def shard_ends(self) -> NDArray[np.int64]:
        """Global number after each shard's last sample: int64 [shards]."""
        return np.cumsum(self.shard_samples)

    def place(self, position: Positions) -> tuple[Positions, Positions]:
        """Epoch of a position (or of each) in the endless stream, and the position in that epoch."""
        return position // self.samples, position % self.samples

    def epoch(self, number: int) -> Epoch:
        """An epoch, opened; the last few are kept."""
        return _opened(self, number)

    def rows_at(self, positions: NDArray[np.int64]) -> Rows:
        """Which row of which window each position of the endless stream is, across epochs."""
        epochs, places = self.place(positions)
        found = np.empty((5, len(positions)), np.int64)
        for number in set(epochs.tolist()):
            here = epochs == number
            found[:, here] = self.epoch(number).windows_at(places[here])
        return Rows(epochs, *found)

    def samples_at(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Global sample number at each position of the endless stream, across epochs."""
        epochs, places = self.place(np.asarray(positions, np.int64))
        samples = np.empty_like(places)
        for number in set(epochs.ravel().tolist()):
            here = epochs == number
            samples[here] = self.epoch(number).samples_at(places[here])
        return samples


class Epoch:
    """One epoch of an order. Positions g are within the epoch, 0 .. N - 1: a number, or an array of any shape."""

    def __init__(self, order: Order, number: int) -> None:
        self.order, self.number = order, number
        seed, lanes = order.seed, order.global_batch
        self._shards = rng.permutation(seed, Stream.SHARD_ORDER, 0, len(order.shard_samples), number)
        self._ends = np.cumsum(order.shard_samples[self._shards])
        self._rotation = int(rng.uint64s(seed, Stream.ROTATION, 0, 1, number)[0]) % order.samples
        self._lane_of_slot = rng.permutation(seed, Stream.LANES, 0, lanes, number)
        self._rows_of_slot = order.samples // lanes + (np.arange(lanes) < order.samples % lanes)
        rows_of_lane = np.empty(lanes, np.int64)
        rows_of_lane[self._lane_of_slot] = self._rows_of_slot
        self._start_of_slot = (np.cumsum(rows_of_lane) - rows_of_lane)[self._lane_of_slot]

    def samples_at(self, g: ArrayLike) -> NDArray[np.int64]:
        """Global sample number (in the manifest's order) at each position."""
        windows = slot, _, first_row, _, _ = self.windows_at(g)
        place, k = self._seek(self._start_of_slot[slot] + first_row + self._indices(windows))
        return self.order.shard_ends[self._shards[k]] - (self._ends[k] - place)

    def window_at(self, g: int) -> Window:
        """The window that a position belongs to, and what to read for it."""
        slot, number, first_row, rows, _ = (int(part) for part in self.windows_at(g))
        return self.window(slot, number, first_row, rows)

    def window(self, slot: int, number: int, first_row: int, rows: int) -> Window:
        """The window of these rows of a slot's lane, and what to read for it."""
        ranges = self._ranges(int(self._start_of_slot[slot]) + first_row, rows)
        return Window(self.number, slot, number, first_row, rows, ranges)

    def index_in_window(self, g: ArrayLike) -> NDArray[np.int64]:
        """Which of its window's samples (0 .. samples - 1, through the ranges) each position takes.

        Cheapest for all positions of a window at once: one permutation is drawn for each window.
        """
        return self._indices(self.windows_at(g))

    def _indices(self, windows_of_each: tuple[NDArray[np.int64], ...]) -> NDArray[np.int64]:
        slot, number, _, rows, row = (part.ravel() for part in windows_of_each)
        lane_and_number = self._lane_of_slot[slot] << 32 | number
        windows, one_of_each, which = np.unique(lane_and_number, return_index=True, return_inverse=True)
        indices = np.empty_like(row)
        at_once = max(1, _KEYS_AT_ONCE // self.order.window)
        for first in range(0, len(windows), at_once):
            part = slice(first, first + at_once)
            permutations = self._permutations(windows[part], rows[one_of_each[part]])
            here = which // at_once == first // at_once
            indices[here] = permutations[which[here] - first, row[here]]
        return indices.reshape(np.shape(windows_of_each[0]))

    def windows_at(self, g: ArrayLike) -> tuple[NDArray[np.int64], ...]:
        """Slot, window number, first row and rows of each position's window, and the position's row in there."""
        g = np.asarray(g, np.int64)
        if g.size and not 0 <= g.min() <= g.max() < self.order.samples:
            raise ValueError(f"positions are {g.min()} to {g.max()}; an epoch has 0 to {self.order.samples - 1}")
        row, slot = np.divmod(g, self.order.global_batch)
        stagger = slot % self.order.window
        number = (row + stagger) // self.order.window
        first_row = np.maximum(number * self.order.window - stagger, 0)
        end = np.minimum((number + 1) * self.order.window - stagger, self._rows_of_slot[slot])
        return slot, number, first_row, end - first_row, row - first_row

    def _permutations(self, windows: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """`rng.permutation` of each window's rows, side by side: [windows, most rows], cut off at its own rows."""
        keys = rng.uint64s(self.order.seed, Stream.WINDOW, windows, int(rows.max()), self.number)
        keys[np.arange(keys.shape[1]) >= rows[:, None]] = np.iinfo(np.uint64).max
        return np.argsort(keys, axis=1, kind="stable")

    def _seek(self, virtual: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Place among the epoch's shards, laid end to end, of places in the rotated array; and which shard that is."""
        place = (np.asarray(virtual) + self._rotation) % self.order.samples
        return place, np.searchsorted(self._ends, place, side="right")

    def _ranges(self, virtual: int, rows: int) -> tuple[SampleRange, ...]:
        ranges = []
        while rows:
            place, k = (int(part) for part in self._seek(virtual))
            shard = int(self._shards[k])
            left = int(self._ends[k]) - place
            ranges.append(SampleRange(shard, int(self.order.shard_samples[shard]) - left, min(rows, left)))
            virtual, rows = virtual + ranges[-1].rows, rows - ranges[-1].rows
        return tuple(ranges)


@lru_cache(maxsize=4)
def _opened(order: Order, number: int) -> Epoch:
    return Epoch(order, number)
