"""Laws of loading: which samples, on which rank, in which step, with which pixels; what broken ones do; how it ends."""

import os
import re
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from data import augment, loader, windows
from data.augment import Augmentation
from data.decode import Decoder
from data.errors import DataError, UsageError
from data.loader import Batch, LoaderSpec, evaluation_batches, training_batches
from data.memory import DECODED_AT_ONCE, READ_AHEAD_BYTES, RUNS_IN_MEMORY, check_memory, granted_bytes
from data.order import Order, Window
from data.shards.manifest import Manifest, read_manifest
from data.shards.shard_list import Shard, Shards
from data.shards.tar_index import index_tar
from data.storage.remote import Storage
from tests.data.servers import http_server

SIDE, SEED = 24, 7
CENTRE = Augmentation(crop="center", flip=False, layers=0, magnitude=0.0)
FULL = Augmentation(crop="random_resized", flip=True, layers=2, magnitude=10.0)
SPLITS = [(8, 2, 3), (12, 4, 5), (64, 16, 4), (1, 1, 1), (4, 1, 100)]
"""Global batch, micro batch, window: the epoch's end on a step's border, within a step, within a micro batch; N < B."""


class Watched(LocalFileSystem):
    """The local disk at watched://, which notes what is read of tars."""

    protocol = "watched"
    reads: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("watched://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> Any:
        if path.endswith(".tar"):
            Watched.reads.append((path, start or 0, end or 0))
        return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("watched", Watched, clobber=True)


def order_of(manifest: Manifest, global_batch: int, window: int, seed: int = SEED) -> Order:
    return Order(seed, np.array([shard.samples for shard in manifest.shards]), global_batch, window)


def spec_of(rank: int, world_size: int, micro_batch: int) -> LoaderSpec:
    return LoaderSpec(rank, world_size, micro_batch, SIDE, torch.device("cpu"), 1)


def loaded(
    manifest: Manifest,
    order: Order,
    micro_batch: int,
    steps: range,
    augmentation: Augmentation = CENTRE,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Batch]]:
    spec = spec_of(rank, world_size, micro_batch)
    with training_batches(manifest, order, augmentation, spec, order.seed, steps.start, steps.stop) as batches:
        return list(batches)


def on_all_ranks(
    manifest: Manifest, order: Order, micro_batch: int, steps: range, augmentation: Augmentation, world_size: int
) -> list[list[Batch]]:
    """Each step's micro batches in the order of their numbers: pass by pass, and in it rank by rank."""
    ranks = [loaded(manifest, order, micro_batch, steps, augmentation, r, world_size) for r in range(world_size)]
    return [
        [batch for of_pass in zip(*of_step, strict=True) for batch in of_pass] for of_step in zip(*ranks, strict=True)
    ]


def evaluated(manifest: Manifest, micro_batch: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    with evaluation_batches(manifest, 1.0, spec_of(rank, world_size, micro_batch)) as batches:
        return list(batches)


def flat(steps: list[list[Batch]]) -> list[Batch]:
    return [batch for step in steps for batch in step]


def keys_of(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert (a.positions == b.positions).all() and a.keys == b.keys and a.broken == b.broken


# ------------------------------------------------------------------------------------- which samples, with which pixels


@settings(max_examples=settings().max_examples // 5, phases=set(Phase) - {Phase.shrink})
@given(
    seed=st.integers(0, 2**48 - 1), window=st.integers(1, 50), micro_batch=st.integers(1, 9), passes=st.integers(1, 4),
    world_size=st.integers(1, 3), first_step=st.integers(0, 40),
)  # fmt: skip
def test_the_ranks_of_a_step_deliver_the_samples_of_any_order(
    packed, seed, window, micro_batch, passes, world_size, first_step
):
    """In its slots, with the labels and the pixels of the files."""
    order, keys = order_of(packed.manifest, world_size * passes * micro_batch, window, seed), packed.keys
    steps = range(first_step, first_step + 2 + order.samples // order.global_batch)
    for step, batches in zip(
        steps, on_all_ranks(packed.manifest, order, micro_batch, steps, CENTRE, world_size), strict=True
    ):
        positions = np.arange(step * order.global_batch, (step + 1) * order.global_batch)
        assert np.concatenate([batch.positions for batch in batches]).tolist() == positions.tolist()
        assert keys_of(batches) == [keys[number] for number in order.samples_at(positions)]
        for batch in batches:
            originals = [packed.originals[key] for key in batch.keys]
            assert batch.images.dtype == torch.uint8 and batch.images.shape == (micro_batch, SIDE, SIDE, 3)
            np.testing.assert_array_equal(batch.images, [original.centre for original in originals])
            assert batch.labels.tolist() == [[original.label] for original in originals] and not batch.broken


@pytest.mark.parametrize(("global_batch", "micro_batch", "window"), SPLITS)
def test_beginning_in_the_middle_gives_the_batches_of_beginning_at_the_start(packed, global_batch, micro_batch, window):
    """To the bit, with all augmentations on."""
    order = order_of(packed.manifest, global_batch, window)
    steps = -(-2 * order.samples // global_batch) + 3
    everything = loaded(packed.manifest, order, micro_batch, range(steps), FULL)
    for first in {1, 2, steps // 3, steps // 2, steps - 1}:
        assert_equal(
            flat(loaded(packed.manifest, order, micro_batch, range(first, steps), FULL)), flat(everything[first:])
        )


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_number_of_ranks_changes_no_pixel(packed, world_size):
    order = order_of(packed.manifest, 12, 5)
    alone = on_all_ranks(packed.manifest, order, 3, range(7), FULL, 1)
    assert_equal(flat(on_all_ranks(packed.manifest, order, 3, range(7), FULL, world_size)), flat(alone))


def test_neither_the_micro_batch_nor_how_far_it_reads_ahead_changes_a_pixel(packed, monkeypatch):
    order = order_of(packed.manifest, 12, 5)
    images = torch.cat([batch.images for batch in flat(loaded(packed.manifest, order, 3, range(9), FULL))])
    monkeypatch.setattr(windows, "READ_AHEAD_BYTES", 0)
    monkeypatch.setattr(loader, "DECODED_AT_ONCE", 1)
    others = [batch.images for batch in flat(loaded(packed.manifest, order, 4, range(9), FULL))]
    assert torch.equal(torch.cat(others), images)


def test_pixels_are_what_the_decoder_makes_of_each_samples_own_draws(packed):
    order, keys = order_of(packed.manifest, 10, 4), packed.keys
    batches = flat(loaded(packed.manifest, order, 5, range(12), FULL))
    positions = np.concatenate([batch.positions for batch in batches])
    numbers = order.samples_at(positions)
    files = [packed.originals[keys[number]].encoded for number in numbers]
    rows = np.concatenate([np.load(packed.manifest.url_of(i, ".npy")) for i in range(len(packed.manifest.shards))])
    params = augment.sample_params(
        FULL, SEED, positions // order.samples, numbers, rows["height"][numbers], rows["width"][numbers]
    )
    answers = iter([(files, params)])
    request: dict[str, Any] = {"device": "cpu", "device_id": None, "threads": 1, "source": lambda: next(answers)}
    decoder = Decoder(resolution=SIDE, batch_size=len(files), layers=2, magnitude=FULL.magnitude, **request)
    assert torch.equal(torch.cat([batch.images for batch in batches]), next(decoder))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_read_each_byte_of_an_epoch_once(packed, world_size):
    manifest = read_manifest(f"watched://{packed.folder}")
    order = order_of(manifest, 8, 3)
    Watched.reads.clear()
    on_all_ranks(manifest, order, 2, range(order.samples // 8), CENTRE, world_size)
    for number in range(len(manifest.shards)):
        rows = np.load(packed.manifest.url_of(number, ".npy"))
        ranges = sorted((first, end) for path, first, end in Watched.reads if path == packed.manifest.url_of(number))
        assert ranges[0][0] == 0 and ranges[-1][1] == rows["offset"][-1] + rows["bytes"][-1]
        assert all(end == first for (_, end), (first, _) in pairwise(ranges))


# ---------------------------------------------------------------------------------------------------------- broken ones


def damaged_copy(packed, folder: Path, keys: list[str], part: str | None = None) -> Manifest:
    """The set with a bit of these samples flipped: in their image, their label, or the first letter of the header."""
    shutil.copytree(packed.folder, folder, dirs_exist_ok=True)
    for tar in folder.glob("*.tar"):
        contents = bytearray(tar.read_bytes())
        for sample in index_tar(bytes(contents)):
            if sample.key in keys:
                (image, *_) = sample.parts.values()
                place = {"image": image[0] + image[1] // 2, "cls": sample.parts["cls"][0], None: sample.offset}[part]
                contents[place] ^= 1
        tar.write_bytes(contents)
    return read_manifest(str(folder))


def window_of(order: Order, number: int) -> list[int]:
    """The window of the first epoch that has this sample, as sample numbers in the order of its bytes."""
    starts = order.shard_ends - order.shard_samples
    for g in range(order.samples):
        window = order.epoch(0).window_at(g)
        members = [int(starts[s.shard]) + s.first_row + i for s in window.ranges for i in range(s.rows)]
        if number in members:
            return members
    raise AssertionError(number)


@pytest.mark.parametrize("part", ["image", "cls", None])
def test_a_damaged_sample_is_replaced_by_the_next_good_one_of_its_window(packed, tmp_path, part):
    """In the micro batch of its place; all other places are as if nothing had happened."""
    order, keys = order_of(packed.manifest, 4, 7), packed.keys
    victims = [n for n in (0, 1, 9, 18, 27, 28, 36) if len(window_of(order, n)) > 2]
    assert len(victims) > 4
    manifest = damaged_copy(packed, tmp_path, [keys[number] for number in victims], part)
    steps = range(order.samples // 4)
    good = flat(loaded(packed.manifest, order, 2, steps))
    of_pixels = {original.centre.tobytes(): key for key, original in packed.originals.items()}
    for batch, expected in zip(flat(loaded(manifest, order, 2, steps)), good, strict=True):
        assert batch.keys == expected.keys
        assert [bad.key for bad in batch.broken] == [key for key in batch.keys if keys.index(key) in victims]
        labels = batch.labels.flatten().tolist()
        for key, image, label, own in zip(batch.keys, batch.images, labels, expected.images, strict=True):
            seen = of_pixels[image.numpy().tobytes()]
            assert label == packed.originals[seen].label
            if keys.index(key) not in victims:
                assert torch.equal(image, own)
            else:
                window = window_of(order, keys.index(key))
                after = window[window.index(keys.index(key)) :] + window
                assert keys.index(seen) == next(number for number in after if number not in victims)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_without_a_good_sample_takes_the_same_substitutes_on_any_ranks(packed, tmp_path, window):
    """A whole shard is damaged, and more; whoever reads a place, and from wherever on, finds the same stand-in."""
    order, lost = order_of(packed.manifest, 12, window), [*packed.keys[9:18], *packed.keys[20:40:3]]
    manifest, steps = damaged_copy(packed, tmp_path, lost, "image"), range(2 * 40 // 12)
    whole = on_all_ranks(packed.manifest, order, 3, steps, CENTRE, 1)
    damaged = on_all_ranks(manifest, order, 3, steps, CENTRE, 1)
    of_pixels = {original.centre.tobytes(): key for key, original in packed.originals.items()}
    for batch, expected in zip(flat(damaged), flat(whole), strict=True):
        assert batch.keys == expected.keys
        assert [bad.key for bad in batch.broken] == [key for key in batch.keys if key in lost]
        for key, image, label in zip(batch.keys, batch.images, batch.labels.flatten().tolist(), strict=True):
            seen = of_pixels[image.numpy().tobytes()]
            assert seen not in lost and (seen == key or key in lost) and label == packed.originals[seen].label
    for world_size in (2, 4):
        assert_equal(flat(on_all_ranks(manifest, order, 3, steps, CENTRE, world_size)), flat(damaged))
    assert_equal(flat(on_all_ranks(manifest, order, 3, steps[4:], CENTRE, 1)), flat(damaged[4:]))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 24), st.data())
def test_substitutes_come_from_a_few_other_windows_of_the_same_epoch(shards, global_batch, window, data):
    order = Order(SEED, np.array(shards), global_batch, window)
    number, g = data.draw(st.integers(0, 99)), data.draw(st.integers(0, order.samples - 1))
    own = order.epoch(number).window_at(g)
    tried = list(windows._neighbours(order, own))
    assert len(tried) == windows.NEIGHBOURS and {each.epoch for each in tried} == {number}
    assert any(each != own for each in tried) or own.samples == order.samples


def test_where_the_windows_of_substitutes_are_broken_too_the_run_ends(packed, tmp_path):
    manifest = damaged_copy(packed, tmp_path, packed.keys, "image")
    shard = r"shard-00000\d\.tar"
    message = rf"{shard}: all \d samples of a window are broken, for example \w+/\d+: .*; so are .* {shard}, {shard}"
    with pytest.raises(DataError, match=message):
        loaded(manifest, order_of(manifest, 4, 5), 2, range(3))


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("micro_batch", [1, 7, 16, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_every_sample_once_in_fixed_micro_batches(packed, world_size, micro_batch):
    ranks = [evaluated(packed.manifest, micro_batch, rank, world_size) for rank in range(world_size)]
    batches = sorted((batch for rank in ranks for batch in rank), key=lambda batch: int(batch.positions[0]))
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(40))
    assert keys_of(batches) == packed.keys
    for number, batch in enumerate(batches):
        assert len(batch.keys) == min(micro_batch, 40 - number * micro_batch)
        assert any(batch is each for each in ranks[number % world_size]) and not batch.broken
        np.testing.assert_array_equal(batch.images, [packed.originals[key].centre for key in batch.keys])
        assert batch.labels.tolist() == [[packed.originals[key].label] for key in batch.keys]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_leaves_out_broken_samples_and_counts_them(packed, tmp_path, world_size):
    """Also where all of a micro batch are broken."""
    broken = [*packed.keys[4:8], packed.keys[21], packed.keys[39]]
    manifest = damaged_copy(packed, tmp_path, broken, "image")
    ranks = [evaluated(manifest, 4, rank, world_size) for rank in range(world_size)]
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(bad.key for batch in batches for bad in batch.broken) == sorted(broken)
    assert sorted(keys_of(batches)) == sorted(set(packed.keys) - set(broken))
    assert len(batches) == 10
    for batch in batches:
        assert [packed.keys[number] for number in batch.positions] == batch.keys
        np.testing.assert_array_equal(
            batch.images, np.reshape([packed.originals[key].centre for key in batch.keys], (-1, SIDE, SIDE, 3))
        )


# ---------------------------------------------------------------------------------------------------------- how it ends


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("batches", "read"))]


def truncated(packed, folder: Path) -> Manifest:
    shutil.copytree(packed.folder, folder, dirs_exist_ok=True)
    for tar in folder.glob("*.tar"):
        os.truncate(tar, 600)
    return read_manifest(str(folder), Storage(attempts=2, first_wait=0.01))


@pytest.mark.parametrize("taken", [0, 1, 5, None])
def test_no_thread_outlives_the_loader_however_much_was_taken(packed, taken):
    order = order_of(packed.manifest, 4, 3)
    with training_batches(
        packed.manifest, order, CENTRE, spec_of(0, 1, 2), SEED, 0, 200 if taken is not None else 10
    ) as batches:
        assert len(list(islice(batches, taken))) == (10 if taken is None else taken)
        assert "batches" in own_threads() or taken is None
    assert own_threads() == []
    with evaluation_batches(packed.manifest, 1.0, spec_of(0, 1, 2)) as batches:
        list(islice(batches, taken))
    assert own_threads() == []


def test_an_error_of_the_consumer_passes_and_ends_the_threads(packed):
    with (
        pytest.raises(KeyError, match="mine"),
        training_batches(
            packed.manifest, order_of(packed.manifest, 4, 3), CENTRE, spec_of(0, 1, 2), SEED, 0, 50
        ) as batches,
    ):
        next(batches)
        raise KeyError("mine")
    assert own_threads() == []


def test_an_error_of_a_reading_thread_reaches_the_consumer_and_ends_the_threads(packed, tmp_path):
    manifest = truncated(packed, tmp_path)
    asked = rf"{re.escape(str(tmp_path))}/shard-00000\d\.tar: bytes \d+ to \d+ cannot be read: .* but \d+ came"
    with pytest.raises(DataError, match=asked):
        loaded(manifest, order_of(manifest, 4, 3), 2, range(10))
    with pytest.raises(DataError, match=asked):
        evaluated(manifest, 4)
    assert own_threads() == []


def test_reads_wait_for_a_distant_server_at_once_and_take_few_threads_of_a_disk(packed):
    """As many as the training needs, an order of magnitude more than of a disk, and no more than there are threads."""
    order = order_of(packed.manifest, 8, 1)
    with http_server(packed.folder) as server:
        manifest, server.latency = read_manifest(server.url), 0.2
        with training_batches(manifest, order, CENTRE, spec_of(0, 1, 8), SEED, 0, 60) as steps:
            first = next(steps)
            of_server = len(own_threads()) - 1
        assert 10 * loader.READS_OF_DISK < server.most_at_once <= of_server <= loader.READS_FROM_AFAR
    with training_batches(packed.manifest, order, CENTRE, spec_of(0, 1, 8), SEED, 0, 60) as steps:
        assert_equal(first, next(steps))
        assert len(own_threads()) - 1 <= loader.READS_OF_DISK


# ----------------------------------------------------------------------------------------------------------- its memory


class NothingIsRead(ThreadPoolExecutor):
    """A pool that only notes how many samples each window has that it is asked for, while anybody holds the window."""

    def __init__(self) -> None:
        super().__init__(1)
        self.held: weakref.WeakKeyDictionary[Future[Any], Window] = weakref.WeakKeyDictionary()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.held[future] = args[-1]
        return future


def handed_over(
    pool: NothingIsRead, order: Order, per_chunk: int, world_size: int, steps: int
) -> Iterator[windows.Places]:
    """The chunks of places as a rank's look-ahead hands them over; samples have 1,000 bytes."""
    shards = Shards.of(Shard(f"{i}.tar", n, 1000 * n) for i, n in enumerate(order.shard_samples.tolist()))
    opened = windows.OpenWindows(Manifest("nowhere", ("class",), shards), order, pool)
    slots = np.arange(order.global_batch // world_size)
    positions = (p for step in range(steps) for p in (step * order.global_batch + slots).tolist())
    return windows.places_ahead(opened, positions, per_chunk, order.global_batch // world_size)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(1, 24), st.integers(1, 3), st.integers(1, 12),
    st.integers(1, 24), st.sampled_from([0, 5_000, 50_000]), st.sampled_from([1, 8, 4096]),
)  # fmt: skip
def test_the_windows_that_a_rank_holds_stay_within_its_budget(
    sizes, slots, world_size, window, per_chunk, ahead_bytes, ahead_samples
):
    """At most a window of each slot and what may be read ahead, and the one window by which that is first passed."""
    order, pool = Order(SEED, np.array(sizes), slots * world_size, window), NothingIsRead()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows, "READ_AHEAD_BYTES", ahead_bytes)
        patched.setattr(windows, "READ_AHEAD_SAMPLES", ahead_samples)
        chunks = handed_over(pool, order, min(per_chunk, slots), world_size, 1 + 3 * order.samples // slots)
        most = max(sum(each.samples for each in pool.held.values()) for _ in chunks)
    assert most <= slots * window + ahead_bytes / 1000 + window


def test_the_windows_of_an_epochs_first_row_are_begun_before_the_last_one_ends():
    """The last windows of an epoch are shorter; what they leave of the budget goes to the next ones."""
    order, pool = Order(SEED, np.array([1000] * 6), 64, 16), NothingIsRead()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(windows, "READ_AHEAD_BYTES", 0)
        chunks = handed_over(pool, order, 64, 1, 200)
        last = next(chunk for chunk in chunks if chunk.positions[-1] >= 6000 - 64)
        assert last.positions[0] < 6000
    assert sum(each.epoch == 1 and each.number == 0 for each in pool.held.values()) > 0.7 * 64


@given(st.integers(1, 2**20), st.integers(1, 2**12), st.integers(1, 8), st.integers(1, 512))
def test_windows_that_do_not_fit_the_memory_are_refused_with_what_would_fit(window, slots, ranks, resolution):
    memory = granted_bytes()
    manifest = Manifest("nowhere", ("class",), Shards.of([Shard("0.tar", 1000, 1000 * 10**6)]))
    decoded = RUNS_IN_MEMORY * DECODED_AT_ONCE * (3 * resolution**2 + 10**6)
    held = ranks * (slots * window * 10**6 + READ_AHEAD_BYTES + decoded)

    def check(window: int) -> None:
        check_memory(manifest, slots, window, resolution, ranks)

    if held <= memory / 2:
        return check(window)
    with pytest.raises(UsageError) as refused:
        check(window)
    assert f"data.shuffle_window={window} " in str(refused.value) and f"{held / 2**30:.1f} GiB" in str(refused.value)
    fitting = re.search(r"; data.shuffle_window=(\d+) would fit", str(refused.value))
    if fitting is not None:
        check(int(fitting[1]))
        with pytest.raises(UsageError):
            check(int(fitting[1]) + 1)
    else:
        with pytest.raises(UsageError, match="no window fits"):
            check(1)


def test_what_a_container_or_slurm_grants_is_the_memory_that_windows_must_fit(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    monkeypatch.setattr("data.memory._groups", lambda: iter([tmp_path]))
    assert granted_bytes() == 2**30
    manifest = Manifest("nowhere", ("class",), Shards.of([Shard("0.tar", 1000, 10**6)]))
    with pytest.raises(UsageError, match=r"the 1\.0 GiB of memory that this machine allows"):
        check_memory(manifest, slots=64, window=1000, resolution=224, local_world_size=1)
