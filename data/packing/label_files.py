"""Lists that a user brings: the classes in their order, the labels of a flat set of images, or images with labels.

A list is refused where it contradicts itself, with the line. Numbers stand for classes only where a list of classes
gives their order: ImageNet's own numbering is not that of its sorted class names, and a guess would be wrong silently.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data.errors import UsageError
from data.shards.manifest import MANIFEST, read_manifest
from data.storage.remote import NotFound, Storage, open_fs
from data.urls import has_suffix, split_query

LISTS = (".csv", ".jsonl")


class Row(NamedTuple):
    """A sample of a list: the number of its line, the path that it names, its labels as written."""

    line: int
    path: str
    labels: tuple[str, ...]


def read_classes(url: str) -> tuple[str, ...]:
    """The class names of a file, one in each line, or of the manifest of packed shards, in their order."""
    if is_packed(url):
        address, query = split_query(url)
        return read_manifest(address.removesuffix(f"/{MANIFEST}") + query).classes
    lines_of: dict[str, int] = {}
    for line, name in _lines(url):
        if lines_of.setdefault(name, line) != line:
            raise UsageError(f"{url} has class {name} twice, in lines {lines_of[name]} and {line}")
    return tuple(lines_of)


def is_packed(url: str) -> bool:
    """Whether this names packed shards, or their manifest, and not a file of class names."""
    fs, path = open_fs(url)
    return has_suffix(url, f"/{MANIFEST}") or fs.isdir(path)


def read_labels(url: str) -> dict[str, str] | list[str]:
    """Labels by file name, from lines `name label` (comma, tab or space); or one in each line, by sorted file name."""
    lines = _lines(url)
    pairs = [(line, *_split_pair(text)) for line, text in lines]
    if not any(label for _, _, label in pairs):
        return [label for _, label in lines]
    labels: dict[str, str] = {}
    for line, name, label in pairs:
        if not label:
            raise UsageError(f"{url} line {line} is {name!r} alone; all lines are `name label`, or all labels alone")
        if name in labels:
            raise UsageError(f"{url} line {line} names {name} once more")
        labels[name] = label
    return labels


def _split_pair(text: str) -> tuple[str, str]:
    separator = next((sign for sign in ",\t" if sign in text), None)
    name, *label = text.split(separator, 1)
    return name.strip(), label[0].strip() if label else ""


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
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = set(reader.fieldnames or ())
    if "path" not in columns or len(columns & {"label", "labels"}) != 1:
        first = text.partition("\n")[0].strip()
        raise UsageError(f"{url} must begin with a line `path,label` or `path,labels`; its first line is {first!r:.80}")
    for fields in reader:
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
        if not isinstance(labels, list) or not isinstance(fields.get("path"), str) or not all(map(_is_label, labels)):
            raise UsageError(
                f'{url} line {number} must be {{"path": "...", "label": ...}} or {{"path": "...", "labels": [...]}}'
            )
        yield Row(number, fields["path"], _unique(map(str, labels)))


def _unique(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(label.strip() for label in labels))


def _is_label(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


# From labels as written to numbers.


def to_class_names(
    where: str, labels: Sequence[tuple[str, ...]], classes: Sequence[str] | None, infer_base: bool
) -> list[tuple[str, ...]]:
    """Labels as class names, where `where` writes them as numbers of `classes`; names stay as they are.

    Numbers count from 0; with `infer_base` from 0 if a label is 0, from 1 if one is the number of classes.
    """
    words = {label for each in labels for label in each}
    if not words or not all(word.isascii() and word.isdecimal() for word in words) or words <= set(classes or ()):
        return list(labels)
    if classes is None:
        raise UsageError(
            f"{where} has numbers as labels; --classes FILE must name the classes in the order of these numbers"
            " (of ImageNet's development kit that is not the order of sorted names)"
        )
    numbers, count = {int(word) for word in words}, len(classes)
    if infer_base and max(numbers) > count - (0 in numbers):
        raise UsageError(f"{where}: labels {min(numbers)} to {max(numbers)} are too many for {count} classes")
    if infer_base and not numbers & {0, count}:
        raise UsageError(
            f"{where} has neither label 0 nor {count}, so what they count from is not known; write class names"
        )
    first = int(infer_base and 0 not in numbers)
    if max(numbers) - first >= count:
        raise UsageError(f"{where}: label {max(numbers)} is none of {count} classes, which are counted from 0")
    return [tuple(classes[int(label) - first] for label in each) for each in labels]


def _lines(url: str) -> list[tuple[int, str]]:
    lines = enumerate((line.strip() for line in _text(url).split("\n")), start=1)
    if not (full := [(number, line) for number, line in lines if line]):
        raise UsageError(f"{url} is empty")
    return full


def _text(url: str) -> str:
    try:
        return Storage().read(url).decode("utf-8-sig")
    except NotFound:
        raise UsageError(f"{url} does not exist; a list is needed") from None
    except UnicodeDecodeError:
        raise UsageError(f"{url} is not UTF-8 text; a list is needed") from None


def abbreviate(names: Iterable[str]) -> str:
    """The first ten of some names, sorted, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")
