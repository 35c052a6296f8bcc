"""Laws of indexing: shards of any writer train as if packed here, and what would be read wrongly is refused by name."""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from PIL import Image

from data.augment import Augmentation
from data.errors import DataError, UsageError
from data.loader import LoaderSpec, training_batches
from data.order import Order, SampleRange
from data.packing.index import DamagedTars, Report, index
from data.packing.parts import NotLast
from data.packing.tars import find_tars
from data.packing.work import Part
from data.reader import Sample, read_ranges
from data.shards.manifest import BadSample, Manifest, read_manifest
from data.shards.sample_table import FLAG_DECODED, FLAG_UNCHECKED, sample_table, table_rows
from data.shards.tar_index import index_tar
from data.storage.remote import NotFound, ReadError, Storage
from tests.data.in_parts import rounds, run_in_parts
from tests.data.servers import forever, http_server

SIDE, SAMPLES = 24, 30


class Counted(LocalFileSystem):
    """The local disk at counted://, which notes the bytes that each read of a tar gave."""

    protocol = "counted"
    reads: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counted://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> Any:
        contents: Any = super().cat_file(path, start, end, **kwargs)
        if path.endswith(".tar"):
            Counted.reads.append(len(contents))
        return contents


fsspec.register_implementation("counted", Counted, clobber=True)


def image(number: int, kind: str = "JPEG") -> bytes:
    """An image unlike all others."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def indexed(url: object, out: object = None, **changed: Any) -> Report:
    request: dict[str, Any] = {"decode": False, "classes": None, "label_field": None, "workers": 2}
    request["progress"] = lambda done, total: None
    return index(str(url), None if out is None else str(out), **{**request, **changed})


def everything(manifest: Manifest) -> list[Sample | BadSample]:
    return read_ranges(manifest, [SampleRange(i, 0, shard.samples) for i, shard in enumerate(manifest.shards)])


# ------------------------------------------------------------------------------------------------- shards of any writer


def by_webdataset(folder: Path) -> dict[str, Any]:
    """With its times as floating point, each of which is a header of its own."""
    with webdataset.ShardWriter(str(folder / "set-%03d.tar"), maxcount=12, verbose=0) as writer:
        for number in range(SAMPLES):
            writer.write({"__key__": f"n{number:06d}", "jpg": image(number), "cls": number % 4})
    return {}


def by_img2dataset(folder: Path) -> dict[str, Any]:
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(shard * 15, shard * 15 + 15):
                described = {"caption": f"a {number}.", "meta": {"label": number % 4}}
                writer.write({"__key__": f"{number:09d}", "jpg": image(number), "json": described, "txt": "a cat"})
    return {"label_field": "meta.label"}


def by_tar(folder: Path, inner: str = "inner") -> dict[str, Any]:
    """Names that begin with ./, folders with dots, kinds in capitals, hidden files."""
    kinds = {"jpeg": "JPEG", "PNG": "PNG", "webp": "WEBP"}
    for number in range(SAMPLES):
        suffix, kind = list(kinds.items())[number % 3]
        place = folder / "files" / f"v1.{number % 2}" / inner / f"{number:03d}.{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image(number, kind))
        place.with_suffix(".cls").write_text(f"{number % 4}\n")
        place.with_name(f"._{place.name}").write_bytes(b"left by a Mac")
    command = ["tar", "--format=gnu", "--sort=name", "-cf", str(folder / "all.tar"), "-C", str(folder / "files"), "."]
    subprocess.run(command, check=True)
    shutil.rmtree(folder / "files")
    return {}


def by_tar_with_long_names(folder: Path) -> dict[str, Any]:
    return by_tar(folder, "long" * 40)


WRITERS = [by_webdataset, by_img2dataset, by_tar, by_tar_with_long_names]


@pytest.fixture(scope="module", params=WRITERS, ids=lambda writer: writer.__name__)
def foreign(request, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    return folder, request.param(folder)


@pytest.fixture(params=[False, True], ids=["headers", "decode"])
def decode(request) -> bool:
    return request.param


def of_webdataset(folder: Path, field: str | None) -> Iterator[tuple[str, bytes, int]]:
    """Key, image and label of each sample as webdataset itself reads the tars."""
    for sample in webdataset.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False):
        if not sample["__key__"].endswith("/"):  # what it makes of the Mac's hidden files
            encoded = next(sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample)
            stated = sample["cls"] if field is None else json.loads(sample["json"])["meta"]["label"]
            yield sample["__key__"], encoded, int(stated)


def test_shards_of_any_writer_are_read_as_webdataset_reads_them(foreign, decode, tmp_path):
    folder, request = foreign
    report = indexed(folder, tmp_path, decode=decode, **request)
    manifest = read_manifest(str(tmp_path))
    expected = list(of_webdataset(folder, request.get("label_field")))
    tars = sorted(folder.glob("*.tar"))
    size, place = sum(tar.stat().st_size for tar in tars), request.get("label_field", ".cls")
    assert report == Report(len(tars), SAMPLES, size, 4, (), 0 if decode else SAMPLES, f"numbers from 0 in {place}")
    assert manifest.classes == ("0", "1", "2", "3") and manifest.samples == len(expected) == SAMPLES
    samples = [sample for sample in everything(manifest) if isinstance(sample, Sample)]
    assert [(each.key, each.image, *each.labels) for each in samples] == expected
    assert {(each.height, each.width) for each in samples} == {(SIDE, SIDE)}


def test_decoding_stores_checksums_sizes_and_the_decoded_flag(foreign, decode, tmp_path):
    folder, request = foreign
    indexed(folder, tmp_path, decode=decode, **request)
    for tar in folder.glob("*.tar"):
        contents = tar.read_bytes()
        samples = index_tar(contents)
        known = sample_table(contents, samples, [(SIDE, SIDE)] * len(samples), FLAG_DECODED)
        unknown = table_rows(samples, 0, [(0, 0)] * len(samples), FLAG_UNCHECKED)
        assert np.array_equal(np.load(tmp_path / f"{tar.stem}.npy"), known if decode else unknown)


def test_dalis_own_reader_takes_the_index(foreign, tmp_path):
    folder, request = foreign
    if request:
        pytest.skip("labels in .json are not DALI's")
    indexed(folder, tmp_path, **request)
    tars = sorted(folder.glob("*.tar"))

    @pipeline_def(batch_size=SAMPLES, num_threads=1, device_id=None)
    def read():
        return tuple(
            fn.readers.webdataset(
                paths=[str(tar) for tar in tars],
                index_paths=[str(tmp_path / f"{tar.stem}.idx") for tar in tars],
                ext=["jpg;jpeg;PNG;webp", "cls"],
            )
        )

    pipeline = read()
    pipeline.build()
    images, labels = pipeline.run()
    expected = [(encoded, label) for _, encoded, label in of_webdataset(folder, None)]
    assert [(bytes(images.at(i)), int(bytes(labels.at(i)))) for i in range(SAMPLES)] == expected


# -------------------------------------------------------------------------------------------------------------- where


def test_a_folder_a_glob_and_a_pattern_give_the_same_on_disk_and_in_memory(tmp_path):
    by_webdataset(tmp_path)
    fsspec.filesystem("memory").put(str(tmp_path) + "/", "/indexed/", recursive=True)
    found = set()
    for base in (str(tmp_path), "memory://indexed"):
        for number, pattern in enumerate(("", "/set-*.tar", "/set-{000..002}.tar", "/set-00{0,1,2}.tar")):
            out = tmp_path / f"{base[:3].strip('/')}{number}"
            indexed(base + pattern, out)
            manifest = read_manifest(str(out))
            assert manifest.shards_at and all(isinstance(each, Sample) for each in everything(manifest))
            found.add(
                b"".join((out / f"set-{i:03d}{kind}").read_bytes() for i in range(3) for kind in (".npy", ".idx"))
            )
            assert [shard.name for shard in manifest.shards] == [f"set-{i:03d}.tar" for i in range(3)]
    assert len(found) == 1


NAMES = [
    "a b",
    "100%",
    "100%41",
    "x#y",
    "d[1]",
    "q?",
    "st*r",
    "{a,b}",
    "{half",
    "c::d",
    "back\\slash",
    "é",
    "AT&T",
    "x.tar",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_themselves_wherever_they_are_whatever_signs_they_have(tmp_path, name):
    folder = written(tmp_path / name, [{"jpg": image(0), "cls": b"0"}])
    (folder / "a.tar").rename(folder / f"{name}.TAR")
    (tmp_path / "link").symlink_to(name)
    with http_server(tmp_path) as server:
        web = f"{server.url}/{quote(name)}"
        places = [folder, f"{folder}/", f"{folder}/{name}.TAR", f"file://{folder}", tmp_path / "link"]
        places += [f"{folder}/*.TAR", f"{folder}/**/*.TAR"]
        places += [f"{web}/", f"{web}/{quote(name)}.TAR", f"{web}/*.TAR", f"{web}/?a=1", f"{web}/{quote(name)}.TAR?a=1"]
        for number, place in enumerate(map(str, places)):
            out = tmp_path / f"out{number}"
            indexed(place, out)
            assert [each.key for each in everything(read_manifest(str(out)))] == ["0000"], place


def test_a_query_goes_with_every_request_as_it_was_written_and_into_no_message(tmp_path, capsys):
    by_webdataset(tmp_path)
    asked = "sig=a%2Fb%3D+%2B&expires=2030-01-01T00:00:00Z"
    with http_server(tmp_path) as server:
        places = ["/", *(f"/set-{pattern}.tar" for pattern in ("{000..002}", "000", "*"))]
        for number, place in enumerate(places):
            server.forget()
            out = tmp_path / f"out{number}"
            indexed(f"{server.url}{place}?{asked}", out, decode=True)
            assert all(isinstance(each, Sample) for each in everything(read_manifest(str(out))))
            tars = [request.query for request in server.requests if request.path.endswith("0.tar")]
            assert tars and set(tars) == {asked}
            assert not any("sig" in file.name for file in out.iterdir())
        faults: list[ReadError] = []
        manifest = read_manifest(str(tmp_path / "out1"), Storage(attempts=5, first_wait=0.0, on_error=faults.append))
        server.plan = forever("503")
        with pytest.raises(DataError, match=r"set-000\.tar\?\.\.\.: bytes") as failed:
            everything(manifest)
        assert len(faults) == 5
        for said in (str(failed.value), repr(faults), capsys.readouterr().err):
            assert "2030" not in said and "sig" not in said


def test_each_tar_has_its_own_query_and_its_name_alone_says_that_it_is_one(tmp_path):
    by_webdataset(tmp_path)
    with http_server(tmp_path) as server:
        indexed(server.url + "/{set-000.tar?a=1,set-001.tar?a=2}", tmp_path / "out")
        assert len(everything(read_manifest(str(tmp_path / "out")))) == 24
        asked = {(request.path, request.query) for request in server.requests if request.path.startswith("/set-")}
        assert asked == {("/set-000.tar", "a=1"), ("/set-001.tar", "a=2")}
        for url, message in {
            "/set-000?file=set-000.tar": "does not exist",
            "/out/manifest.json?file=set-000.tar": "has no .tar files",
            "/{set-000.tar?a=1,set-000.tar?a=2}": "names a tar twice",
        }.items():
            with pytest.raises(UsageError, match=message):
                indexed(server.url + url, tmp_path / "another")


def test_a_server_that_refuses_a_tar_is_not_said_to_lack_it(tmp_path):
    with http_server(tmp_path) as server:
        server.answer = lambda *asked: (403, {"Content-Length": "0"}, b"")
        with pytest.raises(DataError, match=r"a\.tar cannot be found: HTTP 403") as refused:
            indexed(f"{server.url}/a.tar", tmp_path / "out")
        assert not isinstance(refused.value, NotFound)


def test_a_set_indexed_in_place_can_be_moved_and_keeps_the_pattern_s_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "sets" / name).mkdir(parents=True)
        by_webdataset(tmp_path / "sets" / name)
    indexed(f"{tmp_path}/sets/{{b,a}}/set-{{002..000}}.tar")
    moved = (tmp_path / "sets").rename(tmp_path / "moved")
    manifest = read_manifest(str(moved))
    names = [f"{folder}/set-00{number}.tar" for folder in "ba" for number in (2, 1, 0)]
    assert manifest.shards_at is None and [shard.name for shard in manifest.shards] == names
    assert all(isinstance(each, Sample) for each in everything(manifest))


@pytest.mark.parametrize(("bytes_each", "most_read", "most_reads"), [(200_000, 0.06, 1.1), (3_000, 1.05, 0.02)])
def test_large_images_are_not_downloaded_and_small_ones_take_few_requests(tmp_path, bytes_each, most_read, most_reads):
    """As a share of the tar's bytes, and in requests for each sample."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(400):
            writer.write({"__key__": f"{number:06d}", "jpg": bytes(bytes_each), "cls": number % 4})
    Counted.reads.clear()
    indexed(f"counted://{tmp_path}")
    assert 0 < sum(Counted.reads) <= most_read * (tmp_path / "a.tar").stat().st_size
    assert len(Counted.reads) <= most_reads * 400


# -------------------------------------------------------------------------------------------------------------- labels


def written(folder: Path, samples: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(folder / "a.tar"), encoder=False, mtime=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:04d}", **sample})
    return folder


def labelled(folder: Path, documents: list[Any]) -> Path:
    return written(folder, [{"jpg": image(i), "json": json.dumps(each).encode()} for i, each in enumerate(documents)])


def labels_in(folder: Path) -> list[tuple[int, ...] | str]:
    found = everything(read_manifest(str(folder)))
    return [each.labels if isinstance(each, Sample) else each.reason for each in found]


def test_names_as_labels_are_numbered_by_the_lines_of_the_file_of_classes(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\nthe bee\n")
    folder = written(
        tmp_path / "set",
        [{"jpg": image(i), "cls": label} for i, label in enumerate((b"cat", b"dog", b"the bee\n", b"cow"))],
    )
    report = indexed(folder, classes=str(names))
    assert labels_in(folder)[:3] == [(1,), (0,), (2,)]
    reason = "its label is 'cow'; it must be 0 to 2 or the name of a class"
    assert (report.classes, report.broken) == (3, (BadSample("a.tar", "0003", reason),))
    assert labels_in(folder)[3] == "its label is 'cow'; it must be the name of a class"


@pytest.mark.parametrize(
    ("document", "field"),
    [({"label": 3}, "label"), ({"a": {"b": {"c": [3]}}}, "a.b.c"), ({"label": "3"}, "label"), ({"x": [3, 3.0]}, "x")],
)
def test_a_label_is_found_in_any_field(tmp_path, document, field):
    folder = labelled(tmp_path / "set", [document])
    assert (indexed(folder, label_field=field).classes, labels_in(folder)) == (4, [(3,)])


def test_several_labels_of_a_sample_come_in_a_row_filled_up_with_minus_one(tmp_path):
    folder = labelled(tmp_path / "set", [{"labels": labels} for labels in ([2], [0, 1], 1, [2, 0, 1])] * 2)
    indexed(folder, label_field="labels")
    manifest = read_manifest(str(folder))
    plain = Augmentation(crop="center", flip=False, layers=0, magnitude=0.0)
    spec = LoaderSpec(0, 1, 8, SIDE, torch.device("cpu"), 1)
    with training_batches(manifest, Order(0, np.array([8]), 8, 8), plain, spec, 0, 0, 1) as steps:
        (batch,) = next(steps)
    rows = {"0": [2, -1, -1], "1": [0, 1, -1], "2": [1, -1, -1], "3": [2, 0, 1]}
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [rows[str(int(key) % 4)] for key in batch.keys]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (b"{", "its .json is not valid JSON"),
        (b"{}", "its .json has no field label"),
        (b"[1]", "its .json has no field label"),
        (b'{"label": []}', "its label is an empty list"),
        (b'{"label": null}', "its label is null; it must be a number"),
        (b'{"label": true}', "its label is true; it must be a number"),
        (b'{"label": 1.5}', "its label is 1.5; it must be a number"),
        (b'{"label": " "}', "its label is empty"),
        (b'{"label": [1, [2]]}', r"its label is \[2\]; it must be a number"),
        (b'{"label": -1}', "its label is '-1'; without --classes"),
        (b'{"label": 2000000}', "its label is '2000000'; without --classes"),
    ],
)
def test_a_label_that_is_none_is_listed_and_the_sample_is_broken_for_training(tmp_path, part, reason):
    folder = written(tmp_path / "set", [{"jpg": image(0), "json": b'{"label": 0}'}, {"jpg": image(1), "json": part}])
    (listed,) = indexed(folder, label_field="label").broken
    assert (listed.shard, listed.key) == ("a.tar", "0001") and re.match(reason, listed.reason)
    good, bad = everything(read_manifest(str(folder)))
    assert isinstance(good, Sample) and isinstance(bad, BadSample) and bad.key == "0001"


# ------------------------------------------------------------------------------------------------- what is refused


def tar_of(names: list[str], pax_headers: dict[str, str] | None = None, label: str = "0") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax_headers or {}) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            content = label.encode() if name.endswith("cls") else b"x" * 600
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


PAIRS = ["1.jpg", "1.cls", "2.jpg", "2.cls"]
WHOLE = tar_of(PAIRS)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (tar_of(["1.jpg", "2.jpg", "1.cls", "2.cls"]), "parts of sample 1 are not next to each other; .*--sort=name"),
        (tar_of(["1.jpg", "1.cls", "1.JPG"]), "sample 1 has two parts called jpg"),
        (WHOLE[:1900], "not a valid tar"),
        (WHOLE[:1536] + b"x" + WHOLE[1537:], "damaged or cut header at byte 1536"),
        (WHOLE + WHOLE, "it ends at byte 5120, but more follows"),
        (WHOLE[:2560] + bytes(1024) + WHOLE[2560:], "it ends at byte 2560, but more follows"),
        (tar_of(PAIRS, {"path": "z.jpg"}), "a global header before .* gives all members the same name or size"),
        (b"", "empty file"),
        (gzip.compress(WHOLE), "is compressed; unpack it first \\(gunzip"),
    ],
    ids=["apart", "twice", "cut", "header", "joined", "zeros", "global", "empty", "compressed"],
)
def test_a_tar_that_would_be_read_wrongly_is_refused_by_name(tmp_path, contents, message):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    (tmp_path / "b.tar").write_bytes(contents)
    with pytest.raises(DamagedTars, match=r"1 of 2 tars .* cannot be indexed") as refused:
        indexed(tmp_path)
    (damaged,) = refused.value.report.broken
    assert (damaged.shard, damaged.key) == ("b.tar", "") and re.match(f".*{message}", damaged.reason)
    assert not (tmp_path / "manifest.json").exists()


@settings(max_examples=settings().max_examples // 2)
@given(st.sets(st.integers(0, 5), min_size=1), st.booleans(), st.sampled_from(["{}", "é{}", "00{}"]))
def test_all_damaged_tars_are_named_and_the_next_index_reads_only_those(tmp_path_factory, damaged, decode, label):
    folder = tmp_path_factory.mktemp("set")
    whole = {f"{n}.tar": tar_of(PAIRS, label=label.format(n)) for n in range(6)}
    for number, (name, contents) in enumerate(whole.items()):
        (folder / name).write_bytes([contents, contents[:1900], b""][(number in damaged) * (1 + number % 2)])
    with pytest.raises(DamagedTars) as refused:
        indexed(f"counted://{folder}", decode=decode)
    named = {str(each.shard) for each in refused.value.report.broken if not each.key}
    assert named == {f"{number}.tar" for number in damaged}
    for name in named:
        (folder / name).write_bytes(whole[name])
    Counted.reads.clear()
    again = indexed(f"counted://{folder}", decode=decode)
    assert again.kept == 6 - len(damaged)
    assert sum(Counted.reads) <= (1 + decode) * sum(len(whole[name]) for name in named)
    made = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".npy", ".idx", ".json")}
    for file in made:
        (folder / file).unlink()
    assert indexed(f"counted://{folder}", decode=decode) == replace(again, kept=0)
    assert {name: (folder / name).read_bytes() for name in made} == made
    assert {file.name for file in folder.iterdir()} == {*whole, *made}


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder / "0.tar", ns=(1, 1)),
        lambda folder: (folder / "0.tar").write_bytes(WHOLE + bytes(10240)),
        lambda folder: (folder / "0.npy").unlink(),
        lambda folder: (folder / "0.idx").unlink(),
        lambda folder: (folder / ".indexing" / "000000.json").write_text("{"),
    ],
    ids=["touched", "longer", "table", "index", "note"],
)
def test_what_has_changed_since_an_index_ended_early_is_indexed_again(tmp_path, change):
    for name, contents in {"0": WHOLE, "1": WHOLE[:1900]}.items():
        (tmp_path / f"{name}.tar").write_bytes(contents)
    with pytest.raises(DamagedTars):
        indexed(tmp_path)
    (tmp_path / "1.tar").write_bytes(WHOLE)
    change(tmp_path)
    report = indexed(tmp_path)
    assert (report.kept, report.shards, report.samples) == (0, 2, 4)


def test_when_labels_are_refused_what_is_done_is_kept_too(tmp_path):
    for number, label in enumerate(["7", "007", "cat"]):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(PAIRS, label=label))
    with pytest.raises(UsageError, match="two ways"):
        indexed(tmp_path)
    (tmp_path / "1.tar").write_bytes(tar_of(PAIRS, label="dog"))
    report = indexed(tmp_path)
    assert (report.kept, report.shards, report.classes) == (2, 3, 3)
    assert not (tmp_path / ".indexing").exists()


def test_another_request_keeps_nothing_of_an_index_that_ended_early(tmp_path):
    for name, contents in {"0": WHOLE, "1": WHOLE[:1900]}.items():
        (tmp_path / f"{name}.tar").write_bytes(contents)
    with pytest.raises(DamagedTars):
        indexed(tmp_path)
    (tmp_path / "1.tar").write_bytes(WHOLE)
    (tmp_path / "names").write_text("cat\n")
    assert indexed(tmp_path, classes=str(tmp_path / "names")).kept == 0
    assert not (tmp_path / ".indexing").exists()


# -------------------------------------------------------------------------------------------------------- in parts


def made(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def various(tmp_path_factory) -> Path:
    """Tars of several labels a sample, one of which is none, an image that does not decode, and a tar without any."""
    folder = tmp_path_factory.mktemp("various")
    (folder / "6.tar").write_bytes(bytes(10240))
    for number in range(6):
        labels = [[number % 3], [3, number % 2], "-1" if number == 2 else 0]
        images = [image(number), b"x" * 600 if number == 4 else image(9), image(number + 10)]
        documents = [json.dumps({"labels": label}).encode() for label in labels[number % 3 :]]
        samples = [{"jpg": each, "json": document} for each, document in zip(images, documents, strict=False)]
        (written(folder, samples) / "a.tar").rename(folder / f"{number}.tar")
    return folder


@pytest.fixture(scope="module")
def alone(various, tmp_path_factory) -> dict[bool, tuple[Report, dict[str, bytes]]]:
    """What a single index makes of them, without and with --decode."""
    outs = [tmp_path_factory.mktemp("alone") for _ in range(2)]
    return {
        bool(n): (indexed(various, out, decode=bool(n), label_field="labels"), made(out)) for n, out in enumerate(outs)
    }


@settings(max_examples=settings().max_examples // 4)
@given(rounds(), st.booleans())
def test_parts_that_come_as_they_like_make_what_a_single_index_makes(various, alone, tmp_path_factory, plan, decode):
    out = tmp_path_factory.mktemp("parts")
    reports = run_in_parts(partial(indexed, various, out, decode=decode, label_field="labels"), plan)
    expected, files = alone[decode]
    assert [replace(report, kept=0) for report in reports] == [expected] * len(reports) != []
    assert made(out) == files and len(list(out.iterdir())) == len(files)


def test_parts_name_damaged_tars_together_and_do_again_only_what_is_new(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.tar").write_bytes(WHOLE[:1900] if number in (1, 2) else WHOLE)
    for number in (0, 1, 2):
        with pytest.raises(NotLast, match=f"part {number} of 3: .*; {6 - 2 * number} of 6 shards to go"):
            indexed(tmp_path, part=Part(number, 3))
    with pytest.raises(DamagedTars) as refused:
        indexed(tmp_path, part=Part(3, 3))
    assert [each.shard for each in refused.value.report.broken] == ["1.tar", "2.tar"]
    (tmp_path / "1.tar").write_bytes(WHOLE)
    (tmp_path / "2.tar").unlink()
    (tmp_path / "00.tar").write_bytes(WHOLE)
    reports = run_in_parts(partial(indexed, tmp_path), [[(Part(number, 3), None)] for number in (1, 2, 3)])
    assert [(report.kept, report.shards) for report in reports] == [(5, 6)]
    (tmp_path / ".indexing").mkdir()  # as where that one is killed when it has written the manifest
    with pytest.raises(NotLast, match=r"part 2 of 3: .* already has a manifest\.json"):
        indexed(tmp_path, part=Part(2, 3))
    assert not (tmp_path / ".indexing").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decode": True}, "decode was False and is now True"),
        ({"label_field": ".txt"}, r"label_field was None and is now \.txt"),
        ({"classes": "names"}, "classes was None and is now 1 of [0-9a-f]{16}"),
    ],
)
def test_parts_that_disagree_are_refused_by_what_they_disagree_in(tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    Path("names").write_text("cat\n")
    for number in range(2):
        (written(tmp_path / "set", [{"jpg": image(0), "cls": b"0"}]) / "a.tar").rename(f"set/{number}.tar")
    with pytest.raises(NotLast):
        indexed("set", part=Part(1, 2))
    with pytest.raises(UsageError, match=f"{message}; choose another place with --out, or remove its .indexing"):
        indexed("set", part=Part(2, 2), **changed)
    assert indexed("set", part=Part(2, 2)).kept == 1


@pytest.mark.parametrize(("second", "message"), [(WHOLE, "already has a manifest.json"), (b"", "restarted this work")])
def test_a_stale_part_that_finds_the_work_ended_or_begun_anew_changes_nothing(tmp_path, second, message):
    """Others overtake it before it has done anything: all of the same request, or some of another one."""
    (tmp_path / "0.tar").write_bytes(WHOLE)
    (tmp_path / "1.tar").write_bytes(second)
    left: dict[str, bytes] = {}

    def overtake(done: int, total: int) -> None:
        with suppress(DamagedTars):
            indexed(tmp_path, decode=not second)
        left.update(made(tmp_path))

    with pytest.raises((NotLast, UsageError), match=message):
        indexed(tmp_path, part=Part(1, 2), progress=overtake)
    assert made(tmp_path) == left
    assert (tmp_path / ".indexing").exists() == (not second)


def test_a_comment_in_a_global_header_is_fine_and_an_empty_tar_is_left_out(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(PAIRS, {"comment": "made by hand"}))
    (tmp_path / "b.tar").write_bytes(bytes(10240))
    report = indexed(tmp_path)
    assert (report.shards, report.samples, report.broken) == (
        1,
        2,
        (BadSample("b.tar", "", "has no samples; it is left out"),),
    )


@pytest.mark.parametrize(
    ("url", "request_", "message"),
    [
        ("nowhere", {}, "nowhere does not exist"),
        ("set/{a,b}.tar", {}, r"set/b\.tar does not exist"),
        ("set/{c,a,b}.tar", {}, r"set/b\.tar, set/c\.tar do not exist"),
        ("set/{a,a}.tar", {}, "names a tar twice"),
        ("set/*.tgz", {}, "has no .tar files"),
        ("set/{0..2.tar", {}, "does not exist|is not a valid pattern"),
        ("set", {"label_field": "label"}, "sample 0000 has no field label with its label; it has no .json either"),
        ("captioned", {}, r"sample 0000 has no \.cls with its label; --label-field can be one of a, b\.c"),
        ("captioned", {"label_field": "b"}, "has no field b with its label; --label-field can be one of a, b.c"),
        ("dotted", {}, "no sample with a label; for example, a.tar img: has 2 images .*; a key ends at the first dot"),
        ("mixed", {}, r"labels are in different parts, those of .\.tar in .* and those of .\.tar in .*; index"),
        ("set", {"classes": "nofile"}, "nofile"),
        ("done", {}, "done already has a manifest.json; remove it to index again, or choose another --out"),
    ],
)
def test_a_request_that_cannot_be_indexed_is_refused_with_what_to_do(tmp_path, monkeypatch, url, request_, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "set", [{"jpg": image(0), "cls": b"0"}])
    written(tmp_path / "done", [{"jpg": image(0), "cls": b"0"}])
    indexed("done")
    labelled(tmp_path / "captioned", [{"a": "a cat", "b": {"c": 1}}])
    written(tmp_path / "dotted", [{"__key__": f"img.{i}", "jpg": image(i), "cls": b"0"} for i in range(2)])
    written(tmp_path / "mixed", [{"jpg": image(0), "txt": b"cat"}])
    (tmp_path / "mixed" / "b.tar").write_bytes((tmp_path / "set" / "a.tar").read_bytes())
    with pytest.raises(UsageError, match=message) as refused:
        indexed(url, **request_)
    assert "\n" not in str(refused.value)


def test_a_place_that_cannot_be_written_is_an_error_that_says_out(tmp_path):
    written(tmp_path / "set", [{"jpg": image(0), "cls": b"0"}])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written: .*; choose another place with --out"):
        indexed(tmp_path / "set", tmp_path / "file" / "inside")


def test_out_may_be_the_folder_of_the_tars(tmp_path):
    written(tmp_path / "set", [{"jpg": image(0), "cls": b"0"}])
    indexed(tmp_path / "set", f"{tmp_path}/set/")
    assert read_manifest(str(tmp_path / "set")).shards_at is None


def test_the_tars_of_a_folder_are_in_the_order_of_their_names(tmp_path):
    for name in ("10.tar", "9.tar", "1.tar", "x.txt", ".hidden.txt", "._9.tar"):
        (tmp_path / name).write_bytes(WHOLE)
    assert [Path(tar.url).name for tar in find_tars(str(tmp_path))] == ["1.tar", "10.tar", "9.tar"]
    assert [Path(tar.url).name for tar in find_tars(f"{tmp_path}/._*")] == ["._9.tar"]
