"""Laws of holding out: a share of each class, drawn by seed and path; no contents in both sets."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UsageError
from data.packing.copies import name_contents
from data.packing.holdout import held_out
from data.packing.sources import Source, list_source
from data.shards.manifest import read_manifest
from tests.data.test_pack import encoded, files_in, lay_out, packed, samples_in, tar_of
from tests.data.test_source import csv_of, folder_of_tars, jsonl_of, tar_of_tars, zip_of
from tests.pipeline.runs import coatnet

FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**48 - 1)


@st.composite
def listings(draw: st.DrawFn, most_labels: int = 3) -> list[tuple[str, tuple[int, ...], int]]:
    """Images in any order: path, labels, contents, of which some are equal."""
    names = draw(st.lists(st.text("ab/é.", min_size=1, max_size=6), min_size=1, max_size=40, unique=True))
    labels = st.lists(st.integers(0, 3), min_size=1, max_size=most_labels, unique=True).map(tuple)
    return [(name, draw(labels), draw(st.integers(0, 60))) for name in names]


def held_paths(images: Sequence[tuple[str, tuple[int, ...], Any]], fraction: float, seed: int) -> set[str]:
    paths, labels, contents = zip(*images, strict=True)
    names = [repr(each).encode() for each in contents]
    held = set(held_out(zip(paths, labels, names, strict=True), fraction, seed))
    return {path for path, name in zip(paths, names, strict=True) if name in held}


@given(listings(), FRACTIONS, SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_a_listing_and_the_names_of_contents_decide_nothing(images, fraction, seed, shuffling):
    held = held_paths(images, fraction, seed)
    shuffling.shuffle(images)
    assert held_paths(images, fraction, seed) == held
    renumbered = [(path, tuple(9 - label for label in labels), f"{contents}") for path, labels, contents in images]
    assert held_paths(renumbered, fraction, seed) == held


@given(listings(), FRACTIONS, SEEDS)
def test_equal_contents_are_on_one_side_and_no_class_loses_all(images, fraction, seed):
    held = held_paths(images, fraction, seed)
    sides = [{contents for path, _, contents in images if (path in held) == side} for side in (True, False)]
    assert not sides[0] & sides[1]
    assert {n for path, labels, _ in images if path not in held for n in labels} == {n for _, s, _ in images for n in s}


@given(listings(most_labels=1), FRACTIONS, SEEDS)
def test_each_class_gives_its_share_to_the_nearest_image(images, fraction, seed):
    images = [(path, labels, (labels, contents)) for path, labels, contents in images]  # no image is in two classes
    held = held_paths(images, fraction, seed)
    for label in range(4):
        own = [(path in held, contents) for path, labels, contents in images if labels == (label,)]
        count, taken = len({contents for _, contents in own}), len({contents for out, contents in own if out})
        assert taken == min(max(0, count - 1), int(count * fraction + 0.5))


@given(listings(), FRACTIONS, SEEDS)
def test_a_class_gives_less_only_where_a_class_of_each_image_has_one_left(images, fraction, seed):
    images = [(path, labels, path) for path, labels, _ in images]
    held = held_paths(images, fraction, seed)
    left = Counter(label for path, labels, _ in images if path not in held for label in labels)
    counts = Counter(label for _, labels, _ in images for label in labels)
    for lacking in (label for label in counts if counts[label] - left[label] < int(counts[label] * fraction + 0.5)):
        own = [labels for path, labels, _ in images if path not in held and lacking in labels]
        assert all(1 in (left[label] for label in labels) for labels in own)


def test_other_seeds_draw_other_images_and_a_new_image_moves_one_at_most():
    images = [(f"a/{number}.jpg", (0,), number) for number in range(1000)]
    held = held_paths(images, 0.1, 0)
    assert len(held) == 100 and len(held & held_paths(images, 0.1, 1)) < 30
    assert len(held - held_paths([*images, ("a/new.jpg", (0,), -1)], 0.1, 0)) <= 1
    assert held_paths([*images, ("b/new.jpg", (1,), -1)], 0.1, 0) == held


# From files to two sets.

# By path: forty images of three classes. Copies lie in one class, in two, and in a class that has nothing else.
IMAGES = {f"{'abb'[number % 3]}/{number}.jpg": encoded(number) for number in range(36)}
COPIES = {"a/copy of 0.jpg": encoded(0), "b/0.jpg": encoded(0), "b/0 again.png": encoded(0), "few/1.jpg": encoded(1)}
FILES = {**IMAGES, **COPIES}
BROKEN = {"a/broken.jpg": b"no image", "a/broken too.jpg": b"no image", "b/notes.txt": b"notes"}


def contents_in(folder: Path) -> Counter[tuple[str, bytes]]:
    labels = read_manifest(str(folder)).classes
    return Counter(
        (labels[int(each["cls"])], next(each[n] for n in ("jpg", "png") if n in each)) for each in samples_in(folder)
    )


def test_both_sets_have_all_images_between_them_and_none_in_common(tmp_path):
    report = packed(lay_out(tmp_path / "in", {**FILES, **BROKEN}), tmp_path / "out", holdout=0.25)
    train, val = contents_in(tmp_path / "out/train"), contents_in(tmp_path / "out/val")
    assert train + val == Counter((path.partition("/")[0], contents) for path, contents in FILES.items())
    assert not {contents for _, contents in train} & {contents for _, contents in val}
    assert {name for name, _ in train} == {"a", "b", "few"}
    keys = [sample["__key__"] for name in ("train", "val") for sample in samples_in(tmp_path / "out" / name)]
    assert len(set(keys)) == len(FILES)
    manifests = [read_manifest(str(tmp_path / "out" / name)) for name in ("train", "val")]
    assert manifests[0].classes == manifests[1].classes == ("a", "b", "few")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert report.holdout
    assert [each.samples for each in (report.holdout.train, report.holdout.val)] == [each.samples for each in manifests]
    assert (report.samples, report.holdout.copies, report.holdout.missing_in_val) == (40, 4, ("few",))
    assert {each.key for each in report.broken} == set(BROKEN)


SOURCES: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "tar": lambda root, files: tar_of(lay_out(root / "zoo", files)),
    "tar of tars": tar_of_tars,
    "folder of tars": folder_of_tars,
    "zip": zip_of,
    "csv": csv_of,
    "jsonl": jsonl_of,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_is_split_with_its_copies_together(kind, tmp_path):
    report = packed(SOURCES[kind](tmp_path / "in", FILES), tmp_path / "out", holdout=0.25)
    train, val = contents_in(tmp_path / "out/train"), contents_in(tmp_path / "out/val")
    assert train + val == Counter((path.partition("/")[0], contents) for path, contents in FILES.items())
    assert not {contents for _, contents in train} & {contents for _, contents in val}
    assert report.holdout and report.holdout.copies == 4
    if kind not in ("csv", "jsonl"):
        packed(lay_out(tmp_path / "folder", FILES), tmp_path / "of_folder", holdout=0.25)
        assert files_in(tmp_path / "out/val") == files_in(tmp_path / "of_folder/val")


def test_a_list_in_another_order_is_split_alike_with_any_workers(tmp_path):
    lines = csv_of(tmp_path, FILES).read_text().splitlines()
    rows = lines[1:]
    random.Random(0).shuffle(rows)
    (tmp_path / "shuffled.csv").write_text("\n".join([lines[0], *rows]))
    packed(tmp_path / "list.csv", tmp_path / "out", holdout=0.25, workers=1)
    packed(tmp_path / "shuffled.csv", tmp_path / "again", holdout=0.25, workers=3)
    for name in ("train", "val"):
        assert contents_in(tmp_path / "out" / name) == contents_in(tmp_path / "again" / name)


def test_labels_of_several_classes_stand_alike_in_both_sets(tmp_path):
    lay_out(tmp_path, {f"{number}.jpg": encoded(number) for number in range(12)})
    rows = [{"path": f"{n}.jpg", "labels": ["x", "y"] if n == 0 else ["xy"[n % 2]]} for n in range(12)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed(tmp_path / "list.jsonl", tmp_path / "out", holdout=0.3)
    for name in ("train", "val"):
        manifest = read_manifest(str(tmp_path / "out" / name))
        assert (manifest.label_field, manifest.labels_per_sample, manifest.classes) == ("labels", 2, ("x", "y"))
        assert all("json" in sample for sample in samples_in(tmp_path / "out" / name))


def test_in_memory_and_on_disk_the_two_sets_are_the_same(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.put(str(lay_out(tmp_path / "in", FILES)) + "/", "/held_zoo/", recursive=True)
    packed("memory://held_zoo", "memory://held/out", holdout=0.25)
    packed(tmp_path / "in", tmp_path / "out", holdout=0.25)
    for name in ("train", "val"):
        written = {path.rpartition("/")[2]: contents for path, contents in fs.cat(f"/held/out/{name}/*").items()}
        assert written == files_in(tmp_path / "out" / name)


# What is equal.


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3)), max_size=12))
def test_contents_have_one_name_where_their_bytes_are_equal_and_only_there(files):
    """Files that differ in their beginning, their end or their size alone, or in nothing; some of unknown size."""
    fs = fsspec.filesystem("memory")
    fs.rm("/equal", recursive=True) if fs.exists("/equal") else None
    contents = [bytes([first]) + bytes(9000 * size) + bytes([last]) for first, last, size in files] + [b"", b""]
    for number, each in enumerate(contents):
        fs.pipe_file(f"/equal/a/{number:02d}.jpg", each)
    found = list_source("memory://equal")
    found.catalog.change("UPDATE images SET size = NULL WHERE id % 3 = 1")
    names = names_of(found)
    assert [names.index(name) for name in names] == [contents.index(each) for each in contents]


def names_of(found: Source) -> list[bytes]:
    name_contents(found, lambda done, total: None)
    return [name for (name,) in found.catalog.select("SELECT contents FROM images ORDER BY id")]


class Metered:
    """A source of bytes that counts them."""

    def __init__(self, storage: Any) -> None:
        self.storage, self.bytes = storage, 0

    def read(self, url: str, begin: int | None = None, end: int | None = None) -> bytes:
        contents = self.storage.read(url, begin, end)
        self.bytes += len(contents)
        return contents


@pytest.mark.parametrize(("kind", "most"), [("folder", 30 * 4096 + 2 * 50_000), ("zip", 2 * 50_200)])
def test_images_of_equal_size_are_told_apart_by_their_ends_alone(kind, most, tmp_path):
    noise = random.Random(0)
    files = {f"a/{number}.jpg": noise.randbytes(50_000) for number in range(29)}
    files |= {"a/copy.jpg": files["a/7.jpg"], "a/longer.jpg": noise.randbytes(60_000)}
    source = lay_out(tmp_path / "in", files) if kind == "folder" else zip_of(tmp_path, files)
    found = list_source(str(source))
    metered: Any = Metered(found.storage)
    names = names_of(replace(found, storage=metered))
    assert len(set(names)) == len(files) - 1
    assert 0 < metered.bytes <= most


# What is refused.


@pytest.mark.parametrize("holdout", [0.0, 1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(holdout, tmp_path):
    with pytest.raises(UsageError, match=f"--holdout={holdout} must be a share"):
        packed(lay_out(tmp_path / "in", FILES), tmp_path / "out", holdout=holdout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "holdout", "message"),
    [
        ({f"{name}/{number}.jpg": encoded(number) for name in "ab" for number in range(4)}, 0.1, "holds out no image"),
        ({f"{name}/1.jpg": encoded(1) for name in "ab"}, 0.5, "holds out no image"),
        ({f"a/{number}.jpg": b"x%d" % number for number in range(4)}, 0.5, "no training image that can be decoded"),
        (
            {f"a/{number}.jpg": encoded(number) for number in range(9)} | {"b/1.jpg": b"x"},
            0.1,
            "class folders with no training image that can be decoded: b",
        ),
    ],
    ids=["small classes", "equal images", "broken images", "a broken class"],
)
def test_a_source_that_cannot_fill_both_sets_is_refused(files, holdout, message, tmp_path):
    with pytest.raises(UsageError, match=message) as refused:
        packed(lay_out(tmp_path / "in", files), tmp_path / "out", holdout=holdout)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "out").rglob("manifest.json"))


@pytest.mark.parametrize("inside", ["", "train", "val"])
def test_sets_that_were_packed_otherwise_are_replaced_only_when_asked_for(inside, tmp_path):
    source = lay_out(tmp_path / "in", FILES)
    packed(source, tmp_path / "fresh", holdout=0.25)
    packed(source, tmp_path / "out" / inside, samples_per_shard=1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(UsageError, match=f"{(tmp_path / 'out' / inside)} already holds shards"):
        packed(source, tmp_path / "out", holdout=0.25)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
    packed(source, tmp_path / "out", holdout=0.25, overwrite=True)
    for name in ("train", "val"):
        assert files_in(tmp_path / "out" / name) == files_in(tmp_path / "fresh" / name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]


def test_a_set_is_never_written_into_the_images_that_it_is_of(tmp_path):
    source = lay_out(tmp_path / "photos" / "train", FILES)
    with pytest.raises(UsageError, match="photos/train is inside the source"):
        packed(source, tmp_path / "photos", holdout=0.25)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val").write_bytes(b"x")
    with pytest.raises(UsageError, match="out/val is a file"):
        packed(source, tmp_path / "out", holdout=0.25)


def test_the_command_says_what_was_held_out_what_was_equal_and_what_was_too_few(tmp_path):
    source = lay_out(tmp_path / "in", FILES)
    done = coatnet("data", "pack", source, tmp_path / "out", "--holdout", "0.25")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith(f"{tmp_path}/out/train: ") and lines[2].startswith(f"{tmp_path}/out/val: ")
    assert lines[3:] == [
        "byte-for-byte copies of other images, each in the same set as its original: 4",
        "classes with too few images to have one in val: few",
    ]
    again = coatnet("data", "pack", source, tmp_path / "again", "--holdout", "0.25", "--json")
    report = json.loads(again.stdout)
    assert report["holdout"]["train"]["samples"] + report["holdout"]["val"]["samples"] == report["samples"] == 40
    assert (report["holdout"]["copies"], report["holdout"]["missing_in_val"]) == (4, ["few"])
