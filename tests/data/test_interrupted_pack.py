"""Laws of a pack that was interrupted: started again it resumes, and its bytes are those of one that never was."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.errors import UsageError
from data.packing.pack import PackReport
from data.shards.manifest import read_manifest, write_manifest
from tests.data.servers import s3_server
from tests.data.test_pack import encoded, files_in, lay_out, packed

# Every fifth image does not decode, so that some shards of two have a sample less, and some do not exist.
FILES = {f"{'abc'[n % 3]}/{n}.jpg": b"broken" if n % 5 == 0 else encoded(n) for n in range(60)}
TWO_EACH = {"samples_per_shard": 2}


class Interrupted(Exception):
    pass


def packed_until(source: Path, destination: Path | str, image: int, **changed: object) -> PackReport | None:
    def interrupt(done: int, total: int) -> None:
        if done == image:
            raise Interrupted

    try:
        return packed(source, destination, progress=interrupt, **{**TWO_EACH, **changed})
    except Interrupted:
        return None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("in"), FILES)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PackReport, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("whole")
    report = packed(source, folder, **TWO_EACH)
    assert report.kept == 0 and 20 < report.shards < 30 and len(report.broken) == 12
    return report, files_in(folder)


@pytest.mark.parametrize("images", [(3,), (31, 32), (60,), (7, 19, 44, 58)])
def test_after_any_interruption_bytes_and_report_are_those_of_a_whole_pack(source, whole, images, tmp_path):
    for image in images:
        assert packed_until(source, tmp_path / "out", image) is None
        assert not (tmp_path / "out" / "manifest.json").exists()
    report = packed(source, tmp_path / "out", **TWO_EACH, workers=3)
    assert files_in(tmp_path / "out") == whole[1]
    assert report.broken == whole[0].broken
    assert vars(report) == {**vars(whole[0]), "kept": report.kept}
    assert report.kept >= images[-1] // 2 * 4 // 5 - 4  # two are being written, one is being built


def test_shards_that_are_whole_are_not_made_again(source, tmp_path):
    packed_until(source, tmp_path / "out", 40)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    seen = []
    report = packed(source, tmp_path / "out", **TWO_EACH, progress=lambda done, total: seen.append(done))
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert report.kept > 10
    assert {name for name in before if after[name] == before[name]} >= set(sorted(before)[: report.kept])
    assert seen == list(range(seen[0], len(FILES) + 1)) and seen[0] >= 2 * report.kept


def shards_done(folder: Path) -> int:
    """How many shards an interrupted pack has noted, those without an image left out."""
    notes = [note.read_text() for note in (folder / ".packing").glob("[0-9]*.json")]
    return sum(note.endswith("}") and json.loads(note)["shard"] is not None for note in notes)


@pytest.mark.parametrize("suffix", [".tar", ".npy", ".idx"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_torn_or_lacks_a_file_is_made_again(source, whole, suffix, damage, tmp_path):
    packed_until(source, tmp_path / "out", 40)
    torn = tmp_path / "out" / f"shard-000004{suffix}"
    torn.write_bytes(torn.read_bytes()[:-1]) if damage == "cut" else torn.unlink()
    done = shards_done(tmp_path / "out")
    assert 10 < done == packed(source, tmp_path / "out", **TWO_EACH).kept + 1
    assert files_in(tmp_path / "out") == whole[1]


def test_half_a_note_of_what_is_done_counts_as_none(source, whole, tmp_path):
    packed_until(source, tmp_path / "out", 40)
    note = tmp_path / "out" / ".packing" / "000003.json"
    note.write_bytes(note.read_bytes()[:-5])
    done = shards_done(tmp_path / "out")
    assert packed(source, tmp_path / "out", **TWO_EACH).kept == done
    assert files_in(tmp_path / "out") == whole[1]
    assert not (tmp_path / "out" / ".packing").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"samples_per_shard": 3}, "samples per shard was 2 and is now 3"),
        ({"resize": 8}, "resize was None and is now 8"),
        ({"holdout": 0.25}, "holdout was None and is now 0.25"),
    ],
)
def test_a_pack_with_other_options_is_not_mixed_with_one_that_is_unfinished(source, changed, message, tmp_path):
    packed_until(source, tmp_path / "out", 30)
    before = files_in_all(tmp_path / "out")
    with pytest.raises(UsageError, match=message) as error:
        packed(source, tmp_path / "out", **{**TWO_EACH, **changed})
    assert "--overwrite" in str(error.value) and "\n" not in str(error.value)
    assert files_in_all(tmp_path / "out") == before
    packed(source, tmp_path / "out", overwrite=True, **{**TWO_EACH, **changed})
    packed(source, tmp_path / "fresh", **{**TWO_EACH, **changed})
    assert files_in_all(tmp_path / "out") == files_in_all(tmp_path / "fresh")


def files_in_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("images", [(-3,), (20,), (5, -3, 50), (35, 45, 58, 60)])
def test_with_images_held_out_any_interruption_leaves_the_same_two_sets(source, images, tmp_path):
    """In the training set, in the other one, and where images are compared (-3: three before the packing begins)."""
    seen: list[tuple[int, int]] = []
    whole = packed(
        source, tmp_path / "whole", **TWO_EACH, holdout=0.3, progress=lambda done, total: seen.append((done, total))
    )
    before = seen.index((0, 60))
    for image in images:
        left = itertools.count(-before)

        def interrupt(done: int, total: int, left: Iterator[int] = left, image: int = image) -> None:
            if image == (next(left) if image < 0 else done * (total == 60)):
                raise Interrupted

        with pytest.raises(Interrupted):
            packed(source, tmp_path / "out", **TWO_EACH, holdout=0.3, progress=interrupt)
        assert not list((tmp_path / "out").rglob("manifest.json"))
    report = packed(source, tmp_path / "out", **TWO_EACH, holdout=0.3, workers=3)
    assert files_in_all(tmp_path / "out") == files_in_all(tmp_path / "whole")
    assert vars(report) == {**vars(whole), "kept": report.kept}
    assert report.kept or images == (-3,)


def test_a_pack_killed_between_its_two_manifests_writes_both_again(source, monkeypatch, tmp_path):
    packed(source, tmp_path / "whole", **TWO_EACH, holdout=0.3)

    def first_alone(url: str, *arguments: Any, **options: Any) -> None:
        if url.endswith("val"):
            raise Interrupted
        write_manifest(url, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("data.packing.resume.write_manifest", first_alone)
        packed(source, tmp_path / "out", **TWO_EACH, holdout=0.3)
    assert (tmp_path / "out/train/manifest.json").exists() and not (tmp_path / "out/val/manifest.json").exists()
    report = packed(source, tmp_path / "out", **TWO_EACH, holdout=0.3)
    assert report.kept == report.shards
    assert files_in_all(tmp_path / "out") == files_in_all(tmp_path / "whole")


def test_copies_that_came_or_went_since_are_not_mixed_with_what_was_held_out(tmp_path):
    files = {f"a/{number}.bmp": encoded(number, "BMP") for number in range(40)} | {"a/other.jpg": encoded(0)}
    source = lay_out(tmp_path / "in", files)
    assert packed_until(source, tmp_path / "out", 41, holdout=0.5) is None
    for number in range(1, 40, 2):
        (source / f"a/{number}.bmp").write_bytes(files[f"a/{number - 1}.bmp"])  # of the same size
    with pytest.raises(UsageError, match="the source's files, labels or classes have changed since"):
        packed(source, tmp_path / "out", **TWO_EACH, holdout=0.5)


def test_a_source_that_has_changed_is_not_mixed_with_what_it_was(tmp_path):
    source = lay_out(tmp_path / "in", FILES)
    packed_until(source, tmp_path / "out", 30)
    (source / "a" / "3.jpg").write_bytes(encoded(3) + b"\0")
    with pytest.raises(UsageError, match="the source's files, labels or classes have changed since"):
        packed(source, tmp_path / "out", **TWO_EACH)
    assert packed(source, tmp_path / "anew", **TWO_EACH).kept == 0
    assert packed_until(source, tmp_path / "out", 30, overwrite=True) is None
    assert 5 < packed(source, tmp_path / "out", **TWO_EACH).kept < 15
    assert files_in(tmp_path / "out") == files_in(tmp_path / "anew")
    packed_until(source, tmp_path / "again", 30)
    elsewhere = lay_out(tmp_path / "other", FILES)
    with pytest.raises(UsageError, match=r"source was .*in and is now .*other"):
        packed(elsewhere, tmp_path / "again", **TWO_EACH)


def test_overwriting_also_resumes_and_never_keeps_old_shards(source, whole, tmp_path):
    packed(source, tmp_path / "out", **TWO_EACH, seed=5)
    assert packed_until(source, tmp_path / "out", 30, overwrite=True) is None
    report = packed(source, tmp_path / "out", **TWO_EACH, overwrite=True)
    assert 5 < report.kept < 15
    assert files_in(tmp_path / "out") == whole[1]


@pytest.mark.torture
def test_in_s3_an_interrupted_pack_resumes_too(source, tmp_path):
    packed(source, tmp_path, samples_per_shard=10)
    with s3_server() as server:
        fs = fsspec.filesystem("s3", endpoint_url=server.url)
        assert packed_until(source, "s3://data/out", 55, samples_per_shard=10) is None
        with pytest.raises(UsageError, match="seed was 0 and is now 1"):
            packed(source, "s3://data/out", samples_per_shard=10, seed=1)
        assert packed(source, "s3://data/out", samples_per_shard=10).kept > 0
        written = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find("data/out")}
        assert written == files_in(tmp_path)
        assert packed_until(source, "s3://data/two", 59, samples_per_shard=10, holdout=0.3) is None
        assert packed(source, "s3://data/two", samples_per_shard=10, holdout=0.3).kept > 0
        packed(source, tmp_path / "two", samples_per_shard=10, holdout=0.3)
        written = {path.removeprefix("data/two/"): fs.cat_file(path) for path in fs.find("data/two")}
        assert written == files_in_all(tmp_path / "two")


KILLED = """
import sys, time
from data.packing.pack import pack
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.002)
numbers = {"samples_per_shard": 2, "bytes_per_shard": None, "seed": 0, "workers": 2}
pack(sys.argv[1], sys.argv[2], **numbers, overwrite=False, progress=slowly)
"""


def check_kills(source: Path, expected: dict[str, bytes], destination: Path, times: int, seed: int) -> None:
    """Kills the pack's process this many times, each time after a few more images, and lets it end."""
    draw = random.Random(seed)
    command = [sys.executable, "-c", KILLED, str(source), str(destination)]
    for _ in range(times):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout
            for _ in range(draw.randrange(5, 60 // times + 7)):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        assert process.returncode in (-signal.SIGKILL, 0)
        if process.returncode == 0:
            break
    if not (destination / "manifest.json").exists():
        assert packed(source, destination, **TWO_EACH).kept > 0
    assert files_in(destination) == expected
    assert len(read_manifest(str(destination)).shards) > 20


def test_a_pack_that_is_killed_twice_resumes(source, whole, tmp_path):
    check_kills(source, whole[1], tmp_path / "out", 2, 0)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(5))
def test_a_pack_that_is_killed_ten_times_resumes(source, whole, seed, tmp_path):
    check_kills(source, whole[1], tmp_path / "out", 10, seed)
