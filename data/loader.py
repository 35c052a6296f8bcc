"""Batches of a rank from the order, the reader and the decoder; all its state is the first step that is asked for.

    order (positions of this rank) -> windows, fetched ahead by threads -> samples -> draws -> DALI -> micro batches

A window is read once and kept until its last sample is used; one that has no good sample is replaced from its
neighbours, elsewhere in the epoch. Windows are fetched ahead within a byte budget (memory.py), one thread assembles
batches and runs DALI ahead of the training step.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from data import augment
from data.augment import Augmentation, AugmentParams
from data.decode import Decoder
from data.errors import DataError
from data.memory import DECODED_AT_ONCE, READ_AHEAD_BYTES
from data.order import Order, SampleRange, Window, accumulation_steps, positions_of_step, rank_micro_batches
from data.reader import Sample, read_stretches
from data.shards.manifest import BadSample, Manifest
from data.storage.prefetch import ordered_map

READ_AHEAD_SAMPLES = 4096
"""Samples that are looked ahead at most; or a window of each slot, where that is more."""
READING_THREADS = 4
NEIGHBOURS = 8
"""Windows that are tried in place of one that has no good sample."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """A micro batch: `images` uint8 [n, height, width, 3] and `labels` int64 [n, most] on the device, rest by sample.

    `most` is the manifest's labels_per_sample; what a sample has fewer is -1.
    `positions` are places in the endless stream (in evaluation: sample numbers), `keys` and `numbers` the keys and
    numbers of the samples that belong there, `replaced` bool [n] whether another stood in, `broken` those that could
    not be used (replaced; in evaluation: left out), `shapes` int64 [n, 2] heights and widths of the images that
    `recipe` was drawn for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: np.ndarray
    keys: list[str]
    numbers: np.ndarray
    replaced: np.ndarray
    broken: list[BadSample]
    shapes: np.ndarray
    recipe: AugmentParams


@dataclass(frozen=True)
class LoaderSpec:
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
    share: LoaderSpec,
    seed: int,
    first_step: int,
    last_step: int,
) -> Iterator[Iterator[list[Batch]]]:
    """This rank's micro batches of each step from `first_step` up to `last_step` (excluded), in the order of passes."""
    own = rank_micro_batches(order.global_batch // share.micro_batch, share.rank, share.world_size)
    mine = np.concatenate([np.arange(m * share.micro_batch, (m + 1) * share.micro_batch) for m in own])
    positions = (positions_of_step(step, order.global_batch)[mine].tolist() for step in range(first_step, last_step))
    flat = itertools.chain.from_iterable(positions)
    with batches_at(manifest, order, augmentation, share, seed, flat) as batches:
        yield _steps(batches, len(own))


@contextmanager
def batches_at(
    manifest: Manifest, order: Order, augmentation: Augmentation, share: LoaderSpec, seed: int, positions: Iterable[int]
) -> Iterator[Iterator[Batch]]:
    """Micro batches of the samples at rising positions, of each slot without a gap, as training has them there."""
    per_chunk = max(1, DECODED_AT_ONCE // share.micro_batch) * share.micro_batch
    most = manifest.labels_per_sample
    with _reading_threads() as pool:
        slots = accumulation_steps(order.global_batch // share.micro_batch, share.world_size) * share.micro_batch
        places = _placed_ahead(_Windows(manifest, order, pool), positions, per_chunk, slots)
        chunks = map(partial(_assembled, augmentation, seed), places)
        with _in_background(lambda: _decoded(chunks, augmentation, share, per_chunk, most)) as batches:
            yield batches


@contextmanager
def evaluation_batches(manifest: Manifest, crop_fraction: float | None, share: LoaderSpec) -> Iterator[Iterator[Batch]]:
    """This rank's fixed micro batches of the whole set, in manifest order, less the broken samples.

    Of each image the centred square of `crop_fraction` of the short side is taken, of None the whole.
    Micro batch m has the samples m * micro_batch and on; rank r has the numbers r, r + world_size, ...
    """
    micro_batches, most = -(-manifest.samples // share.micro_batch), manifest.labels_per_sample
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])

    def read(number: int) -> _Chunk:
        first = number * share.micro_batch
        numbers = np.arange(first, min(first + share.micro_batch, manifest.samples))
        found = read_stretches(manifest, _stretches_between(starts, first, int(numbers[-1]) + 1))
        good = [(number, sample) for number, sample in zip(numbers, found, strict=True) if isinstance(sample, Sample)]
        samples = [sample for _, sample in good]
        recipe = augment.eval_params(crop_fraction, *_shapes(samples))
        broken: list[BadSample | None] = [sample for sample in found if isinstance(sample, BadSample)]
        used = np.array([number for number, _ in good], np.int64)
        replaced = np.zeros(len(used), bool)
        return _Chunk(used, samples, [s.key for s in samples], used, replaced, recipe, broken)

    augmentation = Augmentation(
        crop="none", flip=False, layers=0, magnitude=0.0
    )  # of which only the layers matter here
    with _reading_threads() as pool:
        mine = rank_micro_batches(micro_batches, share.rank, share.world_size)
        chunks = ordered_map(pool, read, mine, 2 * READING_THREADS)
        with _in_background(lambda: _decoded(chunks, augmentation, share, share.micro_batch, most)) as batches:
            yield batches


# ------------------------------------------------------------------------------------ from positions to open windows


Found = list[Sample | BadSample]


@dataclass(frozen=True)
class _OpenWindow:
    indices: np.ndarray  # which of the window's samples, by row
    numbers: np.ndarray  # global sample numbers, by index
    read: Future[tuple[Found, Found]]


@dataclass(frozen=True)
class _Place:
    position: int
    epoch: int
    window: _OpenWindow
    row: int


class _Windows:
    """The windows of this rank's slots that are open at the front of the look-ahead.

    `samples_held` counts those of the windows that were begun and not let go of with their last place.
    """

    def __init__(self, manifest: Manifest, order: Order, pool: ThreadPoolExecutor) -> None:
        self.manifest, self.order, self._pool = manifest, order, pool
        self._starts = order.shard_ends - order.shard_samples
        self._open: dict[tuple[int, int], tuple[Window, _OpenWindow]] = {}
        self.samples_held = 0

    def place(self, position: int) -> _Place:
        """The place of a position; its window is begun where it is not open."""
        epoch, g = self.order.place(position)
        row, slot = divmod(g, self.order.global_batch)
        if (epoch, slot) not in self._open:
            window = self.order.epoch(epoch).window_at(g)
            self._open[epoch, slot] = window, self._begin(window)
        window, opened = self._open[epoch, slot]
        row_in_window = row - window.first_row_of_lane
        if row_in_window == window.samples - 1:
            del self._open[epoch, slot]
        return _Place(position, epoch, opened, row_in_window)

    def let_go(self, places: list[_Place]) -> None:
        """Takes note that these places were used, which are the last of some windows."""
        sizes = ((place.row + 1, len(place.window.indices)) for place in places)
        self.samples_held -= sum(size for used, size in sizes if used == size)

    def _begin(self, window: Window) -> _OpenWindow:
        rows = window.first_row_of_lane + np.arange(window.samples)
        indices = self.order.epoch(window.epoch).index_in_window(rows * self.order.global_batch + window.slot)
        numbers = np.concatenate([self._starts[s.shard] + s.first_row + np.arange(s.rows) for s in window.stretches])
        self.samples_held += window.samples
        return _OpenWindow(indices, numbers, self._pool.submit(_read_window, self.manifest, self.order, window))


def _read_window(manifest: Manifest, order: Order, window: Window) -> tuple[Found, Found]:
    """The samples of a window, and those among which replacements are looked for: its own, if one of them is good."""
    found = read_stretches(manifest, window.stretches)
    if any(isinstance(sample, Sample) for sample in found):
        return found, found
    for neighbour in _neighbours(order, window):
        instead = read_stretches(manifest, neighbour.stretches)
        if any(isinstance(sample, Sample) for sample in instead):
            return found, instead
    tried = [window, *_neighbours(order, window)]
    names = {manifest.shards[stretch.shard].name: None for each in tried for stretch in each.stretches}
    own = next(sample for sample in found if isinstance(sample, BadSample))
    raise DataError(
        f"{own.shard}: all {len(found)} samples of a window are broken, {own.key} for one: {own.reason};"
        f" so are those of the {NEIGHBOURS} windows tried in its place, in {', '.join(names)}"
    )


def _neighbours(order: Order, window: Window) -> Iterator[Window]:
    """Windows to take samples from instead: those of the next slots, whose bytes lie elsewhere, then of later rows."""
    epoch, batch = order.epoch(window.epoch), order.global_batch
    first = window.first_row_of_lane * batch + window.slot
    for number in range(1, NEIGHBOURS + 1):
        rows_on = number // batch * (order.window - 1)  # with the row that each round of the slots is
        yield epoch.window_at((first + number + rows_on * batch) % order.samples)


def _placed_ahead(windows: _Windows, positions: Iterable[int], per_chunk: int, slots: int) -> Iterator[list[_Place]]:
    """The places of the positions, which are of so many slots at most, in chunks; windows are read ahead of them
    within the byte budget.

    The budget is what a window of each slot takes, and READ_AHEAD_BYTES. Since the last windows of an epoch are
    shorter, it reaches further ahead towards the epoch's end, where all slots begin a window with the next row.
    """
    in_use = slots * windows.order.window
    most_held = in_use + READ_AHEAD_BYTES / windows.manifest.mean_sample_bytes
    most_ahead = 2 * per_chunk  # grows from chunk to chunk, so that the first is soon there
    ahead: deque[_Place] = deque()
    for position in positions:
        ahead.append(windows.place(position))
        while len(ahead) >= per_chunk and (len(ahead) > most_ahead or windows.samples_held > most_held):
            chunk = [ahead.popleft() for _ in range(per_chunk)]
            yield chunk
            windows.let_go(chunk)
            del chunk  # else these windows would stay until the next chunk
            most_ahead = min(most_ahead + per_chunk, max(in_use, READ_AHEAD_SAMPLES))
    while ahead:
        yield [ahead.popleft() for _ in range(min(per_chunk, len(ahead)))]


# ------------------------------------------------------------------------------------------ from samples to batches


@dataclass(frozen=True)
class _Chunk:
    """Samples that go through DALI in one run, with their draws."""

    positions: np.ndarray
    samples: list[Sample]
    keys: list[str]
    numbers: np.ndarray
    replaced: np.ndarray
    recipe: AugmentParams
    broken: list[BadSample | None]  # by place; in evaluation those that were left out


def _assembled(augmentation: Augmentation, seed: int, places: list[_Place]) -> _Chunk:
    found = [_good_sample(place) for place in places]
    samples = [sample for sample, _ in found]
    broken = [bad for _, bad in found]
    keys = [bad.key if bad else sample.key for sample, bad in found]
    epochs = np.array([place.epoch for place in places])
    numbers = np.array([place.window.numbers[place.window.indices[place.row]] for place in places])
    recipe = augment.sample_params(augmentation, seed, epochs, numbers, *_shapes(samples))
    replaced = np.array([bad is not None for bad in broken])
    positions = np.array([place.position for place in places])
    return _Chunk(positions, samples, keys, numbers, replaced, recipe, broken)


def _good_sample(place: _Place) -> tuple[Sample, BadSample | None]:
    """The sample of a place, or the next good one of its window (or of that window's stand-in) with the broken one."""
    found, instead = place.window.read.result()
    index = int(place.window.indices[place.row])
    own = found[index]
    if isinstance(own, Sample):
        return own, None
    following = (instead[(index + step) % len(instead)] for step in range(len(instead)))
    return next(other for other in following if isinstance(other, Sample)), own


def _decoded(
    chunks: Iterator[_Chunk], augmentation: Augmentation, share: LoaderSpec, at_once: int, most_labels: int
) -> Iterator[Batch]:
    """Micro batches of the chunks, through one DALI pipeline that runs ahead."""
    inside: deque[_Chunk] = deque()

    def source() -> tuple[list[np.ndarray], AugmentParams]:
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
        labels = _labels(chunk.samples, most_labels).to(share.device)
        shapes = np.stack(_shapes(chunk.samples), axis=1)
        for first in range(0, max(1, len(chunk.samples)), share.micro_batch):
            part = slice(first, first + share.micro_batch)
            broken = [bad for bad in chunk.broken[part] if bad is not None]
            recipe = AugmentParams(*(getattr(chunk.recipe, field.name)[part] for field in fields(AugmentParams)))
            places = chunk.positions[part], chunk.keys[part], chunk.numbers[part], chunk.replaced[part]
            yield Batch(images[part], labels[part], *places, broken, shapes[part], recipe)


def _steps(batches: Iterator[Batch], passes: int) -> Iterator[list[Batch]]:
    while step := list(itertools.islice(batches, passes)):
        yield step


def _labels(samples: list[Sample], most: int) -> torch.Tensor:
    rows = [[*sample.labels, *[-1] * (most - len(sample.labels))] for sample in samples]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, most)


def _shapes(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s.height for s in samples], np.int64), np.array([s.width for s in samples], np.int64)


def _stretches_between(starts: np.ndarray, first: int, last: int) -> list[SampleRange]:
    """The stretches of samples first .. last - 1 in manifest order; `starts` has N as its last element."""
    stretches = []
    while first < last:
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        rows = min(last, int(starts[shard + 1])) - first
        stretches.append(SampleRange(shard, first - int(starts[shard]), rows))
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


Batches = Callable[[int, int], AbstractContextManager[Iterator[list[Batch]]]]
"""This rank's micro batches of each step from one up to another, read ahead while the context is open."""


Steps = Generator[tuple[int, list[Batch] | None, float], None, None]
"""Of each step its number (from 0), this rank's micro batches, and the seconds that were waited for them."""


def steps_of_batches(batches: Batches, first: int, end: int, skipped: Collection[int]) -> Steps:
    """The steps from `first` up to `end`; one that is skipped has None for its micro batches. The last one never is."""
    step = first
    for until in [*sorted({step for step in skipped if first <= step < end - 1}), end]:
        if step < until:
            with batches(step, until) as reading:
                for number in range(step, until):
                    began = time.perf_counter()
                    yield number, next(reading), time.perf_counter() - began
        if until < end:
            yield until, None, 0.0
        step = until + 1
