"""What the storage of a run can do, as seen from this machine: the run's folder, and the packed datasets.

Each is tried in a process of its own, and leaves nothing behind. Speeds are one process's, with the caches that reads
and writes of the training have too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.doctor.findings import Check, Measurement
from pipeline.doctor.subprocess_probe import run_isolated

if TYPE_CHECKING:
    from pipeline.config.schema import Config


TRIED_BYTES = 32 << 20
FSYNCS = 5


def check_storage(config: Config) -> list[Check]:
    """Where the run is written to, and where its data are read from."""
    places = {"run.dir": config.run.dir, "data.train": config.data.train, "data.val": config.data.val}
    advice = "see that this machine reaches it"
    tried = [run_isolated(key, place, advice=advice) for key, place in places.items() if place is not None]
    return [finding for findings in tried for finding in findings]


def check_run_folder(run: Path) -> Check:
    """What a run needs of its folder's file system, tried in the folder or, until it is there, in the nearest above."""
    try:
        place = nearest_folder(run)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            figures = (
                Measurement("free", shutil.disk_usage(place).free / 2**30, "GiB"),
                *_speeds(Path(folder) / "large"),
                Measurement("fsync", 1000 * _fsync_seconds(Path(folder) / "small"), "ms"),
            )
            _replace(Path(folder))
            locks = _has_locks(Path(folder) / "lock")
    except OSError as error:
        detail = f"{run} cannot be written: {error.strerror or error}"
        return Check("run.dir", "broken", detail, "choose another folder with run.dir=..., or make this one writable")
    if locks:
        return Check("run.dir", "ok", f"{place}: renames replace, locks hold", figures=figures)
    advice = "never start one run twice at a time: the newer start continues, and the older one ends"
    return Check("run.dir", "note", f"{place}: renames replace, but there are no file locks", advice, figures)


def check_dataset(key: str, url: str) -> Check:
    """Whether a packed dataset's manifest and a shard can be read, and how fast one reader is."""
    from data.errors import DataError, UsageError
    from data.shards.manifest import read_manifest
    from data.storage.remote import Storage

    storage = Storage(attempts=2, attempt_timeout=30, timeout=60)
    try:
        manifest = read_manifest(url, storage)
        # another one for each host, as the training reads, and so that no server answers all out of its memory
        shard = zlib.crc32(os.uname().nodename.encode()) % len(manifest.shards)
        place, size = manifest.url_of(shard), min(TRIED_BYTES, manifest.shards[shard].bytes)
        began = time.perf_counter()
        storage.read(place, 0, 1)
        first_byte = time.perf_counter()
        storage.read(place, 0, size)
        seconds = time.perf_counter() - first_byte
    except (UsageError, DataError) as error:
        return Check(key, "broken", str(error), f"correct {key}, or make it readable from here (mount, credentials)")
    figures = (
        Measurement("first byte after", 1000 * (first_byte - began), "ms"),
        Measurement("read", size / seconds / 1e6, "MB/s"),
    )
    detail = f"{url}: {manifest.samples} samples in {len(manifest.shards)} shards"
    return Check(key, "ok", detail, figures=figures)


def nearest_folder(run: Path) -> Path:
    """The run's folder, or the nearest one above it that exists."""
    return next(folder for folder in (run, *run.absolute().parents) if os.path.exists(folder))


def _speeds(path: Path) -> tuple[Measurement, Measurement]:
    """Of a large file: written until it is durable, and read again without this machine's memory of it, if possible."""
    piece = os.urandom(TRIED_BYTES // 8)  # some file systems compress, and would seem faster
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(8):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        opened = time.perf_counter()
        while file.read(1 << 20):
            pass
    read = time.perf_counter()
    megabytes = TRIED_BYTES / 1e6
    return Measurement("write", megabytes / (written - began), "MB/s"), Measurement(
        "read", megabytes / (read - opened), "MB/s"
    )


def _fsync_seconds(path: Path) -> float:
    """How long a few bytes take to become durable, on average."""
    with path.open("wb", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(FSYNCS):
            file.write(b"x")
            os.fsync(file.fileno())
    return (time.perf_counter() - began) / FSYNCS


def _replace(folder: Path) -> None:
    """OSError where a rename does not put a file whole in another's place, which every checkpoint rests on."""
    new, old = folder / "new", folder / "old"
    new.write_text("new")
    old.write_text("old")
    os.replace(new, old)
    if old.read_text() != "new" or new.exists():
        raise OSError("a renamed file is not in the place of the other")


def _has_locks(path: Path) -> bool:
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
