"""What lies in a tar or a zip, found by its headers: each file is a range of the archive's bytes, nothing is unpacked.

A tar inside a tar is a range of the outer one, and stands for a folder of its name: ImageNet's training set comes as a
tar of one tar per class. Of two files of one name the later one counts.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from data.errors import DataError
from data.shards.tar_index import tar_members
from data.storage.ranged_file import RangedFile

_ZIP_HEADER_BYTES = 30
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

    `offset` is None for a file of its own; in a zip it is that of the member's header.
    """

    path: str
    folder: bool
    url: str
    offset: int | None = None
    size: int | None = None
    fault: str | None = None
    zipped: ZipMember | None = None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system and is no image."""
    return name.startswith(".") or name == "__MACOSX"


def normalize_path(name: str) -> str:
    """A path without empty and "." parts: "./a//b/" is "a/b"."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def tar_entries(stream: BinaryIO, url: str, inside: str = "", begin: int = 0) -> dict[str, Entry]:
    """The files and folders of a tar that begins at byte `begin` of `url`, by path below `inside`; tarfile.TarError."""
    entries: dict[str, Entry] = {}
    for member in tar_members(stream):
        path = normalize_path(member.name)
        if not path or any(is_hidden(part) for part in path.split("/")):
            continue
        path = inside + path
        if member.isreg() and path.lower().endswith(".tar"):
            folder = path[: -len(".tar")]
            entries |= {folder: Entry(folder, True, url)} | _nested_entries(stream, url, folder, begin, member)
        else:
            entries[path] = _tar_entry(path, member, url, begin, entries.get(inside + normalize_path(member.linkname)))
    return entries


def _nested_entries(stream: BinaryIO, url: str, folder: str, begin: int, member: tarfile.TarInfo) -> dict[str, Entry]:
    def read(first: int, end: int) -> bytes:
        stream.seek(member.offset_data + first)
        return stream.read(end - first)

    try:
        return tar_entries(RangedFile(read, member.size), url, f"{folder}/", begin + member.offset_data)
    except (tarfile.TarError, DataError) as error:
        raise tarfile.ReadError(f"{folder}.tar in it is not whole: {error}") from None


def _tar_entry(path: str, member: tarfile.TarInfo, url: str, begin: int, linked: Entry | None) -> Entry:
    if member.islnk() and linked:
        return linked._replace(path=path)
    fault = None if member.isreg() or member.isdir() else "a link or device inside the tar"
    return Entry(path, member.isdir(), url, begin + member.offset_data, member.size, fault)


def zip_entries(stream: BinaryIO, url: str) -> dict[str, Entry]:
    """The files and folders of a zip, by path; zipfile.BadZipFile where its directory is damaged."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        begins = sorted({member.header_offset for member in members})
        ends = dict(pairwise([*begins, archive.start_dir]))
    found = ((normalize_path(member.filename), member) for member in members)
    return {
        path: _zip_entry(path, member, url, ends[member.header_offset])
        for path, member in found
        if path and not any(is_hidden(part) for part in path.split("/"))
    }


def _zip_entry(path: str, member: zipfile.ZipInfo, url: str, end: int) -> Entry:
    span, deflated = end - member.header_offset, member.compress_type == zipfile.ZIP_DEFLATED
    zipped = ZipMember(span, member.compress_size, deflated, member.CRC)
    return Entry(path, member.is_dir(), url, member.header_offset, member.file_size, _zip_member_fault(member), zipped)


def _zip_member_fault(member: zipfile.ZipInfo) -> str | None:
    if member.is_dir():
        return None
    if member.flag_bits & 1:
        return "encrypted in the zip; zip it without a password"
    if member.compress_type not in _READABLE:
        return f"compressed in the zip by method {member.compress_type}; stored and deflated files are read"
    if member.external_attr >> 28 == 0o12:  # the upper half is the mode of a POSIX file, if there is any
        return "a link inside the zip"
    return None


def unzip(member: bytes, zipped: ZipMember, size: int) -> bytes:
    """The `size` bytes of a member's contents, from those between its header and the next one's; or DamagedMember."""
    if len(member) < _ZIP_HEADER_BYTES or not member.startswith(b"PK\x03\x04"):
        raise DamagedMember("damaged in the zip: no header where its directory says")
    name_bytes, extra_bytes = struct.unpack_from("<HH", member, 26)  # the directory's own may be longer or shorter
    begin = _ZIP_HEADER_BYTES + name_bytes + extra_bytes
    contents = member[begin : begin + zipped.stored]
    if zipped.deflated:
        try:
            contents = zlib.decompressobj(-zlib.MAX_WBITS).decompress(contents, size + 1)
        except zlib.error:
            raise DamagedMember("damaged in the zip: does not inflate") from None
    if len(contents) != size or zlib.crc32(contents) != zipped.crc:
        raise DamagedMember("damaged in the zip: does not have its checksum")
    return contents
