"""The parts of a sample: which one is its image, and which classes it belongs to.

Labels stand in the part `.cls`; in a field of the part `.json`, which may hold several; or in another part, whose name
then stands for the field with its dot (`.txt`). A label is the name of a class or its number, and the set says which
(Reading); names are compared as Unicode composes them, whatever form a file system gave them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

IMAGES = ("bmp", "jfif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
MOST_SHOWN = 20
_NUMBER = re.compile(r"-?[0-9]{1,9}(\.0+)?")


class Reading(StrEnum):
    """What the labels of a set are. Sets without names of digits may have names among the numbers from 0."""

    NAMES = "names"
    FROM_0 = "numbers from 0"
    FROM_1 = "numbers from 1"


class InvalidSample(ValueError):
    """A sample has no image or no label that can be used; the message says which and what it has."""


def composed(name: str) -> str:
    """A name in the form in which names are compared (NFC): a Mac's file systems take it apart."""
    return unicodedata.normalize("NFC", name)


def image_part(parts: Collection[str]) -> str:
    """The extension under which a sample has its image; InvalidSample where there is none, or more than one."""
    images = [name for name in parts if name in IMAGES] or [n for n in parts if _kind(n) in IMAGES]
    if not images:
        raise InvalidSample(f"has {sorted(parts)}, but no image ({', '.join(IMAGES)})")
    if len(images) > 1:
        dots = "; a key ends at the first dot of its name" if all("." in name for name in images) else ""
        few = ", ".join(sorted(images)[:MOST_SHOWN])
        raise InvalidSample(f"has {len(images)} images ({few}), but must have one{dots}")
    return images[0]


def label_part(field: str | None) -> str:
    """The extension of the part in which labels stand."""
    if field is None:
        return "cls"
    return field[1:] if field.startswith(".") else "json"


def parse_labels(parts: Mapping[str, bytes], field: str | None) -> list[str]:
    """The labels as they are written, each once: of `field`, or of `.cls`; InvalidSample if none."""
    kind = label_part(field)
    places = [kind] if kind in parts else [name for name in parts if _kind(name) == kind]
    if not places:
        raise InvalidSample(f"has {sorted(parts)}, but no label: .{kind} is needed")
    if len(places) > 1:
        raise InvalidSample(f"has {len(places)} labels ({', '.join(sorted(places)[:MOST_SHOWN])}), but must have one")
    content = parts[places[0]]
    if field is None or kind != "json":
        return [_word(_text(content, kind))]
    written = _in_document(content, field)
    labels = [_word(each) for each in (written if isinstance(written, list) else [written])]
    if not labels:
        raise InvalidSample(f"its {field} is an empty list, not a label")
    return list(dict.fromkeys(labels))


def class_numbers(labels: Collection[str], numbers: Mapping[str, int], reading: Reading) -> tuple[int, ...]:
    """The classes' numbers, from 0; `numbers` has them by name. InvalidSample where a label is no class."""
    found, first = [], int(reading is Reading.FROM_1)
    for label in labels:
        number = None if reading is Reading.NAMES else number_of(label)
        found.append(numbers.get(label, -1) if number is None else number - first)
        if not 0 <= found[-1] < len(numbers):
            by_number = "" if reading is Reading.NAMES else f"{first} to {len(numbers) - 1 + first} or "
            raise InvalidSample(f"its label is {label[:MOST_SHOWN]!r}; it must be {by_number}the name of a class")
    return tuple(dict.fromkeys(found))


def number_of(label: str) -> int | None:
    """The number that a label may be, None where it can only be a name: 7, "007" and 7.0 are 7."""
    return int(label.partition(".")[0]) if _NUMBER.fullmatch(label) else None


def label_word(value: object) -> str | None:
    """A label of a JSON document as a word; None where it is neither text nor a whole number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return composed(str(value).strip())


def fields(document: bytes) -> list[str]:
    """The fields of a sample's `.json`, those inside others with their dotted names."""
    try:
        return _names(json.loads(document), "")
    except ValueError:
        return []


def _names(document: object, before: str) -> list[str]:
    if not isinstance(document, dict):
        return [before.removesuffix(".")] if before else []
    return [name for key, value in document.items() for name in _names(value, f"{before}{key}.")]


def _kind(part: str) -> str:
    """What a part is by its extension: "input.jpg" is a jpg."""
    return part.rpartition(".")[2]


def _in_document(document: bytes, field: str) -> Any:
    try:
        found: Any = json.loads(document)
    except (ValueError, RecursionError):
        raise InvalidSample("its .json is not valid JSON") from None
    for name in field.split("."):
        if not isinstance(found, dict) or name not in found:
            raise InvalidSample(f"its .json has no field {field}")
        found = found[name]
    return found


def _text(part: bytes, kind: str) -> str:
    try:
        return part.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidSample(f"its .{kind} is not UTF-8 text") from None


def _word(value: object) -> str:
    word = label_word(value)
    if word is None:
        raise InvalidSample(
            f"its label is {json.dumps(value)[:MOST_SHOWN]}; it must be a number, a name or a list of these"
        )
    if not word:
        raise InvalidSample("its label is empty")
    return word
