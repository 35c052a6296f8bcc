"""Lists that a user brings: the classes in their order, the labels of a flat set of images, or images with labels.

They may be as Windows writes them: UTF-8 or UTF-16 with a mark, any ends of lines, backslashes in paths. A list is
refused where it contradicts itself, with the line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

from data.errors import UsageError
from data.packing.archives import normalize_path
from data.packing.catalog import Database, to_bytes, to_text
from data.packing.label_reading import Classes
from data.shards.labels import composed, label_word
from data.shards.manifest import MANIFEST, read_manifest
from data.storage.ranged_file import RangedFile
from data.storage.remote import NotFound, Storage, open_fs
from data.urls import has_suffix, split_query

LISTS = (".csv", ".jsonl")
_BLOCK_BYTES = 2**20
_NO_TEXT = "the list {url} is not text in UTF-8, or in UTF-16 with a byte order mark"


class Row(NamedTuple):
    """A sample of a list: the number of its line, the path that it names, its labels as written."""

    line: int
    path: str
    labels: tuple[str, ...]


def read_classes(url: str) -> Classes:
    """The class names of a file, one in each line, or of the manifest of packed shards, in their order."""
    fs, path = open_fs(url)
    address, query = split_query(url)
    if address.endswith(f"/{MANIFEST}") or fs.isdir(path):
        return Classes(read_manifest(address.removesuffix(f"/{MANIFEST}") + query).classes, counted=False)
    lines_of: dict[str, int] = {}
    for line, name in _lines(url):
        if lines_of.setdefault(composed(name), line) != line:
            raise UsageError(f"{url} has class {name} twice, on lines {lines_of[composed(name)]} and {line}")
    return Classes(tuple(lines_of), counted=True)


class ListedLabels(Database):
    """The labels of a list by file name; `alone`: one in each line, by sorted file name, `count` of them."""

    def __init__(self, alone: bool) -> None:
        super().__init__("CREATE TABLE labels (name BLOB UNIQUE, label TEXT, taken INT DEFAULT 0)")
        self.alone, self.count = alone, 0

    def add(self, name: str | None, label: str) -> bool:
        """Whether the name is a new one."""
        self.count += 1
        values = name and to_bytes(name), label
        return bool(self.change("INSERT OR IGNORE INTO labels (name, label) VALUES (?, ?)", *values))

    def take(self, name: str) -> str | None:
        """The label of a file."""
        if not self.change("UPDATE labels SET taken = 1 WHERE name = ?", to_bytes(name)):
            return None
        found = self.first("SELECT label FROM labels WHERE name = ?", to_bytes(name))
        return found[0] if found else None

    def left(self) -> Iterator[str]:
        """The names that were not taken."""
        return (to_text(name) for (name,) in self.select("SELECT name FROM labels WHERE NOT taken"))

    def in_order(self) -> Iterator[str]:
        """The labels as they are listed."""
        return (label for (label,) in self.select("SELECT label FROM labels ORDER BY rowid"))


def read_labels(url: str, is_image: Callable[[str], bool]) -> ListedLabels:
    """Labels by file name, from lines `name label` (tab, comma or space); or one in each line, by sorted file name.

    Names are as `comparable_path` has them. Of several signs that could separate, the one after an image's name does.
    """
    signs = "\t", ",", None
    divides, leaves, fits = dict.fromkeys(signs, False), dict.fromkeys(signs, False), dict.fromkeys(signs, False)
    for _, text in _lines(url):
        for sign in signs:
            name, label = _split_pair(text, sign)
            divides[sign] |= bool(label)
            leaves[sign] |= not label
            fits[sign] = fits[sign] or is_image(name)
    divided = [sign for sign in signs if divides[sign]]
    if not divided:
        listed = ListedLabels(alone=True)
        for _, label in _lines(url):
            listed.add(None, composed(label))
        return listed
    whole = [sign for sign in divided if not leaves[sign]] or divided
    chosen = next((sign for sign in whole if fits[sign]), whole[0])
    listed = ListedLabels(alone=False)
    for line, text in _lines(url):
        name, label = _split_pair(text, chosen)
        if not label:
            raise UsageError(f"{url} line {line} has only {name!r}; all lines must be `name label`, or all labels")
        if not listed.add(name, label):
            raise UsageError(f"{url} line {line} names {name} a second time")
    return listed


def comparable_path(path: str) -> str:
    """The path of a file as lists of any system are compared by it."""
    return composed(normalize_path(path.replace("\\", "/")))


def _split_pair(text: str, separator: str | None) -> tuple[str, str]:
    name, *label = text.split(separator, 1)
    if separator and '"' in text and len(quoted := next(csv.reader([text], delimiter=separator, strict=False))) == 2:
        name, *label = quoted
    return comparable_path(name.strip()), composed(label[0].strip()) if label else ""


def read_rows(url: str) -> Iterator[Row]:
    """The samples of a CSV with columns `path` and `label`, or `labels` ("a;b"); or of a JSONL with such fields."""
    parse = _csv_rows if has_suffix(url, ".csv") else _json_rows
    try:
        for row in parse(url, _text(url)):
            if not row.path or not row.labels or not all(row.labels):
                raise UsageError(f"{url} line {row.line} has no {'label' if row.path else 'path'}")
            yield row
    except csv.Error as error:
        raise UsageError(f"{url} is not CSV: {error}") from None


def _csv_rows(url: str, lines: Iterator[str]) -> Iterator[Row]:
    begin = next(lines, "")
    first = begin.strip()
    separator = re.search("[,;\t]", first)  # Excel's is the country's
    reader = csv.DictReader(chain([begin], lines), delimiter=separator[0] if separator else ",", skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    columns = set(reader.fieldnames)
    if "path" not in columns or len(columns & {"label", "labels"}) != 1:
        raise UsageError(f"{url} must begin with a line `path,label` or `path,labels`; its first line is {first!r:.80}")
    for fields in reader:
        if None in fields:
            raise UsageError(f"{url} line {reader.line_num} has more fields than the first; quote any with a comma")
        labels = (fields["labels"] or "").split(";") if "labels" in columns else [fields["label"] or ""]
        yield Row(reader.line_num, fields["path"], _unique(labels))


def _json_rows(url: str, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields: Any = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{url} line {number} is not JSON: {error}") from None
        labels = fields.get("labels", [fields.get("label")]) if isinstance(fields, dict) else None
        words = [label_word(label) for label in labels] if isinstance(labels, list) else [None]
        if None in words or not isinstance(fields.get("path"), str):
            raise UsageError(
                f'{url} line {number} must be {{"path": "...", "label": ...}} or {{"path": "...", "labels": [...]}}'
            )
        yield Row(number, fields["path"], _unique(word for word in words if word is not None))


def _unique(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(composed(label.strip()) for label in labels))


def _lines(url: str) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, each with its number."""
    is_empty = True
    for number, line in enumerate(map(str.strip, _text(url)), start=1):
        if line:
            is_empty = False
            yield number, line
    if is_empty:
        raise UsageError(f"{url} is empty")


def _text(url: str) -> Iterator[str]:
    """The lines of a list, with ends as they are here, read as they are asked for."""
    storage = Storage()
    try:
        size = storage.size(url)
    except NotFound:
        raise UsageError(f"the list {url} does not exist") from None
    stream = io.BufferedReader(cast(io.RawIOBase, RangedFile(partial(storage.read, url), size)), _BLOCK_BYTES)
    marked = stream.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        for line in io.TextIOWrapper(stream, "utf-16" if marked else "utf-8-sig"):
            if "\0" in line:
                raise UsageError(_NO_TEXT.format(url=url))
            yield line
    except UnicodeDecodeError:
        raise UsageError(_NO_TEXT.format(url=url)) from None
