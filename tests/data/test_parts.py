"""Laws of packing in parts: whatever their number, order and ends, the bytes are those of one pack on one machine."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError, UsageError
from data.packing.pack import PackReport, pack
from data.packing.parts import NotLast
from data.packing.work import Part, parse_part
from tests.data.servers import s3_server
from tests.data.test_interrupted_pack import FILES, files_in_all
from tests.data.test_pack import encoded, lay_out, packed, tar_of

REQUEST: dict[str, Any] = {"samples_per_shard": 2, "bytes_per_shard": None, "seed": 0, "workers": 1, "overwrite": False}


def part(source: Path, destination: Path | str, text: str, **changed: Any) -> PackReport | NotLast:
    request: dict[str, Any] = {**REQUEST, "progress": lambda done, total: None, **changed}
    try:
        return pack(str(source), str(destination), **request, part=parse_part(text))
    except NotLast as ended:
        return ended


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any], PackReport, Path]]:
    """Sources with their options, and what one pack makes of them: report and folder."""
    root = tmp_path_factory.mktemp("kinds")
    folder = lay_out(root / "in", FILES)
    rows = [{"path": path, "labels": sorted({path[0], "abc"[n % 3]})} for n, path in enumerate(FILES)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = {f"{'ab'[n % 2]}/{n}.jpg": encoded(n) if n in (4, 5) else b"broken" for n in range(20)}
    sources: dict[str, tuple[Path, dict[str, Any]]] = {
        "broken images, in a tar": (tar_of(lay_out(root / "tar", FILES)), {}),
        "several labels": (folder / "list.jsonl", {}),
        "smaller images": (folder, {"resize": 8, "quality": 80}),
        "empty shards": (lay_out(root / "empty", empty), {}),
        "held out": (folder, {"holdout": 0.3}),
    }
    made = {}
    for number, (name, (source, options)) in enumerate(sources.items()):
        report = packed(source, root / f"whole-{number}", **{**REQUEST, **options})
        made[name] = source, options, report, root / f"whole-{number}"
    return made


def check_parts(kind: tuple[Path, dict[str, Any], PackReport, Path], destination: Path, parts: list[str]) -> None:
    """That the last of these parts has the report of one pack, and that the files are the same."""
    source, options, whole, folder = kind
    for text in parts[:-1]:
        report = part(source, destination, text, **options)
        assert isinstance(report, NotLast) and not list(destination.rglob("manifest.json"))
    report = part(source, destination, parts[-1], **options)
    assert isinstance(report, PackReport) and vars(report) == {**vars(whole), "kept": report.kept}
    assert files_in_all(destination) == files_in_all(folder)


@pytest.mark.parametrize(("kind", "of"), [(0, 1), (0, 8), *((kind, 3) for kind in range(5))])
def test_any_number_of_parts_makes_the_bytes_of_one_pack(kinds, kind, of, tmp_path):
    parts = [f"{number}/{of}" for number in range(1, of + 1)]
    random.Random(10 * of + kind).shuffle(parts)
    check_parts(list(kinds.values())[kind], tmp_path / "out", parts)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12))
def test_the_parts_share_out_all_items_once(items, of):
    shares = [Part(number, of).share(items) for number in range(of + 1)]
    assert not shares[0] and sorted(n for share in shares for n in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares[1:])) <= 1


def test_parts_side_by_side_one_of_them_twice_make_the_bytes_of_one_pack(kinds, tmp_path):
    source, options, _, folder = kinds["broken images, in a tar"]
    with ThreadPoolExecutor(4) as pool:
        done = list(
            pool.map(lambda text: part(source, tmp_path / "out", text, **options), ["1/3", "2/3", "3/3", "2/3"])
        )
    assert any(isinstance(each, PackReport) for each in done)
    assert files_in_all(tmp_path / "out") == files_in_all(folder)


def test_a_part_that_comes_when_all_is_done_changes_nothing(kinds, tmp_path):
    source, _, _, folder = kinds["empty shards"]
    shutil.copytree(folder, tmp_path / "out")
    report = part(source, tmp_path / "out", "2/3")
    assert isinstance(report, NotLast) and report.standing["to_go"] == 0
    assert files_in_all(tmp_path / "out") == files_in_all(folder)


KILLED = """
import sys, time
from data.packing.pack import pack
from data.packing.work import parse_part
def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.002)
numbers = {"samples_per_shard": 2, "bytes_per_shard": None, "seed": 0, "workers": 1, "overwrite": False}
pack(sys.argv[1], sys.argv[2], **numbers, part=parse_part(sys.argv[3]), progress=slowly)
"""


def check_kills(source: Path, folder: Path, destination: Path, times: int, seed: int) -> None:
    """Kills one of three parts this many times at random moments, beside the others, and lets it end."""
    draw = random.Random(seed)
    command = [sys.executable, "-c", KILLED, str(source), str(destination), "2/3"]
    part(source, destination, "3/3")
    for _ in range(times):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout
            for _ in range(draw.randrange(1, 9)):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
    part(source, destination, "1/3")
    assert isinstance(part(source, destination, "2/3"), PackReport)
    assert files_in_all(destination) == files_in_all(folder)


def test_a_part_that_is_killed_leaves_no_harm(kinds, tmp_path):
    source, _, _, folder = kinds["broken images, in a tar"]
    check_kills(source, folder, tmp_path / "out", 1, 0)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(5))
def test_a_part_that_is_killed_five_times_leaves_no_harm(kinds, seed, tmp_path):
    source, _, _, folder = kinds["broken images, in a tar"]
    check_kills(source, folder, tmp_path / "out", 5, seed)


def test_in_s3_parts_make_the_bytes_of_one_pack(kinds, tmp_path):
    source, options, *_ = kinds["held out"]
    options = {**options, "samples_per_shard": 15}
    packed(source, tmp_path, **{**REQUEST, **options})
    with s3_server() as server:
        fs = fsspec.filesystem("s3", endpoint_url=server.url)
        reports = [part(source, "s3://data/out", f"{number}/2", **options) for number in (1, 2)]
        assert isinstance(reports[1], PackReport)
        written = {path.removeprefix("data/out/"): fs.cat_file(path) for path in fs.find("data/out")}
    assert written == files_in_all(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"resize": 8}, "resize was None and is now 8"),
        ({"source": "elsewhere"}, "source was .*in and is now .*elsewhere"),
    ],
)
def test_parts_that_disagree_are_refused_by_name(kinds, changed, message, tmp_path):
    source, *_ = kinds["smaller images"]
    elsewhere = shutil.copytree(source, tmp_path / "elsewhere")
    part(source, tmp_path / "out", "1/3")
    other = elsewhere if changed.pop("source", None) else source
    with pytest.raises(UsageError, match=message):
        part(other, tmp_path / "out", "2/3", **changed)


def test_a_part_of_another_version_is_refused_by_name(kinds, monkeypatch, tmp_path):
    source, *_ = kinds["smaller images"]
    part(source, tmp_path / "out", "1/3")
    monkeypatch.setattr("data.packing.pack.importlib.metadata.version", lambda name: "9.9")
    with pytest.raises(UsageError, match=r"webdataset was .* and is now 9\.9"):
        part(source, tmp_path / "out", "2/3")


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_a_source_that_changes_after_the_listing_is_refused_by_the_name_of_the_file(change, tmp_path):
    source = lay_out(tmp_path / "in", FILES)
    part(source, tmp_path / "out", "0/2")
    changed = source / "a/3.jpg"
    changed.write_bytes(changed.read_bytes() + b"\0") if change == "longer" else changed.unlink()
    failed = 0
    for text in ("1/2", "2/2"):
        try:
            assert isinstance(part(source, tmp_path / "out", text), NotLast)
        except DataError as error:
            assert "a/3.jpg" in str(error)
            failed += 1
    assert failed == 1 and not list(tmp_path.rglob("manifest.json"))


FULL = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)){KILLED}"
"""No file may be as long as a shard's tar, which to a process is as if its disk were full."""


def test_a_part_whose_disk_is_full_says_so_and_holds_up_no_other(kinds, tmp_path):
    source, _, _, folder = kinds["broken images, in a tar"]
    part(source, tmp_path / "out", "0/2")
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "out"), "1/2"]
    full = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert full.returncode and re.search(r"shard-\d+\.tar cannot be written: .*too large", full.stderr)
    report = part(source, tmp_path / "out", "2/2")
    assert isinstance(report, NotLast) and report.standing["to_go"]
    assert isinstance(part(source, tmp_path / "out", "1/2"), PackReport)
    assert files_in_all(tmp_path / "out") == files_in_all(folder)


def test_a_pack_that_is_begun_anew_stops_its_stale_twin(kinds, tmp_path):
    source, *_ = kinds["smaller images"]

    def overtaken(done: int, total: int) -> None:
        if done == 5:
            part(source, tmp_path / "out", "0/1", seed=1, overwrite=True)

    with pytest.raises(DataError, match="another process has finished or restarted this pack"):
        part(source, tmp_path / "out", "1/1", progress=overtaken)
    assert isinstance(part(source, tmp_path / "out", "1/1", seed=1), PackReport)
    packed(source, tmp_path / "fresh", **{**REQUEST, "seed": 1})
    assert files_in_all(tmp_path / "out") == files_in_all(tmp_path / "fresh")


@pytest.mark.parametrize("text", ["", "3", "4/3", "1/0", "-1/2", "one/2"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="3/8 is the third of eight"):
        parse_part(text)
