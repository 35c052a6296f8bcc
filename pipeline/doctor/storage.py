"""What the storage of a run can do, as seen from this machine: the run's folder, and the packed datasets.

Each is tried in a process of its own, and nothing is left behind. Speeds are one process's, with the caches that the
training has too.
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

from pipeline.doctor.checks import Check
from pipeline.doctor.subprocess_probe import run_isolated
from pipeline.formatting import format_number

if TYPE_CHECKING:
    from pipeline.config.schema import Config

TRIED_BYTES = 32 << 20


def check_storage(config: Config) -> list[Check]:
    """Where the run is written to, and where its data are read from."""
    advice = "make sure that this machine can reach it"
    checks = run_isolated("run.dir", "storage.check_run_folder", config.run.dir, advice=advice)
    for key, url in {"data.train": config.data.train, "data.val": config.data.val}.items():
        checks += run_isolated(key, "storage.check_dataset", key, url, advice=advice) if url else []
    return checks


def check_run_folder(run: str) -> list[Check]:
    """What a run needs of its folder's file system, tried in the folder or, until it exists, in the nearest above."""
    try:
        place = nearest_folder(Path(run))
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as folder:
            figures = {"free": f"{shutil.disk_usage(place).free / 2**30:.0f} GiB", **_speeds(Path(folder) / "large")}
            _replace(Path(folder))
            locks = _has_locks(Path(folder) / "lock")
    except OSError as error:
        detail = f"{run} cannot be written: {error.strerror or error}"
        return [Check("run.dir", "broken", detail, "choose another folder with run.dir=..., or make this one writable")]
    if locks:
        return [Check("run.dir", "ok", f"{place}: atomic renames and file locks work", figures=figures)]
    advice = "never start one run twice at the same time: the newer start continues, and the older one ends"
    return [Check("run.dir", "note", f"{place}: atomic renames work, file locks do not", advice, figures)]


def check_dataset(key: str, url: str) -> list[Check]:
    """Whether a packed dataset's manifest and a shard can be read, and how fast one reader is."""
    from data.errors import DataError, UsageError
    from data.shards.manifest import read_manifest
    from data.storage.remote import Storage
    from data.urls import without_secrets

    storage = Storage(attempts=2, attempt_timeout=30, timeout=60)
    try:
        manifest = read_manifest(url, storage)
        # another shard for each host, as the training reads, so that no server answers all from its memory
        shard = zlib.crc32(os.uname().nodename.encode()) % len(manifest.shards)
        size, start = min(TRIED_BYTES, manifest.shards[shard].bytes), time.perf_counter()
        storage.read(manifest.url_of(shard), 0, size)
        figures = {"read": f"{format_number(size / (time.perf_counter() - start) / 1e6)} MB/s"}
    except (UsageError, DataError) as error:
        return [Check(key, "broken", str(error), f"correct {key}, or make it readable from here (mount, credentials)")]
    detail = f"{without_secrets(url)}: {manifest.samples} samples in {len(manifest.shards)} shards"
    return [Check(key, "ok", detail, figures=figures)]


def nearest_folder(run: Path) -> Path:
    """The run's folder, or the nearest one above it that exists."""
    return next(folder for folder in (run, *run.absolute().parents) if os.path.exists(folder))


def _speeds(path: Path) -> dict[str, str]:
    """Of a large file: written until it is durable, and read again, if possible without this machine's cache of it."""
    block = os.urandom(TRIED_BYTES // 8)  # some file systems compress, and would seem faster
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb", buffering=0) as file:
        opened = time.perf_counter()
        while file.read(1 << 20):
            pass
    seconds = {"write": written - start, "read": time.perf_counter() - opened}
    return {name: f"{format_number(TRIED_BYTES / 1e6 / spent)} MB/s" for name, spent in seconds.items()}


def _replace(folder: Path) -> None:
    """OSError where a rename does not put a file whole in another's place, which every checkpoint relies on."""
    new, old = folder / "new", folder / "old"
    new.write_text("new")
    old.write_text("old")
    os.replace(new, old)
    if old.read_text() != "new" or new.exists():
        raise OSError("a renamed file did not replace the other")


def _has_locks(path: Path) -> bool:
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
