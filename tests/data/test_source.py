"""Laws of what can be packed: the same images give the same samples, whatever they lie in and whoever names them."""

import csv
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from data.codec import examine
from data.packing.label_files import read_classes
from data.shards.manifest import read_manifest
from tests.data.servers import http_server, s3_server
from tests.data.test_pack import (
    BAD,
    GOOD,
    JPEG,
    LABELS,
    encoded,
    files_in,
    image_of,
    lay_out,
    packed,
    refused,
    samples_in,
    tar_of,
    upright_by_tag,
)

FILES = {path: contents for path, (contents, *_) in GOOD.items()}
ALL = FILES | {path: contents for path, (contents, *_) in BAD.items()}
FLAT = {path.replace("/", "."): contents for path, contents in FILES.items() if path.endswith((".jpg", ".png"))}
CLASS_OF = {path.replace("/", "."): path.partition("/")[0] for path in FILES}


def tar_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, contents in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return stream.getvalue()


def class_tars(files: dict[str, bytes]) -> dict[str, bytes]:
    classes: dict[str, dict[str, bytes]] = {}
    for path, contents in files.items():
        name, _, inside = path.partition("/")
        classes.setdefault(name, {})[inside] = contents
    return {name: tar_bytes(inside) for name, inside in classes.items()}


def tar_of_tars(root: Path, files: dict[str, bytes], outer: str = "") -> Path:
    """A tar with a tar for each class, as ImageNet's training set."""
    whole = tar_bytes({f"{outer}{name}.tar": contents for name, contents in class_tars(files).items()})
    return lay_out(root, {"train.tar": whole}) / "train.tar"


def folder_of_tars(root: Path, files: dict[str, bytes]) -> Path:
    return lay_out(root / "train", {f"{name}.tar": contents for name, contents in class_tars(files).items()})


def zip_of(root: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, before: bytes = b"") -> Path:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for path, contents in files.items():
            archive.writestr(path, contents)
    return lay_out(root, {"zoo.zip": before + stream.getvalue()}) / "zoo.zip"


def zip64_of(root: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(lay_out(root, {"x": b""}) / "zoo.zip", "w") as archive:
        for path, contents in files.items():
            with archive.open(path, "w", force_zip64=True) as member:
                member.write(contents)
    return root / "zoo.zip"


def csv_of(root: Path, files: dict[str, bytes]) -> Path:
    lay_out(root / "images", files)
    with open(root / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "size", "label"])
        writer.writerows([f"images/{path}", len(files[path]), path.partition("/")[0]] for path in sorted(files))
    return root / "list.csv"


def jsonl_of(root: Path, files: dict[str, bytes]) -> Path:
    lay_out(root / "images", files)
    lines = [{"path": f"images/{path}", "label": path.partition("/")[0]} for path in sorted(files)]
    (root / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "list.jsonl"


ARCHIVES: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "tar of tars": tar_of_tars,
    "tar of tars in a folder": lambda root, files: tar_of_tars(root, files, "./train/"),
    "folder of tars": folder_of_tars,
    "deflated zip": zip_of,
    "stored zip": lambda root, files: zip_of(root, files, zipfile.ZIP_STORED),
    "zip behind a program that unpacks it": lambda root, files: zip_of(root, files, before=b"#!/bin/sh\n" * 99),
    "zip64": zip64_of,
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_is_packed_to_the_same_bytes_as_a_folder_of_its_files(kind, tmp_path):
    files = {path: contents for path, contents in ALL.items() if "/" in path}
    packed(lay_out(tmp_path / "zoo", files), tmp_path / "of_folder")
    report = packed(ARCHIVES[kind](tmp_path / "in", files), tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "of_folder")
    assert [each.key for each in report.broken] == sorted(set(BAD) & set(files))


@pytest.mark.parametrize("stray", ["readme.txt", "cover.jpg"])
def test_a_folder_around_class_folders_is_no_class_whatever_else_it_holds(stray, tmp_path):
    files = {**FILES, stray: b"-"}
    packed(lay_out(tmp_path / "zoo", files), tmp_path / "of_folder")
    outer = tar_bytes({f"zoo/{path}": contents for path, contents in files.items()})
    report = packed(lay_out(tmp_path / "in", {"zoo.tar": outer}) / "zoo.tar", tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "of_folder")
    assert [each.key for each in report.broken] == [stray]


@pytest.mark.parametrize("kind", [csv_of, jsonl_of])
def test_a_list_is_packed_to_the_samples_of_the_folder_that_it_lists(kind, tmp_path):
    packed(lay_out(tmp_path / "images", FILES), tmp_path / "of_folder")
    packed(kind(tmp_path, FILES), tmp_path / "out")
    of_folder, of_list = samples_in(tmp_path / "of_folder"), samples_in(tmp_path / "out")
    assert [sample["__key__"] for sample in of_list] == ["images/" + sample["__key__"] for sample in of_folder]
    for ours, theirs in zip(of_list, of_folder, strict=True):
        assert (image_of(ours), ours["cls"]) == (image_of(theirs), theirs["cls"])
    assert read_manifest(str(tmp_path / "out")).classes == tuple(LABELS)


LABEL_LISTS: dict[str, Callable[[list[str]], str]] = {
    "name label": lambda names: "".join(f"{name}\t{CLASS_OF[name]}\n" for name in names),
    "names without suffix, comma": lambda names: "".join(f"{n.rpartition('.')[0]},{CLASS_OF[n]}\r\n" for n in names),
    "labels": lambda names: "".join(f"{CLASS_OF[name]}\n" for name in sorted(names)),
    "numbers from 1": lambda names: "".join(f"{ORDER.index(CLASS_OF[name]) + 1}\n" for name in sorted(names)),
    "numbers from 0": lambda names: "".join(f"{name}\t{ORDER.index(CLASS_OF[name])}\n" for name in names),
}
ORDER = ["日本", "a.b", "cats"]  # not the order of sorted names, as in ImageNet's development kit


@pytest.mark.parametrize("kind", LABEL_LISTS)
@pytest.mark.parametrize("lies_in", ["folder", "tar", "zip"])
def test_flat_images_take_labels_from_a_list_and_classes_in_the_given_order(kind, lies_in, tmp_path):
    folder = lay_out(tmp_path / "val", FLAT)
    source = {"folder": folder, "tar": tar_of(folder), "zip": zip_of(tmp_path, {f"val/{n}": FLAT[n] for n in FLAT})}
    (tmp_path / "labels.txt").write_text(LABEL_LISTS[kind](list(reversed(FLAT))), encoding="utf-8")
    (tmp_path / "classes.txt").write_text("\n".join(ORDER), encoding="utf-8")
    request = {"labels": str(tmp_path / "labels.txt"), "classes": str(tmp_path / "classes.txt")}
    packed(source[lies_in], tmp_path / "out", **request)
    assert read_manifest(str(tmp_path / "out")).classes == tuple(ORDER)
    found = Counter((image_of(sample)[1], ORDER[int(sample["cls"])]) for sample in samples_in(tmp_path / "out"))
    assert found == Counter((FLAT[name], CLASS_OF[name]) for name in FLAT)


def test_a_validation_set_has_all_classes_of_its_training_set(tmp_path):
    packed(tar_of_tars(tmp_path / "in", FILES), tmp_path / "train")
    some = [name for name in FLAT if CLASS_OF[name] != "a.b"]
    (tmp_path / "labels.txt").write_text("".join(f"{name}\t{CLASS_OF[name]}\n" for name in some), encoding="utf-8")
    flat = lay_out(tmp_path / "flat", {name: FLAT[name] for name in some})
    folders = lay_out(tmp_path / "folders", {path: FILES[path] for path in FILES if not path.startswith("a.b")})
    for source, more in [(flat, {"labels": str(tmp_path / "labels.txt")}), (folders, {})]:
        for number, classes in enumerate([tmp_path / "train", tmp_path / "train/manifest.json"]):
            out = tmp_path / f"{source.name}-{number}"
            packed(source, out, classes=str(classes), **more)
            assert read_manifest(str(out)).classes == tuple(LABELS)
            assert {int(sample["cls"]) for sample in samples_in(out)} == {1, 2}


def test_several_labels_of_a_sample_are_in_its_json(tmp_path):
    lay_out(tmp_path, {f"{number}.jpg": encoded(number) for number in range(3)})
    (tmp_path / "list.csv").write_text("path,labels\n0.jpg,dog; cat\n1.jpg,dog\n2.jpg,ant;cat;dog\n")
    lines = [("0.jpg", ["dog", "cat"]), ("1.jpg", ["dog"]), ("2.jpg", ["ant", "cat", "dog"])]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"path": p, "labels": s}) + "\n" for p, s in lines))
    for name in ("list.csv", "list.jsonl"):
        packed(tmp_path / name, tmp_path / "out" / name)
        manifest = read_manifest(str(tmp_path / "out" / name))
        assert (manifest.label_field, manifest.labels_per_sample) == ("labels", 3)
        assert manifest.classes == ("ant", "cat", "dog")
        found = {sample["__key__"]: json.loads(sample["json"]) for sample in samples_in(tmp_path / "out" / name)}
        assert found == {"0": {"labels": [2, 1]}, "1": {"labels": [2]}, "2": {"labels": [0, 1, 2]}}
        assert not any("cls" in sample for sample in samples_in(tmp_path / "out" / name))


def test_a_list_may_name_absolute_urls_and_numbers_of_the_given_classes(tmp_path):
    fsspec.filesystem("memory").pipe_file("/far/away/1.jpg", encoded(1))
    lay_out(tmp_path, {"near.jpg": encoded(2), "classes.txt": b"dog\ncat\n\n"})
    rows = f'{{"path": "memory://far/away/1.jpg", "label": 0}}\n{{"path": "{tmp_path}/near.jpg", "label": 1}}\n'
    (tmp_path / "list.jsonl").write_text(rows)
    packed(tmp_path / "list.jsonl", tmp_path / "out", classes=str(tmp_path / "classes.txt"))
    found = {sample["__key__"]: (sample["jpg"], int(sample["cls"])) for sample in samples_in(tmp_path / "out")}
    assert found["far/away/1"] == (encoded(1), 0)
    assert sorted(found.values()) == sorted([(encoded(1), 0), (encoded(2), 1)])


# What is refused.

LINES = "1.jpg cat\n2.jpg dog\n"


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ("1.jpg cat\n", None, "labels.txt has no label for 2.jpg of"),
        (LINES + "3.jpg cat\n", None, "labels.txt names 3.jpg, not found in"),
        (LINES + "1.jpg cat\n", None, "labels.txt line 3 names 1.jpg a second time"),
        ("cat\n1.jpg cat\n", None, "labels.txt line 1 has only 'cat'"),
        ("cat\n", None, "labels.txt has 1 labels, one per line, but"),
        ("\n", None, "labels.txt is empty"),
        ("\udcff", None, "labels.txt is not text in UTF-8"),
        ("1\n2\n", None, "has numbers as labels; pass --classes FILE, which names the classes in"),
        ("2\n3\n", "a\nb\nc\nd", "has neither label 0 nor 4, so labels may count from 0 or from 1"),
        ("0\n4\n", "a\nb\nc\nd", "labels 0 (1.jpg) to 4 (2.jpg), which do not fit 4 classes"),
        ("1\n5\n", "a\nb\nc\nd", "labels 1 (1.jpg) to 5 (2.jpg), which do not fit 4 classes"),
        (LINES, "cat\n", "2.jpg of"),
        (LINES, "cat\ndog\ncat\n", "has class cat twice, on lines 1 and 3"),
        (LINES, "", "classes.txt is empty"),
        (None, None, "labels.txt does not exist"),
    ],
)
def test_a_label_list_that_does_not_fit_is_refused_with_what_is_wrong(labels, classes, message, tmp_path):
    source = lay_out(tmp_path / "val", {"1.jpg": JPEG, "2.jpg": JPEG})
    request = {"labels": str(tmp_path / "labels.txt")}
    if labels is not None:
        (tmp_path / "labels.txt").write_text(labels, errors="surrogateescape")
    if classes is not None:
        (tmp_path / "classes.txt").write_text(classes)
        request["classes"] = str(tmp_path / "classes.txt")
    assert message in refused(source, tmp_path / "out", **request)


def test_numbers_are_never_read_in_the_order_of_a_manifest(tmp_path):
    packed(lay_out(tmp_path / "in", {"a/1.jpg": JPEG, "b/1.jpg": JPEG}), tmp_path / "train")
    source = lay_out(tmp_path / "val", {"1.jpg": JPEG, "2.jpg": JPEG, "../labels.txt": b"1\n2\n"})
    request = {"labels": str(tmp_path / "labels.txt"), "classes": str(tmp_path / "train")}
    assert "not the order of sorted names" in refused(source, tmp_path / "out", **request)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.csv", "path,label\n1.jpg,cat\n3.jpg,cat\n4.jpg,cat\n", "names 3.jpg, but there is no such file; 1 more"),
        ("list.csv", "path,label\nfolder,cat\n", "line 2 names folder, but there is no such file"),
        ("list.csv", "path,label\n1.jpg,cat\n./1.jpg,dog\n", "names ./1.jpg twice, on lines 2 and 3"),
        ("list.csv", "path,label\n1.jpg,\n", "line 2 has no label"),
        ("list.csv", "path,label\n,cat\n", "line 2 has no path"),
        ("list.csv", "path,labels\n1.jpg,cat;;dog\n", "line 2 has no label"),
        (
            "list.csv",
            "1.jpg,cat\n",
            "must begin with a line `path,label` or `path,labels`; its first line is '1.jpg,cat'",
        ),
        ("list.csv", "path,label\n", "has no images"),
        ("list.csv", "path,label\n1.jpg,0\n2.jpg,1\n", "has numbers as labels; pass --classes FILE"),
        ("list.jsonl", '{"path": "1.jpg"}\n', "line 1 must be"),
        ("list.jsonl", '{"path": "1.jpg", "labels": []}\n', "line 1 has no label"),
        ("list.jsonl", '\n{"path": 1, "label": "cat"}\n', "line 2 must be"),
        ("list.jsonl", '{"path": "1.jpg", "label": "cat"', "line 1 is not JSON"),
        ("list.jsonl", "[1]", "line 1 must be"),
    ],
)
def test_a_list_that_is_wrong_is_refused_with_the_line(name, text, message, tmp_path):
    lay_out(tmp_path, {"1.jpg": JPEG, "2.jpg": JPEG, "folder/1.jpg": JPEG})
    (tmp_path / name).write_text(text)
    assert message in refused(tmp_path / name, tmp_path / "out")


def test_a_list_has_its_own_labels(tmp_path):
    lay_out(tmp_path, {"1.jpg": JPEG, "list.csv": b"path,label\n1.jpg,2\n"})
    assert "which has labels of its own" in refused(tmp_path / "list.csv", tmp_path / "out", labels="x")


def test_an_image_of_a_class_that_is_not_listed_is_named(tmp_path):
    source = lay_out(tmp_path / "in", {"cat/1.jpg": JPEG, "dog/1.jpg": JPEG, "classes": b"cat\n"})
    assert "dog/1.jpg of" in refused(source, tmp_path / "out", classes=str(source / "classes"))


def test_what_cannot_be_read_of_a_zip_is_listed_with_the_reason(tmp_path):
    place = zip_of(tmp_path, FILES | {"cats/locked.jpg": JPEG, "cats/damaged.jpg": JPEG, "cats/longer.jpg": JPEG})
    with zipfile.ZipFile(place, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cats/lzma.jpg", JPEG)
        offsets = {member.filename: member.header_offset for member in archive.infolist()}
    contents = bytearray(place.read_bytes())
    directory = contents.rindex(b"PK\x01\x02", 0, contents.rindex(b"cats/locked.jpg"))
    contents[directory + 8] |= 1  # encrypted
    for name in ("cats/damaged.jpg", "cats/longer.jpg"):
        begin = offsets[name] + 30 + len(name)
        contents[begin + (200 if name == "cats/damaged.jpg" else 0)] ^= 0xFF
    place.write_bytes(contents)
    report = packed(place, tmp_path / "out")
    reasons = {each.key: each.reason for each in report.broken}
    assert reasons.keys() == {"cats/locked.jpg", "cats/damaged.jpg", "cats/longer.jpg", "cats/lzma.jpg"}
    assert "encrypted in the zip" in reasons["cats/locked.jpg"]
    assert "compressed in the zip by method 14" in reasons["cats/lzma.jpg"]
    assert all("damaged in the zip" in reasons[f"cats/{name}.jpg"] for name in ("damaged", "longer"))
    assert report.samples == len(FILES)


def test_an_archive_that_is_not_whole_is_refused(tmp_path):
    whole = zip_of(tmp_path, FILES).read_bytes()
    lay_out(tmp_path, {"cut.zip": whole[:-30], "empty.zip": b"PK\x05\x06" + bytes(18)})
    assert "cut.zip is not a valid zip" in refused(tmp_path / "cut.zip", tmp_path / "out")
    assert "empty.zip is empty" in refused(tmp_path / "empty.zip", tmp_path / "out")
    tars = class_tars(FILES)
    cut = lay_out(tmp_path / "tars", {"a.b.tar": tars["a.b"], "cats.tar": tars["cats"][:-10_240], "日本.tar": b""})
    message = refused(cut, tmp_path / "out")
    assert "cats.tar is not a valid tar" in message and "日本.tar is not a valid tar" in message
    assert "a.b.tar" not in message
    (cut / "日本.tar").write_bytes(tars["日本"])
    assert "cats.tar in it is not valid" in refused(tar_of(cut), tmp_path / "out")


def test_a_zip_of_which_nothing_can_be_read_is_refused_with_the_reason(tmp_path):
    place = zip_of(tmp_path, FILES, zipfile.ZIP_BZIP2)
    assert ": compressed in the zip by method 12" in refused(place, tmp_path / "out")


# Smaller images.


def test_resized_images_are_upright_and_close_to_pillows_and_small_ones_stay(tmp_path):
    smooth = np.linspace(0, 255, 120 * 90 * 3).reshape(90, 120, 3).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, "JPEG", quality=95, exif=upright_by_tag(6))
    files = {"a/turned.jpg": stream.getvalue(), "a/small.png": encoded(1, "PNG", (40, 30)), "a/cut.jpg": JPEG[:-40]}
    source = lay_out(tmp_path / "in", files)
    report = packed(source, tmp_path / "out", resize=32)
    found = {sample["__key__"]: sample for sample in samples_in(tmp_path / "out")}
    assert found["a/small"]["png"] == files["a/small.png"]
    assert [each.key for each in report.broken] == ["a/cut.jpg"]
    assert examine(found["a/turned"]["jpg"]) == ("jpg", 43, 32)
    image = Image.open(io.BytesIO(found["a/turned"]["jpg"]))
    assert 274 not in image.getexif()
    upright = Image.open(io.BytesIO(files["a/turned.jpg"])).rotate(-90, expand=True)
    expected = np.asarray(upright.resize((32, 43), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(image) - expected).mean() < 2
    rows = {tuple(shape) for path in (tmp_path / "out").glob("*.npy") for shape in np.load(path)[["height", "width"]]}
    assert rows == {(43, 32), (30, 40)}


def test_resizing_gives_the_same_bytes_by_any_number_of_workers(tmp_path):
    source = lay_out(tmp_path / "in", {f"a/{number}.jpg": encoded(number, size=(90, 60)) for number in range(40)})
    packed(source, tmp_path / "once", resize=24, workers=1)
    packed(source, tmp_path / "again", resize=24, quality=92, workers=4)
    packed(source, tmp_path / "other", resize=24, quality=80)
    assert files_in(tmp_path / "once") == files_in(tmp_path / "again") != files_in(tmp_path / "other")


def test_quality_without_resizing_is_refused(tmp_path):
    assert "--resize" in refused(tmp_path, tmp_path / "out", quality=80)
    assert "from 1 to 100" in refused(tmp_path, tmp_path / "out", resize=9, quality=101)


# Afar.


def test_archives_and_lists_in_s3_are_packed_into_s3_as_on_disk(tmp_path):
    packed(lay_out(tmp_path / "zoo", FILES), tmp_path / "of_folder")
    with s3_server() as server:
        fs = fsspec.filesystem("s3", endpoint_url=server.url)
        for kind, make in {"tar": tar_of_tars, "zip": zip_of}.items():
            place = make(tmp_path / kind, FILES)
            fs.pipe_file(f"data/{place.name}", place.read_bytes())
            packed(f"s3://data/{place.name}", f"s3://data/out/{kind}")
            written = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(f"data/out/{kind}")}
            assert written == files_in(tmp_path / "of_folder")
        for path, contents in FLAT.items():
            fs.pipe_file(f"data/flat/{path}", contents)
        rows = "".join(json.dumps({"path": f"flat/{name}", "label": CLASS_OF[name]}) + "\n" for name in FLAT)
        fs.pipe_file("data/list.jsonl", rows.encode())
        assert packed("s3://data/list.jsonl", "s3://data/out/list").samples == len(FLAT)
        assert read_classes("s3://data/out/list").names == tuple(LABELS)
        assert not [path for path in fs.find("data/out") if ".packing" in path]


ODD = ["a b", "100%41", "x#y", "d[1]", "q?", "c::d", "AT&T", "é"]
"""Names of classes and files that mean something else in a URL."""


def test_what_a_web_server_has_is_packed_as_what_lies_on_its_disk(tmp_path):
    """Behind a query, too, which goes with every request."""
    files = {f"{name}/{place}": encoded(i) for i, name in enumerate(ODD) for place in (f"{name}.jpg", "deep/1.JPG")}
    packed(lay_out(tmp_path / "zoo", files), tmp_path / "of_folder")
    tar_of(tmp_path / "zoo").rename(tmp_path / "zoo.TAR")
    zip_of(tmp_path, files).rename(tmp_path / "other.ZIP")
    packed(csv_of(tmp_path, files), tmp_path / "of_list")
    with http_server(tmp_path) as server:
        for number, place in enumerate(["zoo", "zoo/", "zoo.TAR", "other.ZIP", "list.csv"]):
            for query in ("", "?sig=a%2Fb%3D"):
                server.forget()
                out = tmp_path / f"out{number}{query[:1] and 'q'}"
                report = packed(f"{server.url}/{place}{query}", out)
                assert "sig" not in report.labels and (place in report.labels) == (place == "list.csv")
                assert files_in(out) == files_in(tmp_path / ("of_list" if place == "list.csv" else "of_folder"))
                assert {request.query for request in server.requests} == {query[1:]}
        for place in ("of_folder/", "of_folder", "of_folder/manifest.json"):
            assert read_classes(f"{server.url}/{place}?sig=a%2Fb").names == tuple(sorted(ODD))


def test_a_pack_from_a_link_that_is_signed_anew_resumes_and_notes_no_signature(tmp_path):
    zip_of(tmp_path, FILES)
    request = {"samples_per_shard": 1, "workers": 1}
    packed(tmp_path / "zoo.zip", tmp_path / "whole", **request)

    def interrupt(done: int, total: int) -> None:
        if done == len(FILES) - 1:
            raise InterruptedError

    with http_server(tmp_path) as server:
        with pytest.raises(InterruptedError):
            packed(f"{server.url}/zoo.zip?sig=first", tmp_path / "out", **request, progress=interrupt)
        assert "first" not in (tmp_path / "out/.packing/request.json").read_text()
        assert packed(f"{server.url}/zoo.zip?sig=second", tmp_path / "out", **request).kept > 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_sizes_that_a_page_lacks_are_asked_for_so_shards_have_the_same_bounds(tmp_path):
    source = lay_out(tmp_path / "zoo", {f"a/{number}.jpg": encoded(number) for number in range(20)})
    packed(source, tmp_path / "of_folder", bytes_per_shard=8000)
    with http_server(tmp_path) as server:
        assert packed(f"{server.url}/zoo", tmp_path / "out", bytes_per_shard=8000).shards > 1
    assert files_in(tmp_path / "out") == files_in(tmp_path / "of_folder")
