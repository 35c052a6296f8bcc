"""Shards on disk: manifest, tar, DALI index and sample table; written, read and checked here, at any fsspec URL.

    manifest.json       {"format": 1, "samples": N, "classes": [...], "shards": [{"name", "samples", "bytes"}, ...]}
    shard-000000.tar    an ordinary WebDataset tar: KEY.jpg and KEY.cls, one behind the other
    shard-000000.idx    DALI's own index of it (wds2idx, v1.2)
    shard-000000.npy    one row of 32 bytes a sample; row i lies at byte 256 + 32 i, so any run of rows is one range

Where the tars are somebody else's and stay where they are, the manifest says where (`shards_at`), and in which field of
`.json` the labels stand (`label_field`), and how many of them a sample has at most (`labels_per_sample`).

The manifest is written last: where it is, everything that it names is whole. Which samples are read, and when, is not
known here.

Next: reader.py.
"""

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import BadRequest, DataError
from data.parts import Unusable, class_numbers, stated_labels
from data.storage import PLAIN, NotThere, Reads, Storage, locate, write_file

FORMAT = 1
MANIFEST = "manifest.json"
HEADER_BYTES = 256
FLAG_DECODED = 1
FLAG_UNCHECKED = 2
"""Only the sample's headers were read: its checksum is not known."""
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
_UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
# What a global header says of every member that comes after it.
_OF_ONE_MEMBER = {"path", "size"}


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
    label_field: str | None = None
    labels_per_sample: int = 1
    shards_at: str | None = None
    storage: Reads = field(default=PLAIN, compare=False, repr=False)

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
        folder = (self.shards_at or self.url) if suffix == ".tar" else self.url
        return join(folder, self.shards[shard].name.removesuffix(".tar") + suffix)

    def labels_of(self, parts: Mapping[str, bytes]) -> tuple[int, ...]:
        """The numbers of a sample's classes, by its parts; Unusable where it has none, or one that is no class."""
        labels = class_numbers(stated_labels(parts, self.label_field), self._numbers)
        if len(labels) > self.labels_per_sample:
            raise Unusable(f"has {len(labels)} labels; {MANIFEST} says {self.labels_per_sample} at most")
        return labels

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be used: its shard (None if it never got into one), its key or source file, and why."""

    shard: str | None
    key: str
    reason: str


class TarSample(NamedTuple):
    """A sample in a tar: where it begins, its bytes up to the next one; parts: {extension: (offset, size, member)}.

    `contents` has the bytes of those parts that were asked for.
    """

    key: str
    offset: int
    bytes: int
    parts: dict[str, tuple[int, int, str]]
    contents: dict[str, bytes]


class DamagedTar(DataError):
    """A tar that is not whole, or whose samples webdataset would lose or mix up."""


def join(folder: str, name: str) -> str:
    """The URL or path of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


# The manifest.


def write_manifest(
    url: str,
    classes: Sequence[str],
    shards: Sequence[Shard],
    *,
    label_field: str | None = None,
    labels_per_sample: int = 1,
    shards_at: str | None = None,
) -> None:
    """Puts the manifest at `url`, to be called when all else is there; the same content gives the same bytes."""
    optional = {"label_field": label_field, "labels_per_sample": labels_per_sample, "shards_at": shards_at}
    lines = "".join(
        f'"{name}": {json.dumps(value, ensure_ascii=False)},\n'
        for name, value in optional.items()
        if value not in (None, 1)
    )
    rows = ",\n".join("  " + json.dumps(vars(shard), ensure_ascii=False) for shard in shards)
    samples = sum(shard.samples for shard in shards)
    text = (
        f'{{"format": {FORMAT}, "samples": {samples},\n"classes": {json.dumps(list(classes), ensure_ascii=False)},\n'
        f'{lines}"shards": [\n{rows}\n]}}\n'
    )
    fs, folder = locate(url)
    write_file(fs, join(folder, MANIFEST), text.encode())


def read_manifest(url: str, storage: Storage = PLAIN) -> Manifest:
    """What lies at `url`; BadRequest where no manifest is, or one that does not add up; DataError if unreadable."""
    place = join(url, MANIFEST)
    try:
        contents = storage.read(place)
    except NotThere:
        raise BadRequest(
            f"{place} does not exist; `coatnet data pack` makes shards with a manifest, `coatnet data index` one for"
            " shards that are there already"
        ) from None
    return replace(_parse_manifest(url, place, contents), storage=storage)


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
    optional = {name: stated[name] for name in ("label_field", "labels_per_sample", "shards_at") if name in stated}
    manifest = Manifest(url, classes, shards, hashlib.sha256(contents).hexdigest(), **optional)
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
    if type(manifest.labels_per_sample) is not int or manifest.labels_per_sample < 1:
        return f"gives a sample {manifest.labels_per_sample!r} labels"
    if not all(isinstance(each, str | None) for each in (manifest.label_field, manifest.shards_at)):
        return "has a label_field or shards_at that is no text"
    return None


# The sample table.


def sample_table(
    tar: bytes, samples: Sequence[TarSample], shapes: Sequence[tuple[int, int]], flags: int
) -> NDArray[np.void]:
    """Rows (dtype ROW) of a tar's samples; `shapes` are (height, width), in the samples' order."""
    view = memoryview(tar)
    checksums = [zlib.crc32(view[sample.offset : sample.offset + sample.bytes]) for sample in samples]
    return table_rows(samples, checksums, shapes, flags)


def table_rows(
    samples: Sequence[TarSample],
    checksums: int | Sequence[int],
    shapes: Sequence[tuple[int, int]],
    flags: int | Sequence[int],
) -> NDArray[np.void]:
    """Rows (dtype ROW) from what each sample's bytes were found to be; zeros where that is not known."""
    rows = np.zeros(len(samples), ROW)
    rows["offset"] = [sample.offset for sample in samples]
    rows["bytes"] = [sample.bytes for sample in samples]
    rows["crc"] = checksums
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


def read_rows(storage: Reads, url: str, first: int, count: int) -> NDArray[np.void]:
    """Rows first .. first + count - 1 of a sample table by one ranged read; DataError for missing or damaged ones."""
    begin, end = (HEADER_BYTES + ROW.itemsize * row for row in (first, first + count))
    rows = np.frombuffer(storage.read(url, begin, end), ROW)
    if len(_damaged(rows)):
        rows = np.frombuffer(storage.read_again(url, begin, end, "rows of a table have another checksum"), ROW)
    if len(damaged := _damaged(rows)):
        raise DataError(f"{url}: row {first + damaged[0]} is damaged; pack or index the shard again")
    return rows


def _damaged(rows: NDArray[np.void]) -> NDArray[np.int64]:
    return np.flatnonzero(rows["row_crc"] != row_checksums(rows))


# The tar and DALI's index of it.


def tar_members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member of an uncompressed tar, by its headers; tarfile.ReadError where it is damaged or cut short."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # else a million members stay in memory
            if archive.pax_headers.keys() & _OF_ONE_MEMBER:
                raise tarfile.ReadError(f"a global header before {member.name} gives all members one name or size")
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is stored with holes; write the tar without --sparse")
            yield member
        # tarfile takes a damaged header for the end of the archive, and does not look behind its end.
        stream.seek(archive.offset)
        ending = stream.read(tarfile.BLOCKSIZE)
        if len(ending) < tarfile.BLOCKSIZE or ending.strip(b"\0"):
            raise tarfile.ReadError(f"damaged or cut header at byte {archive.offset}")
        while more := stream.read(tarfile.RECORDSIZE):
            if more.strip(b"\0"):
                raise tarfile.ReadError(f"it ends at byte {archive.offset}, and more follows; is it two tars in one?")


def split_name(member: str) -> tuple[str, str]:
    """A member's key and extension as webdataset sees them: "a.b/c.seg.png" is ("a.b/c", "seg.png")."""
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension


def is_part(member: str) -> bool:
    """Whether a member is part of a sample by its name: not hidden, not webdataset's own, and with an extension."""
    key, extension = split_name(member)
    return bool(extension and key) and not key.endswith("/") and not _META.match(member)


def index_tar(tar: bytes | BinaryIO, keep: Collection[str] = ()) -> list[TarSample]:
    """The samples of an uncompressed tar, by its headers, in order; DamagedTar where webdataset would lose some.

    Members that are no part of a sample (folders, links, hidden files, names without extension) are passed over. Of
    the parts with an extension in `keep` the contents are read as well.
    """
    begun: dict[str, TarSample] = {}
    newest, end = "", 0
    stream = io.BytesIO(tar) if isinstance(tar, bytes) else tar
    try:
        for member in tar_members(stream):
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.isreg() and is_part(member.name):
                newest, extension = _begin_part(begun, newest, member)
                if extension in keep:
                    stream.seek(member.offset_data)
                    begun[newest].contents[extension] = stream.read(member.size)
    except tarfile.TarError as error:
        stream.seek(0)
        if tool := unpacker(stream.read(6)):
            raise DamagedTar(f"is compressed; unpack it first ({tool} < THIS > PLAIN.tar)") from None
        raise DamagedTar(f"not a whole tar: {error}") from error
    samples = list(begun.values())
    ends = [*(sample.offset for sample in samples), end][1:]
    return [sample._replace(bytes=stop - sample.offset) for sample, stop in zip(samples, ends, strict=True)]


def _begin_part(begun: dict[str, TarSample], newest: str, member: tarfile.TarInfo) -> tuple[str, str]:
    """Enters a part into its sample, which must be the newest or a new one; its key and extension."""
    key, extension = split_name(member.name)
    extension = extension.lower()
    if key != newest and key in begun:
        raise DamagedTar(
            f"the parts of sample {printable(key)} do not lie together; write the tar in the order of its names"
            " (tar --sort=name)"
        )
    parts = begun.setdefault(key, TarSample(key, member.offset, 0, {}, {})).parts
    if extension in parts:
        raise DamagedTar(f"sample {printable(key)} has two parts called {extension}; give them different names")
    parts[extension] = member.offset_data, member.size, member.name
    return key, extension


def unpacker(beginning: bytes) -> str | None:
    """The program that unpacks a file with this beginning; None where it is not compressed."""
    return next((tool for magic, tool in _UNPACKERS.items() if beginning.startswith(magic)), None)


def printable(name: str) -> str:
    """A name that can be printed whatever bytes it has."""
    return name.encode("utf-8", "backslashreplace").decode()


def index_text(samples: Sequence[TarSample]) -> str:
    """The samples as DALI's wds2idx (v1.2) writes them: extension, offset, size and name of each part."""
    lines = (
        " ".join(f"{split_name(name)[1]} {offset} {size} {name}" for offset, size, name in sample.parts.values())
        for sample in samples
    )
    return f"v1.2 {len(samples)}\n" + "".join(line + "\n" for line in lines)


def index_bytes(samples: Sequence[TarSample]) -> bytes:
    """The index as the bytes of its file."""
    return index_text(samples).encode("utf-8", "surrogateescape")


def key_of_line(line: str) -> str:
    """The key of the sample that a line of the index has."""
    found = re.match(r"(\S*) \d+ \d+ (.*?)\.\1(?: |$)", line)
    if not found:
        raise DataError(f"{line!r} is no line of an index")
    return found[2]
