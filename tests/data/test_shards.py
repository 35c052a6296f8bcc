"""Laws of the files on disk: what is written is read back, by other tools too, and what is damaged is refused."""

import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.errors import DataError, UsageError
from data.shards.labels import Reading
from data.shards.manifest import Shard, read_manifest, write_manifest
from data.shards.sample_table import FLAG_DECODED, ROW, read_rows, row_checksums, sample_table, table_bytes
from data.shards.tar_index import index_bytes, index_tar
from data.storage.remote import Storage, open_fs, write_file

IMPATIENT = Storage(attempts=2, first_wait=0.01)

SAMPLES = [
    {"__key__": "cat/1", "jpg": b"x" * 700, "cls": b"0"},
    {"__key__": "dog/" + "long" * 30, "png": b"y" * 512, "cls": b"1"},
    {"__key__": "v1.2/2", "JPG": b"z", "seg.png": b"", "json": b"{}"},
    {"__key__": "größe/日本", "jpg": b"w" * 1025, "cls": b"2"},
    {"__key__": "cat/3", "jpg": b"v" * 513, "cls": b"0"},
]


def tar_of(samples: list[dict]) -> bytes:
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    return stream.getvalue()


def parsed(contents: bytes) -> list[dict]:
    expanded = tar_file_expander([{"url": "range", "stream": io.BytesIO(contents)}])
    plain = [{key: value for key, value in each.items() if key != "__url__"} for each in group_by_keys(expanded)]
    return [dict(sorted(each.items())) for each in plain]


def lower(sample: dict) -> dict:
    return dict(sorted((name if name == "__key__" else name.lower(), value) for name, value in sample.items()))


TAR = tar_of(SAMPLES)
INDEX = index_tar(TAR)
ROWS = sample_table(TAR, INDEX, [(480, 640 + i) for i in range(len(SAMPLES))], FLAG_DECODED)


@given(st.integers(0, len(SAMPLES) - 1), st.integers(1, len(SAMPLES)))
def test_any_rows_are_a_byte_range_that_webdataset_parses_into_their_samples(first, count):
    rows = ROWS[first : first + count]
    contents = TAR[rows[0]["offset"] : rows[-1]["offset"] + rows[-1]["bytes"]]
    assert parsed(contents) == [lower(sample) for sample in SAMPLES[first : first + count]]


def test_the_index_is_to_the_byte_what_wds2idx_writes(tmp_path):
    (tmp_path / "a.tar").write_bytes(TAR)
    command = [sys.executable, "-m", "wds2idx", str(tmp_path / "a.tar"), str(tmp_path / "a.idx")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert index_bytes(INDEX) == (tmp_path / "a.idx").read_bytes()


def test_the_index_gives_each_part_where_it_lies():
    for sample, indexed in zip(SAMPLES, INDEX, strict=True):
        assert indexed.key == sample["__key__"]
        parts = {extension: TAR[at : at + size] for extension, (at, size, _) in indexed.parts.items()}
        assert {"__key__": indexed.key, **parts} == lower(sample)


def test_members_that_webdataset_passes_over_are_no_samples():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        hidden = ("__meta__/x.jpg", ".hidden.jpg", "./._mac.jpg", "b/noext", "c.d")
        for name in ("cat/1.jpg", "cat/1.cls", *hidden, "dog/2.jpg"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "c.d" else tarfile.REGTYPE
            tar.addfile(member)
    assert [each.key for each in index_tar(stream.getvalue())] == ["cat/1", "dog/2"]
    assert [each["__key__"] for each in parsed(stream.getvalue())] == ["cat/1", "dog/2"]


@given(st.integers(1, INDEX[-1].offset + INDEX[-1].bytes - 1))
def test_a_tar_that_is_cut_is_refused_even_where_a_member_ends(bytes_kept):
    with pytest.raises(DataError, match="not a valid tar"):
        index_tar(TAR[:bytes_kept])


@given(st.data())
def test_a_run_of_rows_read_by_range_is_that_run_of_the_table(tmp_path_factory, draw):
    rows = np.frombuffer(bytearray(np.random.default_rng(0).bytes(32 * 100)), ROW)
    rows["row_crc"] = row_checksums(rows)
    path = tmp_path_factory.getbasetemp() / "table.npy"
    path.write_bytes(table_bytes(rows))
    first = draw.draw(st.integers(0, 99))
    count = draw.draw(st.integers(1, 100 - first))
    assert np.array_equal(read_rows(IMPATIENT, str(path), first, count), rows[first : first + count])


@given(st.integers(0, 32 * 4 - 1), st.integers(0, 7))
def test_a_flipped_bit_in_a_table_is_refused_by_the_row_and_no_other(tmp_path_factory, byte, bit):
    contents = bytearray(table_bytes(sample_table(TAR, INDEX, [(8, 8)] * len(INDEX), 1)))
    contents[256 + byte] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.npy"
    path.write_bytes(contents)
    with pytest.raises(DataError, match=f"row {byte // 32} is damaged"):
        read_rows(IMPATIENT, str(path), 0, 5)
    read_rows(IMPATIENT, str(path), byte // 32 + 1, 1)


@pytest.mark.parametrize("count", [0, 1, 123_456])
def test_numpy_opens_the_table_and_its_rows_begin_at_byte_256(tmp_path, count):
    rows = np.zeros(count, ROW)
    rows["crc"] = np.arange(count)
    (tmp_path / "table.npy").write_bytes(table_bytes(rows))
    assert np.array_equal(np.load(tmp_path / "table.npy"), rows)
    assert (tmp_path / "table.npy").stat().st_size == 256 + 32 * count


CLASSES = ["Hütte", 'a "b"', "c"]
F0, F1, F2 = (16 * each for each in ("f0", "f1", "f2"))
SHARDS = [Shard("shard-000000.tar", 3, 9000, table=F0), Shard("shard-000001.tar", 2, 5000, table=F1)]


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_manifest_is_read_back_as_written(tmp_path, kind):
    url = str(tmp_path) if kind == "local" else f"memory://{tmp_path.name}"
    write_manifest(url, CLASSES, SHARDS)
    manifest = read_manifest(url + "/")
    assert (manifest.classes, [*manifest.shards]) == (tuple(CLASSES), SHARDS)
    assert (manifest.samples, manifest.mean_sample_bytes) == (5, 2800)
    assert manifest.url_of(1, ".npy") == f"{url}/shard-000001.npy"


@pytest.mark.parametrize(
    "optional",
    [{}, {"label_field": "a.b"}, {"labels_per_sample": 3, "shards_at": "s3://there"}],
)
def test_a_manifest_has_its_optional_fields_only_where_they_differ(tmp_path, optional):
    write_manifest(str(tmp_path), CLASSES, SHARDS, **optional)
    manifest = read_manifest(str(tmp_path))
    usual = {"label_field": None, "labels_per_sample": 1, "shards_at": None}
    assert {name: getattr(manifest, name) for name in usual} == {**usual, **optional}
    assert json.loads((tmp_path / "manifest.json").read_text()).keys() - {*optional} == {
        "format", "samples", "classes", "shards"
    }  # fmt: skip
    assert manifest.url_of(0) == f"{optional.get('shards_at', tmp_path)}/shard-000000.tar"
    assert manifest.url_of(0, ".npy") == f"{tmp_path}/shard-000000.npy"


other_rows: list[tuple[str, Any]] = [("samples", 4), ("bytes", 9001), ("table", F2)]
NAMES = [replace(shard, name=f"part/{shard.stem}.TAR", query="?token=9") for shard in SHARDS]


@pytest.mark.parametrize(
    ("classes", "shards", "options", "is_the_same"),
    [
        (CLASSES, NAMES, {"shards_at": "s3://elsewhere", "format_1": "ab"}, True),
        (CLASSES[:2], SHARDS, {}, False),
        (CLASSES[::-1], SHARDS, {}, False),
        (CLASSES, SHARDS[::-1], {}, False),
        (CLASSES, SHARDS[:1], {}, False),
        *((CLASSES, [replace(SHARDS[0], **{name: value}), SHARDS[1]], {}, False) for name, value in other_rows),
        (CLASSES, SHARDS, {"label_field": "a.b"}, False),
        (CLASSES, SHARDS, {"labels_per_sample": 2}, False),
        (CLASSES, SHARDS, {"labels": Reading.NAMES}, False),
    ],
)
def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(tmp_path, classes, shards, options, is_the_same):
    prints = []
    for name, content in (("a", (CLASSES, SHARDS, {})), ("b", (classes, shards, options))):
        (tmp_path / name).mkdir()
        write_manifest(str(tmp_path / name), *content[:2], **content[2])
        prints.append(read_manifest(str(tmp_path / name)).fingerprint)
    assert (prints[0] == prints[1]) is is_the_same and None not in prints


TEXTS = st.sampled_from(["a", "größe/日本", 'a},\n{"shards": [', "\ud800", "},", '"', "x" * 40])
SHARD_ROWS = st.fixed_dictionaries(
    {"name": TEXTS, "samples": st.integers(1, 9), "bytes": st.integers(1, 2**62), "table": st.sampled_from([F0, F1])},
    optional={"query": TEXTS, "headers": st.sampled_from(["", F2]), "unknown": TEXTS},
)
FORMATS: dict[str, dict[str, Any]] = {
    "ours": {},
    "lines": {"indent": 2},
    "sorted": {"indent": 0, "sort_keys": True},
    "one": {"separators": (",", ":")},
}


@given(st.lists(SHARD_ROWS, min_size=1, max_size=20), st.lists(TEXTS, min_size=1, unique=True), st.data())
def test_a_manifest_is_what_json_says_however_it_is_formatted(
    tmp_path_factory, rows: list[dict[str, Any]], classes, draw
):
    """In pieces of any length; its fingerprints are SHA-256 of JSON, as checkpoints have them."""
    number = draw.draw(st.sampled_from([1, 2]))
    rows = [{**row, "name": f"{row['name']}{i}.{'tAR' if i % 3 else 'tar'}"} for i, row in enumerate(rows)]
    rows = [
        {name: value for name, value in row.items() if number == 2 or name not in ("table", "headers")} for row in rows
    ]
    document = {"format": number, "samples": sum(row["samples"] for row in rows), "classes": classes, "shards": rows}
    document |= {"shards_at": "s3://there", "unknown": [{"a": "},"}, {"b": 1}]}
    keys = draw.draw(st.permutations([*document]))
    ascii, style = draw.draw(st.booleans()), FORMATS[draw.draw(st.sampled_from([*FORMATS]))]
    text = json.dumps({key: document[key] for key in keys}, ensure_ascii=ascii, **style)
    contents = text.encode(draw.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), "surrogatepass")
    folder = tmp_path_factory.getbasetemp()
    (folder / "manifest.json").write_bytes(contents)
    with mock.patch("data.shards.manifest._PIECE_LENGTH", draw.draw(st.integers(1, 300))):
        manifest = read_manifest(str(folder))
    expected = [Shard(**{name: value for name, value in row.items() if name != "unknown"}) for row in rows]
    assert [*manifest.shards] == [manifest.shards[i] for i in range(len(rows))] == expected
    assert (manifest.classes, manifest.shards_at) == (tuple(classes), "s3://there")
    assert manifest.format_1 == (hashlib.sha256(contents).hexdigest() if number == 1 else None)
    for found, column in ((manifest.fingerprint, "table"), (manifest.header_fingerprint, "headers")):
        each = [[row["samples"], row["bytes"], row.get(column)] for row in rows]
        whole = hashlib.sha256(json.dumps([classes, None, 1, Reading.FROM_0, each]).encode()).hexdigest()
        assert found == (whole if all(row.get(column) for row in rows) else None)


def changed(**changes: object) -> bytes:
    whole = {"format": 1, "samples": 5, "classes": ["a"], "shards": [{"name": "s.tar", "samples": 5, "bytes": 9}]}
    return json.dumps({name: value for name, value in {**whole, **changes}.items() if value is not None}).encode()


SHARD = {"name": "s.tar", "samples": 5, "bytes": 9}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "does not exist"),
        (b"", "is not valid JSON"),
        (changed()[:-9], "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1]", "is not a manifest of shards"),
        (changed(format=None), "is not a manifest of shards"),
        (changed(format=3), "has format 3; this version can read formats 1 and 2"),
        (changed(format=2), "has format 2, but gives s.tar the table checksum ''"),
        (changed(shards=[{**SHARD, "table": F0}]), f"has format 1, but gives s.tar the table checksum '{F0}'"),
        (changed(shards=[{**SHARD, "table": "f0"}]), "gives s.tar the table 'f0', which is not a checksum"),
        (changed(shards=[{**SHARD, "query": 7}]), "gives s.tar the query 7, which is not text"),
        (changed(shards=[{**SHARD, "bytes": 1 << 63}]), "gives s.tar 5 samples in 9223372036854775808 bytes"),
        (changed(shards=[[]]), "not a complete manifest"),
        (changed(shards=None), "not a complete manifest"),
        (changed(shards=[{"name": "s.tar"}]), "not a complete manifest"),
        (changed(classes=7), "not a complete manifest"),
        (changed(classes=[]), "names no classes"),
        (changed(classes=["a", "a"]), "names a class twice"),
        (changed(shards=[]), "names no shards"),
        (changed(shards=[SHARD, SHARD], samples=10), "names a shard twice"),
        (changed(shards=[{**SHARD, "name": "s"}]), "'s', which is not a .tar"),
        (changed(shards=[{**SHARD, "samples": 0}], samples=0), "gives s.tar 0 samples"),
        (changed(samples=6), "says 6 samples, but its shards have 5"),
        (changed(labels_per_sample=0), "has labels_per_sample 0"),
        (changed(label_field=3), "that is not text"),
    ],
)
def test_a_missing_or_wrong_manifest_is_refused_in_one_line(tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "manifest.json").write_bytes(contents)
    with pytest.raises(UsageError, match=message) as refused:
        read_manifest(str(tmp_path))
    assert str(tmp_path / "manifest.json") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_url_that_nothing_reads_is_refused():
    with pytest.raises(UsageError, match=r"nosuch://x/manifest\.json cannot be opened"):
        read_manifest("nosuch://x")


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path):
    fs, folder = open_fs(str(tmp_path))
    write_file(fs, f"{folder}/a", b"1" * 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"a cannot be written: .* too large"):
            write_file(fs, f"{folder}/a", b"2" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a").read_bytes() == b"1" * 10


def test_a_file_is_written_under_its_name_alone_and_a_failed_write_says_where(tmp_path):
    fs, folder = open_fs(str(tmp_path))
    write_file(fs, f"{folder}/a", b"1")
    write_file(fs, f"{folder}/a", b"22")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"22"}
    with pytest.raises(DataError, match="missing/b cannot be written"):
        write_file(fs, f"{folder}/missing/b", b"3")
