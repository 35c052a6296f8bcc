"""Laws of packing: every image that decodes is in the shards once, with its bytes and label, for other tools too."""

import io
import json
import os
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from PIL import Image

from data import codec
from data.errors import DataError, UsageError
from data.packing.archives import Entry
from data.packing.keys import Keys
from data.packing.pack import PackReport, pack
from data.packing.reading import read_image
from data.packing.sources import SUFFIXES, Source, list_source
from data.shards.manifest import read_manifest
from data.shards.sample_table import FLAG_DECODED
from data.shards.tar_index import index_bytes, index_tar, split_name

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def encoded(
    number: int, kind: str = "JPEG", size: tuple[int, int] = (24, 16), mode: str = "RGB", **options: Any
) -> bytes:
    """An image of `size` (width, height), another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (2, 3, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def upright_by_tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


# By path: contents, the member's extension, and (height, width). Labels: a.b 0, cats 1, 日本 2.
GOOD = {
    "cats/plain.jpg": (encoded(0), "jpg", (16, 24)),
    "cats/loud.JPEG": (encoded(1), "jpg", (16, 24)),
    "cats/with space.and.dots.jpg": (encoded(2), "jpg", (16, 24)),
    "cats/deep/er/plain.png": (encoded(3, "PNG"), "png", (16, 24)),
    "cats/png_inside.jpg": (encoded(4, "PNG"), "png", (16, 24)),
    "cats/gray.jpg": (encoded(5, mode="L"), "jpg", (16, 24)),
    "cats/cmyk.jpg": (encoded(6, mode="CMYK"), "jpg", (16, 24)),
    "cats/rotated.jpg": (encoded(7, exif=upright_by_tag(6)), "jpg", (24, 16)),
    "a.b/plain.jpg": (encoded(8, progressive=True), "jpg", (16, 24)),
    "a.b/" + "long" * 30 + ".webp": (encoded(9, "WEBP"), "webp", (16, 24)),
    "日本/größe.jpg": (encoded(10), "jpg", (16, 24)),
    "日本/one.bmp": (encoded(11, "BMP", (1, 1)), "bmp", (1, 1)),
    "日本/many.tiff": (encoded(12, "TIFF", (300, 40)), "tif", (40, 300)),
}
LABELS = {"a.b": 0, "cats": 1, "日本": 2}
BAD = {
    "cats/text.jpg": (b"no image at all", "not that of a supported image"),
    "cats/truncated.jpg": (encoded(20, size=(64, 64))[:-50], "truncated or damaged"),
    "cats/nothing.jpg": (b"", "empty file"),
    "cats/notes.txt": (b"notes", "its suffix is not that of an image"),
    "a.b/moving.gif": (encoded(21, "GIF"), "its suffix is not that of an image"),
    "README.md": (b"read me", "not in a class folder"),
}
HIDDEN = {".DS_Store": b"x", "cats/._plain.jpg": b"x", "cats/.git/x.jpg": b"x", "__MACOSX/cats/plain.jpg": b"x"}


def lay_out(root: Path, files: dict[str, bytes]) -> Path:
    for path, contents in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(contents)
    return root


def tar_of(folder: Path) -> Path:
    place = folder.with_suffix(".tar")
    with tarfile.open(place, "w") as tar:
        tar.add(folder, ".")
    return place


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    files = {path: contents for path, (contents, *_) in {**GOOD, **BAD}.items()} | HIDDEN
    return lay_out(tmp_path_factory.mktemp("source") / "zoo", files)


def packed(source: object, destination: object, **changed: Any) -> PackReport:
    request: dict[str, Any] = {"samples_per_shard": 5, "bytes_per_shard": None, "seed": 0, "workers": 2}
    request |= {"overwrite": False, "progress": lambda done, total: None, **changed}
    return pack(str(source), str(destination), **request)


@pytest.fixture(scope="module")
def shards_of_zoo(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    packed(zoo, folder)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def samples_in(folder: Path) -> list[dict]:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)) if tars else []


def image_of(sample: dict) -> tuple[str, bytes]:
    (name,) = set(sample) & {"jpg", "png", "webp", "bmp", "tif"}
    return name, sample[name]


def test_webdataset_reads_every_image_once_with_its_bytes_kind_and_label(shards_of_zoo):
    read = Counter((*image_of(sample), int(sample["cls"])) for sample in samples_in(shards_of_zoo))
    assert read == Counter(
        (kind, contents, LABELS[path.partition("/")[0]]) for path, (contents, kind, _) in GOOD.items()
    )


def test_dalis_reader_reads_every_sample_by_our_index(shards_of_zoo):
    tars = sorted(str(path) for path in shards_of_zoo.glob("*.tar"))

    request: dict[str, Any] = {"paths": tars, "index_paths": [tar[:-3] + "idx" for tar in tars]}
    on_the_cpu: dict[str, Any] = {"batch_size": len(GOOD), "num_threads": 1, "device_id": None}

    @pipeline_def(**on_the_cpu)
    def reading() -> tuple:
        samples: Any = fn.readers.webdataset(**request, ext=["jpg;png;webp;bmp;tif", "cls"])
        return *samples, fn.decoders.image(samples[0])

    outputs: Any = reading().run()
    images, labels, decoded = outputs
    read = Counter((bytes(images.at(i)), int(bytes(labels.at(i)))) for i in range(len(GOOD)))
    assert read == Counter((contents, LABELS[path.partition("/")[0]]) for path, (contents, *_) in GOOD.items())
    shapes = {contents: shape for contents, _, shape in GOOD.values()}
    for i in range(len(GOOD)):
        assert decoded.at(i).shape == (*shapes[bytes(images.at(i))], 3)


def test_manifest_index_and_table_agree_with_the_tars(shards_of_zoo):
    manifest = read_manifest(str(shards_of_zoo))
    assert manifest.classes == tuple(LABELS)
    assert set(files_in(shards_of_zoo)) == {"manifest.json"} | {
        shard.name[:-3] + suffix for shard in manifest.shards for suffix in ("tar", "idx", "npy")
    }
    for number, shard in enumerate(manifest.shards):
        tar = Path(manifest.url_of(number)).read_bytes()
        index, rows = index_tar(tar), np.load(manifest.url_of(number, ".npy"))
        assert Path(manifest.url_of(number, ".idx")).read_bytes() == index_bytes(index)
        assert (shard.samples, shard.bytes) == (len(index), len(tar)) == (len(rows), len(tar))
        assert [(each.offset, each.bytes) for each in index] == rows[["offset", "bytes"]].tolist()
        assert all(zlib.crc32(tar[at : at + size]) == crc for at, size, crc, *_ in rows.tolist())
        assert set(rows["flags"]) == {FLAG_DECODED}


def test_the_table_has_each_image_upright_as_it_decodes(shards_of_zoo):
    shapes = {contents: shape for contents, _, shape in GOOD.values()}
    for tar in sorted(shards_of_zoo.glob("*.tar")):
        samples = webdataset.WebDataset(str(tar), shardshuffle=False)
        expected = [shapes[image_of(sample)[1]] for sample in samples]
        assert np.load(tar.with_suffix(".npy"))[["height", "width"]].tolist() == expected


def test_broken_and_foreign_files_are_listed_with_the_reason_and_left_out(zoo, tmp_path):
    report = packed(zoo, tmp_path)
    assert (report.samples, report.shards, report.classes) == (len(GOOD), 4, 3)
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert [each.key for each in report.broken] == sorted(BAD)
    for each in report.broken:
        assert BAD[each.key][1] in each.reason
        assert "\n" not in each.reason and each.shard is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_an_image_that_lacks_its_end_does_not_decode(kind):
    whole = encoded(0, kind, (64, 48))
    assert codec.examine(whole)[1:] == (48, 64)
    for cut in (*range(1, 20), *range(20, len(whole), 97)):
        with pytest.raises(codec.Undecodable):
            codec.examine(whole[: len(whole) - cut])


def test_the_same_source_gives_the_same_bytes_with_any_number_of_workers(zoo, tmp_path):
    packed(zoo, tmp_path / "once", workers=1)
    packed(zoo, tmp_path / "again", workers=3)
    packed(tar_of(zoo), tmp_path / "from_tar", workers=2)
    packed(zoo, tmp_path / "other_seed", seed=1)
    once = files_in(tmp_path / "once")
    assert files_in(tmp_path / "again") == once
    assert files_in(tmp_path / "from_tar") == once
    assert files_in(tmp_path / "other_seed") != once


def test_one_folder_around_the_class_folders_changes_nothing(zoo, shards_of_zoo, tmp_path):
    inner = {path: contents for path, (contents, *_) in GOOD.items()}
    packed(lay_out(tmp_path / "outer", {f"zoo/{path}": contents for path, contents in inner.items()}), tmp_path / "out")
    packed(lay_out(tmp_path / "plain", inner), tmp_path / "plain_out")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "plain_out")


def test_a_source_and_destination_in_memory_give_the_same_bytes_as_on_disk(zoo, shards_of_zoo):
    fs = fsspec.filesystem("memory")
    fs.put(str(zoo) + "/", "/zoo/", recursive=True)
    packed("memory://zoo", "memory://packed/zoo")
    written = {path.rpartition("/")[2]: contents for path, contents in fs.cat("/packed/zoo/*").items()}
    assert written == files_in(shards_of_zoo)


@given(st.integers(1, 9), st.integers(1, 9000))
def test_shards_are_as_few_as_the_limits_of_samples_and_bytes_allow(samples, size):
    name = f"memory://limits-{samples}-{size}"
    fs = fsspec.filesystem("memory")
    for number in range(12):
        fs.pipe_file(f"/by_size/a/{number}.jpg", encoded(number, size=(8 + 6 * number, 8)))
    packed("memory://by_size", name, samples_per_shard=samples, bytes_per_shard=size, workers=1, overwrite=True)
    rows = [np.load(io.BytesIO(table)) for table in fs.cat(f"{name[8:]}/*.npy").values()]
    sizes = [each["bytes"].tolist() for each in rows]
    assert sum(map(len, sizes)) == 12
    for each, after in zip(sizes, [*sizes[1:], []], strict=True):
        assert len(each) <= samples and (sum(each) <= size or len(each) == 1)
        assert not after or len(each) == samples or sum(each) + after[0] > size


def test_samples_come_in_an_order_that_mixes_the_classes(tmp_path):
    files = {f"{name}/{number}.jpg": encoded(number) for name in "ab" for number in range(50)}
    packed(lay_out(tmp_path / "in", files), tmp_path / "out", samples_per_shard=100)
    labels = [int(sample["cls"]) for sample in samples_in(tmp_path / "out")]
    assert 10 < sum(labels[:50]) < 40


def test_a_shard_whose_images_are_all_broken_is_left_out(tmp_path):
    files = {f"a/{number}.jpg": encoded(number) for number in range(4)}
    source = lay_out(tmp_path / "in", files)
    packed(source, tmp_path / "whole", samples_per_shard=1)
    order = [sample["__key__"] for sample in samples_in(tmp_path / "whole")]
    (source / f"{order[1]}.jpg").write_bytes(b"broken")
    packed(source, tmp_path / "out", samples_per_shard=1)
    assert [sample["__key__"] for sample in samples_in(tmp_path / "out")] == [order[0], *order[2:]]
    names = [shard.name for shard in read_manifest(str(tmp_path / "out")).shards]
    assert names == [f"shard-{number:06d}.tar" for number in (0, 2, 3)]  # by the plan, whichever machine made them


def unique_keys(paths: Iterable[str]) -> list[str]:
    return list(map(Keys().of, paths))


@given(st.lists(st.text("ab_-. é(2/", min_size=1, max_size=6), unique=True))
def test_keys_are_unique_and_read_alike_by_webdataset_and_dali(names):
    keys = unique_keys(sorted(f"__{name}__/{name}.jpg" for name in names))
    assert len(set(keys)) == len(names)
    for key in keys:
        assert split_name(f"{key}.jpg") == (key, "jpg")
        assert not key.startswith("__") and not set(key) & set(" .()")


def test_names_that_give_the_same_key_are_numbered_in_their_order():
    paths = ["a/x 1.jpg", "a/x.1.jpg", "a/x_1-2.jpg", "a/x_1.png"]
    assert unique_keys(paths) == ["a/x_1", "a/x_1-2", "a/x_1-2-2", "a/x_1-3"]


def test_a_name_has_the_same_key_however_its_accents_are_encoded():
    assert unique_keys([unicodedata.normalize("NFD", "é/über.jpg")]) == unique_keys(["é/über.jpg"]) == ["é/über"]


def test_progress_counts_every_image_file_to_the_end(zoo, tmp_path):
    seen = []
    packed(zoo, tmp_path, progress=lambda done, total: seen.append((done, total)))
    images = len(GOOD) + sum(path.endswith(SUFFIXES) for path in BAD)
    assert seen == [(done, images) for done in range(images + 1)]


def refused(source: object, destination: object, **changed: Any) -> str:
    with pytest.raises(UsageError) as error:
        packed(source, destination, **changed)
    assert "\n" not in str(error.value)
    assert not fsspec.filesystem("file").exists(f"{destination}/manifest.json")
    return str(error.value)


JPEG = encoded(0)
NO_IMAGES = f"class folders without images ({' '.join(SUFFIXES)}): b, c;"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "in does not exist"),
        ({}, "in is empty"),
        ({".hidden": b"x"}, "in is empty"),
        ({"1.jpg": JPEG, "2.jpg": JPEG}, "no class folders; put the images of each class into a folder of its name"),
        (
            {"a/1.jpg": JPEG, "b/": b"", "c/": b""},
            NO_IMAGES,
        ),
        (
            {"a/1.jpg": JPEG, "b/x.txt": b"", "c/.jpg": b""},
            NO_IMAGES,
        ),
        ({"a/1.jpg": JPEG, "b/1.jpg": b"x", "c/1.jpg": JPEG[:99]}, "folders with no image that can be decoded: b, c;"),
    ],
    ids=["missing", "empty", "only hidden", "no classes", "empty classes", "classes without images", "broken classes"],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_source_without_images_in_every_class_is_refused_in_one_line(tmp_path, files, message, kind):
    source = tmp_path / "in"
    for path, contents in (files or {}).items():
        lay_out(source, {path: contents}) if contents or not path.endswith("/") else (source / path).mkdir()
    if files is not None:
        source.mkdir(exist_ok=True)
        source = tar_of(source) if kind == "tar" else source
    assert message.replace("in ", source.name + " ", message.startswith("in ")) in refused(source, tmp_path / "out")


def test_a_file_that_is_no_whole_plain_tar_is_refused_with_what_to_do(zoo, tmp_path):
    whole = tar_of(zoo).read_bytes()
    with tarfile.open(tmp_path / "in.tgz", "w:gz") as tar:
        tar.add(zoo, ".")
    (tmp_path / "text.tar").write_bytes(b"text\n" * 500)
    (tmp_path / "nothing.tar").write_bytes(b"")
    (tmp_path / "cut.tar").write_bytes(whole[:5000])
    assert "is compressed; gunzip it first" in refused(tmp_path / "in.tgz", tmp_path / "out")
    for name in ("text.tar", "nothing.tar", "cut.tar"):
        assert f"{name} is neither a folder nor a valid tar" in refused(tmp_path / name, tmp_path / "out")


def test_a_destination_in_the_source_is_refused(zoo, tmp_path):
    (tmp_path / "link").symlink_to(zoo)
    for inside in (zoo, zoo / "cats" / "out", tmp_path / "link" / "out"):
        assert "is inside the source" in refused(zoo, inside)
    assert "is inside the source" in refused(tar_of(zoo), tar_of(zoo))


def test_a_destination_that_cannot_be_a_folder_is_refused(zoo, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    assert "is a file" in refused(zoo, tmp_path / "file")
    assert "cannot be" in refused(zoo, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"samples_per_shard": None}, "neither samples nor bytes per shard"),
        ({"samples_per_shard": 0}, "samples per shard is 0"),
        ({"bytes_per_shard": -1}, "bytes per shard is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"seed": 2**48}, "seed is 281474976710656"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_number_that_cannot_be_is_refused(zoo, tmp_path, numbers, message):
    assert message in refused(zoo, tmp_path, **numbers)


def test_shards_that_are_there_are_replaced_only_when_asked_for(zoo, tmp_path):
    packed(zoo, tmp_path / "out", samples_per_shard=1)
    before = files_in(tmp_path / "out")
    with pytest.raises(UsageError, match="already holds shards"):
        packed(zoo, tmp_path / "out")
    assert files_in(tmp_path / "out") == before
    packed(zoo, tmp_path / "out", overwrite=True)
    packed(zoo, tmp_path / "fresh")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "fresh")


def test_somebody_elses_shards_are_replaced_only_when_asked_for(zoo, tmp_path):
    """And what else lies there stays, but for the half-written files of a pack."""
    half = ".shard-000009.tar.00c0ffee.partial"
    there = lay_out(tmp_path, {"shard-000007.tar": b"not ours", half: b"x", "mine.txt": b"mine"})
    before = files_in(there)
    assert "already holds shards" in refused(zoo, there)
    assert files_in(there) == before
    packed(zoo, there, overwrite=True)
    assert files_in(there).keys() & before.keys() == {"mine.txt"}


def images_of(found: Source) -> list[Entry]:
    return [image for image, _ in found.images()]


def contents_of(found: Source) -> list[bytes]:
    return [read_image(found.storage, image) for image in images_of(found)]


def test_a_file_that_cannot_be_read_ends_the_pack_with_its_name(tmp_path):
    source = lay_out(tmp_path / "in", {"a/1.jpg": JPEG, "a/2.jpg": JPEG, "a/3.jpg": JPEG})
    found = list_source(str(source))
    (source / "a/1.jpg").unlink()
    (source / "a/2.jpg").write_bytes(JPEG + b"more")
    images = images_of(found)
    with pytest.raises(DataError, match=r"a/1\.jpg cannot be read: .*; it was there when listed"):
        read_image(found.storage, images[0])
    with pytest.raises(DataError, match=r"a/2\.jpg has .* when listed"):
        read_image(found.storage, images[1])
    assert read_image(found.storage, images[2]) == JPEG


def test_links_are_followed_and_those_that_lead_nowhere_are_listed(tmp_path):
    source = lay_out(tmp_path / "in", {"a/1.jpg": JPEG})
    lay_out(tmp_path / "elsewhere", {"2.jpg": JPEG})
    (source / "b").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "around").symlink_to(source)
    (source / "a" / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    (source / "a" / "one.jpg").symlink_to(source / "a" / "1.jpg")
    os.mkfifo(source / "a" / "pipe.jpg")
    found = list_source(str(source))
    assert [image.path for image in images_of(found)] == ["a/1.jpg", "a/one.jpg", "b/2.jpg"]
    assert contents_of(found) == [JPEG] * 3
    assert {path: reason.partition(" (")[0] for path, reason in found.catalog.broken()} == {
        "a/around": "a link to a folder that contains it",
        "a/nowhere.jpg": "a broken link",
        "a/pipe.jpg": "not a regular file",
    }


def test_hard_links_in_a_tar_are_read_and_the_last_file_of_a_name_wins(tmp_path):
    source = lay_out(tmp_path / "in", {"a/1.jpg": JPEG, "a/3.jpg": encoded(3)})
    os.link(source / "a/1.jpg", source / "a/2.jpg")
    place = tar_of(source)
    (source / "a/3.jpg").write_bytes(encoded(4))
    with tarfile.open(place, "a") as tar:
        tar.add(source / "a/3.jpg", "a/3.jpg")
        link = tarfile.TarInfo("a/4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
    found = list_source(str(place))
    assert contents_of(found) == [JPEG, JPEG, encoded(4)]
    assert list(found.catalog.broken()) == [("a/4.jpg", "a link or device inside the tar")]


def test_file_names_that_are_not_utf8_are_no_obstacle_but_class_names_are(tmp_path):
    source = lay_out(tmp_path / "in", {"a/1.jpg": JPEG})
    for name in (b"a/\xff.jpg", b"a/\xfe.txt"):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(JPEG)
    report = packed(source, tmp_path / "out")
    assert report.samples == 2
    json.dumps([vars(each) for each in report.broken], ensure_ascii=False).encode("utf-8")
    os.mkdir(os.fsencode(source) + b"/\xfd")
    lay_out(Path(os.fsdecode(os.fsencode(source) + b"/\xfd")), {"1.jpg": JPEG})
    assert "is not UTF-8" in refused(source, tmp_path / "other")


def test_real_photographs_are_packed_whole_with_the_sizes_that_pillow_finds(tmp_path):
    if not (SHARED / "imagenet-sample.tar").exists():
        pytest.skip(f"{SHARED}/imagenet-sample.tar is not here")
    report = packed(SHARED / "imagenet-sample.tar", tmp_path, samples_per_shard=300)
    assert (report.samples, report.shards, report.classes, report.broken) == (800, 3, 800, ())
    for tar in sorted(tmp_path.glob("*.tar")):
        rows = np.load(tar.with_suffix(".npy"))
        for sample, row in zip(webdataset.WebDataset(str(tar), shardshuffle=False), rows, strict=True):
            image = Image.open(io.BytesIO(sample["jpg"]))
            turned = image.getexif().get(274, 1) > 4
            assert (row["width"], row["height"]) == (image.size[::-1] if turned else image.size)
