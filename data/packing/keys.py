"""Keys of samples: all different, and such that every reader of tars takes them as they are."""

from __future__ import annotations

import os
import re
import unicodedata

from data.packing.catalog import Database, to_bytes

_NO_LETTERS, _HIDDEN = re.compile(r"[^\w/-]"), re.compile("^__+")


class Keys:
    """Gives each path a key: no suffix, and only letters, digits, "_", "-" and "/".

    webdataset ends a key at its first dot and skips "__x__/..."; DALI's index is split at spaces. Of paths with the
    same key the first keeps it, the next get "-2", "-3", ... What was given is remembered on disk.
    """

    def __init__(self) -> None:
        self._taken = Database("CREATE TABLE keys (key BLOB PRIMARY KEY, times INT) WITHOUT ROWID")

    def of(self, path: str) -> str:
        """The key of the next path."""
        plain = _NO_LETTERS.sub("_", unicodedata.normalize("NFC", os.path.splitext(path)[0]))
        key = plain = _HIDDEN.sub("_", plain)
        while not self._taken.change("INSERT OR IGNORE INTO keys VALUES (?, 1)", to_bytes(key)):
            self._taken.change("UPDATE keys SET times = times + 1 WHERE key = ?", to_bytes(plain))
            times = self._taken.first("SELECT times FROM keys WHERE key = ?", to_bytes(plain))
            assert times is not None  # it is there, since `plain` itself was taken
            key = f"{plain}-{times[0]}"
        return key
