"""Completing an older manifest with its sample tables' checksums, so that the set is known by its content.

All tables are read once, 32 bytes a sample, and the manifest is written again. Where it cannot be written, the tables
are read at each start of a training.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from data.errors import DataError
from data.shards.manifest import MANIFEST, Manifest, write_manifest
from data.shards.sample_table import HEADER_BYTES, ROW, shard_checksums
from data.shards.shard_list import Shard, Shards
from data.storage.prefetch import map_in_threads
from data.urls import join, without_secrets

_TABLES_AT_ONCE = 16


def complete(manifest: Manifest) -> Manifest:
    """The manifest with its tables' checksums, written; DataError where that or reading a table fails."""
    completed = with_checksums(manifest)
    _rewrite(completed)
    return completed


def complete_if_writable(manifest: Manifest) -> Manifest:
    """The manifest with its tables' checksums; a warning where it cannot be written."""
    completed = with_checksums(manifest)
    try:
        _rewrite(completed)
    except DataError as error:
        url, tars = without_secrets(manifest.url), without_secrets(manifest.shards_at or manifest.url)
        command = f"coatnet data index {tars}" + (f" --out {url}" if manifest.shards_at else "")
        print(
            f"warning: {join(url, MANIFEST)} is from an older version and lacks the sample tables' checksums, so the"
            f" tables are read at every start; `{command}` adds the checksums for good ({error})",
            file=sys.stderr,
        )
    return completed


def with_checksums(manifest: Manifest) -> Manifest:
    """The manifest with its tables' checksums; DataError where one is no table of its shard's samples."""

    def with_checksum(number: int) -> Shard:
        shard, url = manifest.shards[number], manifest.url_of(number, ".npy")
        contents = manifest.storage.read(url)
        if len(contents) != HEADER_BYTES + ROW.itemsize * shard.samples:
            raise DataError(f"{without_secrets(url)} does not have {shard.samples} samples; pack or index it again")
        table, headers = shard_checksums(contents)
        if shard.table not in ("", table):
            raise DataError(f"{without_secrets(url)} does not match the manifest's checksum; pack or index it again")
        return replace(shard, table=table, headers=headers)

    numbers = range(len(manifest.shards))
    shards = map_in_threads(with_checksum, numbers, _TABLES_AT_ONCE, lambda done, total: None)
    return replace(manifest, shards=Shards.of(shards))


def _rewrite(manifest: Manifest) -> None:
    names = ("label_field", "labels_per_sample", "shards_at", "labels", "format_1")
    write_manifest(manifest.url, manifest.classes, manifest.shards, **{name: getattr(manifest, name) for name in names})
