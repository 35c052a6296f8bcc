"""Laws of checking: what was packed is whole, and each byte that is not the packed one is found, under its own name."""

import io
import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner
from webdataset import TarWriter

from data.errors import DataError, UsageError
from data.packing.index import Report, index
from data.packing.verify import verify
from data.shards.manifest import BadSample
from data.shards.sample_table import row_checksums, table_bytes
from data.shards.tar_index import index_tar
from pipeline.cli import app

TAR, TABLE, INDEX = (f"shard-000001.{suffix}" for suffix in ("tar", "npy", "idx"))


def verified(url: object) -> Report:
    return verify(str(url), workers=2, progress=lambda done, total: None)


@pytest.fixture
def copy(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed.folder, tmp_path / "copy"))


def test_what_was_packed_is_whole(packed):
    manifest = packed.manifest
    assert verified(packed.folder) == Report(5, 40, sum(shard.bytes for shard in manifest.shards), 4, (), 0)


@pytest.mark.parametrize("decode", [False, True])
def test_what_was_indexed_is_whole(packed, tmp_path, decode):
    index(
        str(packed.folder), str(tmp_path), decode=decode, classes=None, label_field=None, workers=1,
        progress=lambda done, total: None,
    )  # fmt: skip
    assert (verified(tmp_path).samples, verified(tmp_path).broken) == (40, ())


@given(st.data())
def test_a_changed_byte_anywhere_is_found_and_blamed_on_its_own_shard_and_sample(packed, tmp_path_factory, data):
    """In a tar (end included), a sample table or an index."""
    folder = Path(shutil.copytree(packed.folder, tmp_path_factory.getbasetemp() / "changed", dirs_exist_ok=True))
    name = data.draw(st.sampled_from([TAR, TAR, TABLE, INDEX]))
    contents = bytearray((folder / name).read_bytes())
    samples = index_tar((packed.folder / TAR).read_bytes())
    place = data.draw(st.integers(0, len(contents) - 1))
    contents[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(contents)
    broken = verified(folder).broken
    owners = {
        TAR: [each.key for each in samples if each.offset <= place < each.offset + each.bytes],
        TABLE: [each.key for row, each in enumerate(samples) if 256 + 32 * row <= place < 288 + 32 * row],
        INDEX: [],
    }[name]
    assert broken and {each.shard for each in broken} == {TAR}
    blamed = {each.key for each in broken if each.key}
    assert blamed == set(owners) or blamed == {f"row {row}" for row, s in enumerate(samples) if s.key in owners}


def tar_cut(folder: Path) -> None:
    offset = int(np.load(folder / TABLE)["offset"][7])
    (folder / TAR).write_bytes((folder / TAR).read_bytes()[: offset + 10])


def table_of_another(folder: Path) -> None:
    shutil.copy(folder / "shard-000002.npy", folder / TABLE)


def row_of_another(folder: Path) -> None:
    rows = np.load(folder / TABLE)
    rows[3] = rows[4]
    (folder / TABLE).write_bytes(table_bytes(rows))


def size_of_another(folder: Path) -> None:
    rows = np.load(folder / TABLE)
    rows["height"][3] += 1
    rows["row_crc"] = row_checksums(rows)
    (folder / TABLE).write_bytes(table_bytes(rows))


OTHER_TABLE = "its sample table (.npy) is another than the manifest's"


def one_class_less(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": manifest["classes"][:3]}))


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (lambda folder: (folder / TAR).unlink(), {"does not exist"}),
        (lambda folder: (folder / TABLE).unlink(), {"has no sample table (.npy)"}),
        (lambda folder: (folder / INDEX).unlink(), {"has no DALI index (.idx)"}),
        (lambda folder: (folder / TABLE).write_bytes(b""), {"its sample table (.npy) is not one of 9 samples"}),
        (tar_cut, {"lies past the end of the tar", "not a whole tar: *", "has 20490 bytes; the manifest says *"}),
        (table_of_another, {OTHER_TABLE, "its row of the sample table is not that of its headers"}),
        (row_of_another, {OTHER_TABLE, "its row of the sample table is not that of its headers"}),
        (size_of_another, {OTHER_TABLE, "decodes to *; its row says *"}),
        (one_class_less, {"its label is '3'; it must be 0 to 2 or the name of a class"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_found_with_the_reason(copy, damage, reasons):
    damage(copy)
    found = {each.reason for each in verified(copy).broken}
    assert len(found) == len(reasons)
    assert all(any(fnmatch(reason, each) for each in reasons) for reason in found)


def test_an_image_that_was_marked_and_does_not_decode_is_found(by_hand, packed, tmp_path):
    """Its checksum is right."""
    whole = packed.originals["bee/1"].encoded
    manifest = by_hand(tmp_path, [{"png": whole, "cls": b"0"}, {"png": whole[:-30], "cls": b"0"}], 1, 1)
    reasons = {each.key: each.reason for each in verified(manifest.url).broken}
    assert set(reasons) == {"0000", "0001"}
    assert "its row says 0 x 0" in reasons["0000"] and "truncated" in reasons["0001"]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3))
def test_keys_are_unique_in_a_shard_and_may_begin_anew_in_the_next(packed, tmp_path_factory, shards):
    """The keys of each shard."""
    folder = tmp_path_factory.mktemp("set")

    def write(number: int, keys: Iterable[int]) -> None:
        with TarWriter(str(folder / f"{number}.tar"), encoder=False, mtime=0) as writer:
            for key in keys:
                writer.write({"__key__": f"{key}", "png": packed.originals["bee/1"].encoded, "cls": b"0"})

    for number, keys in enumerate(shards):
        write(number, dict.fromkeys(keys))
    request = {"decode": True, "classes": None, "label_field": None, "workers": 1}
    index(str(folder), None, **request, progress=lambda done, total: None)
    for number, keys in enumerate(shards):
        write(number, keys)
    with_a_key_twice = {f"{number}.tar" for number, keys in enumerate(shards) if len(set(keys)) < len(keys)}
    assert {each.shard for each in verified(folder).broken} == with_a_key_twice


def test_without_a_manifest_there_is_nothing_to_check(tmp_path):
    with pytest.raises(UsageError, match=r"manifest\.json does not exist"):
        verified(tmp_path)


def foreign(folder: Path) -> Path:
    """A tar of two images, one of them cut short."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
    with TarWriter(str(folder / "a.tar")) as writer:
        for number, encoded in enumerate((file.getvalue(), file.getvalue()[:-40])):
            writer.write({"__key__": f"{number}", "jpg": encoded, "cls": number})
    return folder


def test_the_commands_print_one_document_and_exit_with_1_for_broken_samples(tmp_path):
    folder = foreign(tmp_path / "set")

    def run(*command: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(app, ["data", *command, "--json"])
        return result.exit_code, json.loads(result.stdout)

    broken = [{"shard": "a.tar", "key": "1", "reason": "does not decode: truncated or damaged"}]
    size = (folder / "a.tar").stat().st_size
    found = {"shards": 1, "samples": 2, "bytes": size, "classes": 2, "labels": "", "kept": 0}
    read = {**found, "labels": "numbers from 0 in .cls"}
    assert run("index", str(folder), "--out", str(tmp_path / "out")) == (0, {**read, "broken": [], "unchecked": 2})
    assert run("verify", str(tmp_path / "out")) == (1, {**found, "broken": broken, "unchecked": 2})
    assert (
        "hint: 2 samples have no checksum" in CliRunner().invoke(app, ["data", "verify", str(tmp_path / "out")]).stdout
    )
    assert run("index", str(folder), "--decode") == (0, {**read, "broken": broken, "unchecked": 0})
    assert run("verify", str(folder)) == (1, {**found, "broken": broken, "unchecked": 0})
    assert verified(folder).broken == (BadSample(**broken[0]),)
    (folder / "b.tar").write_bytes(b"")
    (folder / "manifest.json").unlink()
    status, document = run("index", str(folder))
    assert (status, document["broken"]) == (1, [{"shard": "b.tar", "key": "", "reason": "not a whole tar: empty file"}])


def test_every_broken_shard_is_printed_and_the_first_of_the_samples(tmp_path):
    """Fetching shards again takes the list of all; samples are listed by --json."""
    folder = foreign(tmp_path / "set")
    for number in range(30):
        (folder / f"cut-{number:02d}.tar").write_bytes(b"")
    result = CliRunner().invoke(app, ["data", "index", str(folder)])
    assert [f"cut-{number:02d}.tar: not a whole tar" in result.stderr for number in range(30)] == [True] * 30
    assert isinstance(result.exception, DataError) and "30 of 31 tars" in str(result.exception)
