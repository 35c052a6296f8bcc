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

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from data.errors import DataError, UsageError
from data.packing.archives import Entry, unzip
from data.packing.folders import NEEDED, list_entries
from data.packing.image_lists import list_images
from data.packing.label_files import LISTS, comparable_path, read_classes, read_labels
from data.packing.label_reading import Classes, abbreviate, describe_reading, to_class_names
from data.shards.labels import IMAGES, composed
from data.shards.manifest import BadSample
from data.shards.tar_index import printable
from data.storage.remote import ByteSource, Storage
from data.urls import has_suffix, split_query

_REQUESTS_AT_ONCE = 16
SUFFIXES = tuple(f".{name}" for name in IMAGES)


@dataclass(frozen=True)
class Source:
    """Images in the order of their paths (of a list: in its order), their labels, and what was left out.

    `labels` are numbers of `classes`, one tuple an image. `fixed` says that the classes were given: then a class
    may have no image. `reading` says how a list's labels were read.
    """

    url: str
    classes: tuple[str, ...]
    fixed: bool
    images: tuple[Entry, ...]
    labels: tuple[tuple[int, ...], ...]
    broken: tuple[BadSample, ...]
    storage: ByteSource
    reading: str = ""

    def read(self, image: Entry) -> bytes:
        """The bytes of an image's file; DataError if unreadable or not as listed, DamagedMember in a damaged zip."""
        if image.size == 0:
            return b""
        size = image.zipped.span if image.zipped else image.size
        begin, end = (None, None) if image.offset is None else (image.offset, image.offset + (size or 0))
        try:
            contents = self.storage.read(image.url, begin, end)
        except DataError as error:
            raise DataError(f"{printable(image.path)} of {self.url} cannot be read: {error}") from error
        if size is not None and len(contents) != size:
            had = f"has {len(contents)} bytes and had {size} when listed"
            raise DataError(f"{printable(image.path)} of {self.url} {had}")
        return unzip(contents, image.zipped, image.size or 0) if image.zipped else contents


def list_source(url: str, labels: str | None = None, classes: str | None = None) -> Source:
    """What is in a folder, tar, zip or list, with the label list at `labels` if it is flat.

    `classes` fixes the classes and their order: a file with one in each line, or packed shards. UsageError where there
    is nothing, a list does not fit, a class is unknown, or one that is not fixed has no image file.
    """
    address, query = split_query(url)
    url = (address.rstrip("/") or "/") + query
    given = None if classes is None else read_classes(classes)
    storage = Storage()
    if has_suffix(url, *LISTS):
        if labels is not None:
            raise UsageError(f"{url} is a list, which has its labels; leave out --labels={labels}")
        return _labelled(storage, url, *list_images(storage, url), [], given, url)
    entries = list_entries(storage, url)
    if labels is not None:
        images, broken = _images_and_broken(_without_outer_folders(entries), lambda entry: None)
        return _labelled(storage, url, images, _listed_labels(url, images, labels), broken, given, labels)
    entries = _without_outer_folder(entries)
    images, broken = _images_and_broken(entries, lambda entry: None if "/" in entry.path else "in no class folder")
    _check_usable(url, entries, images, broken, given is not None)
    return _make_source(storage, url, images, [(_class_name(image),) for image in images], broken, given)


def check_empty_classes(url: str, empty: Iterable[str], why: str) -> None:
    """UsageError that names the classes, if there are any."""
    if names := list(empty):
        raise UsageError(f"{url} has class folders {why}: {abbreviate(names)}; add images to them or take them away")


def _labelled(
    storage: Storage,
    url: str,
    images: list[Entry],
    written: Sequence[tuple[str, ...]],
    broken: list[BadSample],
    given: Classes | None,
    where: str,
) -> Source:
    """The source of images with labels as `where` has them written."""
    paths = [printable(image.path) for image in images]
    label_names, reading = to_class_names(where, written, paths, given)
    source = _make_source(storage, url, images, label_names, broken, given)
    return replace(source, reading=describe_reading(reading, where, source.classes, source.fixed))


def _make_source(
    storage: Storage,
    url: str,
    images: list[Entry],
    label_names: Sequence[tuple[str, ...]],
    broken: list[BadSample],
    given: Classes | None,
) -> Source:
    if not images:
        raise UsageError(f"{url} has no images ({' '.join(SUFFIXES)})" + _example(broken))
    classes = sorted({name for each in label_names for name in each}) if given is None else given.names
    numbers = {name: number for number, name in enumerate(classes)}
    for image, names in zip(images, label_names, strict=True):
        if unknown := [name for name in names if name not in numbers]:
            where = f"{printable(image.path)} of {url}"
            raise UsageError(f"{where} is of class {printable(unknown[0])}, which --classes does not have")
    labels = tuple(tuple(numbers[name] for name in names) for names in label_names)
    sized = tuple(_with_sizes(storage, images))
    return Source(url, tuple(classes), given is not None, sized, labels, tuple(broken), storage)


def _with_sizes(storage: Storage, images: list[Entry]) -> Iterator[Entry]:
    """The images with their sizes, for which a web server is asked one by one: its pages lack them."""

    def size(image: Entry) -> int | None:
        return storage.info(image.url)["size"] if image.size is None else image.size

    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for image, number in zip(images, pool.map(size, images), strict=True):
            yield image._replace(size=number)


def _example(broken: list[BadSample]) -> str:
    return f"; {broken[0].key}, for one: {broken[0].reason}" if broken else ""


# Class folders.


def _class_name(entry: Entry) -> str:
    return composed(entry.path.partition("/")[0])


def _check_usable(url: str, entries: list[Entry], images: list[Entry], broken: list[BadSample], fixed: bool) -> None:
    classes = {_class_name(entry) for entry in entries if entry.folder or "/" in entry.path}
    if not entries:
        raise UsageError(f"{url} is empty; {NEEDED}")
    if not classes:
        raise UsageError(
            f"{url} has no class folders; put the images of each class into a folder of its name, or give their labels"
            " with --labels FILE"
        )
    for name in classes:
        if name != printable(name):
            raise UsageError(f"{url} has a class folder {printable(name)}, which is not UTF-8; rename it")
    if not fixed and images:
        empty = classes - {_class_name(image) for image in images}
        check_empty_classes(url, empty, f"without images ({' '.join(SUFFIXES)})")


def _images_and_broken(
    entries: list[Entry], fault_of_place: Callable[[Entry], str | None]
) -> tuple[list[Entry], list[BadSample]]:
    """Images and broken files, each in the order of their paths."""
    images, broken = [], []
    for entry in sorted(entries):
        if entry.folder:
            continue
        if reason := entry.fault or fault_of_place(entry) or fault_of_name(entry.path):
            broken.append(BadSample(None, printable(entry.path), reason))
        else:
            images.append(entry)
    return images, broken


def fault_of_name(path: str) -> str | None:
    """Why a file of this name is no image; None where it is one."""
    if not path.lower().endswith(SUFFIXES):
        return f"not an image by its name ({' '.join(SUFFIXES)})"
    return None


def _without_outer_folder(entries: list[Entry]) -> list[Entry]:
    """Entries without the one folder around everything, if it has folders of images in it."""
    images = (entry.path for entry in entries if not entry.folder and fault_of_name(entry.path) is None)
    return _one_folder_less(entries) if any(path.count("/") > 1 for path in images) else entries


def _without_outer_folders(entries: list[Entry]) -> list[Entry]:
    """Entries without any folder around everything."""
    while (inner := _one_folder_less(entries)) is not entries:
        entries = inner
    return entries


def _one_folder_less(entries: list[Entry]) -> list[Entry]:
    tops = {_class_name(entry) for entry in entries}
    if len(tops) != 1 or not any("/" in entry.path for entry in entries):
        return entries
    return [entry._replace(path=entry.path.partition("/")[2]) for entry in entries if "/" in entry.path]


# A label list beside flat images.


def _listed_labels(url: str, images: list[Entry], labels: str) -> list[tuple[str, ...]]:
    """The labels of each image by the label list; UsageError where it lacks one, or names what is not there."""
    paths = [comparable_path(image.path) for image in images]
    stems = [os.path.splitext(path)[0] for path in paths]
    listed = read_labels(labels, {*paths, *stems})
    if isinstance(listed, list):
        if len(listed) != len(images):
            raise UsageError(f"{labels} has {len(listed)} labels, one a line, for {len(images)} images of {url}")
        return [(label,) for label in listed]
    names = [path if path in listed else stem for path, stem in zip(paths, stems, strict=True)]
    if unlabelled := [path for path, name in zip(paths, names, strict=True) if name not in listed]:
        raise UsageError(f"{labels} has no label for {printable(abbreviate(unlabelled))} of {url}")
    if missing := set(listed) - set(names):
        raise UsageError(f"{labels} names {abbreviate(missing)}, which {url} does not have")
    return [(listed[name],) for name in names]
