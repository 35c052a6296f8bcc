"""Shards on disk: manifest, tar, DALI index and sample table; written, read and checked here, at any fsspec URL.

    manifest.json       {"format": 1, "samples": N, "classes": [...], "shards": [{"name", "samples", "bytes"}, ...]}
    shard-000000.tar    an ordinary WebDataset tar: KEY.jpg and KEY.cls, one behind the other
    shard-000000.idx    DALI's own index of it (wds2idx, v1.2)
    shard-000000.npy    one row of 32 bytes a sample; row i lies at byte 256 + 32 i, so any run of rows is one range

The manifest is written last: where it is, everything that it names is whole. Which samples are read, and when, is not
known here.

Next: reader.py.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from data.errors import BadRequest, DataError

FORMAT = 1
MANIFEST = "manifest.json"
HEADER_BYTES = 256
FLAG_DECODED = 1
ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header, an extended header included
        ("bytes", "<u4"),  # from there to the next sample's first header
        ("crc", "<u4"),  # zlib.crc32 of exactly these bytes
        ("height", "<u4"),  # as decoded, EXIF orientation applied
        ("width", "<u4"),
        ("flags", "<u4"),
        ("row_crc", "<u4"),  # zlib.crc32 of the 28 bytes before it: a wrong size would crash DALI's decoder
    ]
)
# Members that webdataset's reader passes over without a word.
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name beside the manifest, its samples, its bytes."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What lies at `url`; `fingerprint` is the SHA-256 of the manifest's bytes, in hexadecimal."""

    url: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str

    @cached_property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def mean_sample_bytes(self) -> float:
        """Bytes of tar a sample takes on average."""
        return sum(shard.bytes for shard in self.shards) / self.samples

    def url_of(self, shard: int, suffix: str = ".tar") -> str:
        """Where a shard's tar lies, or its ".npy" or ".idx"."""
        return join(self.url, self.shards[shard].name.removesuffix(".tar") + suffix)


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be used: its shard (None if it never got into one), its key or source file, and why."""

    shard: str | None
    key: str
    reason: str


class TarSample(NamedTuple):
    """A sample in a tar: where it begins, its bytes up to the next one; parts: {extension: (offset, size, member)}."""

    key: str
    offset: int
    bytes: int
    parts: dict[str, tuple[int, int, str]]


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it that a URL or path names; BadRequest where nothing reads such URLs."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise BadRequest(f"{url} cannot be opened: {error}") from None


def join(folder: str, name: str) -> str:
    """The URL or path of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def write_file(fs: fsspec.AbstractFileSystem, path: str, contents: bytes) -> None:
    """Puts a file at `path` whole: on a local disk nobody sees half of it under its name. DataError if it fails."""
    folder, _, name = path.rpartition("/")
    partial = f"{folder}/.{name}.partial" if isinstance(fs, LocalFileSystem) else path
    try:
        fs.pipe_file(partial, contents)
        if partial != path:
            os.replace(partial, path)
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{path} cannot be written: {error}") from error


# The manifest.


def write_manifest(url: str, classes: Sequence[str], shards: Sequence[Shard]) -> None:
    """Puts the manifest at `url`, to be called when all shards lie there; the same content gives the same bytes."""
    rows = ",\n".join("  " + json.dumps(vars(shard), ensure_ascii=False) for shard in shards)
    samples = sum(shard.samples for shard in shards)
    text = (
        f'{{"format": {FORMAT}, "samples": {samples},\n"classes": {json.dumps(list(classes), ensure_ascii=False)},\n'
        f'"shards": [\n{rows}\n]}}\n'
    )
    fs, folder = locate(url)
    write_file(fs, join(folder, MANIFEST), text.encode())


def read_manifest(url: str) -> Manifest:
    """What lies at `url`; BadRequest where no manifest is, or one that does not add up; DataError if unreadable."""
    fs, folder = locate(url)
    place = join(url, MANIFEST)
    try:
        contents = fs.cat_file(join(folder, MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise BadRequest(f"{place} does not exist; `coatnet data pack` makes shards with a manifest") from None
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{place} cannot be read: {error}") from error
    return _parse_manifest(url, place, contents)


def _parse_manifest(url: str, place: str, contents: bytes) -> Manifest:
    try:
        stated: Any = json.loads(contents)
    except ValueError as error:
        raise BadRequest(f"{place} is not JSON ({error}); pack again") from None
    if not isinstance(stated, dict) or "format" not in stated:
        raise BadRequest(f"{place} is not a manifest of shards: it has no `format`; is the path another?")
    if stated["format"] != FORMAT:
        raise BadRequest(f"{place} has format {stated['format']}; this version reads format {FORMAT}")
    try:
        shards = tuple(Shard(each["name"], each["samples"], each["bytes"]) for each in stated["shards"])
        classes, samples = tuple(stated["classes"]), stated["samples"]
    except (KeyError, TypeError) as error:
        raise BadRequest(f"{place} is not a whole manifest ({error!r}); pack again") from None
    manifest = Manifest(url, classes, shards, hashlib.sha256(contents).hexdigest())
    if fault := _fault(manifest, samples):
        raise BadRequest(f"{place} {fault}; pack again")
    return manifest


def _fault(manifest: Manifest, samples: object) -> str | None:
    """What does not hold of a manifest, in a few words."""
    if not manifest.classes or not all(isinstance(each, str) for each in manifest.classes):
        return "names no classes"
    if len(set(manifest.classes)) < len(manifest.classes):
        return "names a class twice"
    if not manifest.shards:
        return "names no shards"
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or not shard.name.endswith(".tar"):
            return f"names a shard {shard.name!r}, which is no .tar"
        if any(type(number) is not int or number < 1 for number in (shard.samples, shard.bytes)):
            return f"gives {shard.name} {shard.samples!r} samples in {shard.bytes!r} bytes"
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        return "names a shard twice"
    if manifest.samples != samples:
        return f"says {samples!r} samples, and its shards have {manifest.samples}"
    return None


# The sample table.


def sample_table(
    tar: bytes, samples: Sequence[TarSample], shapes: Sequence[tuple[int, int]], flags: int
) -> NDArray[np.void]:
    """Rows (dtype ROW) of a tar's samples; `shapes` are (height, width), in the samples' order."""
    view = memoryview(tar)
    rows = np.zeros(len(samples), ROW)
    rows["offset"] = [sample.offset for sample in samples]
    rows["bytes"] = [sample.bytes for sample in samples]
    rows["crc"] = [zlib.crc32(view[sample.offset : sample.offset + sample.bytes]) for sample in samples]
    rows["height"], rows["width"] = np.array(shapes, np.uint32).reshape(-1, 2).T
    rows["flags"] = flags
    rows["row_crc"] = row_checksums(rows)
    return rows


def row_checksums(rows: NDArray[np.void]) -> list[int]:
    """What each row's `row_crc` must be."""
    contents, size = memoryview(rows.tobytes()), ROW.itemsize
    return [zlib.crc32(contents[begin : begin + size - 4]) for begin in range(0, size * len(rows), size)]


def table_bytes(rows: NDArray[np.void]) -> bytes:
    """The rows as an .npy file, which `numpy.load` opens, with a header of exactly 256 bytes."""
    described = repr({"descr": ROW.descr, "fortran_order": False, "shape": rows.shape}).encode()
    length = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + described.ljust(length - 1) + b"\n" + rows.tobytes()


def read_rows(fs: fsspec.AbstractFileSystem, path: str, first: int, count: int) -> NDArray[np.void]:
    """Rows first .. first + count - 1 of a sample table by one ranged read; DataError for missing or damaged ones."""
    begin, end = (HEADER_BYTES + ROW.itemsize * row for row in (first, first + count))
    contents = fs.cat_file(path, start=begin, end=end)
    if len(contents) != end - begin:
        raise DataError(f"{path} gave {len(contents)} bytes for rows {first} to {first + count - 1}, not {end - begin}")
    rows = np.frombuffer(contents, ROW)
    damaged = np.flatnonzero(rows["row_crc"] != row_checksums(rows))
    if len(damaged):
        raise DataError(f"{path}: row {first + damaged[0]} is damaged; pack or index the shard again")
    return rows


# The tar and DALI's index of it.


def tar_members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member of an uncompressed tar, by its headers; tarfile.ReadError where it is damaged or cut short."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # else a million members stay in memory
            yield member
        # tarfile takes a damaged header for the end of the archive.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged or cut header at byte {archive.offset}")


def split_name(member: str) -> tuple[str, str]:
    """A member's key and extension as webdataset sees them: "a.b/c.seg.png" is ("a.b/c", "seg.png")."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension


def index_tar(tar: bytes | BinaryIO) -> list[TarSample]:
    """The samples of an uncompressed tar, by its headers, in order; DataError where webdataset would lose some.

    Members that webdataset passes over (folders, links, hidden files, names without extension) are passed over.
    """
    begun: dict[str, tuple[int, dict[str, tuple[int, int, str]]]] = {}
    newest, end = None, 0
    try:
        for member in tar_members(io.BytesIO(tar) if isinstance(tar, bytes) else tar):
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            key, extension = split_name(member.name)
            if not member.isreg() or not extension or not key or key.endswith("/") or _META.match(key):
                continue
            if key != newest and key in begun:
                raise DataError(f"the parts of sample {key} do not lie together; pack the tar in the order of its keys")
            _, parts = begun.setdefault(key, (member.offset, {}))
            if extension.lower() in parts:
                raise DataError(f"sample {key} has two parts called {extension.lower()}; give them different names")
            parts[extension.lower()] = member.offset_data, member.size, member.name
            newest = key
    except tarfile.TarError as error:
        raise DataError(f"not a whole tar: {error}") from error
    ends = [*(offset for offset, _ in begun.values()), end][1:]
    return [
        TarSample(key, offset, stop - offset, parts)
        for (key, (offset, parts)), stop in zip(begun.items(), ends, strict=True)
    ]


def index_text(samples: Sequence[TarSample]) -> str:
    """The samples as DALI's wds2idx (v1.2) writes them: extension, offset, size and name of each part."""
    lines = (
        " ".join(f"{split_name(name)[1]} {offset} {size} {name}" for offset, size, name in sample.parts.values())
        for sample in samples
    )
    return f"v1.2 {len(samples)}\n" + "".join(line + "\n" for line in lines)
