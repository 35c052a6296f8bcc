"""The images to pack, at any fsspec URL, each with its labels and where its bytes are.

    a folder, tar or zip of class folders   the class of an image is its first folder
    the same with class tars for folders    as ImageNet's training set comes, unpacked once or not at all
    one of flat images, and a label list    as ImageNet's validation set comes
    a CSV or JSONL of paths and labels      several labels a sample, if need be

Listing reads names and sizes only. Folders deeper than a class are part of an image's name; one outer folder around all
is taken off; hidden files are skipped. Every other file is either an image by its suffix or listed as broken with the
reason. The same files give the same listing, whatever they lie in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from data.errors import UsageError
from data.packing.archives import Entry
from data.packing.catalog import ENTRY, Catalog, Database, to_bytes, to_entry, to_row, to_text
from data.packing.folders import NEEDED, list_entries
from data.packing.image_lists import Labelled, list_images
from data.packing.keys import Keys
from data.packing.label_files import LISTS, comparable_path, read_classes, read_labels
from data.packing.label_reading import Classes, abbreviate, class_names_of, describe_reading
from data.shards.labels import IMAGES, Reading, composed
from data.shards.tar_index import printable
from data.storage.prefetch import ordered_map
from data.storage.remote import ByteSource, Storage
from data.urls import has_suffix, split_query

_REQUESTS_AT_ONCE = 16
SUFFIXES = tuple(f".{name}" for name in IMAGES)


@dataclass(frozen=True)
class Source:
    """Images in the order of their paths (of a list: in its order) with their labels, and what was left out.

    `numbers` has the class of each label as it is written. `fixed` says that the classes were given: then a class may
    have no image. `reading` says how a list's labels were read.
    """

    url: str
    classes: tuple[str, ...]
    fixed: bool
    numbers: Mapping[str, int]
    catalog: Catalog
    storage: ByteSource
    reading: str = ""

    def images(self) -> Iterator[tuple[Entry, tuple[int, ...]]]:
        """Each image, and the numbers of its classes."""
        numbers_of = label_numbers(self.numbers)
        for labels, *entry in self.catalog.select(f"SELECT labels, {ENTRY} FROM images ORDER BY id"):
            yield to_entry(*entry), numbers_of(labels)


def label_numbers(numbers: Mapping[str, int]) -> Callable[[str], tuple[int, ...]]:
    """From an image's labels in a catalog to the numbers of its classes."""
    return lru_cache(2**16)(lambda labels: tuple(numbers[label] for label in json.loads(labels)))


def list_source(
    url: str,
    labels: str | None = None,
    classes: str | None = None,
    listed: Callable[[int], None] = lambda count: None,
) -> Source:
    """What is in a folder, tar, zip or list, with the label list at `labels` if it is flat.

    `classes` fixes the classes and their order: a file with one in each line, or packed shards. `listed(count)` counts
    what was found so far. UsageError where there is nothing, a list does not fit, a class is unknown, or one that is
    not fixed has no image file.
    """
    address, query = split_query(url)
    url = (address.rstrip("/") or "/") + query
    given = None if classes is None else read_classes(classes)
    storage, catalog = Storage(), Catalog(listed)
    if has_suffix(url, *LISTS):
        if labels is not None:
            raise UsageError(f"{url} is a list, which has labels of its own; leave out --labels={labels}")
        first_with = _insert(catalog, list_images(storage, url, listed))
        return _make_source(storage, url, catalog, first_with, given, url)
    list_entries(storage, url, catalog)
    if labels is not None:
        images = _images_and_broken(catalog, _inside(catalog, catalog.around.count), lambda entry: None)
        first_with = _insert(catalog, _with_listed_labels(url, images, labels))
        return _make_source(storage, url, catalog, first_with, given, labels)
    outer = min(1, catalog.around.count) if _has_folders_of_images(catalog) else 0
    seen = _Seen()
    entries = map(seen.note, _inside(catalog, outer))
    images = _images_and_broken(catalog, entries, lambda entry: None if "/" in entry.path else "not in a class folder")
    first_with = _insert(catalog, ((image, (_class_name(image),)) for image in images))
    _check_usable(url, seen, first_with, given is not None)
    return _make_source(storage, url, catalog, first_with, given, None)


def check_empty_classes(url: str, empty: Iterable[str], why: str) -> None:
    """UsageError that names the classes, if there are any."""
    if names := list(empty):
        raise UsageError(f"{url} has class folders {why}: {abbreviate(names)}; add images to them or remove them")


def _insert(catalog: Catalog, labelled: Labelled) -> dict[str, str]:
    """Enters the images in their order; returns each label with the first image that has it."""
    keys, first_with, written = Keys(), dict[str, str](), lru_cache(2**16)(json.dumps)

    def rows() -> Iterator[tuple[object, ...]]:
        for image, labels in labelled:
            for label in labels:
                if label not in first_with:
                    first_with[label] = printable(image.path)
            yield *to_row(image), to_bytes(keys.of(image.path)), written(labels)

    catalog.change_each(f"INSERT INTO images ({ENTRY}, key, labels) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows())
    return first_with


def _make_source(
    storage: Storage,
    url: str,
    catalog: Catalog,
    first_with: Mapping[str, str],
    given: Classes | None,
    where: str | None,
) -> Source:
    """The source of the images that were entered; `where` has labels in its own writing, where they are no folders."""
    if not first_with:
        raise UsageError(f"{url} has no images ({' '.join(SUFFIXES)})" + _example(catalog))
    names, reading = {name: name for name in first_with}, Reading.NAMES
    if where is not None:
        names, reading = class_names_of(where, first_with, given)
    classes = tuple(sorted(set(names.values()))) if given is None else given.names
    numbers = {name: number for number, name in enumerate(classes)}
    for label, image in first_with.items():
        if names[label] not in numbers:
            name = printable(names[label])
            raise UsageError(f"{image} of {url} is of class {name}, which is not in --classes")
    described = "" if where is None else describe_reading(reading, where, classes, given is not None)
    _find_sizes(storage, catalog)
    numbered = {label: numbers[name] for label, name in names.items()}
    return Source(url, classes, given is not None, numbered, catalog, storage, described)


def _find_sizes(storage: Storage, catalog: Catalog) -> None:
    """Enters the sizes for which a web server is asked one by one: its pages lack them."""

    unsized = catalog.select("SELECT id, url FROM images WHERE size IS NULL")
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        sizes = ordered_map(
            pool, lambda row: (storage.info(to_text(row[1]))["size"], row[0]), unsized, 2 * _REQUESTS_AT_ONCE
        )
        catalog.change_each("UPDATE images SET size = ? WHERE id = ?", sizes)


def _example(catalog: Catalog) -> str:
    return "".join(f"; for example, {path}: {reason}" for path, reason in islice(catalog.broken(), 1))


# Class folders.


@dataclass
class _Seen:
    """Whether anything was seen, and the class folders, with images or without."""

    anything: bool = False
    classes: set[str] = field(default_factory=set)

    def note(self, entry: Entry) -> Entry:
        """The entry, seen."""
        self.anything = True
        if entry.folder or "/" in entry.path:
            self.classes.add(_class_name(entry))
        return entry


def _class_name(entry: Entry) -> str:
    return composed(entry.path.partition("/")[0])


def _check_usable(url: str, seen: _Seen, with_images: Mapping[str, str], fixed: bool) -> None:
    if not seen.anything:
        raise UsageError(f"{url} is empty; {NEEDED}")
    if not seen.classes:
        raise UsageError(
            f"{url} has no class folders; put the images of each class into a folder of its name, or give their labels"
            " with --labels FILE"
        )
    for name in seen.classes:
        if name != printable(name):
            raise UsageError(f"{url} has a class folder {printable(name)}, which is not UTF-8; rename it")
    if not fixed and with_images:
        check_empty_classes(url, seen.classes.difference(with_images), f"without images ({' '.join(SUFFIXES)})")


def _images_and_broken(
    catalog: Catalog, entries: Iterable[Entry], fault_of_place: Callable[[Entry], str | None]
) -> Iterator[Entry]:
    """The images of what was found; the files that are none are entered with the reason."""
    for entry in entries:
        if entry.folder:
            continue
        if reason := entry.fault or fault_of_place(entry) or fault_of_name(entry.path):
            catalog.change("INSERT INTO broken VALUES (?, ?)", printable(entry.path), reason)
        else:
            yield entry


def fault_of_name(path: str) -> str | None:
    """Why a file of this name is no image; None where it is one."""
    if not path.lower().endswith(SUFFIXES):
        return f"its suffix is not that of an image ({' '.join(SUFFIXES)})"
    return None


def _inside(catalog: Catalog, outer: int) -> Iterator[Entry]:
    """What was found, without this many folders around everything."""
    for entry in catalog.entries():
        parts = entry.path.split("/", outer)
        if len(parts) > outer:
            yield entry._replace(path=parts[-1]) if outer else entry


def _has_folders_of_images(catalog: Catalog) -> bool:
    """Whether a folder around everything would have class folders in it."""
    paths = catalog.select("SELECT path FROM files WHERE NOT folder")
    return catalog.around.count > 0 and any(
        path.count(b"/") > 1 and fault_of_name(to_text(path)) is None for (path,) in paths
    )


# A label list beside flat images.


_FLAT = f"CREATE TABLE images ({ENTRY}); CREATE TABLE names (name BLOB PRIMARY KEY) WITHOUT ROWID;"


def _with_listed_labels(url: str, images: Iterator[Entry], labels: str) -> Labelled:
    """The images with their labels by the label list; UsageError where it lacks one, or names what is not there."""
    flat = Database(_FLAT)
    count = 0
    for count, image in enumerate(images, start=1):  # noqa: B007
        flat.change("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", *to_row(image))
        for name in _names(image):
            flat.change("INSERT OR IGNORE INTO names VALUES (?)", to_bytes(name))
    listed = read_labels(labels, lambda name: bool(flat.first("SELECT 1 FROM names WHERE name = ?", to_bytes(name))))
    found = (to_entry(*row) for row in flat.select(f"SELECT {ENTRY} FROM images"))
    if listed.alone:
        if listed.count != count:
            raise UsageError(f"{labels} has {listed.count} labels, one per line, but {url} has {count} images")
        yield from ((image, (label,)) for image, label in zip(found, listed.in_order(), strict=True))
        return
    unlabelled = []
    for image in found:
        label = next(filter(None, map(listed.take, _names(image))), None)
        if label is None:
            unlabelled.append(_names(image)[0])
        else:
            yield image, (label,)
    if unlabelled:
        raise UsageError(f"{labels} has no label for {printable(abbreviate(unlabelled))} of {url}")
    if missing := list(listed.left()):
        raise UsageError(f"{labels} names {abbreviate(missing)}, not found in {url}")


def _names(image: Entry) -> tuple[str, str]:
    """What a list may call an image: its path, or that without its suffix."""
    path = comparable_path(image.path)
    return path, os.path.splitext(path)[0]
