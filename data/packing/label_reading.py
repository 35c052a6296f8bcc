"""What the labels of a set are, names of classes or their numbers, from 0 or from 1: one rule for lists and for shards.

Labels are names where the classes have them all by name, or where one is no number; otherwise they are numbers, which
count from 0 if a 0 is among them and from 1 if the number of classes is. Numbers stand for the lines of a file of
classes alone: ImageNet's own numbering is not that of its sorted class names, and a guess would be wrong silently.
Labels that two readings would give to different classes are refused, with both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from data.errors import UsageError
from data.shards.labels import Reading, number_of
from data.urls import without_secrets


@dataclass(frozen=True)
class Classes:
    """Class names in their order; `counted` says that numbers may stand for them, in that order."""

    names: tuple[str, ...]
    counted: bool

    @cached_property
    def named(self) -> frozenset[str]:
        """The names without their order."""
        return frozenset(self.names)


def reading_of(where: str, labels: Mapping[str, str], classes: Classes | None) -> Reading:
    """How all the labels at `where` are to be read, each with the first sample that has it; UsageError if not known.

    Without classes each label is a class of its own; all are names where one is, or is written as no number is ("007").
    """
    numbers = {label: number for label in labels if (number := number_of(label)) is not None}
    if not labels:
        return Reading.NAMES
    if classes is None:
        return _without_classes(where, labels, numbers)
    names = classes.named.intersection(labels)
    if not names:
        return Reading.NAMES if len(numbers) < len(labels) else _numbers_of(where, labels, numbers, classes)
    for label, number in numbers.items():
        if label not in names and 0 <= number <= len(classes.names):
            name = min(names)
            raise UsageError(
                f"{where} has labels of two kinds: {name!r} ({labels[name]}) is the name of a class, but {label!r}"
                f" ({labels[label]}) is not, and may be a number; write all labels as class names, or all as numbers"
                " that are not class names themselves"
            )
    _check_same_as_numbers(where, labels, numbers, classes)
    return Reading.NAMES


def class_names_of(where: str, labels: Mapping[str, str], classes: Classes | None) -> tuple[dict[str, str], Reading]:
    """The class name of each label, where `where` may write numbers of `classes`, and how the labels were read."""
    reading = reading_of(where, labels, classes)
    if reading is Reading.NAMES:
        return {label: label for label in labels}, reading
    if classes is None:
        raise UsageError(_NO_ORDER.format(where=where))
    first = int(reading is Reading.FROM_1)
    return {label: classes.names[(number_of(label) or 0) - first] for label in labels}, reading


def describe_reading(reading: Reading, where: str, names: Sequence[str], given: bool) -> str:
    """How labels were read, for the report; `given` says that the classes were."""
    where = without_secrets(where)
    if reading is Reading.NAMES:
        return f"names in {where}" if given else f"{len(names)} names in {where}: {abbreviate(map(_short, names))}"
    first = int(reading is Reading.FROM_1)
    return f"{reading} in {where}" + (f"; {first} is {_short(names[0])}" if given else "")


def abbreviate(names: Iterable[str]) -> str:
    """The first ten of some names, sorted, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")


_NO_ORDER = (
    "{where} has numbers as labels; pass --classes FILE, which names the classes in the order of these numbers"
    " (for ImageNet's development kit that is not the order of sorted names)"
)


def _without_classes(where: str, labels: Mapping[str, str], numbers: dict[str, int]) -> Reading:
    if len(numbers) == len(labels) and not any(re.match("0[0-9]", label) for label in numbers):
        return Reading.FROM_0
    written: dict[int, str] = {}
    for label, number in numbers.items():
        if (other := written.setdefault(number, label)) != label:
            raise UsageError(
                f"{where} has labels that can be read in two ways: {other!r} ({labels[other]}) and {label!r}"
                f" ({labels[label]}) are two names, or one number; list the classes in --classes FILE"
            )
    return Reading.NAMES


def _numbers_of(where: str, labels: Mapping[str, str], numbers: dict[str, int], classes: Classes) -> Reading:
    """What numbers count from; UsageError where they do not fit, or it is not known."""
    if not classes.counted:
        raise UsageError(_NO_ORDER.format(where=where))
    count, values = len(classes.names), set(numbers.values())
    first = _counted_from(values, count)
    if first is not None:
        return Reading.FROM_1 if first else Reading.FROM_0
    (low, least), *_, (high, most) = sorted([*numbers.items()] * 2, key=lambda each: each[1])
    if least < 0 or most > count - (least == 0):
        raise UsageError(
            f"{where} has labels {low} ({labels[low]}) to {high} ({labels[high]}), which do not fit {count} classes:"
            f" counted from 0 they would be 0 to {count - 1}, counted from 1, 1 to {count}"
        )
    raise UsageError(
        f"{where} has neither label 0 nor {count}, so labels may count from 0 or from 1: {low} ({labels[low]}) would be"
        f" {classes.names[least]!r} from 0 and {classes.names[least - 1]!r} from 1; write class names, or list the"
        " numbers themselves in --classes"
    )


def _check_same_as_numbers(where: str, labels: Mapping[str, str], numbers: dict[str, int], classes: Classes) -> None:
    """UsageError where labels that are names of classes are numbers of other classes just as well."""
    plain = len(numbers) == len(labels) and all(str(number) == label for label, number in numbers.items())
    first = _counted_from(set(numbers.values()), len(classes.names)) if plain and classes.counted else None
    for label, number in numbers.items() if first is not None else ():
        if (by_number := classes.names[number - (first or 0)]) != label:
            raise UsageError(
                f"{where} has labels that can be read in two ways: {label!r} ({labels[label]}) is the name of a class,"
                f" but as a number from {first} it is class {by_number!r}; list --classes in the order of the numbers,"
                " or pass packed shards as --classes, where only names count"
            )


def _counted_from(numbers: set[int], count: int) -> int | None:
    """0 or 1 where numbers of `count` classes are known to count from there: they fit, and the 0 or the last occurs."""
    first = int(0 not in numbers)
    fit = min(numbers) >= first and max(numbers) < count + first
    return first if fit and (first == 0 or count in numbers) else None
