"""The parts of a sample: which one is its image, and which classes it belongs to.

A label is the number of a class, or its name. It stands in the part `.cls`, or in a field of the part `.json`, which
may hold several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

IMAGES = ("bmp", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
MOST_SHOWN = 20


class InvalidSample(ValueError):
    """A sample has no image or no label that can be used; the message says which and what it has."""


def image_part(parts: Collection[str]) -> str:
    """The extension under which a sample has its image; InvalidSample where there is none, or more than one."""
    images = [name for name in parts if name in IMAGES] or [n for n in parts if n.rpartition(".")[2] in IMAGES]
    if not images:
        raise InvalidSample(f"has {sorted(parts)} and no image ({', '.join(IMAGES)})")
    if len(images) > 1:
        raise InvalidSample(f"has {len(images)} images ({', '.join(sorted(images))}); one is needed")
    return images[0]


def label_part(field: str | None) -> str:
    """The extension of the part in which labels stand."""
    return "cls" if field is None else "json"


def parse_labels(parts: Mapping[str, bytes], field: str | None) -> list[int | str]:
    """The labels as they are written, numbers or names: of `field`, or of `.cls`; InvalidSample if none."""
    if label_part(field) not in parts:
        raise InvalidSample(f"has {sorted(parts)} and no label: .{label_part(field)} is needed")
    written: Any = _text(parts["cls"]) if field is None else _in_document(parts["json"], field)
    labels = [_number_or_name(each) for each in (written if isinstance(written, list) else [written])]
    if not labels:
        raise InvalidSample(f"its {field} is an empty list, not a label")
    return list(dict.fromkeys(labels))


def class_numbers(labels: Collection[int | str], numbers: Mapping[str, int]) -> tuple[int, ...]:
    """The classes' numbers; `numbers` has them by name. InvalidSample where a label is no class."""
    found = []
    for label in labels:
        found.append(label if isinstance(label, int) else numbers.get(label, -1))
        if not 0 <= found[-1] < len(numbers):
            raise InvalidSample(
                f"its label is {str(label)[:MOST_SHOWN]!r}; it must be 0 to {len(numbers) - 1} or the name of a class"
            )
    return tuple(dict.fromkeys(found))


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


def _in_document(document: bytes, field: str) -> Any:
    try:
        found: Any = json.loads(document)
    except (ValueError, RecursionError):
        raise InvalidSample("its .json is not JSON") from None
    for name in field.split("."):
        if not isinstance(found, dict) or name not in found:
            raise InvalidSample(f"its .json has no field {field}")
        found = found[name]
    return found


def _text(part: bytes) -> str:
    return part.decode("utf-8", "replace").strip()


def _number_or_name(value: object) -> int | str:
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InvalidSample(f"its label is {json.dumps(value)[:MOST_SHOWN]}; a number, a name or a list of them is needed")
