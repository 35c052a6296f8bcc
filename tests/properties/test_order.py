"""Laws of the order: what promise 1 (exactly once) and promise 2 (the same run) say of which sample comes when."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from data import rng
from data.order import Epoch, Order, SampleRange, Window, positions_of_step, rank_micro_batches, steps
from data.rng import Stream, permutation

seeds = st.integers(0, rng.SEEDS - 1)
epochs = st.integers(0, 2**32 - 2)
# One shard, shards of one sample, empty ones, more shards than a lane has rows.
shards = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), min_size=1, max_size=80).filter(any),
)
orders = st.builds(Order, seeds, shards, st.integers(1, 40), st.integers(1, 24))
ONE_SAMPLE = Order(0, np.array([1]), 1, 1)
FEWER_THAN_THE_BATCH = Order(1, np.array([3, 1, 1]), 16, 4)
NOT_DIVISIBLE = Order(2, np.array([50, 1, 40, 9]), 7, 5)
WINDOW_WIDER_THAN_A_LANE = Order(3, np.array([30, 30]), 4, 1000)


def every(order: Order) -> np.ndarray:
    return np.arange(order.samples)


def windows_of(epoch: Epoch, slot: int) -> Iterator[Window]:
    """The windows of a slot, from row to row as a reader goes down the lane."""
    row, batch = 0, epoch.order.global_batch
    while row * batch + slot < epoch.order.samples:
        yield (window := epoch.window_at(row * batch + slot))
        row = window.first_row_of_lane + window.samples


def samples_of(window: Window, order: Order) -> list[int]:
    """Global numbers of a window's samples, in the order of its bytes."""
    starts = order.shard_ends - order.shard_samples
    return [int(starts[part.shard]) + part.first_row + i for part in window.ranges for i in range(part.rows)]


def epoch_by_hand(order: Order, number: int) -> list[int]:
    """DESIGN of the order, built as a list: permuted shards, rotated, cut into lanes, shuffled within windows."""
    seed, batch, size = order.seed, order.global_batch, order.samples
    starts = order.shard_ends - order.shard_samples
    array: list[int] = []
    for shard in permutation(seed, Stream.SHARD_ORDER, 0, len(starts), number):
        array += range(starts[shard], order.shard_ends[shard])
    rotation = int(rng.uint64s(seed, Stream.ROTATION, 0, 1, number)[0]) % size
    array = array[rotation:] + array[:rotation]
    lane_of_slot = permutation(seed, Stream.LANES, 0, batch, number).tolist()
    lanes = {}
    for lane in range(batch):
        slot = lane_of_slot.index(lane)
        rows = size // batch + (slot < size % batch)
        lanes[slot], array = array[:rows], array[rows:]
    for slot, rows in lanes.items():
        borders = [0, *range(order.window - slot % order.window, len(rows), order.window), len(rows)]
        shuffled = []
        for window, (first, end) in enumerate(pairwise(borders)):
            index = lane_of_slot[slot] * 2**32 + window
            shuffled += [rows[first + i] for i in permutation(seed, Stream.WINDOW, index, end - first, number)]
        lanes[slot] = shuffled
    return [lanes[g % batch][g // batch] for g in range(size)]


def locate(order: Order, samples: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Shard of each global sample number, and its row in there."""
    shard = np.searchsorted(order.shard_ends, samples, side="right")
    return shard, np.asarray(samples) - (order.shard_ends - order.shard_samples)[shard]


def inverse(order: Order, number: int) -> Callable[[int], int]:
    """The way back, by plain integers: the position in the epoch at which a global sample number is used."""
    seed, batch, width = order.seed, order.global_batch, order.window
    rank_of_shard = np.argsort(permutation(seed, Stream.SHARD_ORDER, 0, len(order.shard_samples), number))
    in_epoch = np.empty_like(order.shard_samples)
    in_epoch[rank_of_shard] = order.shard_samples
    starts = np.cumsum(in_epoch) - in_epoch
    rotation = int(rng.uint64s(seed, Stream.ROTATION, 0, 1, number)[0]) % order.samples
    lane_of_slot = permutation(seed, Stream.LANES, 0, batch, number)
    slot_of_lane = np.argsort(lane_of_slot)
    lane_ends = np.cumsum(order.samples // batch + (slot_of_lane < order.samples % batch))

    def position(sample: int) -> int:
        shard, row = (int(part) for part in locate(order, sample))
        place = (int(starts[rank_of_shard[shard]]) + row - rotation) % order.samples
        lane = int(np.searchsorted(lane_ends, place, side="right"))
        slot = int(slot_of_lane[lane])
        rows = order.samples // batch + (slot < order.samples % batch)
        row = place - (int(lane_ends[lane]) - rows)
        window, stagger = (row + slot % width) // width, slot % width
        first, end = max(0, window * width - stagger), min(rows, (window + 1) * width - stagger)
        shuffled = permutation(seed, Stream.WINDOW, lane * 2**32 + window, end - first, number).tolist()
        return (first + shuffled.index(row - first)) * batch + slot

    return position


@given(order=orders, number=epochs)
@example(order=ONE_SAMPLE, number=0)
@example(order=FEWER_THAN_THE_BATCH, number=0)
@example(order=NOT_DIVISIBLE, number=0)
@example(order=WINDOW_WIDER_THAN_A_LANE, number=0)
def test_every_sample_exactly_once_in_an_epoch(order, number):
    samples = order.epoch(number).samples_at(every(order))
    assert samples.dtype == np.int64 and np.array_equal(np.sort(samples), every(order))


@given(order=orders, number=epochs)
@example(order=FEWER_THAN_THE_BATCH, number=0)
@example(order=NOT_DIVISIBLE, number=0)
@example(order=WINDOW_WIDER_THAN_A_LANE, number=0)
def test_arithmetic_equals_the_order_built_as_a_list(order, number):
    assert order.epoch(number).samples_at(every(order)).tolist() == epoch_by_hand(order, number)


@given(order=orders, positions=st.lists(st.integers(0, 10**9), max_size=12))
def test_random_access_equals_sequential(order, positions):
    again = Order(order.seed, order.shard_samples, order.global_batch, order.window)
    first = np.array([position // order.samples for position in positions], np.int64) * order.samples
    sequential = [again.samples_at(np.arange(start, start + order.samples)) for start in first]
    expected = [int(run[p % order.samples]) for run, p in zip(sequential, positions, strict=True)]
    assert order.samples_at(np.array(positions, np.int64)).tolist() == expected
    assert [int(order.samples_at(position)) for position in reversed(positions)] == expected[::-1]


@given(order=orders, step=st.integers(0, 10**6), micro_batch=st.integers(1, 5), micro_batches=st.integers(1, 12))
def test_a_step_is_the_same_batch_for_any_number_of_ranks(order, step, micro_batch, micro_batches):
    order = Order(order.seed, order.shard_samples, micro_batch * micro_batches, order.window)
    batch = order.samples_at(positions_of_step(step, order.global_batch)).tolist()
    for world_size in range(1, micro_batches + 3):
        by_micro_batch = {}
        for rank in range(world_size):
            for turn, number in enumerate(rank_micro_batches(micro_batches, rank, world_size)):
                assert number == turn * world_size + rank and number not in by_micro_batch
                slots = np.arange(number * micro_batch, (number + 1) * micro_batch)
                by_micro_batch[number] = order.samples_at(step * order.global_batch + slots).tolist()
        assert list(chain(*(by_micro_batch[number] for number in range(micro_batches)))) == batch


@given(order=orders, number=epochs)
@example(order=NOT_DIVISIBLE, number=0)
def test_a_positions_sample_lies_in_its_windows_ranges_at_its_index(order, number):
    epoch = order.epoch(number)
    indices, samples = epoch.index_in_window(every(order)), epoch.samples_at(every(order))
    for g in range(order.samples):
        assert samples_of(epoch.window_at(g), order)[indices[g]] == samples[g]
    shard, row = locate(order, samples)
    assert np.all((row >= 0) & (row < order.shard_samples[shard]))
    assert np.array_equal((order.shard_ends - order.shard_samples)[shard] + row, samples)


@given(order=orders, number=epochs)
@example(order=FEWER_THAN_THE_BATCH, number=0)
@example(order=WINDOW_WIDER_THAN_A_LANE, number=0)
def test_the_windows_of_a_lane_tile_it_and_each_is_read_once(order, number):
    epoch, width, read = order.epoch(number), order.window, []
    for slot in range(order.global_batch):
        row = 0
        rows = order.samples // order.global_batch + (slot < order.samples % order.global_batch)
        for count, window in enumerate(windows_of(epoch, slot)):
            assert (window.epoch, window.slot, window.number) == (number, slot, count)
            assert window.first_row_of_lane == row
            assert window.samples == min(rows - row, width - (slot % width if row == 0 else 0))
            positions = np.arange(row, row + window.samples) * order.global_batch + slot
            assert all(epoch.window_at(int(g)) == window for g in positions)
            assert sorted(epoch.index_in_window(positions)) == list(range(window.samples))
            read += samples_of(window, order)
            row += window.samples
        assert row == rows, "the epoch's first N mod B slots have one row more"
    assert sorted(read) == list(range(order.samples))


@given(order=orders, number=epochs)
def test_a_window_is_one_range_of_a_shard_unless_it_runs_into_the_next(order, number):
    epoch = order.epoch(number)
    for slot in range(min(order.global_batch, order.samples)):
        for window in windows_of(epoch, slot):
            parts = window.ranges
            assert sum(part.rows for part in parts) == window.samples and all(part.rows > 0 for part in parts)
            assert all(part.first_row == 0 for part in parts[1:])
            assert all(part.first_row + part.rows == order.shard_samples[part.shard] for part in parts[:-1])


@given(order=orders, number=epochs, first=st.integers(0, 39), count=st.integers(1, 40))
def test_after_its_first_row_an_epoch_opens_equally_many_windows_at_every_row(order, number, first, count):
    """Of any n neighbouring slots, floor or ceil of n / W open one at each full row: a rank reads evenly, too."""
    epoch, batch = order.epoch(number), order.global_batch
    slots = range(min(first, batch - 1), min(first + count, batch))
    for row in range(1, order.samples // batch):
        opened = sum(epoch.window_at(row * batch + slot).first_row_of_lane == row for slot in slots)
        assert opened in (len(slots) // order.window, -(-len(slots) // order.window))


@given(order=orders, number=st.integers(0, 2**31))
@example(order=ONE_SAMPLE, number=0)
def test_epochs_follow_each_other_without_a_gap(order, number):
    size, start = order.samples, number * order.samples
    assert order.place(start) == (number, 0)
    assert order.place(start + size - 1) == (number, size - 1)
    assert order.place(start + size) == (number + 1, 0)
    assert order.place(start + size + 1) == (number + 1 + (size == 1), 1 % size)
    positions = start + np.array([0, size - 1, size, size + 1])
    placed = [order.place(int(position)) for position in positions]
    assert list(zip(*(part.tolist() for part in order.place(positions)), strict=True)) == placed
    assert order.samples_at(positions).tolist() == [int(order.epoch(e).samples_at(g)) for e, g in placed]


@given(order=orders, passes=st.integers(1, 4))
def test_the_steps_of_some_epochs_use_every_sample_equally_often(order, passes):
    count = steps(passes, order.samples, order.global_batch)
    positions = np.concatenate([positions_of_step(step, order.global_batch) for step in range(count)])
    assert np.array_equal(positions, np.arange(count * order.global_batch))
    assert 0 <= len(positions) - passes * order.samples < order.global_batch
    used = np.bincount(order.samples_at(positions[: passes * order.samples]), minlength=order.samples)
    assert np.all(used == passes)


@given(a=st.tuples(seeds, epochs), b=st.tuples(seeds, epochs), batch=st.integers(1, 40), window=st.integers(8, 24))
@example(a=(0, 0), b=(0, 1), batch=8, window=8)
@example(a=(0, 0), b=(1, 0), batch=8, window=8)
def test_other_epochs_and_other_seeds_have_other_orders(a, b, batch, window):
    runs = [
        Order(seed, np.array([40] * 8), batch, window).epoch(number).samples_at(np.arange(320))
        for seed, number in (a, b)
    ]
    assert np.array_equal(runs[0], runs[1]) == (a == b)


def test_every_sample_is_equally_likely_at_a_position():
    order = Order(0, np.array([7, 1, 4, 8]), 3, 4)
    samples = np.array([order.epoch(number).samples_at([0, 10, 19]) for number in range(2000)])
    for at_a_position in samples.T:
        counts = np.bincount(at_a_position, minlength=20)
        statistic = ((counts - 100) ** 2 / 100).sum()
        assert statistic < 19 + 5 * np.sqrt(2 * 19)


@pytest.mark.parametrize("g", [-1, 100])
def test_a_position_outside_the_epoch_is_refused(g):
    for ask in (NOT_DIVISIBLE.epoch(0).samples_at, NOT_DIVISIBLE.epoch(0).window_at):
        with pytest.raises(ValueError, match=f"{g}; an epoch has 0 to 99"):
            ask(g)


@pytest.mark.parametrize(
    ("sizes", "batch", "window", "message"),
    [
        ([], 1, 1, "not all zero"),
        ([0, 0], 1, 1, "not all zero"),
        ([3, -1], 1, 1, "none negative"),
        ([3], 0, 1, "global_batch is 0; it must be at least 1"),
        ([3], 1, 0, "window is 0; it must be at least 1"),
        ([2**40], 8, 16, "window is 16; 1099511627776 samples need more"),
    ],
)
def test_an_impossible_order_is_refused(sizes, batch, window, message):
    with pytest.raises(ValueError, match=message):
        Order(0, sizes, batch, window)


def test_golden_order_that_existing_runs_depend_on():
    """Changing any of these changes which samples every existing run sees after a resume: don't."""
    order = Order(7, np.array([5, 1, 6, 4]), 3, 4)
    assert order.epoch(0).samples_at(np.arange(16)).tolist() == [9, 13, 2, 8, 12, 1, 7, 14, 5, 10, 6, 3, 0, 15, 4, 11]
    assert order.samples_at(np.arange(14, 20)).tolist() == [4, 11, 1, 6, 4, 11]
    assert order.epoch(1).window_at(5) == Window(1, 2, 0, 0, 2, (SampleRange(0, 4, 1), SampleRange(3, 0, 1)))
    large = Order(2**48 - 1, np.full(3000, 1000), 4096, 32)
    assert large.samples_at([0, 1, 10**6, 3 * 10**6, 10**12]).tolist() == [314030, 2911080, 2176870, 2119504, 501482]


SHARDS = 300_000


@pytest.fixture(scope="module")
def shards_of_three_billion() -> np.ndarray:
    more = (rng.uint32s(0, Stream.PACK, 0, SHARDS // 2) % 1_001).astype(np.int64)
    return np.concatenate((10_000 + more, 10_000 - more))


@pytest.mark.parametrize("global_batch", [4_096, 65_536])
def test_laws_hold_at_three_billion_samples(shards_of_three_billion, global_batch):
    order = Order(11, shards_of_three_billion, global_batch, 32)
    full_steps = order.samples // global_batch
    assert order.samples == 3_000_000_000
    for number in (0, 1_000):
        epoch, position = order.epoch(number), inverse(order, number)
        for step in (0, full_steps - 1, *(rng.uint32s(number, Stream.PACK, 1, 3) % full_steps).tolist()):
            g = positions_of_step(step, global_batch)
            samples, indices = epoch.samples_at(g), epoch.index_in_window(g)
            assert samples.min() >= 0 and samples.max() < order.samples
            assert len(np.unique(samples)) == global_batch
            for slot in range(0, global_batch, global_batch // 64):
                assert position(int(samples[slot])) == g[slot]
                assert samples_of(epoch.window_at(int(g[slot])), order)[indices[slot]] == samples[slot]
        last = order.samples - 1
        assert position(int(epoch.samples_at(last))) == last


def test_a_batch_of_65536_is_the_same_for_4096_ranks_and_for_3000(shards_of_three_billion):
    order = Order(11, shards_of_three_billion, 65_536, 32)
    batch = order.samples_at(positions_of_step(40_000, 65_536))
    for world_size in (4_096, 3_000):
        slots = [
            number * 16 + i
            for rank in range(world_size)
            for number in rank_micro_batches(4_096, rank, world_size)
            for i in range(16)
        ]
        assert sorted(slots) == list(range(65_536))
        rank = world_size - 1
        mine = np.array([number * 16 + i for number in rank_micro_batches(4_096, rank, world_size) for i in range(16)])
        assert np.array_equal(order.samples_at(40_000 * 65_536 + mine), batch[mine])


def test_memory_does_not_grow_with_the_samples():
    peaks = []
    for samples_per_shard in (1_000, 1_000, 10**9):
        tracemalloc.start()
        order = Order(0, np.full(1_000, samples_per_shard), 64, 32)
        order.samples_at(order.samples - 1 - np.arange(64))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]


def test_an_epoch_of_300000_shards_opens_within_50_megabytes(shards_of_three_billion):
    tracemalloc.start()
    order = Order(11, shards_of_three_billion, 65_536, 32)
    order.samples_at(order.samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
