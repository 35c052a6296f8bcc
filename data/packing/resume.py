"""A pack's destination: what lies there already, which shards are whole, and what makes it a set.

Shards are numbered by the plan, so one of which no image decodes leaves a gap. With images held out the destination
holds two sets, each in its folder (`train/`, `val/`), of one request and plan. Nothing torn is kept, and files of other
requests are never mixed. When the manifests are there, the notes of the work go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError, UsageError
from data.packing.work import Work, list_folder
from data.shards.manifest import MANIFEST, BadSample, Shard, write_manifest
from data.shards.sample_table import HEADER_BYTES, ROW
from data.storage.remote import DEFAULT, open_fs, write_file
from data.urls import join

PACKING = ".packing"
_OWN_FILE = re.compile(r"((?:train/|val/)?)\.?(shard-\d{6,})\.(tar|idx|npy)(?:\.[0-9a-f]{8}\.partial)?")


class FinishedShard(NamedTuple):
    """A shard of the plan that is written: `shard` is None where no image of it decodes.

    `broken` are the images that were left out, `unused` the classes of each; `copies` of the others have the bytes of
    one that is before them in the listing.
    """

    shard: Shard | None
    index_bytes: int
    broken: tuple[BadSample, ...]
    unused: tuple[tuple[int, ...], ...]
    copies: int


def check_destination(source: str, destination: str, sets: Sequence[str], overwrite: bool) -> None:
    """UsageError where the sets cannot go into `destination`, or would replace other shards unasked."""
    source_fs, root = open_fs(source)
    fs, folder = open_fs(destination)
    for name in _places(sets):
        place = inside(folder, name)
        if type(fs) is type(source_fs) and _within(fs, place, root):
            raise UsageError(
                f"{inside(destination, name)} is inside the source {source}; choose a destination outside it"
            )
        if fs.isfile(place):
            raise UsageError(f"{inside(destination, name)} is a file; the destination must be a folder")
    names = files_of(destination, sets)
    is_unfinished = PACKING in names and sets[-1] + MANIFEST not in names
    for name in () if overwrite or is_unfinished else names:
        if _is_shard(name) or name.rpartition("/")[2] == MANIFEST:
            place = inside(folder, name.rpartition("/")[0])
            raise UsageError(f"{place} already holds shards; pack elsewhere, or pass --overwrite to replace them")


def is_unfinished(destination: str, sets: Sequence[str]) -> bool:
    """Whether a pack is under way there, or ended early."""
    return DEFAULT.exists(join(destination, PACKING)) and not DEFAULT.exists(_manifest_of(destination, sets[-1]))


def clear(destination: str, sets: Sequence[str]) -> None:
    """Takes away what makes an earlier pack a whole set, and makes the folders; UsageError where that is impossible."""
    fs, folder = open_fs(destination)
    try:
        for name in _places(sets):
            if DEFAULT.exists(_manifest_of(destination, name)):
                fs.rm_file(_manifest_of(folder, name))
        for name in sets:
            fs.makedirs(inside(folder, name), exist_ok=True)
    except Exception as error:  # the back ends' exceptions share no base class
        raise UsageError(f"{destination} cannot be written: {error}") from error


def take_back(destination: str, sets: Sequence[str]) -> None:
    """Removes the folders that `clear` made, if nothing is in them."""
    fs, folder = open_fs(destination)
    for name in (*sets, "") if isinstance(fs, LocalFileSystem) else ():
        with suppress(OSError):
            os.rmdir(inside(folder, name))


def write_shard(
    work: Work, plan: dict[str, Any], number: int, name: str, files: dict[str, bytes], done: FinishedShard
) -> None:
    """Writes a shard's files (by suffix) beside the notes, and then that shard `number` of the plan is finished."""
    folder = work.folder.removesuffix(f"/{PACKING}")
    for suffix, contents in files.items():
        write_file(work.fs, join(folder, name + suffix), contents)
    broken = [[each.key, each.reason] for each in done.broken]
    facts = {**done._asdict(), "shard": done.shard and vars(done.shard), "broken": broken}
    work.record(number, listing=plan["listing"], **facts)


def finished_shards(
    work: Work, plan: dict[str, Any], numbers: Iterable[int], sets: Sequence[str]
) -> dict[int, FinishedShard]:
    """Those of these shards that have a record by this plan, and whose files have the sizes noted in it."""
    sizes = files_of(work.url, sets)
    records = {number: each for number, each in work.records(numbers).items() if each["listing"] == plan["listing"]}
    found = {number: _finished(record) for number, record in records.items()}
    return {number: each for number, each in found.items() if _has_its_files(each, sizes)}


def commit(work: Work, classes: Sequence[str], written: Mapping[str, list[Shard]], labels_per_sample: int) -> None:
    """Removes what earlier packs left, which globs would take for samples, and writes the manifests last.

    `written` are the shards of each set, named from the destination on. Another part may do the same at this moment,
    or still write a shard: it finds the manifests where its unfinished file is gone.
    """
    stems = {shard.stem for shards in written.values() for shard in shards}
    _remove(work.url, list(written), lambda own: own[1] + own[2] not in stems)
    label_field = "labels" if labels_per_sample > 1 else None
    for name, shards in written.items():
        own_names = [replace(shard, name=shard.name.removeprefix(name)) for shard in shards]
        place = inside(work.url, name)
        write_manifest(place, classes, own_names, label_field=label_field, labels_per_sample=labels_per_sample)
    _remove(work.url, list(written), lambda own: own[0].endswith(".partial"))
    work.remove()


def has_manifests(destination: str, sets: Sequence[str]) -> bool:
    """Whether all sets are whole."""
    return all(DEFAULT.exists(_manifest_of(destination, name)) for name in sets)


def _manifest_of(destination: str, name: str) -> str:
    return join(inside(destination, name), MANIFEST)


def _remove(destination: str, sets: Sequence[str], is_stale: Callable[[re.Match[str]], bool]) -> None:
    fs, folder = open_fs(destination)
    for name in files_of(destination, sets):
        if (own := _OWN_FILE.fullmatch(name)) and is_stale(own):
            with suppress(FileNotFoundError):  # another part may do the same
                fs.rm_file(join(folder, name))


def _finished(record: dict[str, Any]) -> FinishedShard:
    return FinishedShard(
        record["shard"] and Shard(**record["shard"]),
        record["index_bytes"],
        tuple(BadSample(None, *each) for each in record["broken"]),
        tuple(tuple(each) for each in record["unused"]),
        record["copies"],
    )


def _has_its_files(done: FinishedShard, sizes: dict[str, int]) -> bool:
    if done.shard is None:
        return True
    stem, table = done.shard.stem, HEADER_BYTES + ROW.itemsize * done.shard.samples
    expected = {f"{stem}.tar": done.shard.bytes, f"{stem}.npy": table, f"{stem}.idx": done.index_bytes}
    return expected.items() <= sizes.items()


def _is_shard(name: str) -> bool:
    return name.endswith(".tar") and _OWN_FILE.fullmatch(name) is not None


def _places(sets: Sequence[str]) -> Sequence[str]:
    """Where shards may lie in a destination: those of its sets, and of a set that was packed into it whole."""
    return list(dict.fromkeys(("", *sets)))


def inside(folder: str, name: str) -> str:
    """A folder, or one inside it."""
    return join(folder, name.rstrip("/")) if name else folder


def _within(fs: fsspec.AbstractFileSystem, inner: str, outer: str) -> bool:
    if isinstance(fs, LocalFileSystem):
        inner, outer = os.path.realpath(inner), os.path.realpath(outer)
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def files_of(destination: str, sets: Sequence[str]) -> dict[str, int]:
    """The bytes of each file in a destination and in its sets' folders, by its name from there on; folders too."""
    fs, folder = open_fs(destination)
    fs.invalidate_cache()
    sizes = {}
    for name in _places(sets):
        try:
            infos = list_folder(fs, inside(folder, name))
        except DataError as error:
            raise UsageError(str(error)) from error
        sizes |= {name + info["name"].rstrip("/").rpartition("/")[2]: info["size"] for info in infos}
    return sizes
