"""Everything that is read and written through fsspec, behind one layer of retries: ours.

A read gives exactly the bytes that were asked for, or ends within known limits with a DataError that says what was
tried. Every attempt has a timeout, so neither silence nor a trickle holds a reader. Transient errors (a refused or
dropped connection, 408, 429, 5xx, a short answer) are retried with growing waits and reported to `on_error`; others (no
permission, other 4xx) end at once. The retries of the layers below are switched off.

Threads may share all of this, forked processes may not: fsspec's connections do not survive a fork.
"""

from __future__ import annotations

import errno
import html
import os
import re
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from data.errors import DataError, UsageError
from data.storage.durable import write_atomically
from data.urls import is_web, join, split_query, without_secrets

MAX_WAIT = 30.0
WARN_AT_ATTEMPT = 4
"""The attempt after which a line is printed, since the run would seem to hang."""
MIN_BYTES_PER_SECOND = 1 << 20
"""The timeout of an attempt allows for this rate, so it grows with the size of the request."""
WHOLE_FILES_BYTES = 8 << 30
"""What a process keeps in unnamed temporary files of servers that give no ranges; one file at least."""
CONNECTIONS = 100
"""To a server at once, as aiohttp has them."""
_IN_QUERIES = "!#$%&'()*+,/:;=?@[]~"
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf", "http": "http", "https": "http"}
_FATAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG}
_FATAL = (
    PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError,
    NotImplementedError, ImportError, TypeError,
)  # fmt: skip
_MISSING_STATUSES = {404, 410}
_TRANSIENT_STATUSES = {408, 416, 425, 429}  # 416: a range past the end, so the file is shorter than it was
Result = TypeVar("Result")


class NotFound(DataError):
    """A file that was asked for as a whole does not exist."""


@dataclass(frozen=True)
class ReadError:
    """An attempt that failed: bytes `begin` to `end` (None: the whole file), its number from 1, the reason."""

    url: str
    begin: int | None
    end: int | None
    attempt: int
    reason: str


class ByteSource(Protocol):
    """What gives the bytes of a file: a Storage, or a cache in front of one."""

    def read(self, url: str, begin: int | None = None, end: int | None = None) -> bytes: ...

    def reread(self, url: str, begin: int, end: int, reason: str) -> bytes: ...


def _ignore(error: ReadError) -> None:
    pass


@dataclass(frozen=True)
class Storage:
    """Reads at any fsspec URL, with `attempts`, seconds for each (and one more a MiB), and seconds for all of them.

    Waits begin at `first_wait` seconds and double, up to MAX_WAIT; a part of each is drawn from a checksum, so that
    ranks do not retry all at once. `on_error` is called with every attempt that failed.
    """

    attempts: int = 10
    attempt_timeout: float = 60.0
    timeout: float = 600.0
    first_wait: float = 0.5
    on_error: Callable[[ReadError], None] = _ignore

    def read(self, url: str, begin: int | None = None, end: int | None = None) -> bytes:
        """Bytes `begin` to `end` of a file, or all of it; DataError where they cannot be had.

        A range is asked of a file that is known to be there, so one that a server misses is tried again. A whole one,
        and any on a disk, is NotFound at once.
        """
        if begin is None or end is None:
            return self.with_retries("read", url, lambda: self._whole(url))
        return self.with_retries("read", url, lambda: self._range(url, begin, end), begin, end)

    def open(self, url: str) -> BufferedReader:
        """A file to be read through: itself on a disk, else a copy without a name. NotFound where there is none."""
        return self.with_retries("read", url, lambda: self._open(url))

    def size(self, url: str) -> int:
        """The bytes of a file; NotFound where there is none, DataError where its server does not say."""
        return known_size(url, self.info(url))

    def exists(self, url: str) -> bool:
        """Whether a file or folder is there."""
        fs, path = open_fs(url)
        return self.with_retries("found", url, lambda: fs.exists(path))

    def info(self, url: str) -> dict[str, Any]:
        """What the file system says of a file or folder; NotFound where there is none."""
        fs, path = open_fs(url)
        return self.with_retries("found", url, lambda: _info(fs, path))

    def list_folder(self, fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
        """What lies in a folder, which is a path of `fs`; of a web server's page those links that lead into it."""
        found = self.with_retries("listed", folder, lambda: fs.ls(folder or "/", detail=True))
        return _entries_of_page(folder, found) if is_web(folder) else found

    def reread(self, url: str, begin: int, end: int, reason: str) -> bytes:
        """The same range once more, since what came was not what was written, which counts as a fault."""
        self.on_error(ReadError(without_secrets(url), begin, end, 1, reason))
        return self.read(url, begin, end)

    def with_retries(
        self, done: str, url: str, call: Callable[[], Result], begin: int | None = None, end: int | None = None
    ) -> Result:
        """What `call` returns at last; DataError ("cannot be read: ...") past the limits or if retrying is no use."""
        shown = without_secrets(url)
        what = shown if begin is None else f"{shown}: bytes {begin} to {end}"
        started = time.monotonic()
        for attempt in count(1):
            try:
                return call()
            except (UsageError, DataError):
                raise
            except Exception as error:  # the back ends' exceptions share no base class
                failure = error
            reason, spent = _reason(failure), time.monotonic() - started
            if _is_fatal(failure, is_gone=begin is None or _is_on_disk(url)):
                kind = NotFound if isinstance(failure, FileNotFoundError | NotADirectoryError) else DataError
                raise kind(f"{what} cannot be {done}: {reason}") from failure
            self.on_error(ReadError(shown, begin, end, attempt, reason))
            wait = self._wait(f"{url} {begin} {end}", attempt)
            if attempt >= self.attempts or spent + wait > self.timeout:
                last = f"{attempt} attempts in {spent:.0f} s, the last: {reason}"
                raise DataError(f"{what} cannot be {done}: {last}") from failure
            if attempt == WARN_AT_ATTEMPT:
                print(f"{what}: {attempt} attempts failed, the last: {reason}; retrying", file=sys.stderr)
            time.sleep(wait)
        raise AssertionError("count() has no end")

    def _wait(self, asked: str, attempt: int) -> float:
        drawn = zlib.crc32(f"{asked} {attempt} {os.getpid()}".encode()) / 2**32
        return min(MAX_WAIT, self.first_wait * 2 ** (attempt - 1)) * (0.5 + drawn / 2)

    def _whole(self, url: str) -> bytes:
        fs, path = open_fs(url)
        return _call(fs, "cat_file", self.attempt_timeout, path)

    def _open(self, url: str) -> BufferedReader:
        fs, path = open_fs(url)
        if type(fs) is LocalFileSystem:
            return open(path, "rb")
        with tempfile.NamedTemporaryFile() as copy:
            _call(fs, "get_file", self.attempt_timeout, path, copy.name)
            return open(copy.name, "rb")

    def _range(self, url: str, begin: int, end: int) -> bytes:
        fs, path = open_fs(url)
        if type(fs) is LocalFileSystem:
            contents = _part_of_file(path, begin, end)
        elif _server(url) in _without_ranges:
            contents = _part_of_whole(fs, path, begin, end, 20 * self.attempt_timeout)
        else:
            seconds = self.attempt_timeout + (end - begin) / MIN_BYTES_PER_SECOND
            options = {"cache_type": "none"} if urlsplit(url).scheme == "hf" else {}  # else it reads megabytes ahead
            contents = _call(fs, "cat_file", seconds, path, start=begin, end=end, **options)
            if len(contents) > end - begin and urlsplit(url).scheme in ("http", "https"):
                _warn_without_ranges(_server(url))
                contents = _part_of_whole(fs, path, begin, end, 20 * self.attempt_timeout)
        if len(contents) != end - begin:
            raise OSError(
                f"{end - begin} bytes were requested, but {len(contents)} came; is this the file that was packed?"
            )
        return contents


_DISK = fsspec.filesystem("file")
DEFAULT = Storage()
"""For reads and writes with the default limits and without a report of errors."""


def open_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path in it that a URL or path names; UsageError where nothing reads such URLs.

    Its own retries are off, and so are its caches of listings, which would hide that a file has changed. A query is
    sent as it stands, since a signature may be of its every letter. Of a path and a web address "::" is a part.
    """
    if _is_on_disk(url):
        return _DISK, _DISK._strip_protocol(url)
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    address, query = split_query(url)
    try:
        options = _options(protocol)
        if query:
            import yarl

            options["encoded"] = True
            url = str(yarl.URL(address)) + quote(query, safe=_IN_QUERIES)
        sent = url.replace("::", "%3A%3A") if is_web(url) else url
        fs, path = fsspec.core.url_to_fs(sent, **options)
    except ImportError as error:
        extra = f"; pip install 'coatnet[{EXTRAS[protocol]}]'" if protocol in EXTRAS else ""
        raise UsageError(f"{url} cannot be opened: {error}{extra}") from None
    except ValueError as error:
        raise UsageError(f"{url} cannot be opened: {error}") from None
    if EXTRAS.get(protocol) == "s3":
        fs.retries = 1
    return fs, path


def _is_on_disk(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def known_size(url: str, info: dict[str, Any]) -> int:
    """The bytes of a file by what its file system says of it; DataError where that has no size."""
    if info["size"] is None:
        raise DataError(f"{url}: the server does not say how large it is")
    return info["size"]


def write_file(fs: fsspec.AbstractFileSystem, path: str, contents: bytes, storage: Storage = DEFAULT) -> None:
    """Puts a file at `path`, where half of it is never seen, durably on a local disk. DataError if it fails."""
    storage.with_retries("written", path, partial(_write, fs, path, contents, storage.attempt_timeout))


def send_file(source: str, fs: fsspec.AbstractFileSystem, path: str, storage: Storage = DEFAULT) -> None:
    """Copies a local file of any size to `path`, where half of it may be seen meanwhile. DataError if it fails."""
    seconds = storage.attempt_timeout + os.path.getsize(source) / MIN_BYTES_PER_SECOND
    storage.with_retries("written", path, lambda: _call(fs, "put_file", seconds, source, path))


def _write(fs: fsspec.AbstractFileSystem, path: str, contents: bytes, attempt_timeout: float) -> None:
    if isinstance(fs, LocalFileSystem):
        write_atomically(Path(path), contents)
    else:
        _call(fs, "pipe_file", attempt_timeout + len(contents) / MIN_BYTES_PER_SECOND, path, contents)


def _options(protocol: str) -> dict[str, Any]:
    """What a file system is opened with, beside what the person says by fsspec's own configuration."""
    if protocol not in EXTRAS:
        return {}
    configured, options = fsspec.config.conf.get(protocol, {}), {"use_listings_cache": False}
    if EXTRAS[protocol] == "s3":
        once = {"retries": {"total_max_attempts": 1, "mode": "standard"}}
        connections = {"max_pool_connections": CONNECTIONS}  # botocore has 10
        return {**options, "config_kwargs": {**connections, **configured.get("config_kwargs", {}), **once}}
    if EXTRAS[protocol] == "http":
        import aiohttp

        by_socket = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)}
        return {**options, "client_kwargs": {**by_socket, **configured.get("client_kwargs", {})}}
    return options


def _call(fs: fsspec.AbstractFileSystem, name: str, seconds: float, *arguments: Any, **options: Any) -> Any:
    """What a method of the file system gives; TimeoutError if it is not done in time, except on a disk."""
    if isinstance(fs, AsyncFileSystem):
        return sync(fs.loop, getattr(fs, f"_{name}"), *arguments, timeout=seconds, **options)
    if isinstance(fs, LocalFileSystem | MemoryFileSystem):
        return getattr(fs, name)(*arguments, **options)
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(getattr(fs, name)(*arguments, **options))
        except BaseException as error:  # handed to who asked
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # where it hangs, it is abandoned
    return outcome.result(seconds)


def _part_of_file(path: str, begin: int, end: int) -> bytes:
    """As fsspec's cat_file of a local file, in a third of its time."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, end - begin, begin)
    finally:
        os.close(file)


def _info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    try:
        return fs.info(path)
    except FileNotFoundError as missing:
        cause = missing.__cause__  # of a web server this error stands for all others too
        if cause is None or not is_web(path) or _status(cause) in _MISSING_STATUSES:
            raise
        raise cause from None


def _entries_of_page(folder: str, links: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files and folders in a folder by the links of its page, which has others as well, such as those that sort."""
    names = (html.unescape(link["name"].removeprefix(folder.rstrip("/") + "/")).removeprefix("./") for link in links)
    inside = sorted({name for name in names if re.fullmatch(r"[^/?#]+/?", name)})
    kinds = {True: "directory", False: "file"}
    return [{"name": join(folder, name), "size": None, "type": kinds[name.endswith("/")]} for name in inside]


# What a failed attempt was.


def _is_fatal(error: Exception, is_gone: bool) -> bool:
    """Whether trying again is no use; `is_gone`: whether a file that is missing stays so."""
    if isinstance(error, FileNotFoundError):
        return is_gone
    status = _status(error)
    return (
        isinstance(error, _FATAL)
        or (isinstance(error, OSError) and error.errno in _FATAL_ERRNOS)
        or (status is not None and 400 <= status < 500 and status not in _TRANSIENT_STATUSES)
        or type(error).__name__ == "NoCredentialsError"  # botocore's, which need not be installed
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, gcsfs or huggingface_hub."""
    places = ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code"))
    values = (getattr(place, name, None) for place, name in places)
    return next((number for number in values if isinstance(number, int)), None)


def _reason(error: Exception) -> str:
    """One line; of an HTTP error without its URL, so that like ones can be counted together."""
    if status := _status(error):
        return f"HTTP {status} {getattr(error, 'message', '')}".strip()
    text = without_secrets(str(error).partition("\n")[0])[:200] or (
        "timed out" if isinstance(error, TimeoutError) else ""
    )
    return f"{type(error).__name__}: {text}".removeprefix("OSError: ").removesuffix(": ")


# Servers that give no ranges.

_without_ranges: set[str] = set()
_whole_files: dict[str, IO[bytes]] = {}  # the least recently used first
_fetching = threading.Lock()


def _server(url: str) -> str:
    return "{0.scheme}://{0.netloc}".format(urlsplit(url))


def _warn_without_ranges(server: str) -> None:
    if server not in _without_ranges:
        _without_ranges.add(server)
        print(
            f"{without_secrets(server)} does not support Range requests: whole files go to {tempfile.gettempdir()},"
            f" up to {WHOLE_FILES_BYTES >> 30} GiB per process; a server that supports them would be much faster",
            file=sys.stderr,
        )


def _part_of_whole(fs: fsspec.AbstractFileSystem, path: str, begin: int, end: int, seconds: float) -> bytes:
    """The range from a temporary copy of the file, which has no name and so goes with the process."""
    with _fetching:
        file = _whole_files.pop(path, None)
        if file is None:
            file = tempfile.TemporaryFile()  # noqa: SIM115
            _call(fs, "get_file", seconds, path, file)
            file.flush()
            kept = sum(map(_size, _whole_files.values()))
            while _whole_files and kept + _size(file) > WHOLE_FILES_BYTES:
                kept -= _size(_whole_files.pop(next(iter(_whole_files))))
        _whole_files[path] = file
    return os.pread(file.fileno(), end - begin, begin)  # a reader keeps it open, whatever is dropped meanwhile


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
