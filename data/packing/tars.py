"""The tars that a URL names: a folder, a glob or a pattern such as train-{000..123}.tar, at any fsspec URL."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from data.errors import UsageError
from data.packing.archives import is_hidden
from data.packing.folders import resolve_kind
from data.packing.label_reading import abbreviate
from data.shards.tar_index import TarSample, index_tar
from data.storage.ranged_file import RangedFile
from data.storage.remote import NotFound, Storage, known_size, open_fs
from data.urls import file_name, has_suffix, split_query

_REQUESTS_AT_ONCE = 16
_VERSIONS = ("mtime", "ETag", "etag", "LastModified", "Last-Modified", "generation", "created")


class Tar(NamedTuple):
    """A tar and its size in bytes; what changes when it is replaced, as far as that is known; why it is none."""

    url: str
    bytes: int
    version: str = ""
    fault: str | None = None


def find_tars(url: str) -> list[Tar]:
    """The tars of a folder, glob or brace pattern, in its order; UsageError where there are none, or one is missing.

    What is there by its very name is no pattern, whatever signs it has.
    """
    there, pattern, query = _split_pattern(url)
    try:
        patterns = list(braceexpand(pattern + query))
    except ValueError as error:
        raise UsageError(f"{url} is not a valid pattern: {error}") from None
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        found = list(pool.map(lambda each: _matching(there + each), patterns))
        if missing := [there + each for each, tars in zip(patterns, found, strict=True) if tars is None]:
            raise UsageError(f"{abbreviate(missing)} {'does' if len(missing) == 1 else 'do'} not exist")
        tars = list(pool.map(_tar, chain.from_iterable(each for each in found if each)))
    stem, times = Counter(split_query(tar.url)[0][: -len(".tar")] for tar in tars).most_common(1)[0]
    if times > 1:
        raise UsageError(f"{url} names a tar twice, or two that would share an index: {stem}.tar")
    return tars


def _split_pattern(url: str) -> tuple[str, str, str]:
    """What of a URL is there by its very name, a folder or all of it; the pattern that is left; the query."""
    address, query = split_query(url)
    parts = re.findall("[^/]*/|[^/]+", address)
    for number, part in enumerate(parts):
        if re.search(r"[*?[{]", part) and not _is_there("".join(parts[: number + 1]).rstrip("/") + query):
            return "".join(parts[:number]), "".join(parts[number:]), query
    return address, "", query


def _is_there(url: str) -> bool:
    fs, path = open_fs(url)

    def ask() -> bool:
        try:
            return fs.exists(path)
        except PermissionError:  # what S3 says of a missing file to those who may not list
            return False

    return Storage().with_retries("found", url, ask)


def _matching(url: str) -> list[tuple[str, dict[str, Any]]] | None:
    """URL and description of each tar that a glob names, or that lies in a folder, or of the one; None if not there.

    Hidden ones, such as macOS leaves, are named only where the pattern begins with their dot.
    """
    storage = Storage()
    there, pattern, query = _split_pattern(url)
    try:
        if re.search(r"[*?[]", pattern):
            found = list(_glob(storage, *open_fs((there or ".") + query), pattern.strip("/").split("/")))
        elif has_suffix(url, ".tar") and (named := storage.info(url))["type"] != "directory":
            found = [named]
        else:
            found = list(_glob(storage, *open_fs(url), ["*"]))
    except NotFound:
        return None
    fs = open_fs(url)[0]
    found = [each for each in found if has_suffix(each["name"], ".tar") and resolve_kind(fs, each)[0] != "directory"]
    if not found:
        raise UsageError(f"{url} has no .tar files (a compressed one must be unpacked first: gunzip, unzstd, unxz)")
    return sorted(((_url(fs, each["name"]), each) for each in found), key=lambda tar: tar[0])


def _glob(storage: Storage, fs: fsspec.AbstractFileSystem, folder: str, pattern: list[str]) -> Iterator[dict[str, Any]]:
    """What in a folder matches, by the names of its folders and its own; "**" stands for any number of folders."""
    first, *rest = pattern
    if first == "**" and rest:
        yield from _glob(storage, fs, folder, rest)
    for info in storage.list_folder(fs, folder):
        name = info["name"].rstrip("/")
        if is_hidden(file_name(name)) and not first.startswith("."):
            continue
        inside = name != folder.rstrip("/") and resolve_kind(fs, info)[0] == "directory"
        if first == "**" and inside:
            yield from _glob(storage, fs, name, pattern)
        elif fnmatchcase(file_name(name), first) or fnmatchcase(split_query(name)[0].rpartition("/")[2], first):
            if not rest:
                yield info
            elif inside:
                yield from _glob(storage, fs, name, rest)


def _tar(found: tuple[str, dict[str, Any]]) -> Tar:
    """A tar that was found; a web server is asked for what its page does not say."""
    url, info = found
    fault = resolve_kind(open_fs(url)[0], info)[1]
    try:
        info = Storage().info(url) if info["size"] is None else info
    except NotFound:
        return Tar(url, 0, fault="a broken link")
    return Tar(url, known_size(url, info), " ".join(str(info[key]) for key in _VERSIONS if key in info), fault)


def _url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if type(fs) is LocalFileSystem else fs.unstrip_protocol(path)


def walk_headers(storage: Storage, tar: Tar, keep: set[str]) -> list[TarSample]:
    """The samples of a tar by its headers, read in ranges; DamagedTar where webdataset would lose some."""
    return index_tar(RangedFile(lambda begin, end: storage.read(tar.url, begin, end), tar.bytes), keep)
