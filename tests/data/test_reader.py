"""Laws of reading: a range gives its samples in order, and each byte that is not the packed one is noticed."""

import contextlib
import io
import re
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.errors import DataError
from data.order import SampleRange
from data.reader import Sample, _parse, read_ranges
from data.shards.manifest import BadSample, Manifest, read_manifest
from data.shards.sample_table import FLAG_UNCHECKED, table_rows
from data.shards.tar_index import TarSample, index_tar, is_part
from data.storage.remote import Storage

IMPATIENT = Storage(attempts=2, first_wait=0.01)


class Unsteady(LocalFileSystem):
    """The local disk at unsteady://, whose first `bad_reads` reads of a tar come damaged or short."""

    protocol = "unsteady"
    bad_reads: ClassVar[int] = 0
    short: ClassVar[bool] = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("unsteady://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> Any:
        content: Any = super().cat_file(path, start, end, **kwargs)
        if not path.endswith(".tar") or Unsteady.bad_reads == 0:
            return content
        Unsteady.bad_reads -= 1
        return content[:-1] if Unsteady.short else content[:700] + b"\xff" + content[701:]


fsspec.register_implementation("unsteady", Unsteady, clobber=True)


def whole(manifest: Manifest) -> list[SampleRange]:
    return [SampleRange(i, 0, shard.samples) for i, shard in enumerate(manifest.shards)]


def copied(packed, folder: Path) -> Manifest:
    shutil.copytree(packed.folder, folder, dirs_exist_ok=True)
    return read_manifest(str(folder), IMPATIENT)


def in_memory(packed, name: str, changed: dict[str, bytes]) -> Manifest:
    """The set at memory://NAME, with these files changed."""
    fs = fsspec.filesystem("memory")
    for path in packed.folder.iterdir():
        fs.pipe_file(f"/{name}/{path.name}", changed.get(path.name, path.read_bytes()))
    return read_manifest(f"memory://{name}")


def test_every_sample_comes_in_order_with_its_own_bytes_label_and_size(packed):
    samples = read_ranges(packed.manifest, whole(packed.manifest))
    assert [sample.key for sample in samples] == packed.keys
    for sample in samples:
        original = packed.originals[sample.key]
        assert isinstance(sample, Sample)
        assert (sample.image, sample.labels) == (original.encoded, (original.label,))
        assert min(sample.height, sample.width) == 24


@given(st.data())
def test_any_range_gives_the_same_samples_as_reading_everything(packed, data):
    everything = read_ranges(packed.manifest, whole(packed.manifest))
    shard = data.draw(st.integers(0, len(packed.manifest.shards) - 1))
    first = data.draw(st.integers(0, packed.manifest.shards[shard].samples - 1))
    rows = data.draw(st.integers(1, packed.manifest.shards[shard].samples - first))
    start = sum(each.samples for each in packed.manifest.shards[:shard]) + first
    assert read_ranges(packed.manifest, [SampleRange(shard, first, rows)]) == everything[start : start + rows]


@given(st.data())
def test_a_changed_byte_breaks_its_own_sample_and_no_other(packed, data):
    """Wherever it lies: in a header, in the key's own letters, in the image, the label or the padding."""
    tar = bytearray((packed.folder / "shard-000001.tar").read_bytes())
    samples = index_tar(bytes(tar))
    victim = data.draw(st.integers(0, len(samples) - 1))
    place = samples[victim].offset + data.draw(st.integers(0, samples[victim].bytes - 1))
    tar[place] ^= data.draw(st.integers(1, 255))
    manifest = in_memory(packed, "changed", {"shard-000001.tar": bytes(tar)})
    good = read_ranges(packed.manifest, [SampleRange(1, 0, len(samples))])
    for row, (found, expected) in enumerate(
        zip(read_ranges(manifest, [SampleRange(1, 0, len(samples))]), good, strict=True)
    ):
        if row == victim:
            assert isinstance(found, BadSample)
            assert (found.shard, found.key) == ("shard-000001.tar", samples[victim].key)
        else:
            assert found == expected


NAMES = [
    "a.jpg",
    "a.cls",
    "a.JPG",
    "b/c.d.PNG",
    "b/c.cls",
    "__x__/a.jpg",
    ".hidden",
    "folder/",
    "none",
    "ä.cls",
    60 * "x/" + "a.cls",
]


@given(st.data())
def test_headers_are_read_as_webdataset_reads_them(data):
    """Of tars in any format, with one byte changed at most: each sample is what its iterators give of its bytes."""
    stream, kinds = io.BytesIO(), st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    starts, names_of_one = [], st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
    with tarfile.open(fileobj=stream, mode="w", format=data.draw(kinds)) as tar:
        for names in data.draw(st.lists(names_of_one, min_size=1, max_size=3)):
            starts.append(tar.offset)
            for name in names:
                member = tarfile.TarInfo(name)
                member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                member.size = data.draw(st.sampled_from([0, 1, 512, 700]))
                tar.addfile(member, io.BytesIO(bytes(member.size)))
        starts.append(tar.offset)
    raw = bytearray(stream.getvalue()[: starts[-1]])
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    spans = [bytes(raw[begin:end]) for begin, end in pairwise(starts)]
    samples = [TarSample("", begin, end - begin, {}, {}) for begin, end in pairwise(starts)]
    found = _parse(bytes(raw), table_rows(samples, 0, [(0, 0)] * len(samples), FLAG_UNCHECKED))
    expected = webdatasets(bytes(raw))
    if len(expected) != len(spans):
        expected = [each[0] if len(each) == 1 else None for each in map(webdatasets, spans)]
    assert [each and {"__key__": each[0], "__url__": "", **each[1]} for each in found] == expected


def webdatasets(tar: bytes) -> list[Any]:
    """The samples that webdataset finds."""
    found: list[Any] = []
    with contextlib.suppress(Exception):  # what came before it counts
        found.extend(group_by_keys(tar_file_expander([{"url": "", "stream": io.BytesIO(tar)}], select_files=is_part)))
    return found


def test_a_range_that_is_damaged_throughout_is_broken_samples_and_no_error(packed):
    manifest = in_memory(packed, "zeros", {"shard-000000.tar": bytes(manifest_bytes(packed, 0))})
    assert [sample.key for sample in read_ranges(manifest, [SampleRange(0, 0, 9)])] == packed.keys[:9]
    assert all(isinstance(sample, BadSample) for sample in read_ranges(manifest, [SampleRange(0, 2, 3)]))


def manifest_bytes(packed, shard: int) -> int:
    return packed.manifest.shards[shard].bytes


def test_without_an_index_a_damaged_sample_is_named_by_its_row(packed, tmp_path):
    manifest = copied(packed, tmp_path)
    (tmp_path / "shard-000000.tar").write_bytes(bytes(manifest_bytes(packed, 0)))
    (tmp_path / "shard-000000.idx").unlink()
    assert [sample.key for sample in read_ranges(manifest, [SampleRange(0, 2, 2)])] == ["row 2", "row 3"]


def test_what_a_second_read_gives_right_is_not_broken(packed):
    Unsteady.bad_reads, Unsteady.short = 1, False
    manifest = read_manifest(f"unsteady://{packed.folder}")
    assert read_ranges(manifest, [SampleRange(0, 0, 9)]) == read_ranges(packed.manifest, [SampleRange(0, 0, 9)])
    assert Unsteady.bad_reads == 0
    Unsteady.bad_reads = 2
    assert sum(isinstance(sample, BadSample) for sample in read_ranges(manifest, [SampleRange(0, 0, 9)])) == 1


def test_a_short_read_is_retried_and_then_an_error_with_file_and_bytes(packed):
    Unsteady.bad_reads, Unsteady.short = 1, True
    manifest = read_manifest(f"unsteady://{packed.folder}", IMPATIENT)
    assert read_ranges(manifest, [SampleRange(1, 2, 3)]) == read_ranges(packed.manifest, [SampleRange(1, 2, 3)])
    Unsteady.bad_reads = 2
    rows = np.load(packed.folder / "shard-000001.npy")[2:5]
    begin, end = rows["offset"][0], rows["offset"][-1] + rows["bytes"][-1]
    asked = rf"shard-000001\.tar: bytes {begin} to {end} cannot be read: 2 attempts .* but {end - begin - 1} came"
    with pytest.raises(DataError, match=asked):
        read_ranges(manifest, [SampleRange(1, 2, 3)])


def test_a_truncated_tar_is_an_error_past_its_end_only(packed, tmp_path):
    manifest = copied(packed, tmp_path)
    offset = int(np.load(tmp_path / "shard-000000.npy")["offset"][4])
    tar = tmp_path / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[: offset + 10])
    assert read_ranges(manifest, [SampleRange(0, 0, 4)]) == read_ranges(packed.manifest, [SampleRange(0, 0, 4)])
    with pytest.raises(DataError, match=rf"{tar}: bytes {offset} to \d+ cannot be read: .* requested, but 10 came"):
        read_ranges(manifest, [SampleRange(0, 4, 2)])


@pytest.mark.parametrize("suffix", [".tar", ".npy"])
def test_a_missing_file_is_an_error_in_one_line_that_names_it(packed, tmp_path, suffix):
    manifest = copied(packed, tmp_path)
    (tmp_path / f"shard-000001{suffix}").unlink()
    with pytest.raises(DataError, match=rf"shard-000001\{suffix}.*cannot be read: .*No such file") as raised:
        read_ranges(manifest, [SampleRange(1, 0, 1)])
    assert "\n" not in str(raised.value)


def test_a_truncated_table_is_an_error_that_names_it(packed, tmp_path):
    manifest = copied(packed, tmp_path)
    table = tmp_path / "shard-000001.npy"
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"shard-000001\.npy: bytes 512 to 544 cannot be read: .* 32 .* requested, but 31 came"
    ):
        read_ranges(manifest, [SampleRange(1, 8, 1)])


def test_an_unmarked_sample_is_decoded_before_it_counts(packed, by_hand, tmp_path):
    """Bytes that never decoded could end the process inside DALI; the size is then the decoded one, not the table's."""
    image = packed.originals["bee/1"].encoded
    manifest = by_hand(tmp_path, [{"png": image, "cls": b"0"}, {"png": image[:-30], "cls": b"0"}], 1, 0)
    good, bad = read_ranges(manifest, [SampleRange(0, 0, 2)])
    assert good == Sample("shard-000000.tar", "0000", image, (0,), 24, 25)
    assert isinstance(bad, BadSample) and (bad.shard, bad.key) == ("shard-000000.tar", "0001")


@pytest.mark.parametrize("label", [b"2", b"-1", b"", b"x", b"1.5", b"\xff", b"9" * 5000])
def test_a_label_that_is_no_class_is_broken(packed, by_hand, tmp_path, label):
    image = packed.originals["bee/1"].encoded
    manifest = by_hand(tmp_path, [{"png": image, "cls": label}, {"png": image, "cls": b" 1\n"}], 2, 0)
    bad, good = read_ranges(manifest, [SampleRange(0, 0, 2)])
    assert isinstance(bad, BadSample) and bad.key == "0000"
    assert re.search("its label is .*; it must be 0 to 1|its label is empty|its .cls is not UTF-8", bad.reason)
    assert isinstance(good, Sample) and good.labels == (1,)


@pytest.mark.parametrize("parts", [{"cls": b"0"}, {"jpg": b"x"}, {"json": b"{}", "txt": b"x", "cls": b"0"}])
def test_a_sample_without_image_or_label_is_broken_and_says_what_it_has(by_hand, tmp_path, parts):
    (bad,) = read_ranges(by_hand(tmp_path, [parts], 1, 0), [SampleRange(0, 0, 1)])
    assert isinstance(bad, BadSample) and str(sorted(parts)) in bad.reason
