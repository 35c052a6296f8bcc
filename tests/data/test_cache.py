"""Laws of the node's cache: what was fetched once is not fetched again, and what comes out of it is always right."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from data.augment import Augmentation
from data.loader import LoaderSpec, training_batches
from data.order import Order
from data.reader import Sample, read_ranges
from data.shards.manifest import read_manifest, with_cache
from data.storage.cache import BLOCK_BYTES, NodeCache
from data.storage.remote import DEFAULT, ReadError, Storage, open_fs, write_file
from tests.data.servers import Server, http_server, once, s3_server
from tests.data.test_reader import whole

SIZE = 5 * BLOCK_BYTES + 12345
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def server(tmp_path, content) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.tar").write_bytes(content)
    with http_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


def cache_in(folder: Path, max_bytes: int | None = None, storage: Storage = DEFAULT) -> NodeCache:
    """What a rank that has just started makes of the folder."""
    return NodeCache(storage, folder, max_bytes, "fingerprint", lambda url: SIZE if url.endswith("a.tar") else None)


def blocks_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.name != "lock"]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.parent != folder)


def test_three_epochs_from_s3_read_the_set_once_and_give_what_was_packed(packed, folder):
    """Each epoch by two new ranks, with the order that training has."""
    with s3_server() as server:
        for path in packed.folder.iterdir():
            write_file(*open_fs(f"s3://data/set/{path.name}"), path.read_bytes())
        order = Order(3, np.array([shard.samples for shard in packed.manifest.shards]), 4, 5)
        plain = Augmentation(crop="center", flip=False, layers=0, magnitude=0.0)
        keys: list[str] = []
        for epoch in range(3):
            for rank in range(2):
                manifest = with_cache(read_manifest("s3://data/set"), DEFAULT, str(folder), None)
                spec = LoaderSpec(rank, 2, 2, 24, torch.device("cpu"), 2)
                steps = 10 * epoch, 10 * (epoch + 1)
                with training_batches(manifest, order, plain, spec, 3, *steps) as loaded:
                    keys += [key for step in loaded for batch in step for key in batch.keys]
        assert sorted(keys) == sorted(3 * packed.keys)
        for suffix in (".tar", ".npy"):
            packed_bytes = sum(path.stat().st_size for path in packed.folder.glob(f"*{suffix}"))
            assert server.bytes_sent(suffix) == packed_bytes


def test_threads_of_two_ranks_read_any_ranges_and_each_block_is_fetched_once(server, folder, content):
    ranks = cache_in(folder), cache_in(folder)
    draws = np.random.default_rng(1)
    ranges = [sorted(draws.integers(0, SIZE, 2)) for _ in range(60)] + [(0, SIZE), (SIZE - 1, SIZE)]

    def right(number: int) -> bool:
        begin, end = map(int, ranges[number])
        return begin == end or ranks[number % 2].read(f"{server.url}/a.tar", begin, end) == content[begin:end]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(len(ranges))))
    assert server.bytes_sent() == SIZE
    assert len(blocks_in(folder)) == 6


READ_ON = """
import resource
import signal
import sys
from pathlib import Path
from data.storage.cache import NodeCache
from data.storage.remote import DEFAULT
url, folder, size, dies_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if dies_at:  # the kernel ends the process with the byte of a file that is one too many
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (dies_at, dies_at))
cache = NodeCache(DEFAULT, folder, None, "fingerprint", lambda url: size)
cache.read(url, size - 1, size)
cache.read(url, 0, size)
"""


def reading_on(server: Server, folder: Path, dies_at: int) -> subprocess.Popen[bytes]:
    arguments = f"{server.url}/a.tar", folder, str(SIZE), str(dies_at)
    return subprocess.Popen([sys.executable, "-c", READ_ON, *arguments], cwd=ROOT)


def test_a_process_killed_while_it_writes_leaves_a_cache_that_is_right(server, folder, content):
    for dies_at in (1000, BLOCK_BYTES - 1):  # within the last block, which is short, and in the first
        assert reading_on(server, folder, dies_at).wait() == -signal.SIGXFSZ
        assert dies_at in [path.stat().st_size for path in (folder / "partial").glob("*")]
    for blocks in (2, 4):
        process = reading_on(server, folder, 0)
        while process.poll() is None and len(blocks_in(folder)) < blocks:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert cache_in(folder).read(f"{server.url}/a.tar", 0, SIZE) == content


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped in the first page": lambda block: block[:3000] + bytes([block[3000] ^ 1]) + block[3001:],
    "flipped in the last byte": lambda block: block[:-1] + bytes([block[-1] ^ 128]),
    "flipped in its checksums": lambda block: bytes([block[0] ^ 1]) + block[1:],
    "cut within": lambda block: block[: len(block) // 2],
    "cut at a page": lambda block: block[: -(64 << 10)],
    "cut within its checksums": lambda block: block[:7],
    "empty": lambda block: b"",
    "zeros behind a place": lambda block: block[:5000] + bytes(len(block) - 5000),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_block_is_fetched_again(server, folder, content, damage):
    cache = cache_in(folder)
    assert cache.read(f"{server.url}/a.tar", 0, SIZE) == content
    server.forget()
    for block in blocks_in(folder):
        block.write_bytes(damage(block.read_bytes()))
    for _ in range(2):
        assert cache.read(f"{server.url}/a.tar", 0, SIZE) == content
    assert server.bytes_sent() == SIZE


def test_a_block_under_the_name_of_another_is_not_taken_for_it(server, folder, content):
    cache = cache_in(folder)
    cache.read(f"{server.url}/a.tar", 0, SIZE)
    blocks = [block for block in blocks_in(folder) if block.stat().st_size > BLOCK_BYTES]
    for block in blocks[1:]:
        shutil.copyfile(blocks[0], block)
    assert cache.read(f"{server.url}/a.tar", 0, SIZE) == content


@pytest.mark.parametrize("most", [3.5, 1.5, 0.5])
def test_the_limit_is_kept_by_what_was_used_longest_ago(server, folder, content, most):
    limit = int(most * BLOCK_BYTES)
    ranks = cache_in(folder, limit), cache_in(folder, limit)
    for number in [0, 1, 2, 0, 3, 0, 4, 0, 5, 0, 1, 2]:
        begin = number * BLOCK_BYTES + 100
        for rank in ranks:
            assert rank.read(f"{server.url}/a.tar", begin, begin + 999) == content[begin : begin + 999]
        assert bytes_in(folder) <= limit
        time.sleep(0.01)  # times of use must differ
    server.forget()
    assert ranks[0].read(f"{server.url}/a.tar", 0, 10) == content[:10]
    assert server.bytes_sent() == (0 if most > 3 else server.bytes_sent())


def test_a_limit_that_is_set_lower_is_kept_from_the_next_block_on(server, folder, content):
    cache_in(folder, 100 * BLOCK_BYTES).read(f"{server.url}/a.tar", 0, 4 * BLOCK_BYTES)
    assert bytes_in(folder) > 4 * BLOCK_BYTES
    cache_in(folder, 2 * BLOCK_BYTES).read(f"{server.url}/a.tar", SIZE - 1, SIZE)
    assert bytes_in(folder) <= 2 * BLOCK_BYTES


def test_a_full_disk_ends_the_cache_with_one_line_and_not_the_reading(server, folder, content, capsys):
    cache = cache_in(folder)
    cache.read(f"{server.url}/a.tar", 0, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK_BYTES // 2, limits[1]))
    try:
        assert cache.read(f"{server.url}/a.tar", 0, SIZE) == content
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capsys.readouterr().err
    assert (
        printed.count("\n") == 1
        and f"data.cache.dir={folder} is no longer written to" in printed
        and "too large" in printed
    )
    server.forget()
    assert cache.read(f"{server.url}/a.tar", 0, 10) == content[:10]
    assert server.requests == []


def test_a_folder_that_cannot_be_made_is_the_same(server, tmp_path, content, capsys):
    (tmp_path / "file").write_text("")
    cache = cache_in(tmp_path / "file" / "cache")
    assert cache.read(f"{server.url}/a.tar", 5, SIZE) == content[5:]
    assert capsys.readouterr().err.count("\n") == 1


def test_damage_on_the_way_is_reported_and_does_not_stay_in_the_cache(packed, folder):
    faults: list[ReadError] = []
    with http_server(packed.folder) as server:
        storage = Storage(on_error=faults.append)
        manifest = with_cache(read_manifest(server.url), storage, str(folder), None)
        server.plan = once("damage", ".tar")
        for _ in range(3):
            found = read_ranges(manifest, whole(manifest))
            assert found == read_ranges(packed.manifest, whole(packed.manifest))
            assert all(isinstance(sample, Sample) for sample in found)
        assert len(faults) == len(manifest.shards)
        assert len(server.requests) == 1 + 3 * len(manifest.shards)


def test_another_set_at_the_same_url_is_not_answered_from_the_old_one(server, folder, content, tmp_path):
    url = f"{server.url}/a.tar"
    cache_in(folder).read(url, 0, SIZE)
    (tmp_path / "served" / "a.tar").write_bytes(content[::-1])
    other = NodeCache(DEFAULT, folder, None, "another fingerprint", lambda url: SIZE)
    assert other.read(url, 0, SIZE) == content[::-1]


def test_a_lock_that_another_process_holds_for_good_does_not_stop_a_read(server, folder, content, monkeypatch):
    monkeypatch.setattr("data.storage.cache.LOCK_TIMEOUT", 0.2)
    cache_in(folder).read(f"{server.url}/a.tar", 0, SIZE)
    program = "import fcntl, sys\nfiles = [open(name, 'a') for name in sys.argv[1:]]\n"
    program += "[fcntl.flock(file, fcntl.LOCK_EX) for file in files]\nprint('locked', flush=True)\nsys.stdin.read()"
    locks = [str(path) for path in folder.glob("??/lock")]
    holder = subprocess.Popen(
        [sys.executable, "-c", program, *locks], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    for block in blocks_in(folder):
        block.unlink()
    assert cache_in(folder).read(f"{server.url}/a.tar", 0, SIZE) == content
    holder.communicate("")


def test_a_set_on_a_disk_is_not_cached(packed, folder):
    manifest = with_cache(packed.manifest, DEFAULT, str(folder), None)
    read_ranges(manifest, whole(manifest))
    assert not folder.exists()


def test_the_folder_may_name_variables_of_the_node(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH_OF_THIS_NODE", str(tmp_path))
    with http_server(packed.folder) as server:
        manifest = with_cache(read_manifest(server.url), DEFAULT, "$SCRATCH_OF_THIS_NODE/cache", None)
        read_ranges(manifest, whole(manifest))
    assert len(blocks_in(tmp_path / "cache")) == 2 * len(manifest.shards)
