"""Laws of reading from afar: the right bytes or a clear end, whatever a server does; every fault is reported."""

import io
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import Augmentation
from data.errors import DataError, UsageError
from data.loader import LoaderSpec, training_batches
from data.order import Order
from data.packing.pack import pack
from data.reader import read_ranges
from data.shards.manifest import read_manifest
from data.storage.remote import NotFound, ReadError, Storage, open_fs, write_file
from tests.data.servers import Server, forever, http_server, none, once, s3_server, shares
from tests.data.test_reader import whole

CONTENT = bytes(range(256)) * 200
BEGIN, END = 1000, 1100


class Far:
    """A file on a server, and a storage of small limits that keeps its faults."""

    def __init__(self, server: Server, folder: str, put: Callable[[bytes], None]) -> None:
        self.server, self.folder, self.url, self.put = server, folder, f"{folder}/a.tar", put
        self.faults: list[ReadError] = []
        self.storage = Storage(attempts=4, attempt_timeout=3.0, first_wait=0.01, on_error=self.faults.append)
        put(CONTENT)
        server.forget()

    def read(self) -> bytes:
        return self.storage.read(self.url, BEGIN, END)


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["http", "s3"])
def far(request, tmp_path) -> Iterator[Far]:
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        yield Far(server, "s3://data", lambda content: write_file(*open_fs("s3://data/a.tar"), content))
        server.plan = none
    else:
        with http_server(tmp_path) as server:
            yield Far(server, server.url, lambda content: (tmp_path / "a.tar").write_bytes(content) and None)


PASSING = ["503", "500", "429", "404", "drop", "hang", "trickle", "short"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_transient_fault_costs_one_more_request_and_is_reported_once(far, fault):
    far.server.plan = once(fault)
    assert far.read() == CONTENT[BEGIN:END]
    assert len(far.server.requests) == 2
    (reported,) = far.faults
    assert (reported.url, reported.begin, reported.end, reported.attempt) == (far.url, BEGIN, END, 1)
    assert reported.reason and "\n" not in reported.reason


@pytest.mark.parametrize("fault", ["503", "404", "drop", "short"])
def test_a_lasting_fault_ends_after_the_allowed_attempts_of_one_layer(far, fault):
    far.server.plan = forever(fault)
    with pytest.raises(DataError) as ended:
        far.read()
    message = rf"{far.url}: bytes {BEGIN} to {END} cannot be read: 4 attempts in \d+ s, the last: .+"
    assert re.fullmatch(message, str(ended.value))
    assert [fault.attempt for fault in far.faults] == [1, 2, 3, 4]
    assert len(far.server.requests) == 4


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_server_that_never_ends_its_answer_does_not_hold_a_read(far, fault):
    far.server.plan = forever(fault)
    with pytest.raises(DataError, match=r"cannot be read: 2 attempts in \d+ s, the last: .*timed out"):
        replace(far.storage, attempts=2, attempt_timeout=0.2).read(far.url, BEGIN, END)


def test_the_timeout_ends_attempts_that_the_count_would_allow(far):
    far.server.plan = forever("503")
    with pytest.raises(DataError, match=r"cannot be read: [1-9] attempts in \d+ s"):
        replace(far.storage, attempts=1000, timeout=0.3, first_wait=0.1).read(far.url, BEGIN, END)


def test_what_will_not_pass_ends_at_once(far):
    far.server.plan = forever("403", "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: bytes 1000 to 1100 cannot be read: .*(Forbidden|AccessDenied)"):
        far.read()
    with pytest.raises(NotFound, match=r"/b\.tar cannot be read"):
        far.storage.read(f"{far.folder}/b.tar")
    with pytest.raises(NotFound, match=r"/no/such\.tar: bytes 0 to 10 cannot be read: .*No such file"):
        far.storage.read("/no/such.tar", 0, 10)
    assert far.faults == []
    assert sum(request.path.endswith("a.tar") for request in far.server.requests) == 1


def test_a_bucket_that_does_not_exist_ends_at_once(s3):
    with pytest.raises(NotFound, match="s3://missing/a"):
        Storage().read("s3://missing/a")


def test_a_range_past_the_end_is_a_fault_and_never_fewer_bytes(far):
    for begin in (len(CONTENT) - 10, len(CONTENT) + 10):
        with pytest.raises(DataError, match="cannot be read: 4 attempts"):
            far.storage.read(far.url, begin, begin + 100)


def test_a_file_that_changes_is_seen_as_it_is_now(far):
    assert far.storage.read(far.url) == CONTENT
    far.put(CONTENT[::-1] * 2)
    assert far.storage.read(far.url, 0, 2 * len(CONTENT)) == far.storage.read(far.url) == CONTENT[::-1] * 2


def test_eight_threads_share_a_storage_and_each_gets_its_own_bytes(far):
    far.server.plan = shares({"503": 0.1, "drop": 0.05})
    begins = [7 * i for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda begin: far.storage.read(far.url, begin, begin + 999), begins))
    assert found == [CONTENT[begin : begin + 999] for begin in begins]
    assert len(far.faults) > 10


def test_whole_files_are_fetched_once_from_a_server_without_ranges(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).write_bytes(CONTENT + name.encode())
    with http_server(tmp_path) as server:
        server.plan = forever("whole")
        for begin in (3, 1000, len(CONTENT) - 99):
            for name in "ab":
                assert (
                    Storage().read(f"{server.url}/{name}", begin, begin + 100)
                    == (CONTENT + name.encode())[begin : begin + 100]
                )
        assert Counter(request.path for request in server.requests) == {"/a": 2, "/b": 1}
        message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{server.url} does not support Range requests: whole files go to" in message


def test_a_refused_write_is_made_again(s3):
    s3.plan = once("503", "written")
    fs, path = open_fs("s3://data/written")
    write_file(fs, path, CONTENT, Storage(first_wait=0.01))
    assert Storage().read("s3://data/written") == CONTENT
    s3.plan = forever("503")
    with pytest.raises(DataError, match="data/written cannot be written: 3 attempts"):
        write_file(fs, path, CONTENT, Storage(attempts=3, first_wait=0.01))
    s3.plan = none


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("gs://b/a", "gcsfs", "gcs"), ("hf://a/b", "huggingface_hub", "hf")]
)
def test_a_url_whose_package_is_missing_is_refused_with_the_extra_that_brings_it(monkeypatch, url, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{url} cannot be opened: .*pip install 'coatnet\[{extra}\]'"):
        Storage().read(url)


@pytest.mark.parametrize("suffix", [".npy", ".tar"])
def test_damaged_answers_are_read_again_and_reported(packed, suffix):
    with http_server(packed.folder) as server:
        faults: list[ReadError] = []
        manifest = read_manifest(server.url, Storage(on_error=faults.append))
        server.plan = once("damage", suffix)
        assert read_ranges(manifest, whole(manifest)) == read_ranges(packed.manifest, whole(packed.manifest))
        assert [fault.url.endswith(suffix) for fault in faults] == [True] * len(manifest.shards)
        server.plan = forever("damage", ".npy")
        with pytest.raises(DataError, match=r"shard-000000\.npy: row \d is damaged"):
            read_ranges(manifest, whole(manifest))


def images_as_tar(count: int) -> bytes:
    """A tar of two classes of tiny images, of which every hundredth looks alike."""
    encoded = []
    for number in range(100):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
        encoded.append(file.getvalue())
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"{'even' if number % 2 == 0 else 'odd'}/{number:06d}.jpg")
            member.size = len(encoded[number % 100])
            tar.addfile(member, io.BytesIO(encoded[number % 100]))
    return stream.getvalue()


@pytest.mark.torture
@pytest.mark.parametrize("samples", [1000, 100_000])
def test_an_epoch_from_an_s3_that_fails_has_every_sample_exactly_once(tmp_path, s3, samples):
    """5 % of the requests are refused and 1 % dropped half-way, while packing too."""
    (tmp_path / "images.tar").write_bytes(images_as_tar(samples))
    s3.plan = shares({"503": 0.05, "drop": 0.01})
    request = {"samples_per_shard": samples // 20, "bytes_per_shard": None, "seed": 0, "workers": 2}
    url = f"s3://data/{samples}"
    pack(str(tmp_path / "images.tar"), url, **request, overwrite=False, progress=lambda done, total: None)

    faults: list[ReadError] = []
    manifest = read_manifest(url, Storage(on_error=faults.append, first_wait=0.05))
    order = Order(0, np.array([shard.samples for shard in manifest.shards]), global_batch=samples // 25, window=8)
    spec = LoaderSpec(0, 1, order.global_batch, 8, torch.device("cpu"), 2)
    plain = Augmentation(crop="center", flip=False, layers=0, magnitude=0.0)
    with training_batches(manifest, order, plain, spec, 0, 0, 25) as steps:
        batches = [batch for step in steps for batch in step]
    s3.plan = none

    names = {f"{'even' if number % 2 == 0 else 'odd'}/{number:06d}" for number in range(samples)}
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == samples and set(keys) == names
    assert [bad for batch in batches for bad in batch.broken] == []
    kinds = Counter("refused" if "SlowDown" in fault.reason else "dropped" for fault in faults)
    assert kinds["refused"] > samples / 100 and kinds["dropped"] > 0, kinds
    assert replace(manifest, storage=Storage()) == read_manifest(url)
