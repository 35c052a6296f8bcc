"""Batches of a rank from the order, the reader and the decoder; all its state is the first step that is asked for.

    order (positions of this rank) -> windows, fetched ahead by threads -> samples -> draws -> DALI -> micro batches

A window is read once and kept until its last sample is used. Windows are fetched ahead within a byte budget, one
thread assembles batches and runs DALI ahead of the training step.

Next: ../pipeline/config.py.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from data import augment
from data.augment import Augmentation, Recipe
from data.decode import Decoder
from data.errors import DataError
from data.order import Order, Stretch, Window, deal, positions_of_step
from data.reader import Sample, read_stretches
from data.shards import Broken, Manifest

READ_AHEAD_BYTES = 256 << 20
READ_AHEAD_CHUNKS = 16
READING_THREADS = 4
DECODED_AT_ONCE = 256
"""Samples in one run of DALI, whose cost per run is worth spreading over several micro batches."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """A micro batch: `images` uint8 [n, height, width, 3] and `labels` int64 [n] on the device, the rest by sample.

    `positions` are places in the endless stream (in evaluation: sample numbers), `keys` those of the places, `broken`
    the samples that were replaced (in evaluation: left out).
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: np.ndarray
    keys: list[str]
    broken: list[Broken]


@dataclass(frozen=True)
class Share:
    """Which part of the global batches one rank decodes, and how."""

    rank: int
    world_size: int
    micro_batch: int
    resolution: int
    device: torch.device
    threads: int


@contextmanager
def training_batches(
    manifest: Manifest,
    order: Order,
    augmentation: Augmentation,
    share: Share,
    seed: int,
    first_step: int,
    last_step: int,
) -> Iterator[Iterator[list[Batch]]]:
    """This rank's micro batches of each step from `first_step` up to `last_step` (excluded), in the order of passes."""
    micro_batches = order.global_batch // share.micro_batch
    mine = np.concatenate(
        [
            np.arange(m * share.micro_batch, (m + 1) * share.micro_batch)
            for m in deal(micro_batches, share.rank, share.world_size)
        ]
    )
    per_chunk = max(1, DECODED_AT_ONCE // share.micro_batch) * share.micro_batch
    positions = (positions_of_step(step, order.global_batch)[mine] for step in range(first_step, last_step))
    with _reading_threads() as pool:
        places = _placed_ahead(_Windows(manifest, order, pool), _rechunk(positions, per_chunk))
        chunks = _assembled(places, augmentation, seed)
        with _in_background(lambda: _decoded(chunks, augmentation, share, per_chunk)) as batches:
            yield _steps(batches, len(mine) // share.micro_batch)


@contextmanager
def evaluation_batches(manifest: Manifest, crop_fraction: float, share: Share) -> Iterator[Iterator[Batch]]:
    """This rank's fixed micro batches of the whole set, in manifest order, less the broken samples.

    Micro batch m has the samples m * micro_batch and on; rank r has the numbers r, r + world_size, ...
    """
    micro_batches = -(-manifest.samples // share.micro_batch)
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])

    def read(number: int) -> _Chunk:
        first = number * share.micro_batch
        numbers = np.arange(first, min(first + share.micro_batch, manifest.samples))
        found = read_stretches(manifest, _stretches_between(starts, first, int(numbers[-1]) + 1))
        good = [(number, sample) for number, sample in zip(numbers, found, strict=True) if isinstance(sample, Sample)]
        samples = [sample for _, sample in good]
        recipe = augment.fixed(crop_fraction, *_shapes(samples))
        broken: list[Broken | None] = [sample for sample in found if isinstance(sample, Broken)]
        return _Chunk(
            np.array([number for number, _ in good], np.int64), samples, [s.key for s in samples], recipe, broken
        )

    augmentation = Augmentation(crop="center", center_fraction=crop_fraction, flip=False, layers=0, magnitude=0.0)
    with _reading_threads() as pool:
        chunks = _mapped_ahead(pool, read, deal(micro_batches, share.rank, share.world_size))
        with _in_background(lambda: _decoded(chunks, augmentation, share, share.micro_batch)) as batches:
            yield batches


# ------------------------------------------------------------------------------------ from positions to open windows


@dataclass(frozen=True)
class _OpenWindow:
    indices: np.ndarray  # which of the window's samples, by row
    numbers: np.ndarray  # global sample numbers, by index
    samples: Future[list[Sample | Broken]]


@dataclass(frozen=True)
class _Place:
    position: int
    epoch: int
    window: _OpenWindow
    row: int


class _Windows:
    """The windows of this rank's slots that are open at the front of the look-ahead."""

    def __init__(self, manifest: Manifest, order: Order, pool: ThreadPoolExecutor) -> None:
        self._manifest, self._order, self._pool = manifest, order, pool
        self._starts = order.shard_ends - order.shard_samples
        self._open: dict[tuple[int, int], tuple[Window, _OpenWindow]] = {}

    def place(self, position: int) -> tuple[_Place, int]:
        """The place of a position, and the bytes whose reading this started."""
        epoch, g = self._order.place(position)
        row, slot = divmod(g, self._order.global_batch)
        began = 0
        if (epoch, slot) not in self._open:
            window = self._order.epoch(epoch).window_at(g)
            self._open[epoch, slot] = window, self._begin(window)
            began = int(window.samples * self._manifest.mean_sample_bytes)
        window, opened = self._open[epoch, slot]
        row_in_window = row - window.first_row_of_lane
        if row_in_window == window.samples - 1:
            del self._open[epoch, slot]
        return _Place(position, epoch, opened, row_in_window), began

    def _begin(self, window: Window) -> _OpenWindow:
        rows = window.first_row_of_lane + np.arange(window.samples)
        indices = self._order.epoch(window.epoch).index_in_window(rows * self._order.global_batch + window.slot)
        numbers = np.concatenate([self._starts[s.shard] + s.first_row + np.arange(s.rows) for s in window.stretches])
        return _OpenWindow(indices, numbers, self._pool.submit(read_stretches, self._manifest, window.stretches))


def _placed_ahead(windows: _Windows, chunks: Iterator[np.ndarray]) -> Iterator[list[_Place]]:
    """The places of each chunk of positions; windows are read ahead of it within the byte budget."""
    ahead: deque[tuple[list[_Place], int]] = deque()
    bytes_ahead = 0
    for positions in chunks:
        placed = [windows.place(int(position)) for position in positions]
        ahead.append(([place for place, _ in placed], sum(began for _, began in placed)))
        bytes_ahead += ahead[-1][1]
        while len(ahead) > READ_AHEAD_CHUNKS or (len(ahead) > 1 and bytes_ahead > READ_AHEAD_BYTES):
            places, began = ahead.popleft()
            bytes_ahead -= began
            yield places
    yield from (places for places, _ in ahead)


def _rechunk(steps: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    rest = np.empty(0, np.int64)
    for positions in steps:
        rest = np.concatenate([rest, positions])
        while len(rest) >= size:
            yield rest[:size]
            rest = rest[size:]
    if len(rest):
        yield rest


# ------------------------------------------------------------------------------------------ from samples to batches


@dataclass(frozen=True)
class _Chunk:
    """Samples that go through DALI in one run, with their draws."""

    positions: np.ndarray
    samples: list[Sample]
    keys: list[str]
    recipe: Recipe
    broken: list[Broken | None]  # by place; in evaluation those that were left out


def _assembled(places: Iterator[list[_Place]], augmentation: Augmentation, seed: int) -> Iterator[_Chunk]:
    for chunk in places:
        found = [_good_sample(place) for place in chunk]
        samples = [sample for sample, _ in found]
        broken = [bad for _, bad in found]
        keys = [bad.key if bad else sample.key for sample, bad in found]
        epochs = np.array([place.epoch for place in chunk])
        numbers = np.array([place.window.numbers[place.window.indices[place.row]] for place in chunk])
        recipe = augment.draw(augmentation, seed, epochs, numbers, *_shapes(samples))
        positions = np.array([place.position for place in chunk])
        yield _Chunk(positions, samples, keys, recipe, broken)


def _good_sample(place: _Place) -> tuple[Sample, Broken | None]:
    """The sample of a place, or the next good one of its window together with the broken one."""
    window = place.window.samples.result()
    index = int(place.window.indices[place.row])
    own = window[index]
    if isinstance(own, Sample):
        return own, None
    for step in range(1, len(window)):
        other = window[(index + step) % len(window)]
        if isinstance(other, Sample):
            return other, own
    raise DataError(f"{own.shard}: all {len(window)} samples of a window are broken, {own.key} for one: {own.reason}")


def _decoded(chunks: Iterator[_Chunk], augmentation: Augmentation, share: Share, at_once: int) -> Iterator[Batch]:
    """Micro batches of the chunks, through one DALI pipeline that runs ahead."""
    inside: deque[_Chunk] = deque()

    def source() -> tuple[list[np.ndarray], Recipe]:
        inside.append(next(chunks))
        return [np.frombuffer(sample.image, np.uint8) for sample in inside[-1].samples], inside[-1].recipe

    decoder = Decoder(
        resolution=share.resolution,
        batch_size=at_once,
        layers=augmentation.layers,
        magnitude=augmentation.magnitude,
        device="gpu" if share.device.type == "cuda" else "cpu",
        device_id=share.device.index,
        threads=share.threads,
        source=source,
    )
    for images in decoder:
        chunk = inside.popleft()
        labels = torch.tensor([sample.label for sample in chunk.samples], dtype=torch.int64).to(share.device)
        for first in range(0, max(1, len(chunk.samples)), share.micro_batch):
            part = slice(first, first + share.micro_batch)
            broken = [bad for bad in chunk.broken[part] if bad is not None]
            yield Batch(images[part], labels[part], chunk.positions[part], chunk.keys[part], broken)


def _steps(batches: Iterator[Batch], passes: int) -> Iterator[list[Batch]]:
    while step := list(itertools.islice(batches, passes)):
        yield step


def _shapes(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s.height for s in samples], np.int64), np.array([s.width for s in samples], np.int64)


def _stretches_between(starts: np.ndarray, first: int, last: int) -> list[Stretch]:
    """The stretches of samples first .. last - 1 in manifest order; `starts` has N as its last element."""
    stretches = []
    while first < last:
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        rows = min(last, int(starts[shard + 1])) - first
        stretches.append(Stretch(shard, first - int(starts[shard]), rows))
        first += rows
    return stretches


# ------------------------------------------------------------------------------------------------------- threads


@contextmanager
def _reading_threads() -> Iterator[ThreadPoolExecutor]:
    """A pool for reads; at the end those that have not begun are dropped."""
    pool = ThreadPoolExecutor(READING_THREADS, "read")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _mapped_ahead(pool: ThreadPoolExecutor, read: Callable[[int], Item], numbers: Iterable[int]) -> Iterator[Item]:
    """`map` in order, with a few calls under way ahead of the consumer."""
    under_way: deque[Future[Item]] = deque()
    for number in numbers:
        under_way.append(pool.submit(read, number))
        if len(under_way) > 2 * READING_THREADS:
            yield under_way.popleft().result()
    yield from (future.result() for future in under_way)


@contextmanager
def _in_background(produce: Callable[[], Iterator[Item]]) -> Iterator[Iterator[Item]]:
    """The items of an iterator that a thread runs two ahead; its error is raised at the item it prevented."""
    ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(2)
    ended = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not ended.is_set():
            try:
                return ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in produce():
                put(item, None)
                if ended.is_set():
                    return
            put(None, None)
        except BaseException as error:  # handed to the consumer
            put(None, error)

    def items() -> Iterator[Item]:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    thread = threading.Thread(target=run, name="batches")
    thread.start()
    try:
        yield items()
    finally:
        ended.set()
        thread.join()
