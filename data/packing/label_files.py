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
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from data.errors import UsageError
from data.packing.archives import normalize_path
from data.packing.label_reading import Classes
from data.shards.labels import composed, label_word
from data.shards.manifest import MANIFEST, read_manifest
from data.storage.remote import NotFound, Storage, open_fs
from data.urls import has_suffix, split_query

LISTS = (".csv", ".jsonl")


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
            raise UsageError(f"{url} has class {name} twice, in lines {lines_of[composed(name)]} and {line}")
    return Classes(tuple(lines_of), counted=True)


def read_labels(url: str, images: Collection[str]) -> dict[str, str] | list[str]:
    """Labels by file name, from lines `name label` (tab, comma or space); or one in each line, by sorted file name.

    Names are as `comparable_path` has them. Of several signs that could separate, the one after an image's name does.
    """
    lines = _lines(url)
    ways = [[(line, *_split_pair(text, sign)) for line, text in lines] for sign in ("\t", ",", None)]
    divided = [pairs for pairs in ways if any(label for _, _, label in pairs)]
    if not divided:
        return [composed(label) for _, label in lines]
    whole = [pairs for pairs in divided if all(label for _, _, label in pairs)] or divided
    pairs = next((pairs for pairs in whole if any(name in images for _, name, _ in pairs)), whole[0])
    labels: dict[str, str] = {}
    for line, name, label in pairs:
        if not label:
            raise UsageError(f"{url} line {line} is {name!r} alone; all lines are `name label`, or all labels alone")
        if name in labels:
            raise UsageError(f"{url} line {line} names {name} once more")
        labels[name] = label
    return labels


def comparable_path(path: str) -> str:
    """The path of a file as lists of any system are compared by it."""
    return composed(normalize_path(path.replace("\\", "/")))


def _split_pair(text: str, separator: str | None) -> tuple[str, str]:
    name, *label = text.split(separator, 1)
    if separator and '"' in text and len(quoted := next(csv.reader([text], delimiter=separator, strict=False))) == 2:
        name, *label = quoted
    return comparable_path(name.strip()), composed(label[0].strip()) if label else ""


def read_rows(url: str) -> list[Row]:
    """The samples of a CSV with columns `path` and `label`, or `labels` ("a;b"); or of a JSONL with such fields."""
    parse = _csv_rows if has_suffix(url, ".csv") else _json_rows
    try:
        rows = list(parse(url, _text(url)))
    except csv.Error as error:
        raise UsageError(f"{url} is not CSV: {error}") from None
    for row in rows:
        if not row.path or not row.labels or not all(row.labels):
            raise UsageError(f"{url} line {row.line} lacks its {'label' if row.path else 'path'}")
    return rows


def _csv_rows(url: str, text: str) -> Iterator[Row]:
    first = text.partition("\n")[0].strip()
    separator = re.search("[,;\t]", first)  # Excel's is the country's
    reader = csv.DictReader(io.StringIO(text), delimiter=separator[0] if separator else ",", skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    columns = set(reader.fieldnames)
    if "path" not in columns or len(columns & {"label", "labels"}) != 1:
        raise UsageError(f"{url} must begin with a line `path,label` or `path,labels`; its first line is {first!r:.80}")
    for fields in reader:
        if None in fields:
            raise UsageError(f"{url} line {reader.line_num} has more fields than the first; quote what has a comma")
        labels = (fields["labels"] or "").split(";") if "labels" in columns else [fields["label"] or ""]
        yield Row(reader.line_num, fields["path"], _unique(labels))


def _json_rows(url: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
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


def _lines(url: str) -> list[tuple[int, str]]:
    lines = enumerate((line.strip() for line in _text(url).split("\n")), start=1)
    if not (full := [(number, line) for number, line in lines if line]):
        raise UsageError(f"{url} is empty")
    return full


def _text(url: str) -> str:
    """A list's text, with ends of lines as they are here."""
    try:
        contents = Storage().read(url)
    except NotFound:
        raise UsageError(f"{url} does not exist; a list is needed") from None
    encoding = "utf-16" if contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{url} is not UTF-8 text (nor UTF-16 with its mark); a list is needed")
    return text.replace("\r\n", "\n").replace("\r", "\n")
