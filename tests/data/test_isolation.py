"""An image that passes every check and that DALI fails on alone is replaced like a broken one, and named."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader
from data.decode import Decoder, DecodingFailed
from data.errors import DataError
from data.loader import evaluation_batches, training_batches
from data.shards.manifest import Manifest, Shard, read_manifest, write_manifest
from data.shards.sample_table import FLAG_DECODED, sample_table, table_bytes
from data.shards.tar_index import index_bytes, index_tar
from tests.data.test_loader import (
    CENTRE,
    FULL,
    SEED,
    SIDE,
    assert_equal,
    flat,
    keys_of,
    loaded,
    on_all_ranks,
    order_of,
    spec_of,
)

SAMPLES, PER_SHARD = 30, 11


def signed_tiff(seed: int) -> bytes:
    """A grey TIFF of signed 16-bit values, which DALI's decoder refuses."""
    strip = np.random.default_rng(seed).integers(-999, 999, (SIDE, SIDE)).astype("<i2").tobytes()
    short = {256: SIDE, 257: SIDE, 258: 16, 259: 1, 262: 1, 277: 1, 278: SIDE, 279: len(strip), 339: 2}
    entries = [(tag, 3, value) for tag, value in short.items()]
    table = b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted([*entries, (273, 4, 134)])
    )
    return b"II*\0" + struct.pack("<IH", 8, len(short) + 1) + table + struct.pack("<I", 0) + strip


def image(number: int) -> bytes:
    """One colour, so that a sample is known by its pixels whatever its crop."""
    return b"P6 %d %d 255\n" % (SIDE, SIDE) + bytes([number, 255 - number, 7]) * SIDE**2


def dataset(folder: Path, failing: Sequence[int]) -> Manifest:
    """Thirty samples in three shards, whose table has all for decoded, also those that DALI fails on."""
    folder.mkdir()
    shards = []
    for first in range(0, SAMPLES, PER_SHARD):
        stream = io.BytesIO()
        with webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for number in range(first, min(first + PER_SHARD, SAMPLES)):
                contents = {"tif": signed_tiff(number)} if number in failing else {"ppm": image(number)}
                tar.write({"__key__": f"{number:04d}", **contents, "cls": str(number % 4).encode()})
        contents, name = stream.getvalue(), f"shard-{len(shards):06d}"
        index = index_tar(contents)
        rows = sample_table(contents, index, [(SIDE, SIDE)] * len(index), FLAG_DECODED)
        (folder / f"{name}.tar").write_bytes(contents)
        (folder / f"{name}.npy").write_bytes(table_bytes(rows))
        (folder / f"{name}.idx").write_bytes(index_bytes(index))
        shards.append(Shard(f"{name}.tar", len(index), len(contents)))
    write_manifest(str(folder), [f"class {i}" for i in range(4)], shards)
    return read_manifest(str(folder))


@settings(max_examples=8)
@given(st.sets(st.integers(0, SAMPLES - 1), min_size=1, max_size=8), st.sampled_from([3, 7, 100]), st.data())
def test_a_failing_image_is_replaced_and_all_else_is_as_it_was(tmp_path_factory, failing, window, data):
    """On any number of ranks, and from any step on."""
    folder = tmp_path_factory.mktemp("isolation")
    whole, manifest = dataset(folder / "whole", []), dataset(folder / "failing", sorted(failing))
    order, steps = order_of(manifest, 8, window), range(2 * SAMPLES // 8)
    expected, found = (on_all_ranks(each, order, 2, steps, CENTRE, 1) for each in (whole, manifest))
    for batch, sound in zip(flat(found), flat(expected), strict=True):
        assert batch.keys == sound.keys and (batch.positions == sound.positions).all()
        assert [int(bad.key) for bad in batch.broken] == [int(key) for key in batch.keys if int(key) in failing]
        for bad in batch.broken:
            assert bad.shard == f"shard-{int(bad.key) // PER_SHARD:06d}.tar" and "DALI cannot decode it" in bad.reason
        for key, pixels, label, other in zip(batch.keys, batch.images, batch.labels, sound.images, strict=True):
            seen = int(pixels[0, 0, 0])
            assert seen not in failing and label.tolist() == [seen % 4] and pixels.unique().numel() <= 3
            assert int(key) in failing or torch.equal(pixels, other)
        assert batch.replaced.tolist() == [int(key) in failing for key in batch.keys]
    world_size, begin = data.draw(st.sampled_from([2, 4])), data.draw(st.integers(0, len(steps) - 1))
    assert_equal(flat(on_all_ranks(manifest, order, 2, steps[begin:], CENTRE, world_size)), flat(found[begin:]))


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_evaluation_leaves_out_failing_images_and_names_them(tmp_path, micro_batch):
    failing = [0, 8, 9, 10, 11, 29]
    manifest = dataset(tmp_path / "set", failing)
    with evaluation_batches(manifest, None, spec_of(0, 1, micro_batch)) as batches:
        found = list(batches)
    assert sorted(int(bad.key) for batch in found for bad in batch.broken) == failing
    assert [int(key) for key in keys_of(found)] == [n for n in range(SAMPLES) if n not in failing]
    for batch in found:
        assert (
            [int(pixels[0, 0, 0]) for pixels in batch.images] == batch.positions.tolist() == list(map(int, batch.keys))
        )


def test_a_window_of_nothing_but_failing_images_ends_the_run_by_name(tmp_path):
    manifest = dataset(tmp_path / "set", range(SAMPLES))
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: \d{4}: DALI cannot decode it: .+ no sample of 9 windows"):
        loaded(manifest, order_of(manifest, 4, 5), 2, range(3))


@pytest.mark.parametrize("reason", ["the device is lost", "out of memory"])
def test_what_is_not_an_images_fault_is_not_blamed_on_one(tmp_path, monkeypatch, reason):
    """DALI fails on sound images too; or for want of memory, which one large image could seem to cause."""
    failed_once: list[int] = []

    class Failing(Decoder):
        def __next__(self) -> Any:
            if reason == "out of memory" and failed_once:
                return super().__next__()
            failed_once.append(1)
            raise DecodingFailed(reason)

    monkeypatch.setattr(loader, "Decoder", Failing)
    manifest = dataset(tmp_path / "set", [])
    with (
        pytest.raises(DataError, match=f"DALI failed on a batch: {reason}"),
        training_batches(manifest, order_of(manifest, 4, 5), FULL, spec_of(0, 1, 2), SEED, 0, 3) as batches,
    ):
        next(batches)
