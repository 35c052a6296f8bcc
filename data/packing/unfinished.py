"""What an index that ended early had done, so that the next one of the same request does only the rest.

    .indexed.json    the request, and of each tar that is done its version and what was found in it

It lies beside the tables and indexes, is written when an index ends without a manifest, and goes when one has it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from data.errors import DataError
from data.storage.remote import NotFound, Storage, open_fs, write_file
from data.urls import join

_FILE = ".indexed.json"
Done = dict[str, dict[str, Any]]
"""What is known of each tar, by its URL without the query."""


def read_done(destination: str, request: dict[str, Any]) -> Done | None:
    """What an earlier index of this request had done; None where there is no note."""
    try:
        document = json.loads(Storage().read(join(destination, _FILE)))
        return document["done"] if document["request"] == request else {}
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):  # as where no rename is atomic
        return {}


def keep_done(destination: str, request: dict[str, Any], done: Done) -> None:
    """Notes what is done, if the destination can be written: the error that ended the index is another."""
    fs, folder = open_fs(destination)
    with suppress(DataError):
        write_file(fs, join(folder, _FILE), json.dumps({"request": request, "done": done}).encode())


def forget_done(destination: str) -> None:
    """Removes the note."""
    fs, folder = open_fs(destination)
    fs.rm_file(join(folder, _FILE))
