"""Images packed into shuffled WebDataset shards; the same source and seed give the same bytes.

Images keep their bytes, unless smaller ones are asked for or training would not decode them (codec.py). Each is decoded
once, in threads, so that training meets no damaged one; what does not decode is listed and left out. Which image goes
into which shard is planned by the listing alone (candidates.py), before anything is read: neither threads nor damaged
images, neither an interruption nor the number of machines (work.py) move a sample to another shard. The manifest comes
last, so an unfinished pack never looks whole. With `holdout` two sets are cut from the plan, one after the other.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

from webdataset import TarWriter

from data import codec, rng
from data.errors import DataError, UsageError
from data.packing.archives import DamagedMember
from data.packing.candidates import (
    TRAIN,
    VAL,
    Candidate,
    fingerprint_of,
    hold_out,
    read_piece,
    split_by_size,
    write_plan,
)
from data.packing.parts import NotLast
from data.packing.reading import read_images
from data.packing.resize import shrink
from data.packing.resume import (
    PACKING,
    FinishedShard,
    check_destination,
    clear,
    commit,
    finished_shards,
    has_manifests,
    is_unfinished,
    take_back,
    write_shard,
)
from data.packing.sources import Source, check_empty_classes, list_source
from data.packing.work import WHOLE, Part, Request, Work, open_work
from data.shards.manifest import MANIFEST, BadSample, Shard
from data.shards.sample_table import FLAG_DECODED, sample_table, shard_checksums, table_bytes
from data.shards.tar_index import index_bytes, index_tar, printable
from data.storage.prefetch import ordered_map
from data.storage.remote import Storage
from data.urls import split_query

QUALITY = 92
LOOK_AHEAD_BYTES = 2**27
"""Of images in archives that are read in the order in which they lie."""
_CHUNK_IMAGES, _CHUNK_BYTES = 32, 2**24
_WRITES_AT_ONCE = 2
_FORMAT = 1
"""Of the plan and the records: parts that were begun by another one are refused."""


@dataclass(frozen=True)
class SetReport:
    """What was packed: shards, samples, bytes of tar, classes."""

    shards: int
    samples: int
    bytes: int
    classes: int


@dataclass(frozen=True)
class HoldoutReport:
    """The two sets, how many images have the bytes of another one, and the classes that `val` has no image of."""

    train: SetReport
    val: SetReport
    copies: int
    missing_in_val: tuple[str, ...]


@dataclass(frozen=True)
class PackReport(SetReport):
    """What was packed in all, and what was left out of it, by path.

    `kept` of the shards are those that an interrupted pack had left whole; `labels` says how a list's were read.
    """

    broken: tuple[BadSample, ...]
    kept: int
    holdout: HoldoutReport | None
    labels: str = ""


class Examined(NamedTuple):
    """A candidate's bytes and what they are, or why they are left out."""

    candidate: Candidate
    encoded: bytes
    picture: codec.Picture | None
    reason: str


def pack(
    source: str,
    destination: str,
    *,
    samples_per_shard: int | None,
    bytes_per_shard: int | None,
    seed: int,
    workers: int,
    overwrite: bool,
    progress: Callable[[int, int], None],
    listed: Callable[[int], None] = lambda count: None,
    labels: str | None = None,
    classes: str | None = None,
    resize: int | None = None,
    quality: int | None = None,
    holdout: float | None = None,
    part: Part | None = None,
) -> PackReport:
    """Packs what `list_source` finds into shards at `destination`, or resumes an interrupted pack of the same.

    A shard has at most `samples_per_shard` samples and about `bytes_per_shard` bytes of tar (at least one sample),
    whichever comes first. Images whose shorter side is above `resize` are made that small, in JPEG of this `quality`.
    With `holdout`, that share of each class goes to `destination`/val and the rest to `destination`/train, images of
    equal bytes to the same set. `progress(done, total)` counts image files, and before that the reads that compare
    them; `listed(count)` what the listing finds. A `part` takes the listing that is kept there, or makes it, and does
    its share of the shards; the one that finds all of them done writes the manifests, and others end with NotLast.
    UsageError where source, destination or numbers cannot be; DataError where reading or writing fails.
    """
    _check_numbers(samples_per_shard, bytes_per_shard, seed, workers, resize, quality, holdout)
    sets = ("",) if holdout is None else (TRAIN, VAL)

    def list_images() -> Source:
        found = list_source(source, labels, classes, listed)
        if holdout is not None:
            hold_out(found, holdout, seed, progress)
        return found

    lists = {"labels": labels and split_query(labels)[0], "classes": classes and split_query(classes)[0]}
    numbers: Request = {"samples per shard": samples_per_shard, "bytes per shard": bytes_per_shard, "seed": seed}
    options: Request = {"resize": resize, "quality": quality, "holdout": holdout, **lists}
    versions = {"webdataset": importlib.metadata.version("webdataset"), "nvimgcodec": codec.nvimgcodec.__version__}
    request = {"source": split_query(source)[0], **numbers, **options, "format": _FORMAT, **versions}
    work = open_work(destination, PACKING, request)
    if part and part.number and has_manifests(destination, sets):
        work.remove()  # the part that finished may have been killed while it did that
        raise NotLast(f"{destination} already has its {MANIFEST}, so there is nothing to do", part, 0)
    check_destination(source, destination, sets, overwrite)
    if overwrite and part and part.number:
        raise UsageError(f"pass --overwrite only with --part 0/{part.of}, which lists the images again")
    if overwrite and not (work.is_current() and is_unfinished(destination, sets)):
        work.remove()
    clear(destination, sets)
    work.join(overwrite or (part is None and not work.is_planned()))
    plan = work.plan()
    if plan is None or part is None or overwrite:  # one process alone lists each time, and finds out what has changed
        plan = _planned(work, plan, list_images, sets, overwrite)
    part = part or WHOLE
    share = part.share(plan["items"])
    kept = finished_shards(work, plan, share, sets)
    shards = [number for number in share if number not in kept]
    try:
        _pack_shards(work, plan, share, shards, split_query(source)[1], (resize, quality or QUALITY), workers, progress)
    except DataError as error:
        if not has_manifests(destination, sets):  # else a twin of this part was faster
            raise error if work.is_current() else _overtaken(work) from error
    return _finish(work, plan, part, sets, kept)


def _planned(
    work: Work, plan: dict[str, Any] | None, list_images: Callable[[], Source], sets: tuple[str, ...], overwrite: bool
) -> dict[str, Any]:
    """The plan by a listing made now; UsageError where there is one that differs, unless it may be overwritten."""
    try:
        found = list_images()
    except UsageError:
        if plan is None:
            work.remove()  # it is no pack, and would keep others out
            take_back(work.url, sets)
        raise
    if plan is not None and plan["listing"] == fingerprint_of(found):
        return plan
    if plan is not None and not overwrite:
        raise UsageError(
            f"{work.url} holds an unfinished pack of another listing: the source's files, labels or classes have"
            " changed since; pack elsewhere, or pass --overwrite to start over"
        )
    request: dict[str, Any] = work.request
    return write_plan(work, found, sets, request["seed"], request["samples per shard"], request["bytes per shard"])


def _check_numbers(
    samples_per_shard: int | None,
    bytes_per_shard: int | None,
    seed: int,
    workers: int,
    resize: int | None,
    quality: int | None,
    holdout: float | None,
) -> None:
    if samples_per_shard is None and bytes_per_shard is None:
        raise UsageError("neither samples nor bytes per shard are given; give one or both")
    numbers = {"samples per shard": samples_per_shard, "bytes per shard": bytes_per_shard, "workers": workers}
    for name, number in {**numbers, "resize": resize}.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; it must be at least 1")
    if not 0 <= seed < rng.SEEDS:
        raise UsageError(f"seed is {seed}; it must be from 0 to {rng.SEEDS - 1}")
    if quality is not None and (resize is None or not 1 <= quality <= 100):
        raise UsageError(f"quality is {quality}; it is for resized images (--resize) and must be from 1 to 100")
    if holdout is not None and not 0 < holdout < 1:
        raise UsageError(f"--holdout={holdout} must be a share of the images above 0 and below 1, such as 0.1")


# Reading and decoding, in threads; the results come in order.


def _pack_shards(
    work: Work,
    plan: dict[str, Any],
    share: Sequence[int],
    shards: Sequence[int],
    query: str,
    size: tuple[int | None, int],
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Writes these shards of a share, each while the next is read."""
    images = {number: plan["shards"][number][1] for number in share}
    total = sum(images.values())
    done = total - sum(images[number] for number in shards)
    candidates = chain.from_iterable(read_piece(work, plan, number, query) for number in shards)
    with ThreadPoolExecutor(workers) as pool:
        examined = _examine_all(
            pool, partial(_examine, *size), candidates, workers, lambda read: progress(read, total), done
        )
        built = (_build_shard(number, plan["shards"][number][0], islice(examined, images[number])) for number in shards)
        for _ in ordered_map(pool, lambda shard: _write_shard(work, plan, *shard), built, _WRITES_AT_ONCE):
            pass


def _examine_all(
    pool: ThreadPoolExecutor,
    examine: Callable[[list[Candidate]], Iterable[Examined]],
    candidates: Iterable[Candidate],
    workers: int,
    progress: Callable[[int], None],
    done: int,
) -> Iterator[Examined]:
    """The candidates in their order, read and decoded in that of `_as_they_lie`; `done` were before them."""

    def work_on(chunk: list[tuple[int, Candidate]]) -> list[tuple[int, Examined]]:
        results = examine([each for _, each in chunk])
        return [(place, each) for (place, _), each in zip(chunk, results, strict=True)]

    progress(done)
    chunks = split_by_size(_as_they_lie(candidates), lambda each: _bytes_of(each[1]), _CHUNK_IMAGES, _CHUNK_BYTES)
    ready: dict[int, Examined] = {}
    following = 0
    for read, each in chain.from_iterable(ordered_map(pool, work_on, chunks, 2 * workers)):
        ready[read] = each
        done += 1
        progress(done)
        while following in ready:
            yield ready.pop(following)
            following += 1


def _as_they_lie(candidates: Iterable[Candidate]) -> Iterator[tuple[int, Candidate]]:
    """The candidates with their places, within a look-ahead in the order in which they lie in their archives."""
    first = 0
    for window in split_by_size(candidates, _bytes_of, None, LOOK_AHEAD_BYTES):
        lying = list(enumerate(window, first))
        if any(each.image.offset is not None for each in window):
            lying.sort(key=lambda each: (each[1].image.url, each[1].image.offset or 0))
        yield from lying
        first += len(window)


def _bytes_of(candidate: Candidate) -> int:
    return candidate.image.size or 0


def _examine(resize: int | None, quality: int, chunk: list[Candidate]) -> Iterator[Examined]:
    for candidate, encoded in zip(chunk, read_images(Storage(), [each.image for each in chunk]), strict=True):
        try:
            if isinstance(encoded, DamagedMember):
                raise encoded
            found = codec.decode(encoded)[:2] if resize is None else shrink(encoded, resize, quality)
            yield Examined(candidate, *found, "")
        except (codec.Undecodable, DamagedMember) as error:
            yield Examined(candidate, b"", None, str(error))


# Writing.


def _build_shard(
    number: int, name: str, examined: Iterable[Examined]
) -> tuple[int, str, dict[str, bytes], FinishedShard]:
    """Number, name and files of a shard of those samples that decoded, and what it is."""
    stream, shapes, bad, copies = io.BytesIO(), [], [], 0
    with TarWriter(stream, encoder=False, mtime=0) as tar:  # any other mtime makes other bytes each time
        for candidate, encoded, picture, reason in examined:
            if picture is None:
                bad.append((candidate.labels, BadSample(None, printable(candidate.image.path), reason)))
                continue
            tar.write({"__key__": candidate.key, picture.kind: encoded, candidate.label[0]: candidate.label[1]})
            shapes.append((picture.height, picture.width))
            copies += candidate.is_copy
    left_out = tuple(each for _, each in bad), tuple(labels for labels, _ in bad)
    if not shapes:
        return number, name, {}, FinishedShard(None, 0, *left_out, copies)
    contents = stream.getvalue()
    samples = index_tar(contents)
    if len(samples) != len(shapes):
        raise DataError(f"{name}.tar has {len(samples)} samples by its headers, but {len(shapes)} were written")
    table = table_bytes(sample_table(contents, samples, shapes, FLAG_DECODED))
    index = index_bytes(samples)
    shard = Shard(f"{name}.tar", len(samples), len(contents), "", *shard_checksums(table))
    files = {".npy": table, ".idx": index, ".tar": contents}
    return number, name, files, FinishedShard(shard, len(index), *left_out, copies)


def _write_shard(
    work: Work, plan: dict[str, Any], number: int, name: str, files: dict[str, bytes], done: FinishedShard
) -> None:
    if not work.is_current():
        raise _overtaken(work)
    write_shard(work, plan, number, name, files, done)


def _overtaken(work: Work) -> DataError:
    return DataError(f"{work.url}: another process has finished or restarted this pack; nothing more is written")


# What came of it.


def _finish(
    work: Work, plan: dict[str, Any], part: Part, sets: tuple[str, ...], kept: dict[int, FinishedShard]
) -> PackReport:
    """Makes the set, if all shards of the plan are done, and reports it; else what this part did."""
    everything = range(plan["items"])
    left = len(set(everything) - work.numbers())
    done = {} if left else finished_shards(work, plan, everything, sets)
    if len(done) < plan["items"]:
        left = 0 if has_manifests(work.url, sets) else left or plan["items"] - len(done)
        if left and part == WHOLE:
            raise DataError(f"{left} shards of {work.url} were removed while packing; pack again")
        share = part.share(plan["items"]) if part.number else everything
        images = f"images: {sum(plan['shards'][number][1] for number in share):,}"
        done_now = f"shards done: {len(share)}, {images}" if part.number else f"the plan is written, {images}"
        raise NotLast(f"{done_now}; {left} of {plan['items']} shards to go", part, left)
    sets_of = {number: name.partition("shard-")[0] for number, (name, _) in enumerate(plan["shards"])}
    written = {name: [done[n].shard for n in range(plan["items"]) if sets_of[n] == name] for name in sets}
    written = {name: [shard for shard in shards if shard] for name, shards in written.items()}
    classes_of = {name: _classes_of(plan, done, sets_of, name) for name in sets}
    _check_packed(work, plan, done, sets_of, classes_of)
    commit(work, plan["classes"], written, plan["labels_per_sample"])
    left_out = chain((BadSample(None, *each) for each in plan["broken"]), *(each.broken for each in done.values()))
    return PackReport(
        **vars(_count(plan, list(chain.from_iterable(written.values())))),
        broken=tuple(sorted(left_out, key=lambda each: each.key)),
        kept=sum(each.shard is not None for each in kept.values()),
        holdout=_compare(plan, written, classes_of, done) if VAL in sets else None,
        labels=plan["reading"],
    )


def _classes_of(plan: dict[str, Any], done: dict[int, FinishedShard], sets_of: dict[int, str], name: str) -> set[int]:
    """The classes of which a set has images that were not left out."""
    counts = Counter(dict(plan["counts"][name]))
    for number, each in done.items():
        if sets_of[number] == name:
            counts.subtract(chain.from_iterable(each.unused))
    return {label for label, images in counts.items() if images > 0}


def _count(plan: dict[str, Any], shards: Sequence[Shard]) -> SetReport:
    samples, size = (sum(getattr(shard, name) for shard in shards) for name in ("samples", "bytes"))
    return SetReport(len(shards), samples, size, len(plan["classes"]))


def _check_packed(
    work: Work,
    plan: dict[str, Any],
    done: dict[int, FinishedShard],
    sets_of: dict[int, str],
    classes_of: dict[str, set[int]],
) -> None:
    """UsageError where a set has no image, or a class has none to learn from."""
    kinds, source = {"": "image", TRAIN: "training image", VAL: "held-out image"}, work.request["source"]
    for name, full in classes_of.items():
        if not full:
            one = next(bad for number, each in done.items() if sets_of[number] == name for bad in each.broken)
            raise UsageError(f"{source} has no {kinds[name]} that can be decoded; for example, {one.key}: {one.reason}")
        if name != VAL and not plan["fixed"]:
            empty = [each for label, each in enumerate(plan["classes"]) if label not in full]
            check_empty_classes(str(source), empty, f"with no {kinds[name]} that can be decoded")


def _compare(
    plan: dict[str, Any],
    written: dict[str, list[Shard]],
    classes_of: dict[str, set[int]],
    done: dict[int, FinishedShard],
) -> HoldoutReport:
    return HoldoutReport(
        _count(plan, written[TRAIN]),
        _count(plan, written[VAL]),
        copies=sum(each.copies for each in done.values()),
        missing_in_val=tuple(plan["classes"][label] for label in sorted(classes_of[TRAIN] - classes_of[VAL])),
    )
