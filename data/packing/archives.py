"""What lies in a tar or a zip, found by its headers: each file is a range of the archive's bytes, nothing is unpacked.

A tar inside a tar is a range of the outer one, and stands for a folder of its name: ImageNet's training set comes as a
tar of one tar per class. Of two files of one name the later one counts. A zip's names are UTF-8, said or not, and
backslashes in them separate where no Unix made it, or where nothing else does.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from data.errors import DataError, UsageError
from data.shards.tar_index import tar_members
from data.storage.ranged_file import RangedFile
from data.urls import has_suffix

_ZIP_HEADER_BYTES = 30
_UTF_8, _UNICODE_PATH, _UNIX = 1 << 11, 0x7075, 3
_READABLE = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class DamagedMember(ValueError):
    """A member of a zip is not what the zip says of it; the message says in a few words why."""


class ZipMember(NamedTuple):
    """How a zip holds a file: `span` bytes from its header to the next, in them `stored` bytes of contents."""

    span: int
    stored: int
    deflated: bool
    crc: int


class Entry(NamedTuple):
    """A folder or file of a source: its path inside, and where its bytes are; `fault` says why they are not.

    `offset` is None for a file of its own; in a zip it is that of the member's header. `link` is the path of the file
    that a hard link in a tar stands for, if there is one.
    """

    path: str
    folder: bool
    url: str
    offset: int | None = None
    size: int | None = None
    fault: str | None = None
    zipped: ZipMember | None = None
    link: str | None = None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system and is no image."""
    return name.startswith(".") or name == "__MACOSX"


def normalize_path(name: str) -> str:
    """A path without empty and "." parts: "./a//b/" is "a/b"."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def tar_entries(stream: BinaryIO, url: str, inside: str = "", begin: int = 0) -> Iterator[Entry]:
    """The files and folders of a tar that begins at byte `begin` of `url`, their paths below `inside`, as they lie.

    tarfile.TarError where it is damaged.
    """
    for member in tar_members(stream):
        path = normalize_path(member.name)
        if not path or any(is_hidden(part) for part in path.split("/")):
            continue
        path = inside + path
        if member.isreg() and has_suffix(path, ".tar"):
            folder = path[: -len(".tar")]
            yield Entry(folder, True, url)
            yield from _nested_entries(stream, url, folder, begin, member)
        else:
            yield _tar_entry(path, member, url, inside, begin)


def _nested_entries(stream: BinaryIO, url: str, folder: str, begin: int, member: tarfile.TarInfo) -> Iterator[Entry]:
    def read(first: int, end: int) -> bytes:
        stream.seek(member.offset_data + first)
        return stream.read(end - first)

    try:
        yield from tar_entries(RangedFile(read, member.size), url, f"{folder}/", begin + member.offset_data)
    except (tarfile.TarError, DataError) as error:
        raise tarfile.ReadError(f"{folder}.tar in it is not valid: {error}") from None


def _tar_entry(path: str, member: tarfile.TarInfo, url: str, inside: str, begin: int) -> Entry:
    fault = None if member.isreg() or member.isdir() else "a link or device inside the tar"
    link = inside + normalize_path(member.linkname) if member.islnk() else None
    return Entry(path, member.isdir(), url, begin + member.offset_data, member.size, fault, link=link)


def zip_entries(stream: BinaryIO, url: str) -> Iterator[Entry]:
    """The files and folders of a zip; zipfile.BadZipFile where its directory is damaged, which is read whole."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        begins = sorted({member.header_offset for member in members})
        ends = dict(pairwise([*begins, archive.start_dir]))
    names = [_zip_name(member, url) for member in members]
    by_dos = not any("/" in name for name in names)
    for name, member in zip(names, members, strict=True):
        if by_dos or member.create_system != _UNIX:
            name = name.replace("\\", "/")
        path = normalize_path(name)
        if path and not any(is_hidden(part) for part in path.split("/")):
            yield _zip_entry(path, name.endswith("/"), member, url, ends[member.header_offset])


def _zip_name(member: zipfile.ZipInfo, url: str) -> str:
    """A member's name: by the flag or the field that says it is UTF-8, or as UTF-8 where it can be; else UsageError."""
    if member.flag_bits & _UTF_8:
        return member.filename
    name = member.orig_filename.encode("cp437")  # as which zipfile has decoded it
    for kind, contents in _zip_extras(member.extra):
        if kind == _UNICODE_PATH and contents[1:5] == struct.pack("<I", zlib.crc32(name)):
            name = contents[5:]
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise UsageError(
            f"{url} does not say how its file names are encoded: one reads {name.decode('cp437')!r} in cp437 (DOS) and"
            f" {name.decode('gbk', 'replace')!r} in GBK; zip the folder again with UTF-8 names, or unpack it and pack"
            " the folder"
        ) from None


def _zip_extras(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """The extra fields of a member: kind and contents."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        yield kind, extra[4 : 4 + size]
        extra = extra[4 + size :]


def _zip_entry(path: str, folder: bool, member: zipfile.ZipInfo, url: str, end: int) -> Entry:
    span, deflated = end - member.header_offset, member.compress_type == zipfile.ZIP_DEFLATED
    zipped = ZipMember(span, member.compress_size, deflated, member.CRC)
    fault = None if folder else _zip_member_fault(member)
    return Entry(path, folder, url, member.header_offset, member.file_size, fault, zipped)


def _zip_member_fault(member: zipfile.ZipInfo) -> str | None:
    if member.flag_bits & 1:
        return "encrypted in the zip; zip it without a password"
    if member.compress_type not in _READABLE:
        return f"compressed in the zip by method {member.compress_type}; only stored and deflated files can be read"
    if member.external_attr >> 28 == 0o12:  # the upper half is the mode of a POSIX file, if there is any
        return "a link inside the zip"
    return None


def unzip(member: bytes, zipped: ZipMember, size: int) -> bytes:
    """The `size` bytes of a member's contents, from those between its header and the next one's; or DamagedMember."""
    if len(member) < _ZIP_HEADER_BYTES or not member.startswith(b"PK\x03\x04"):
        raise DamagedMember("damaged in the zip: no header where the zip's directory points")
    name_bytes, extra_bytes = struct.unpack_from("<HH", member, 26)  # the directory's own may be longer or shorter
    begin = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
    contents = member[begin : begin + zipped.stored]
    if zipped.deflated:
        try:
            contents = zlib.decompressobj(-zlib.MAX_WBITS).decompress(contents, size + 1)
        except zlib.error:
            raise DamagedMember("damaged in the zip: cannot be inflated") from None
    if len(contents) != size or zlib.crc32(contents) != zipped.crc:
        raise DamagedMember("damaged in the zip: wrong checksum or size")
    return contents
