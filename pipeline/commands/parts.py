"""Work of `coatnet data` that many machines share, seen from its destination: whether it may begin, how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from data.packing.work import Part, find_work
from data.shards.manifest import MANIFEST, read_manifest
from data.storage.remote import DEFAULT
from data.urls import join
from pipeline.errors import UsageError

DOING = {"pack": "packing", "index": "indexing", "verify": "verifying"}
"""The commands that can be shared, and the state of their work; its notes are in a folder of that name, with a dot."""


@dataclass(frozen=True)
class Progress:
    """`nothing`, `listing`, `packing` (`indexing`, `verifying`) or `done`, and how far it is; items are shards.

    `left` are the items without a record, None where there is no plan; `images` is of all that was listed, or packed.
    """

    state: str
    items: int | None = None
    left: frozenset[int] | None = None
    images: int | None = None

    def missing(self, parts: int) -> list[int]:
        """Those of so many parts that have something left to do."""
        numbers = range(1, parts + 1)
        left = self.left or frozenset()
        return [part for part in numbers if left.intersection(Part(part, parts).share(self.items or 0))]


def read_progress(destination: str, command: str | None = None) -> Progress:
    """How far a command's work is, by its notes; None: of any command. No record is read, only their names."""
    is_packed = command != "verify" and any(
        DEFAULT.exists(join(place, MANIFEST)) for place in _sets(destination, "", "val")
    )
    for name in [command] if command else DOING:
        if is_packed and name != "verify":  # what there is of its notes is left over
            continue
        if (work := find_work(destination, f".{DOING[name]}")) is None:
            continue
        if (plan := work.plan()) is None:
            return Progress("listing")
        left = frozenset(range(plan["items"])) - work.numbers()
        return Progress(DOING[name], plan["items"], left, plan.get("images"))
    if command == "verify":
        return Progress("done" if DEFAULT.exists(join(destination, "verified.json")) else "nothing")
    if not is_packed:
        return Progress("nothing")
    sets = [
        read_manifest(place)
        for place in _sets(destination, "", "train", "val")
        if DEFAULT.exists(join(place, MANIFEST))
    ]
    return Progress("done", sum(len(each.shards) for each in sets), images=sum(each.samples for each in sets))


def check_request(command: str, options: dict[str, Any]) -> str:
    """Where the work of a command with these options writes; UsageError where it could not begin."""
    if command == "pack":
        from data.packing.candidates import TRAIN, VAL
        from data.packing.resume import check_destination

        sets = ("",) if options["holdout"] is None else (TRAIN, VAL)
        check_destination(options["source"], options["destination"], sets, options["overwrite"])
        return options["destination"]
    if command == "verify":
        read_manifest(options["url"])
        return options.get("out") or options["url"]
    from data.packing.index import folder_of_tars

    destination = options["out"] or folder_of_tars(options["url"])
    if read_progress(destination, command).state == "done":
        raise UsageError(f"{destination} already has a {MANIFEST}; remove it to index again, or choose another --out")
    return destination


def _sets(destination: str, *names: str) -> list[str]:
    """Where sets may be: in a destination itself, or, with images held out, in two folders, of which val is last."""
    return [join(destination, name) if name else destination for name in names]
