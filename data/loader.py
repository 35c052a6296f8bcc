"""Batches of a rank from the order, the reader and the decoder; all its state is the first step that is asked for.

    order (positions of this rank) -> windows, read ahead by threads -> samples -> draws -> DALI -> micro batches

Windows are read ahead within a byte budget (windows.py); one thread assembles batches and runs DALI ahead of the
training step.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem

from data import augment
from data.augment import Augmentation, AugmentParams
from data.decode import Decoder, Source
from data.isolation import Inputs, decode_chunks
from data.memory import DECODED_AT_ONCE, READ_AHEAD_BYTES
from data.order import Order, SampleRange, accumulation_steps, positions_of_step, rank_micro_batches
from data.pinned import to_device
from data.reader import Reader, Sample
from data.shards.manifest import BadSample, Manifest
from data.storage.prefetch import ordered_map
from data.storage.remote import open_fs
from data.windows import Failed, OpenWindows, Places, places_ahead, undecodable

READS_OF_DISK, READS_FROM_AFAR = 4, 96
"""Reads under way at once at most, each in a thread. A disk gains nothing from more, nor from more than there are
processors: they would only take the interpreter from one another. From a server with 50 ms latency, where a window
takes two requests, so many are 30,000 images a second in windows of 32. How many are under way follows from the
look-ahead, and so from the training's pace and READ_AHEAD_BYTES."""
PATIENCE_SECONDS = 1.0
"""How long a batch is waited for before the consumer is asked whether to wait on."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """A micro batch: `images` uint8 [n, height, width, 3] and `labels` int64 [n, most] on the device, rest by sample.

    `most` is the manifest's labels_per_sample; what a sample has fewer is -1.
    `positions` are places in the endless stream (in evaluation: sample numbers), `keys` and `numbers` the keys and
    numbers of the samples that belong there, `replaced` bool [n] whether another stood in, `broken` those that could
    not be used (replaced; in evaluation: left out), `shapes` int64 [n, 2] heights and widths of the images that
    `params` were drawn for.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: np.ndarray
    keys: list[str]
    numbers: np.ndarray
    replaced: np.ndarray
    broken: list[BadSample]
    shapes: np.ndarray
    params: AugmentParams


@dataclass(frozen=True)
class LoaderSpec:
    """Which part of the global batches one rank decodes, and how."""

    rank: int
    world_size: int
    micro_batch: int
    resolution: int
    device: torch.device
    threads: int
    gives_up: Callable[[], bool] = lambda: False
    """Asked while a batch does not come: whether nobody waits for it any more. The batches end there."""


@contextmanager
def training_batches(
    manifest: Manifest,
    order: Order,
    augmentation: Augmentation,
    spec: LoaderSpec,
    seed: int,
    first_step: int,
    last_step: int,
) -> Iterator[Iterator[list[Batch]]]:
    """This rank's micro batches of each step from `first_step` up to `last_step` (excluded), in order."""
    numbers = rank_micro_batches(order.global_batch // spec.micro_batch, spec.rank, spec.world_size)
    slots = np.concatenate([np.arange(m * spec.micro_batch, (m + 1) * spec.micro_batch) for m in numbers])
    positions = (positions_of_step(step, order.global_batch)[slots].tolist() for step in range(first_step, last_step))
    flat = itertools.chain.from_iterable(positions)
    with batches_at(manifest, order, augmentation, spec, seed, flat) as batches:
        yield _steps(batches, len(numbers))


@contextmanager
def batches_at(
    manifest: Manifest, order: Order, augmentation: Augmentation, spec: LoaderSpec, seed: int, positions: Iterable[int]
) -> Iterator[Iterator[Batch]]:
    """Micro batches of the samples at rising positions, of each slot without a gap, as training has them there."""
    per_chunk = max(1, DECODED_AT_ONCE // spec.micro_batch) * spec.micro_batch
    most = manifest.labels_per_sample
    with _reading_threads(_reads_at_once(manifest, spec.threads), spec.gives_up) as pool:
        slots = accumulation_steps(order.global_batch // spec.micro_batch, spec.world_size) * spec.micro_batch
        windows = OpenWindows(manifest, order, pool)
        chunks = map(partial(_assemble, augmentation, seed), places_ahead(windows, positions, per_chunk, slots))
        substitute = partial(_substitute, windows, augmentation, seed)
        decode = partial(_decode, chunks, augmentation, spec, per_chunk, most, substitute)
        with _in_background(decode, spec.gives_up) as decoded:
            yield itertools.chain.from_iterable(decoded)


@contextmanager
def evaluation_batches(manifest: Manifest, crop_fraction: float | None, spec: LoaderSpec) -> Iterator[Iterator[Batch]]:
    """This rank's fixed micro batches of the whole set, in manifest order, less the broken samples.

    Of each image the centred square of `crop_fraction` of the short side is taken, of None the whole.
    Micro batch m has the samples m * micro_batch and on; rank r has the numbers r, r + world_size, ...
    """
    micro_batches, most = -(-manifest.samples // spec.micro_batch), manifest.labels_per_sample
    reader = Reader(manifest)
    starts = np.cumsum([0, *manifest.shards.samples.tolist()])

    def read(number: int) -> _Chunk:
        first = number * spec.micro_batch
        numbers = np.arange(first, min(first + spec.micro_batch, manifest.samples))
        found = reader.read(_ranges_between(starts, first, int(numbers[-1]) + 1))
        return _evaluation_chunk(crop_fraction, numbers, found)

    reads = _reads_at_once(manifest, spec.threads)
    within_budget = int(READ_AHEAD_BYTES / (spec.micro_batch * manifest.mean_sample_bytes))
    with _reading_threads(reads, spec.gives_up) as pool:
        numbers = rank_micro_batches(micro_batches, spec.rank, spec.world_size)
        chunks = ordered_map(pool, read, numbers, max(2, min(2 * reads, within_budget)))
        leave_out = partial(_leave_out, crop_fraction)
        decode = partial(_decode, chunks, augment.NONE, spec, spec.micro_batch, most, leave_out)
        with _in_background(decode, spec.gives_up) as decoded:
            yield itertools.chain.from_iterable(decoded)


@dataclass(frozen=True)
class _Chunk:
    """Samples that go through DALI in one run, with their draws; fields as in Batch."""

    positions: np.ndarray
    epochs: np.ndarray
    numbers: np.ndarray
    keys: list[str]
    replaced: np.ndarray
    samples: list[Sample]
    params: AugmentParams
    broken: list[BadSample | None]  # by place; in evaluation those that were left out
    failed: dict[int, Failed]  # by place the samples that DALI failed on there


def _assemble(augmentation: Augmentation, seed: int, places: Places) -> _Chunk:
    samples, broken = places.usable_samples()
    at = places.positions, places.epochs, places.numbers()
    return _training_chunk(augmentation, seed, *at, samples, broken, {})


def _training_chunk(
    augmentation: Augmentation,
    seed: int,
    positions: np.ndarray,
    epochs: np.ndarray,
    numbers: np.ndarray,
    samples: list[Sample],
    broken: list[BadSample | None],
    failed: dict[int, Failed],
) -> _Chunk:
    keys = [bad.key if bad else sample.key for sample, bad in zip(samples, broken, strict=True)]
    params = augment.sample_params(augmentation, seed, epochs, numbers, *_shapes(samples))
    replaced = np.array([bad is not None for bad in broken])
    return _Chunk(positions, epochs, numbers, keys, replaced, samples, params, broken, failed)


def _substitute(
    windows: OpenWindows, augmentation: Augmentation, seed: int, chunk: _Chunk, failures: dict[int, str]
) -> _Chunk:
    """The chunk with substitutes for the samples at these places, on which DALI failed for these reasons."""
    samples, broken, failed = [*chunk.samples], [*chunk.broken], dict(chunk.failed)
    for i, reason in failures.items():
        sample = chunk.samples[i]
        failed[i] = {**failed.get(i, {}), (sample.shard, sample.key): reason}
        samples[i], broken[i] = windows.substitute(int(chunk.positions[i]), failed[i])
    at = chunk.positions, chunk.epochs, chunk.numbers
    return _training_chunk(augmentation, seed, *at, samples, broken, failed)


def _evaluation_chunk(crop_fraction: float | None, numbers: np.ndarray, found: list[Sample | BadSample]) -> _Chunk:
    used = np.array([n for n, sample in zip(numbers, found, strict=True) if isinstance(sample, Sample)], np.int64)
    samples = [sample for sample in found if isinstance(sample, Sample)]
    broken: list[BadSample | None] = [sample for sample in found if isinstance(sample, BadSample)]
    params = augment.eval_params(crop_fraction, *_shapes(samples))
    keys, none = [sample.key for sample in samples], np.zeros_like(used)
    return _Chunk(used, none, used, keys, none.astype(bool), samples, params, broken, {})


def _leave_out(crop_fraction: float | None, chunk: _Chunk, failures: dict[int, str]) -> _Chunk:
    """The chunk without the samples at these places, on which DALI failed for these reasons."""
    found: list[Sample | BadSample] = [
        undecodable(sample, failures[i]) if i in failures else sample for i, sample in enumerate(chunk.samples)
    ]
    left = _evaluation_chunk(crop_fraction, chunk.numbers, found)
    return replace(left, broken=[*chunk.broken, *left.broken])


def _decode(
    chunks: Iterator[_Chunk],
    augmentation: Augmentation,
    spec: LoaderSpec,
    at_once: int,
    most_labels: int,
    without: Callable[[_Chunk, dict[int, str]], _Chunk],
) -> Iterator[list[Batch]]:
    """Micro batches of each chunk, through one DALI pipeline that runs ahead; `without` as in decode_chunks."""

    def inputs(chunk: _Chunk) -> Inputs:
        return [sample.image for sample in chunk.samples], chunk.params

    def make_decoder(source: Source, ahead: int) -> Decoder:
        return Decoder(
            resolution=spec.resolution,
            batch_size=at_once,
            layers=augmentation.layers,
            magnitude=augmentation.magnitude,
            device="gpu" if spec.device.type == "cuda" else "cpu",
            device_id=spec.device.index,
            threads=spec.threads,
            source=source,
            ahead=ahead,
        )

    for chunk, images in decode_chunks(chunks, inputs, make_decoder, without):
        labels = to_device(_label_rows(chunk.samples, most_labels), spec.device)
        shapes, batches = np.stack(_shapes(chunk.samples), axis=1), []
        for first in range(0, max(1, len(chunk.samples)), spec.micro_batch):
            part = slice(first, first + spec.micro_batch)
            broken = [bad for bad in chunk.broken[part] if bad is not None]
            places = chunk.positions[part], chunk.keys[part], chunk.numbers[part], chunk.replaced[part]
            batches.append(Batch(images[part], labels[part], *places, broken, shapes[part], chunk.params[part]))
        yield batches


def _steps(batches: Iterator[Batch], micro_batches: int) -> Iterator[list[Batch]]:
    while len(step := list(itertools.islice(batches, micro_batches))) == micro_batches:
        yield step


def _label_rows(samples: list[Sample], most: int) -> np.ndarray:
    rows = np.full((len(samples), most), -1, np.int64)
    for number, labels in enumerate(itertools.zip_longest(*(sample.labels for sample in samples), fillvalue=-1)):
        rows[:, number] = labels
    return rows


def _shapes(samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([s.height for s in samples], np.int64), np.array([s.width for s in samples], np.int64)


def _ranges_between(starts: np.ndarray, first: int, last: int) -> list[SampleRange]:
    """The ranges of samples first .. last - 1 in manifest order; `starts` has N as its last element."""
    ranges = []
    while first < last:
        shard = int(np.searchsorted(starts, first, side="right")) - 1
        rows = min(last, int(starts[shard + 1])) - first
        ranges.append(SampleRange(shard, first - int(starts[shard]), rows))
        first += rows
    return ranges


def _reads_at_once(manifest: Manifest, processors: int) -> int:
    files, _ = open_fs(manifest.shards_at or manifest.url)
    return min(READS_OF_DISK, processors) if isinstance(files, LocalFileSystem) else READS_FROM_AFAR


@contextmanager
def _reading_threads(at_once: int, gives_up: Callable[[], bool]) -> Iterator[ThreadPoolExecutor]:
    """A pool for reads, whose threads start as reads need them; at the end those that have not begun are dropped."""
    pool = ThreadPoolExecutor(at_once, "read")
    try:
        yield pool
    finally:
        pool.shutdown(not gives_up(), cancel_futures=True)


@contextmanager
def _in_background(produce: Callable[[], Iterator[Item]], gives_up: Callable[[], bool]) -> Iterator[Iterator[Item]]:
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
            try:
                item, error = ready.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                if gives_up():
                    return
                continue
            if error is not None:
                raise error
            if item is None:
                return
            yield item

    thread = threading.Thread(target=run, name="batches", daemon=True)
    thread.start()
    try:
        yield items()
    finally:
        ended.set()
        thread.join(PATIENCE_SECONDS if gives_up() else None)


Batches = Callable[[int, int], AbstractContextManager[Iterator[list[Batch]]]]
"""This rank's micro batches of each step from one up to another, read ahead while the context is open."""


Steps = Generator[tuple[int, list[Batch] | None, float], None, None]
"""Of each step its number (from 0), this rank's micro batches (none where LoaderSpec gave up), and the seconds spent
waiting for them."""


def steps_of_batches(batches: Batches, first: int, end: int, skipped: Collection[int]) -> Steps:
    """The steps from `first` up to `end`; a skipped one has None instead of micro batches. The last one never is."""
    step = first
    for until in [*sorted({step for step in skipped if first <= step < end - 1}), end]:
        if step < until:
            with batches(step, until) as reading:
                for number in range(step, until):
                    began = time.perf_counter()
                    yield number, next(reading, []), time.perf_counter() - began
        if until < end:
            yield until, None, 0.0
        step = until + 1
