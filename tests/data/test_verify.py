"""Laws of checking: what was packed is whole, and each byte that is not the packed one is found, under its own name."""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner
from webdataset import TarWriter

from data.errors import DataError, UsageError
from data.packing.index import Report, index
from data.packing.parts import NotLast
from data.packing.verify import SampledReport, chance_of_missing, verify
from data.packing.work import Part
from data.shards.manifest import BadSample, read_manifest
from data.shards.sample_table import row_checksums, table_bytes
from data.shards.tar_index import index_tar
from pipeline.cli import app
from tests.data.in_parts import rounds, run_in_parts

TAR, TABLE, INDEX = (f"shard-000001.{suffix}" for suffix in ("tar", "npy", "idx"))


def verified(url: object, **changed: Any) -> Report:
    request: dict[str, Any] = {"workers": 2, "progress": lambda done, total: None}
    return verify(str(url), **{**request, **changed})


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


def tar_cut(folder: Path, stem: str = TAR[:-4]) -> None:
    offset, tar = int(np.load(folder / f"{stem}.npy")["offset"][7]), folder / f"{stem}.tar"
    tar.write_bytes(tar.read_bytes()[: offset + 10])


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


OTHER_TABLE = "its sample table (.npy) does not match the manifest's checksum"


def one_class_less(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": manifest["classes"][:3]}))


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        (lambda folder: (folder / TAR).unlink(), {"does not exist"}),
        (lambda folder: (folder / TABLE).unlink(), {"has no sample table (.npy)"}),
        (lambda folder: (folder / INDEX).unlink(), {"has no DALI index (.idx)"}),
        (lambda folder: (folder / TABLE).write_bytes(b""), {"its sample table (.npy) does not have 9 samples"}),
        (tar_cut, {"lies past the end of the tar", "not a valid tar: *", "has 20490 bytes; the manifest says *"}),
        (table_of_another, {OTHER_TABLE, "its row of the sample table does not match its headers"}),
        (row_of_another, {OTHER_TABLE, "its row of the sample table does not match its headers"}),
        (size_of_another, {OTHER_TABLE, "decodes to *; its row says *"}),
        (one_class_less, {"its label is '3'; it must be 0 to 2 or the name of a class"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_found_with_the_reason(copy, damage, reasons):
    """With a share of the samples too: where all of them are drawn, and of a whole shard where none is."""
    damage(copy)
    broken = verified(copy).broken
    found = {each.reason for each in broken}
    assert len(found) == len(reasons)
    assert all(any(fnmatch(reason, each) for each in reasons) for reason in found)
    most, none = (verified(copy, sample=share) for share in (1 - 1e-12, 1e-12))
    assert Counter((each.shard, each.key == "") for each in most.broken) == Counter(
        (each.shard, each.key == "") for each in broken
    )
    assert bool(none.broken) == (damage is not one_class_less)


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


# ------------------------------------------------------------------------------------------ in parts, and by a draw


def harm(folder: Path, rows: Iterable[int]) -> None:
    """Changes a byte of the image in some samples of a shard."""
    contents = bytearray((folder / TAR).read_bytes())
    for row, offset in enumerate(np.load(folder / TABLE)["offset"].tolist()):
        contents[offset + 600] ^= row in rows
    (folder / TAR).write_bytes(contents)


@pytest.fixture(scope="module")
def harmed(packed, tmp_path_factory) -> Path:
    """With two damaged samples, a tar cut short, and an index that is gone."""
    folder = Path(shutil.copytree(packed.folder, tmp_path_factory.mktemp("harmed") / "set"))
    harm(folder, (2, 5))
    tar_cut(folder, "shard-000003")
    (folder / "shard-000000.idx").unlink()
    return folder


@settings(max_examples=settings().max_examples // 4)
@given(rounds(), st.sampled_from([None, 0.5]))
def test_parts_that_come_as_they_like_report_what_a_single_verify_reports(harmed, tmp_path_factory, plan, share):
    out = tmp_path_factory.mktemp("verified")
    expected = verified(harmed, sample=share, seed=3)
    reports = run_in_parts(partial(verified, harmed, out=str(out), sample=share, seed=3), plan)
    assert reports == [expected] * len(reports) != []
    (written,) = out.iterdir()
    document = json.loads(written.read_text())
    assert {**document, **json.loads(json.dumps(asdict(expected)))} == document
    more = {name: document[name] for name in ("set", "sample", "seed")}
    assert more == {"set": read_manifest(str(harmed)).fingerprint, "sample": share, "seed": 3 if share else 0}
    assert document["proves"].startswith("every sample" if share is None else f"{document['decoded']} of 40 samples")


def test_parts_of_a_set_that_changed_meanwhile_are_refused_and_others_begin_again_when_all_is_done(copy):
    with pytest.raises(NotLast, match="part 1 of 2: shards done: 3; 2 of 5 shards to go"):
        verified(copy, part=Part(1, 2))
    one_class_less(copy)
    with pytest.raises(
        UsageError, match=r"set was \w+ and is now \w+; choose another place with --out, or remove its .verifying"
    ):
        verified(copy, part=Part(2, 2))
    shutil.rmtree(copy / ".verifying")
    broken = verified(copy, part=Part(1, 1)).broken
    with pytest.raises(NotLast, match=r"already has a verified\.json"):
        verified(copy, part=Part(2, 2))
    assert broken and not verified(copy, part=Part(1, 1), sample=1e-12).broken


def test_the_chance_of_missing_damage_is_the_share_of_all_draws_that_miss_it():
    for samples, damaged, drawn in ((1, 1, 0), (6, 2, 3), (7, 1, 7), (9, 3, 2), (8, 8, 1)):
        draws = list(combinations(range(samples), drawn))
        missing = sum(min(draw, default=samples) >= damaged for draw in draws)
        assert chance_of_missing(samples, damaged, drawn) == pytest.approx(missing / len(draws), abs=1e-15)
    assert chance_of_missing(3_000_000_000, 300_000, 3_000_000) == pytest.approx(0.999**300_000, rel=0.2)


def test_a_draw_finds_damage_as_often_as_its_report_says(copy):
    """One sample of the forty, by 60 seeds; the number of findings lies within four standard deviations."""
    harm(copy, [4])
    reports = [verified(copy, sample=0.3, seed=seed) for seed in range(60)]
    missed = np.array([report.missed for report in reports if isinstance(report, SampledReport)])
    found = sum(len(report.broken) for report in reports)
    assert {len(report.broken) for report in reports} == {0, 1}
    assert abs(found - (1 - missed).sum()) < 4 * np.sqrt((missed * (1 - missed)).sum())


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

    broken = [{"shard": "a.tar", "key": "1", "reason": "cannot be decoded: truncated or damaged"}]
    size = (folder / "a.tar").stat().st_size
    found = {"shards": 1, "samples": 2, "bytes": size, "classes": 2, "labels": "", "kept": 0}
    read = {**found, "labels": "numbers from 0 in .cls"}
    assert run("index", str(folder), "--out", str(tmp_path / "out")) == (0, {**read, "broken": [], "unchecked": 2})
    assert run("verify", str(tmp_path / "out")) == (1, {**found, "broken": broken, "unchecked": 2})
    assert (
        "2 samples have no recorded checksum"
        in CliRunner().invoke(app, ["data", "verify", str(tmp_path / "out")]).stdout
    )
    assert run("index", str(folder), "--decode") == (0, {**read, "broken": broken, "unchecked": 0})
    assert run("verify", str(folder)) == (1, {**found, "broken": broken, "unchecked": 0})
    assert verified(folder).broken == (BadSample(**broken[0]),)
    assert run("index", str(folder), "--part", "1/2") == (0, {"part": "part 1 of 2", "to_go": 0})
    status, document = run("verify", str(folder), "--part", "1/1", "--sample", "0.999999")
    assert (status, document["broken"], document["decoded"], document["missed"]) == (1, broken, 2, 0.0)
    assert json.loads((folder / "verified.json").read_text()).items() >= document.items()
    (folder / "b.tar").write_bytes(b"")
    (folder / "manifest.json").unlink()
    status, document = run("index", str(folder))
    assert (status, document["broken"]) == (1, [{"shard": "b.tar", "key": "", "reason": "not a valid tar: empty file"}])


def test_every_broken_shard_is_printed_and_the_first_of_the_samples(tmp_path):
    """Fetching shards again takes the list of all; samples are listed by --json."""
    folder = foreign(tmp_path / "set")
    for number in range(30):
        (folder / f"cut-{number:02d}.tar").write_bytes(b"")
    result = CliRunner().invoke(app, ["data", "index", str(folder)])
    assert [f"cut-{number:02d}.tar: not a valid tar" in result.stderr for number in range(30)] == [True] * 30
    assert isinstance(result.exception, DataError) and "30 of 31 tars" in str(result.exception)
