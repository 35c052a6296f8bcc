"""Images packed into shuffled WebDataset shards; the same source and seed give the same bytes.

Images keep their bytes, unless smaller ones are asked for or training would not decode them (codec.py). Each is decoded
once, in threads, so that training meets no damaged one; what does not decode is listed and left out. The order is one
permutation of all images, and shards are cut from it by the sizes that the listing gave, before anything is read:
neither threads nor damaged images nor an interruption move a sample to another shard. At most three shards are in
memory. The manifest comes last, so an interrupted pack never looks whole. With `holdout` two sets are cut from that
order, one after the other.
"""

from __future__ import annotations

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
    Candidate,
    candidates_of,
    fingerprint_of,
    image_bytes,
    split_by_size,
    split_sets,
    tar_bytes,
)
from data.packing.resize import shrink
from data.packing.resume import (
    TRAIN,
    VAL,
    FinishedShard,
    Request,
    check_destination,
    commit,
    resume,
    write_shard,
)
from data.packing.sources import Source, check_empty_classes, list_source
from data.shards.manifest import BadSample, Shard
from data.shards.sample_table import FLAG_DECODED, sample_table, shard_checksums, table_bytes
from data.shards.tar_index import index_bytes, index_tar, printable
from data.storage.prefetch import ordered_map
from data.urls import split_query

QUALITY = 92
_CHUNK_IMAGES, _CHUNK_BYTES = 32, 2**24
_WRITES_AT_ONCE = 2


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
    labels: str | None = None,
    classes: str | None = None,
    resize: int | None = None,
    quality: int | None = None,
    holdout: float | None = None,
) -> PackReport:
    """Packs what `list_source` finds into shards at `destination`, or resumes an interrupted pack of the same.

    A shard has at most `samples_per_shard` samples and about `bytes_per_shard` bytes of tar (at least one sample),
    whichever comes first. Images whose shorter side is above `resize` are made that small, in JPEG of this `quality`.
    With `holdout`, that share of each class goes to `destination`/val and the rest to `destination`/train, images of
    equal bytes to the same set. `progress(done, total)` counts image files, and before that the reads that compare
    them. UsageError where source, destination or numbers cannot be; DataError where reading or writing fails.
    """
    _check_numbers(samples_per_shard, bytes_per_shard, seed, workers, resize, quality, holdout)
    sets = ("",) if holdout is None else (TRAIN, VAL)
    check_destination(source, destination, sets, overwrite)
    found = list_source(source, labels, classes)
    candidates = candidates_of(found) if holdout is None else split_sets(found, holdout, seed, progress)
    shuffled = [candidates[i] for i in rng.permutation(seed, rng.Stream.PACK, 0, len(candidates))]
    by_set = [[candidate for candidate in shuffled if candidate.set == name] for name in sets]
    plan = [run for each in by_set for run in split_by_size(each, tar_bytes, samples_per_shard, bytes_per_shard)]
    numbers: Request = {"samples per shard": samples_per_shard, "bytes per shard": bytes_per_shard, "seed": seed}
    options: Request = {"resize": resize, "quality": quality, "holdout": holdout}
    listing = fingerprint_of(found, candidates)
    request = {"source": split_query(source)[0], **numbers, **options, "listing": listing}
    done = resume(destination, sets, request, overwrite)
    kept = len(done)
    with ThreadPoolExecutor(workers) as pool:
        examine = partial(_examine, found, resize, quality or QUALITY)
        examined = _examine_all(pool, examine, plan, kept, workers, progress)
        done += _write_shards(pool, destination, plan, done, examined)
    packed, shards = list(_packed(plan, done)), [each.shard for each in done if each.shard]
    written = {name: [shard for shard in shards if shard.name.startswith(name)] for name in sets}
    classes_of = {name: {label for each in packed if each.set == name for label in each.labels} for name in sets}
    _check_packed(found, plan, done, classes_of)
    commit(destination, found.classes, written, max(map(len, found.labels)))
    left_out = chain(found.broken, *(each.broken for each in done))
    return PackReport(
        **vars(_count(found, shards)),
        broken=tuple(sorted(left_out, key=lambda each: each.key)),
        kept=sum(each.shard is not None for each in done[:kept]),
        holdout=None if holdout is None else _compare(found, written, classes_of, packed),
        labels=found.reading,
    )


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
        raise UsageError(f"quality is {quality}; it is that of resized images (--resize), from 1 to 100")
    if holdout is not None and not 0 < holdout < 1:
        raise UsageError(f"--holdout={holdout} is no share of the images; it must be above 0 and below 1, such as 0.1")


# Reading and decoding, in threads; the results come in order.


def _examine_all(
    pool: ThreadPoolExecutor,
    examine: Callable[[Candidate], Examined],
    plan: Sequence[list[Candidate]],
    kept: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> Iterator[Examined]:
    """Every candidate after the shards that are kept, in order, read and decoded."""
    before, total = sum(map(len, plan[:kept])), sum(map(len, plan))
    chunks = split_by_size(chain.from_iterable(plan[kept:]), image_bytes, _CHUNK_IMAGES, _CHUNK_BYTES)
    results = ordered_map(pool, lambda chunk: [examine(each) for each in chunk], chunks, 2 * workers)
    progress(before, total)
    for done, each in enumerate(chain.from_iterable(results), start=before + 1):
        progress(done, total)
        yield each


def _examine(found: Source, resize: int | None, quality: int, candidate: Candidate) -> Examined:
    try:
        encoded = found.read(candidate.image)
        if resize is None:
            return Examined(candidate, *codec.decode(encoded)[:2], "")
        return Examined(candidate, *shrink(encoded, resize, quality), "")
    except (codec.Undecodable, DamagedMember) as error:
        return Examined(candidate, b"", None, str(error))


# Writing.


def _write_shards(
    pool: ThreadPoolExecutor,
    destination: str,
    plan: Sequence[list[Candidate]],
    kept: Sequence[FinishedShard],
    examined: Iterator[Examined],
) -> list[FinishedShard]:
    """The shards after those that are kept, each written while the next is built."""

    def shards() -> Iterator[tuple[Any, ...]]:
        named = Counter(candidates[0].set for candidates, each in zip(plan, kept, strict=False) if each.shard)
        for number, candidates in enumerate(plan[len(kept) :], start=len(kept)):
            tar, shapes, broken = _tar(islice(examined, len(candidates)))
            name = candidates[0].set
            yield destination, number, f"{name}shard-{named[name]:06d}", tar, shapes, broken
            named[name] += bool(shapes)

    return list(ordered_map(pool, lambda shard: _write_shard(*shard), shards(), _WRITES_AT_ONCE))


def _tar(samples: Iterable[Examined]) -> tuple[bytes, list[tuple[int, int]], list[BadSample]]:
    """A tar of those samples that decoded, their (height, width), and the others."""
    stream, shapes, broken = io.BytesIO(), [], []
    with TarWriter(stream, encoder=False, mtime=0) as tar:  # any other mtime makes other bytes each time
        for candidate, encoded, picture, reason in samples:
            if picture is None:
                broken.append(BadSample(None, printable(candidate.image.path), reason))
                continue
            tar.write({"__key__": candidate.key, picture.kind: encoded, candidate.label[0]: candidate.label[1]})
            shapes.append((picture.height, picture.width))
    return stream.getvalue(), shapes, broken


def _write_shard(
    destination: str,
    number: int,
    name: str,
    tar: bytes,
    shapes: Sequence[tuple[int, int]],
    broken: Sequence[BadSample],
) -> FinishedShard:
    if not shapes:
        return write_shard(destination, number, name, {}, FinishedShard(None, 0, tuple(broken)))
    samples = index_tar(tar)
    if len(samples) != len(shapes):
        raise DataError(f"{name}.tar has {len(samples)} samples by its headers and was given {len(shapes)}")
    table = table_bytes(sample_table(tar, samples, shapes, FLAG_DECODED))
    index = index_bytes(samples)
    shard = Shard(f"{name}.tar", len(samples), len(tar), "", *shard_checksums(table))
    done = FinishedShard(shard, len(index), tuple(broken))
    return write_shard(destination, number, name, {".npy": table, ".idx": index, ".tar": tar}, done)


# What came of it.


def _packed(plan: Sequence[list[Candidate]], done: Sequence[FinishedShard]) -> Iterator[Candidate]:
    """The images that were not left out."""
    for candidates, each in zip(plan, done, strict=True):
        broken = {left_out.key for left_out in each.broken}
        yield from (candidate for candidate in candidates if printable(candidate.image.path) not in broken)


def _count(found: Source, shards: Sequence[Shard]) -> SetReport:
    samples, size = (sum(getattr(shard, name) for shard in shards) for name in ("samples", "bytes"))
    return SetReport(len(shards), samples, size, len(found.classes))


def _check_packed(
    found: Source, plan: Sequence[list[Candidate]], done: Sequence[FinishedShard], classes_of: dict[str, set[int]]
) -> None:
    """UsageError where a set has no image, or a class has none to learn from."""
    kinds = {"": "image", TRAIN: "training image", VAL: "held-out image"}
    for name, full in classes_of.items():
        if not full:
            shards = zip(plan, done, strict=True)
            one = next(broken for run, each in shards if run[0].set == name for broken in each.broken)
            raise UsageError(f"{found.url} has no {kinds[name]} that decodes; {one.key}, for one: {one.reason}")
        if name != VAL and not found.fixed:
            empty = [each for label, each in enumerate(found.classes) if label not in full]
            check_empty_classes(found.url, empty, f"of which no {kinds[name]} decodes")


def _compare(
    found: Source, written: dict[str, list[Shard]], classes: dict[str, set[int]], packed: Sequence[Candidate]
) -> HoldoutReport:
    return HoldoutReport(
        _count(found, written[TRAIN]),
        _count(found, written[VAL]),
        copies=len(packed) - len({candidate.contents for candidate in packed}),
        missing_in_val=tuple(found.classes[label] for label in sorted(classes[TRAIN] - classes[VAL])),
    )
