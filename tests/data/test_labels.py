"""Laws of labels: a class comes back under the name that was written, from any form, or is refused; never another's."""

import codecs
import io
import json
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data.errors import UsageError
from data.packing.index import index
from data.packing.sources import list_source
from data.shards.manifest import Shard, read_manifest, write_manifest
from pipeline.cli import app
from tests.data.test_pack import JPEG, SUFFIXES, lay_out, packed, refused

Names = Sequence[str]
Form = Callable[[Path, Names], tuple[str, dict[str, str]]]


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


# ------------------------------------------------------------------------------------- forms in which classes are given


def csv_lines(names: Names) -> str:
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    return "path,label\n" + "".join(f"{i}.jpg,{name}\n" for i, name in enumerate(quoted))


def flat(root: Path, names: Names, files: dict[str, str]) -> None:
    lay_out(root / "flat", {f"{i}.jpg": b"image" for i in range(len(names))})
    for name, text in files.items():
        (root / name).write_bytes(text.encode())


def folders(root: Path, names: Names) -> tuple[str, dict[str, str]]:
    return str(lay_out(root / "in", {f"{name}/{i}.jpg": b"image" for i, name in enumerate(names)})), {}


def zipped(root: Path, names: Names, flagged: bool = True) -> tuple[str, dict[str, str]]:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i, name in enumerate(names):
            archive.writestr(f"{name}/{i}.jpg", b"image")
    return str(lay_out(root, {"in.zip": stream.getvalue() if flagged else unflagged(stream)}) / "in.zip"), {}


def unflagged(stream: io.BytesIO) -> bytes:
    """A zip whose names are UTF-8 and do not say so, as Info-ZIP and macOS write them."""
    contents = bytearray(stream.getvalue())
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            contents[member.header_offset + 7] &= ~8
        at = archive.start_dir
    while contents[at : at + 4] == b"PK\1\2":
        contents[at + 9] &= ~8
        at += 46 + sum(struct.unpack_from("<HHH", contents, at + 28))
    return bytes(contents)


def csv_list(root: Path, names: Names) -> tuple[str, dict[str, str]]:
    flat(root, names, {"flat/list.csv": csv_lines(names)})
    return str(root / "flat/list.csv"), {}


def jsonl_list(root: Path, names: Names) -> tuple[str, dict[str, str]]:
    rows = [json.dumps({"path": f"{i}.jpg", "label": name}) + "\n" for i, name in enumerate(names)]
    flat(root, names, {"flat/list.jsonl": "".join(rows)})
    return str(root / "flat/list.jsonl"), {}


def tab_labels(root: Path, names: Names) -> tuple[str, dict[str, str]]:
    flat(root, names, {"labels.txt": "".join(f"{i}.jpg\t{name}\n" for i, name in enumerate(names))})
    return str(root / "flat"), {"labels": str(root / "labels.txt")}


def space_labels(root: Path, names: Names) -> tuple[str, dict[str, str]]:
    flat(root, names, {"LABELS.TXT": "".join(f"{i} {name}\n" for i, name in enumerate(names))})
    return str(root / "flat"), {"labels": str(root / "LABELS.TXT")}


PACKED: list[Form] = [folders, zipped, csv_list, jsonl_list, tab_labels, space_labels]
PACKED += [lambda root, names: zipped(root, names, flagged=False)]


def shards(part: str, field: str | None = None) -> Form:
    def write(root: Path, names: Names) -> tuple[str, dict[str, str]]:
        root.mkdir(exist_ok=True)
        for shard in range(2):
            with webdataset.TarWriter(str(root / f"{shard}.tar"), encoder=False) as tar:
                for i, name in list(enumerate(names))[shard::2]:
                    content = json.dumps({field: name}) if field else name
                    tar.write({"__key__": str(i), "input.jpg": b"image", part: content.encode()})
        return str(root), {"label_field": field} if field else {}

    return write


INDEXED: list[Form] = [shards("cls"), shards("txt"), shards("a.cls"), shards("json", "label")]


def listed(source: str, **options: str) -> dict[int, str]:
    """The class of each image by its number, as packing lists it."""
    found = list_source(source, **options)  # type: ignore[arg-type]
    return {int(Path(image.path).stem): found.classes[label] for image, (label,) in found.images()}


def indexed(source: str, **options: Any) -> dict[int, str]:
    """The class of each sample by its number, as training reads the labels of an indexed set."""
    request: dict[str, Any] = {"decode": False, "classes": None, "label_field": None, "workers": 1, **options}
    out = tempfile.mkdtemp()
    report = index(source, out, **request, progress=lambda done, total: None)
    manifest, found = read_manifest(out), {}
    for number, shard in enumerate(manifest.shards):
        contents = Path(manifest.url_of(number)).read_bytes()
        for sample in webdataset.WebDataset(manifest.url_of(number), shardshuffle=False, empty_check=False):
            parts = {name: part for name, part in sample.items() if not name.startswith("__")}
            (label,) = manifest.labels_of(parts)
            found[int(sample["__key__"])] = manifest.classes[label]
        assert shard.bytes == len(contents)
    assert report.labels and not [each for each in report.broken if each.key]
    return found


LETTERS = "abZ09 ,.äß日本éÅ'\"-_+#&"
NAMES = st.text(LETTERS, min_size=1, max_size=6).map(str.strip).filter(lambda name: name and name[0] not in ",.\"'")
NUMBERS = st.integers(0, 12).flatmap(lambda n: st.sampled_from([str(n), f"{n:03d}"]))
SETS = st.sampled_from([NAMES, NUMBERS, NAMES | NUMBERS]).flatmap(lambda each: st.lists(each, min_size=1, max_size=6))
FORMS = st.sampled_from([*((form, listed) for form in PACKED), *((form, indexed) for form in INDEXED)])
REFUSALS = ("two ways", "of two kinds", "numbers as labels", "count from", "do not fit")


def given_classes(root: Path, names: Names, how: str) -> dict[str, str]:
    """No classes, a file of all names in their order, or shards that were packed with them."""
    if how == "file":
        (root / "names.txt").write_bytes("".join(f"{name}\n" for name in names).encode())
    if how == "packed":
        write_manifest(str(root), names, [Shard("0.tar", 1, 1)])
    return {"none": {}, "file": {"classes": str(root / "names.txt")}, "packed": {"classes": str(root)}}[how]


@settings(max_examples=60, deadline=None)
@given(SETS, FORMS, st.sampled_from(["none", "file", "packed"]), st.sampled_from(["NFC", "NFD"]), st.randoms())
def test_a_class_comes_back_under_its_name_or_is_refused(names, form, how, composition, random):
    write, read = form
    expected = {i: nfc(name) for i, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        source, options = write(Path(folder, "set"), [unicodedata.normalize(composition, name) for name in names])
        order = random.sample(sorted({*expected.values()}), len({*expected.values()}))
        try:
            assert read(source, **options, **given_classes(Path(folder), order, how)) == expected
        except UsageError as error:
            assert any(name.isdecimal() for name in names) and any(words in str(error) for words in REFUSALS), error


NUMBERED = st.sampled_from(
    [
        *((form, listed) for form in (csv_list, jsonl_list, tab_labels, space_labels)),
        *((form, indexed) for form in INDEXED),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 5), st.sampled_from([0, 1]), st.sampled_from(["{}", "{:03d}", "{}.0"]), NUMBERED)
def test_numbers_count_from_where_they_are_seen_to_or_are_refused(data, count, base, written, form):
    names = data.draw(st.permutations([f"class {i}" for i in range(count)]))
    numbers = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
    write, read = form
    with tempfile.TemporaryDirectory() as folder:
        source, options = write(Path(folder, "set"), [written.format(number + base) for number in numbers])
        try:
            found = read(source, **options, **given_classes(Path(folder), names, "file"))
        except UsageError as error:
            assert not {0, count} & {number + base for number in numbers} and "may count from 0 or from 1" in str(error)
        else:
            assert found == {i: names[number] for i, number in enumerate(numbers)}
        with pytest.raises(UsageError, match="numbers as labels"):
            read(source, **options, **given_classes(Path(folder), names, "packed"))


@pytest.mark.parametrize(
    "form", [(csv_list, listed), (tab_labels, listed), (INDEXED[0], indexed), (INDEXED[3], indexed)]
)
@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ("cat 1", "cat dog", "'cat' .* is the name of a class, but '1' .* is not, and may be a number"),
        ("0 1 2 3", "1 2 3 4", "'1' .* is the name of a class, but '0' .* is not, and may be a number"),
        ("001 2", "001 002", "'001' .* is the name of a class, but '2' .* is not, and may be a number"),
        ("0 1 2", "2 1 0", "'0' .* is the name of a class, but as a number from 0 it is class '2'"),
        ("0 1 2", "a b", "labels 0 .* to 2 .*: counted from 0 they would be 0 to 1, counted from 1, 1 to 2"),
        ("1 2", "a b c", "neither label 0 nor 3, .*: 1 .* would be 'b' from 0 and 'a' from 1"),
        ("1 01", "", "'0?1' .* and '0?1' .* are two names, or one number"),
    ],
)
def test_labels_of_two_readings_are_refused_with_both_in_lists_and_shards(tmp_path, form, labels, classes, message):
    write, read = form
    source, options = write(tmp_path / "set", labels.split())
    with pytest.raises(UsageError, match=message) as error:
        read(source, **options, **given_classes(tmp_path, classes.split(), "file" if classes else "none"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "classes", "reading"),
    [
        ("cat dog", "", "2 names in {}: 'cat', 'dog'"),
        ("cat 7", "", "2 names in {}: '7', 'cat'"),
        ("002 001", "001 002", "names in {}"),
        ("0 1", "dog cat", "numbers from 0 in {}; 0 is 'dog'"),
        ("1 2", "dog cat", "numbers from 1 in {}; 1 is 'dog'"),
    ],
)
def test_how_labels_were_read_is_printed(tmp_path, labels, classes, reading):
    names = labels.split()
    given_classes(tmp_path, classes.split(), "file")
    options = [f"--classes={tmp_path}/names.txt"] if classes else []
    shards("cls")(tmp_path / "set", names)
    csv_list(tmp_path, names)
    lay_out(tmp_path / "flat", {f"{i}.jpg": JPEG for i in range(len(names))})
    for command, where in (("index", ".cls"), ("pack", f"{tmp_path}/flat/list.csv")):
        place = str(tmp_path / "set") if command == "index" else where
        result = CliRunner().invoke(
            app, ["data", command, place, *([str(tmp_path / "out")] * (command == "pack")), *options]
        )
        assert (result.exit_code, f"labels: {reading.format(where)}\n" in result.stdout) == (0, True), result.output


# ----------------------------------------------------------------------------------------------------- lists of Windows

ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with its mark": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}
ROWS = [("käse/0.jpg", "tench, Tinca tinca"), ("käse/b c.jpg", "Käse"), ("brot/1.jpg", "Käse")]


@pytest.mark.parametrize("slash", "/\\")
@pytest.mark.parametrize("composition", ["NFC", "NFD"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_list_of_any_system_is_read_as_the_same_list(tmp_path, encoding, ends, composition, slash):
    root = lay_out(tmp_path, {path: JPEG for path, _ in ROWS})
    rows = [[unicodedata.normalize(composition, each) for each in row] for row in ROWS]
    rows = [(path.replace("/", slash), label) for path, label in rows]
    lists = {
        "A.CSV": ["path,label", *(f'{path},"{label}"' for path, label in rows)],
        "spaces.csv": ["path, label", *(f'{path}, "{label}"' for path, label in rows)],
        "semicolons.csv": ["label;path", *(f"{label};{path}" for path, label in rows)],
        "tabs.csv": ["path\tlabel", *(f"{path}\t{label}" for path, label in rows)],
        "B.JSONL": [json.dumps({"path": path, "label": label}, ensure_ascii=False) for path, label in rows],
        "LABELS.TXT": [f"{path}\t{label}" for path, label in rows],
        "labels.csv": [f'{path},"{label}"' for path, label in rows],
        "plain.csv": [f"{path},{label}" for path, label in rows],
    }
    (tmp_path / "names.txt").write_bytes(ENCODINGS[encoding](ends.join(("Käse", "tench, Tinca tinca", ""))))
    expected = {path: nfc(label) for path, label in ROWS}
    for name, lines in lists.items():
        (root / name).write_bytes(ENCODINGS[encoding](ends.join([*lines, ""])))
        options = {"classes": str(tmp_path / "names.txt")}
        flat = name in ("LABELS.TXT", "labels.csv", "plain.csv")
        if flat:
            options["labels"] = str(root / name)
            lay_out(tmp_path / "photos", {path: JPEG for path, _ in ROWS})
        found = list_source(str(tmp_path / "photos" if flat else root / name), **options)  # type: ignore[arg-type]
        assert found.classes == ("Käse", "tench, Tinca tinca")
        assert {image.path: found.classes[label] for image, (label,) in found.images()} == expected


def test_a_comma_that_is_not_quoted_is_refused_with_its_line(tmp_path):
    lay_out(tmp_path, {"0.jpg": JPEG, "list.csv": b"path,label\n0.jpg,tench, Tinca tinca\n"})
    assert "line 2 has more fields than the first" in refused(tmp_path / "list.csv", tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- names of zips


def zip_of(names: dict[bytes, bytes], extra: bytes = b"", system: int = 3) -> bytes:
    """A zip of these names as they are, without the flag of UTF-8."""
    stream, plain = io.BytesIO(), {}
    with zipfile.ZipFile(stream, "w") as archive:
        for number, (name, contents) in enumerate(names.items()):
            info = zipfile.ZipInfo(f"{number}".rjust(len(name), "-"))
            plain[info.filename.encode()] = name
            info.create_system, info.extra = system, extra
            archive.writestr(info, contents)
    written = stream.getvalue()
    for own, name in plain.items():
        written = written.replace(own, name)
    return written


def classes_of(contents: bytes, folder: Path) -> tuple[str, ...]:
    return list_source(str(lay_out(folder, {"in.zip": contents}) / "in.zip")).classes


@pytest.mark.parametrize("encoding", ["cp437", "gbk", "cp932", "latin-1"])
def test_names_of_a_zip_that_are_not_utf_8_are_refused_with_their_readings(tmp_path, encoding):
    name = {"gbk": "日本", "cp932": "日本"}.get(encoding, "Käse").encode(encoding)
    lay_out(tmp_path, {"in.zip": zip_of({name + b"/0.jpg": JPEG, b"Brot/0.jpg": JPEG})})
    said = refused(tmp_path / "in.zip", tmp_path / "out")
    assert repr(name.decode("cp437"))[1:-1] in said and repr(name.decode("gbk", "replace"))[1:-1] in said


def test_the_utf_8_name_beside_another_in_a_zip_is_its_name(tmp_path):
    name = "猫/0.jpg".encode("gbk")
    field = b"\1" + struct.pack("<I", zlib.crc32(name)) + "猫/0.jpg".encode()
    extra = struct.pack("<HH", 0x7075, len(field)) + field
    assert classes_of(zip_of({name: JPEG}, extra), tmp_path) == ("猫",)


@pytest.mark.parametrize(
    ("names", "system", "classes"),
    [
        (["cat\\0.jpg", "dog\\1.jpg"], 0, ("cat", "dog")),
        (["cat\\0.jpg", "dog\\1.jpg"], 3, ("cat", "dog")),
        (["photos/cat\\0.jpg", "photos/dog\\1.jpg"], 0, ("cat", "dog")),
        (["cat\\", "cat\\0.jpg"], 0, ("cat",)),
        (["AC\\DC/0.jpg", "AC\\BC/0.jpg"], 3, ("AC\\BC", "AC\\DC")),
    ],
)
def test_backslashes_separate_where_a_zip_has_nothing_else_or_is_not_of_unix(tmp_path, names, system, classes):
    files = {name.encode(): b"" if name.endswith("\\") else JPEG for name in names}
    assert classes_of(zip_of(files, system=system), tmp_path) == classes


def test_names_composed_in_two_ways_are_one_class_in_training_and_evaluation(tmp_path):
    forms = {
        form: {unicodedata.normalize(form, "Käse") + "/0.jpg": JPEG, "Brot/0.jpg": JPEG} for form in ("NFC", "NFD")
    }
    for form, files in forms.items():
        packed(lay_out(tmp_path / form, files), tmp_path / f"shards-{form}")
    manifests = [read_manifest(str(tmp_path / f"shards-{form}")) for form in forms]
    assert manifests[0].classes == manifests[1].classes == ("Brot", "Käse")
    (tmp_path / "shards-NFD/manifest.json").write_text(
        unicodedata.normalize("NFD", (tmp_path / "shards-NFD/manifest.json").read_text())
    )
    assert read_manifest(str(tmp_path / "shards-NFD")).classes == ("Brot", "Käse")


def test_every_suffix_of_images_is_packed_and_read_from_shards(tmp_path):
    files = {f"cat/{number}{suffix}": JPEG for number, suffix in enumerate(SUFFIXES)}
    assert packed(lay_out(tmp_path / "in", files), tmp_path / "out").samples == len(SUFFIXES)
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for number, suffix in enumerate(SUFFIXES):
            tar.write({"__key__": str(number), f"s.input{suffix}": JPEG, "s.target.cls": b"0"})
    assert indexed(str(tmp_path / "a.tar")) == dict.fromkeys(range(len(SUFFIXES)), "0")
