"""Local files and folders that have their names only once they are whole, and keep them through a power cut.

Everything is written to a hidden name beside the final one, synced and renamed. What renames without this module means
something else: `attempts` claims a number that must be free, `cache` keeps blocks that may be lost.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
ABANDONED_SECONDS = 3600.0


def write_atomically(path: Path, contents: str | bytes | Iterable[bytes]) -> None:
    """Writes or replaces a file: readers, also after a crash or a power cut, find the old contents or the new ones.

    Several processes may do so at once. A killed one leaves `.NAME.XXXXXXXX.partial` beside it.
    """
    if isinstance(contents, str):
        contents = contents.encode()
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        with partial.open("xb") as file:
            file.writelines([contents] if isinstance(contents, bytes) else contents)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # a full disk's error has none
        raise
    finally:
        with suppress(OSError):  # it has its final name, or could not be written
            partial.unlink()


def remove_partials(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder: what nobody has written to for an hour."""
    with suppress(OSError):  # it lies beside what counts, and is tried again
        for file in os.scandir(folder):
            if PARTIAL.fullmatch(file.name) and time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                os.unlink(file)


def publish(partial: Path, final: Path) -> None:
    """Gives a written file or folder its final name, durably; what had that name is replaced, and removed afterwards.

    Contents are as durable as their writer made them. A crash between the two renames that replace a folder leaves the
    old one as `.NAME.replaced`.
    """
    replaced = final.with_name(f".{final.name}.replaced")
    if os.path.lexists(final) and partial.is_dir():  # a rename replaces files by files, but no folder that holds any
        _remove(replaced)
        while os.path.lexists(replaced):  # it cannot be removed
            replaced = replaced.with_name(f"{replaced.name}.replaced")
        final.rename(replaced)
    partial.replace(final)
    sync_folder(final.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Returns once the names in a folder would outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
