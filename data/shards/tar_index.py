"""A tar's members without its bodies, and its index in the format of DALI's wds2idx (v1.2)."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from data.errors import DataError

# Members that webdataset's reader skips without a word.
_META = re.compile(r"__[^/]*__($|/)")
_UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
# What a global header says of every member that comes after it.
_OF_ONE_MEMBER = {"path", "size"}


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


# The tar and DALI's index of it.


def tar_members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member of an uncompressed tar, by its headers; tarfile.ReadError where it is damaged or cut short."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # else a million members stay in memory
            if archive.pax_headers.keys() & _OF_ONE_MEMBER:
                raise tarfile.ReadError(f"a global header before {member.name} gives all members the same name or size")
            if member.issparse():
                raise tarfile.ReadError(f"{member.name} is stored as a sparse file; write the tar without --sparse")
            yield member
        # tarfile takes a damaged header for the end of the archive, and does not look past its end.
        stream.seek(archive.offset)
        ending = stream.read(tarfile.BLOCKSIZE)
        if len(ending) < tarfile.BLOCKSIZE or ending.strip(b"\0"):
            raise tarfile.ReadError(f"damaged or cut header at byte {archive.offset}")
        while more := stream.read(tarfile.RECORDSIZE):
            if more.strip(b"\0"):
                raise tarfile.ReadError(f"it ends at byte {archive.offset}, but more follows; is it two tars in one?")


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

    Members that are no part of a sample (folders, links, hidden files, names without extension) are skipped. Of
    the parts whose extension ends in one of `keep` the contents are read as well.
    """
    begun: dict[str, TarSample] = {}
    newest, end = "", 0
    stream = io.BytesIO(tar) if isinstance(tar, bytes) else tar
    try:
        for member in tar_members(stream):
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.isreg() and is_part(member.name):
                newest, extension = _begin_part(begun, newest, member)
                if extension.rpartition(".")[2] in keep:
                    stream.seek(member.offset_data)
                    begun[newest].contents[extension] = stream.read(member.size)
    except tarfile.TarError as error:
        stream.seek(0)
        if tool := decompressor_for(stream.read(6)):
            raise DamagedTar(f"is compressed; unpack it first ({tool} < THIS > PLAIN.tar)") from None
        raise DamagedTar(f"not a valid tar: {error}") from error
    samples = list(begun.values())
    ends = [*(sample.offset for sample in samples), end][1:]
    return [sample._replace(bytes=stop - sample.offset) for sample, stop in zip(samples, ends, strict=True)]


def _begin_part(begun: dict[str, TarSample], newest: str, member: tarfile.TarInfo) -> tuple[str, str]:
    """Enters a part into its sample, which must be the newest or a new one; its key and extension."""
    key, extension = split_name(member.name)
    extension = extension.lower()
    if key != newest and key in begun:
        raise DamagedTar(
            f"the parts of sample {printable(key)} are not next to each other; write the tar sorted by name"
            " (tar --sort=name)"
        )
    parts = begun.setdefault(key, TarSample(key, member.offset, 0, {}, {})).parts
    if extension in parts:
        raise DamagedTar(f"sample {printable(key)} has two parts called {extension}; give them different names")
    parts[extension] = member.offset_data, member.size, member.name
    return key, extension


def decompressor_for(beginning: bytes) -> str | None:
    """The program that unpacks a file with this beginning; None where it is not compressed."""
    return next((tool for magic, tool in _UNPACKERS.items() if beginning.startswith(magic)), None)


def printable(name: str) -> str:
    """A name that can be printed whatever bytes it has."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def index_bytes(samples: Sequence[TarSample]) -> bytes:
    """The samples as DALI's wds2idx (v1.2) writes them: extension, offset, size and name of each part."""
    lines = (
        " ".join(f"{split_name(name)[1]} {offset} {size} {name}" for offset, size, name in sample.parts.values())
        for sample in samples
    )
    return "\n".join([f"v1.2 {len(samples)}", *lines, ""]).encode("utf-8", "surrogateescape")


def key_of_line(line: str) -> str:
    """The key of the sample that a line of the index has."""
    found = re.match(r"(\S*) \d+ \d+ (.*?)\.\1(?: |$)", line)
    if not found:
        raise DataError(f"{line!r} is not a line of an index")
    return found[2]
