"""A person's images packed into shuffled WebDataset shards; the same source and seed give the same bytes.

Images keep their bytes. Each is decoded once, in threads, so that training meets no damaged one; what does not decode
is listed and left out. The order is one permutation of all images, and shards are cut from it by the sizes that the
listing gave, before anything is read: neither threads nor damaged images move a sample to another shard. At most three
shards are in memory. The manifest comes last, so an interrupted pack never looks whole. Who trains on the shards is
not known here.

Next: order.py.
"""

import io
import os
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from webdataset import TarWriter

from data import codec, draws, shards
from data.errors import BadRequest, DataError
from data.shards import Broken, Shard
from data.source import Entry, Source, list_source, printable, refuse_empty_classes

_OWN_FILE = re.compile(r"\.?(shard-\d{6,})\.(tar|idx|npy)(\.partial)?")
_CHUNK_IMAGES, _CHUNK_BYTES = 32, 2**24
_WRITES_AT_ONCE = 2
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PackReport:
    """What was packed (shards, samples, bytes of tar, classes), and what was left out of it, by path."""

    shards: int
    samples: int
    bytes: int
    classes: int
    broken: tuple[Broken, ...]


class Candidate(NamedTuple):
    """An image on its way into a shard."""

    image: Entry
    key: str
    label: int


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
) -> PackReport:
    """Packs a folder of class folders, or a tar of one, into shards at `destination`.

    A shard has at most `samples_per_shard` samples and about `bytes_per_shard` bytes of tar (at least one sample),
    whichever comes first. `progress(done, total)` counts image files. BadRequest where source, destination or numbers
    cannot be; DataError where reading or writing fails.
    """
    _refuse_numbers(samples_per_shard, bytes_per_shard, seed, workers)
    _refuse_destination(source, destination, overwrite)
    found = list_source(source)
    fs, folder = _empty_folder(destination)
    candidates = _shuffled(found, seed)
    plan = cut(candidates, _tar_bytes, samples_per_shard, bytes_per_shard)
    left_out = list(found.broken)
    progress(0, len(candidates))
    with ThreadPoolExecutor(workers) as pool:
        examined = _examined(pool, found, candidates, workers, left_out, progress)
        written, labels = _write_shards(pool, fs, folder, plan, examined)
    empty = (name for label, name in enumerate(found.classes) if not labels[label])
    refuse_empty_classes(source, empty, "of which no image decodes")
    _remove_leftovers(fs, folder, {shard.name.removesuffix(".tar") for shard in written})
    shards.write_manifest(destination, found.classes, written)
    return PackReport(
        shards=len(written),
        samples=sum(shard.samples for shard in written),
        bytes=sum(shard.bytes for shard in written),
        classes=len(found.classes),
        broken=tuple(sorted(left_out, key=lambda each: each.key)),
    )


# Before anything is read.


def _refuse_numbers(samples_per_shard: int | None, bytes_per_shard: int | None, seed: int, workers: int) -> None:
    if samples_per_shard is None and bytes_per_shard is None:
        raise BadRequest("neither samples nor bytes per shard are given; give one or both")
    numbers = {"samples per shard": samples_per_shard, "bytes per shard": bytes_per_shard, "workers": workers}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise BadRequest(f"{name} is {number}; it must be at least 1")
    if not 0 <= seed < draws.SEEDS:
        raise BadRequest(f"seed is {seed}; it must be from 0 to {draws.SEEDS - 1}")


def _refuse_destination(source: str, destination: str, overwrite: bool) -> None:
    (source_fs, root), (fs, folder) = shards.locate(source), shards.locate(destination)
    if type(fs) is type(source_fs) and _within(fs, folder, root):
        raise BadRequest(f"{destination} lies in the source {source}; choose a destination outside it")
    if fs.isfile(folder):
        raise BadRequest(f"{destination} is a file; the destination must be a folder")
    names = _names(fs, folder)
    # A pack that was interrupted left a table beside each tar; a tar without one is somebody else's.
    tars = {name.removesuffix(".tar") for name in names if _OWN_FILE.fullmatch(name) and name.endswith(".tar")}
    foreign = any(f"{name}.npy" not in names for name in tars)
    if (shards.MANIFEST in names or foreign) and not overwrite:
        raise BadRequest(f"{destination} holds shards already; pack elsewhere, or with --overwrite to replace them")


def _empty_folder(destination: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The destination's file system and folder, made, with no manifest in it."""
    fs, folder = shards.locate(destination)
    manifest = shards.join(folder, shards.MANIFEST)
    try:
        fs.makedirs(folder, exist_ok=True)
        if fs.exists(manifest):
            fs.rm_file(manifest)
    except Exception as error:  # the back ends' exceptions share no base class
        raise BadRequest(f"{destination} cannot be written: {error}") from error
    return fs, folder


def _within(fs: fsspec.AbstractFileSystem, inner: str, outer: str) -> bool:
    if isinstance(fs, LocalFileSystem):
        inner, outer = os.path.realpath(inner), os.path.realpath(outer)
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def _names(fs: fsspec.AbstractFileSystem, folder: str) -> set[str]:
    fs.invalidate_cache()
    try:
        return {path.rstrip("/").rpartition("/")[2] for path in fs.ls(folder, detail=False)}
    except FileNotFoundError:  # object stores have no empty folders
        return set()
    except Exception as error:  # the back ends' exceptions share no base class
        raise BadRequest(f"{folder} cannot be listed: {error}") from error


def _remove_leftovers(fs: fsspec.AbstractFileSystem, folder: str, written: set[str]) -> None:
    """Takes away what an earlier or interrupted pack left beside the shards, which globs would take for samples."""
    for name in _names(fs, folder):
        own = _OWN_FILE.fullmatch(name)
        if own and (own[1] not in written or name.endswith(".partial")):
            fs.rm_file(shards.join(folder, name))


# The order, the keys and the shards, from the listing alone.


def _shuffled(found: Source, seed: int) -> list[Candidate]:
    numbers = {name: label for label, name in enumerate(found.classes)}
    keys = keys_of([image.path for image in found.images])
    candidates = [
        Candidate(image, key, numbers[image.path.partition("/")[0]])
        for image, key in zip(found.images, keys, strict=True)
    ]
    return [candidates[i] for i in draws.permutation(seed, draws.Purpose.PACK, 0, len(candidates))]


def keys_of(paths: Iterable[str]) -> list[str]:
    """A key for each path, all different: no suffix, and only letters, digits, "_", "-" and "/".

    webdataset ends a key at its first dot and passes over "__x__/..."; DALI's index is cut at spaces. Of paths with
    the same key the first keeps it, the next get "-2", "-3", ...
    """
    taken: dict[str, int] = {}
    keys = []
    for path in paths:
        plain = re.sub(r"[^\w/-]", "_", unicodedata.normalize("NFC", os.path.splitext(path)[0]))
        key = plain = re.sub(r"^__+", "_", plain)
        while key in taken:
            taken[plain] += 1
            key = f"{plain}-{taken[plain]}"
        taken[key] = 1
        keys.append(key)
    return keys


def cut(
    items: Iterable[Item], bytes_of: Callable[[Item], int], most_items: int | None, most_bytes: int | None
) -> Iterator[list[Item]]:
    """The items in runs of at most this many items and bytes; a run has at least one item."""
    run: list[Item] = []
    size = 0
    for item in items:
        more = bytes_of(item)
        if run and (len(run) == most_items or (most_bytes is not None and size + more > most_bytes)):
            yield run
            run, size = [], 0
        run.append(item)
        size += more
    if run:
        yield run


def _image_bytes(candidate: Candidate) -> int:
    return candidate.image.size or 0


def _tar_bytes(candidate: Candidate) -> int:
    """What a sample takes in a tar: two headers, the label's block, and the image in whole blocks."""
    return 3 * 512 + -(-_image_bytes(candidate) // 512) * 512


# Reading and decoding, in threads; the results come in order.


def _examined(
    pool: ThreadPoolExecutor,
    found: Source,
    candidates: Sequence[Candidate],
    workers: int,
    left_out: list[Broken],
    progress: Callable[[int, int], None],
) -> Iterator[Examined]:
    """Every candidate in order, read and decoded; those that are broken are added to `left_out` on their way."""
    chunks = cut(candidates, _image_bytes, _CHUNK_IMAGES, _CHUNK_BYTES)
    results = _in_order(pool, lambda chunk: [_examine(found, each) for each in chunk], chunks, 2 * workers)
    for done, each in enumerate(chain.from_iterable(results), start=1):
        if each.picture is None:
            left_out.append(Broken(None, printable(each.candidate.image.path), each.reason))
        progress(done, len(candidates))
        yield each


def _examine(found: Source, candidate: Candidate) -> Examined:
    encoded = found.read(candidate.image)
    try:
        return Examined(candidate, encoded, codec.examine(encoded), "")
    except codec.Undecodable as error:
        return Examined(candidate, b"", None, str(error))


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    running: deque[Future[Result]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


# Writing.


def _write_shards(
    pool: ThreadPoolExecutor,
    fs: fsspec.AbstractFileSystem,
    folder: str,
    plan: Iterable[list[Candidate]],
    examined: Iterator[Examined],
) -> tuple[list[Shard], Counter[int]]:
    """The shards, written while the next is built, and how many samples each label has."""
    written: list[Shard] = []
    labels: Counter[int] = Counter()
    writes: deque[Future[Shard]] = deque()
    named = 0
    for candidates in plan:
        tar, shapes = _tar(islice(examined, len(candidates)), labels)
        if shapes:
            writes.append(pool.submit(_write_shard, fs, folder, f"shard-{named:06d}", tar, shapes))
            named += 1
        if len(writes) > _WRITES_AT_ONCE:
            written.append(writes.popleft().result())
    return written + [write.result() for write in writes], labels


def _tar(samples: Iterable[Examined], labels: Counter[int]) -> tuple[bytes, list[tuple[int, int]]]:
    """A tar of those samples that decoded, and their (height, width)."""
    stream, shapes = io.BytesIO(), []
    with TarWriter(stream, encoder=False, mtime=0) as tar:  # any other mtime makes other bytes each time
        for (_, key, label), encoded, picture, _ in samples:
            if picture is not None:
                tar.write({"__key__": key, picture.kind: encoded, "cls": str(label).encode()})
                shapes.append((picture.height, picture.width))
                labels[label] += 1
    return stream.getvalue(), shapes


def _write_shard(
    fs: fsspec.AbstractFileSystem, folder: str, name: str, tar: bytes, shapes: Sequence[tuple[int, int]]
) -> Shard:
    samples = shards.index_tar(tar)
    if len(samples) != len(shapes):
        raise DataError(f"{name}.tar has {len(samples)} samples by its headers and was given {len(shapes)}")
    rows = shards.sample_table(tar, samples, shapes, shards.FLAG_DECODED)
    path = shards.join(folder, name)
    shards.write_file(fs, f"{path}.npy", shards.table_bytes(rows))
    shards.write_file(fs, f"{path}.idx", shards.index_text(samples).encode("utf-8"))
    shards.write_file(fs, f"{path}.tar", tar)
    return Shard(f"{name}.tar", len(samples), len(tar))
