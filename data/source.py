"""The images that a person brings: a folder of class folders, or an uncompressed tar of one, at any fsspec URL.

Listing reads names and sizes only. The class of an image is its first folder; deeper folders are part of its name; one
outer folder around all classes is taken off. Hidden files are nobody's. Every other file is either an image by its
suffix or listed as broken with the reason. The same files give the same listing, from a folder or a tar of it. What
becomes of the images is not known here.

Next: pack.py.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data.errors import BadRequest, DataError
from data.shards import Broken, locate, tar_members

SUFFIXES = (".bmp", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}


class Entry(NamedTuple):
    """A folder or file of the source: its path inside, and where its bytes are; `fault` says why they are not."""

    path: str
    folder: bool
    place: str
    offset: int | None = None
    size: int | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Source:
    """Classes in sorted order, their images in the order of their paths, and what was left out."""

    url: str
    fs: fsspec.AbstractFileSystem
    root: str
    classes: tuple[str, ...]
    images: tuple[Entry, ...]
    broken: tuple[Broken, ...]

    def read(self, image: Entry) -> bytes:
        """The bytes of an image's file; DataError that names it where they cannot be read or are not those listed."""
        if image.size == 0:
            return b""
        begin, end = (None, None) if image.offset is None else (image.offset, image.offset + (image.size or 0))
        try:
            contents = self.fs.cat_file(image.place, start=begin, end=end)
        except Exception as error:  # the back ends' exceptions share no base class
            raise DataError(f"{image.path} of {self.url} cannot be read: {error}") from error
        if image.size is not None and len(contents) != image.size:
            raise DataError(f"{image.path} of {self.url} has {len(contents)} bytes and had {image.size} when listed")
        return contents


def list_source(url: str) -> Source:
    """What is in a folder or tar of class folders; BadRequest where there is none, or a class has no image file."""
    fs, root = locate(url)
    try:
        if fs.isdir(root):
            entries = list(_folder_entries(fs, root))
        elif fs.isfile(root):
            entries = list(_tar_entries(fs, root, url))
        else:
            raise BadRequest(f"{url} does not exist; a folder of class folders, or a tar of one, is needed")
    except (BadRequest, DataError):
        raise
    except Exception as error:  # the back ends' exceptions share no base class
        raise DataError(f"{url} cannot be listed: {error}") from error
    entries = _without_outer_folder(entries)
    classes = sorted({entry.path.partition("/")[0] for entry in entries if entry.folder or "/" in entry.path})
    images, broken = _sorted_out(entries)
    _refuse_unusable(url, classes, entries, images)
    return Source(url, fs, root, tuple(classes), tuple(images), tuple(broken))


def refuse_empty_classes(url: str, empty: Iterable[str], why: str) -> None:
    """BadRequest that names the classes, if there are any."""
    if names := sorted(empty):
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise BadRequest(f"{url} has class folders {why}: {shown}; add images to them or take them away")


def _refuse_unusable(url: str, classes: list[str], entries: list[Entry], images: list[Entry]) -> None:
    if not entries:
        raise BadRequest(f"{url} is empty; a folder of class folders, or a tar of one, is needed")
    if not classes:
        raise BadRequest(f"{url} has no class folders; put the images of each class into a folder of its name")
    for name in classes:
        if name != printable(name):
            raise BadRequest(f"{url} has a class folder {printable(name)}, which is not UTF-8; rename it")
    with_images = {image.path.partition("/")[0] for image in images}
    refuse_empty_classes(url, set(classes) - with_images, f"without images ({' '.join(SUFFIXES)})")


def _sorted_out(entries: list[Entry]) -> tuple[list[Entry], list[Broken]]:
    """Images and broken files, each in the order of their paths."""
    images, broken = [], []
    for entry in sorted(entries):
        if entry.folder:
            continue
        if reason := _fault(entry):
            broken.append(Broken(None, printable(entry.path), reason))
        else:
            images.append(entry)
    return images, broken


def _fault(entry: Entry) -> str | None:
    if entry.fault:
        return entry.fault
    if "/" not in entry.path:
        return "in no class folder"
    if not entry.path.lower().endswith(SUFFIXES):
        return f"not an image by its name ({' '.join(SUFFIXES)})"
    return None


def printable(path: str) -> str:
    """A path that can be printed whatever bytes its file name has."""
    return path.encode("utf-8", "backslashreplace").decode()


def _without_outer_folder(entries: list[Entry]) -> list[Entry]:
    """Entries without the one folder around everything, if it has folders in it and no files."""
    tops = {entry.path.partition("/")[0] for entry in entries}
    folders_inside = any("/" in entry.path for entry in entries)
    files_directly = any(not entry.folder and entry.path.count("/") < 2 for entry in entries)
    if len(tops) != 1 or files_directly or not folders_inside:
        return entries
    return [entry._replace(path=entry.path.partition("/")[2]) for entry in entries if "/" in entry.path]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _folder_entries(fs: fsspec.AbstractFileSystem, root: str) -> Iterator[Entry]:
    pending = [(root.rstrip("/"), "")]
    while pending:
        folder, inside = pending.pop()
        for info in fs.ls(folder or "/", detail=True):
            place = info["name"].rstrip("/")
            name = place.rpartition("/")[2]
            if _hidden(name) or place == folder:  # object stores list a folder in itself
                continue
            kind, fault = _kind(fs, info)
            if kind == "directory":
                pending.append((place, f"{inside}{name}/"))
            yield Entry(inside + name, kind == "directory", place, None, info.get("size"), fault)


def _kind(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> tuple[str, str | None]:
    """Type of what was listed, links followed, and why it cannot be used."""
    kind = info["type"]
    if isinstance(fs, LocalFileSystem) and info["islink"]:
        place = PurePath(info["name"])
        if not os.path.exists(place):
            return "other", "a link to nothing"
        if os.path.realpath(place) in {os.path.realpath(parent) for parent in place.parents}:
            return "other", "a link to a folder around it"
        kind = fs.info(str(place))["type"]
    return kind, None if kind in ("file", "directory") else "not a regular file"


def _tar_entries(fs: fsspec.AbstractFileSystem, root: str, url: str) -> Iterator[Entry]:
    entries: dict[str, Entry] = {}  # of a name that comes twice the later file counts
    with fs.open(root, "rb") as stream:
        try:
            for member in tar_members(stream):
                path = _inside(member.name)
                if path and not any(_hidden(part) for part in path.split("/")):
                    entries[path] = _tar_entry(path, member, root, entries)
        except tarfile.TarError as error:
            stream.seek(0)
            raise BadRequest(f"{url} {_no_tar(stream.read(6), error)}") from None
    yield from entries.values()


def _tar_entry(path: str, member: tarfile.TarInfo, root: str, earlier: dict[str, Entry]) -> Entry:
    if member.islnk() and (target := earlier.get(_inside(member.linkname))):
        return target._replace(path=path)
    fault = None if member.isreg() or member.isdir() else "a link or device inside the tar"
    return Entry(path, member.isdir(), root, member.offset_data, member.size, fault)


def _inside(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _no_tar(beginning: bytes, error: tarfile.TarError) -> str:
    for magic, tool in _COMPRESSED.items():
        if beginning.startswith(magic):
            return f"is compressed; {tool} it first: a folder or a plain tar is needed"
    return f"is neither a folder nor a whole tar ({error}); a folder of class folders, or a tar of one, is needed"
