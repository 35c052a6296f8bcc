"""Faults of a step that all ranks know of: samples that were replaced, reads made again, steps that were skipped."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict

from data.loader import Batch
from data.storage.remote import ReadError
from pipeline.distributed.collectives import all_gather
from pipeline.errors import RunFailed
from pipeline.run.events import Events


def record_replaced(
    events: Events, step: int, batches: list[Batch], replaced: dict[int, int], samples: int, most: float
) -> None:
    """Writes each replaced sample of a step; RunFailed where more than this share of an epoch were. Collective."""
    for broken in all_gather([broken for batch in batches for broken in batch.broken]):
        events.write("sample_replaced", step=step, **asdict(broken))
    for epoch, count in replaced.items():
        if count > most * samples:
            raise RunFailed(
                f"{count} of {samples} samples of epoch {epoch} are broken, more than"
                f" data.max_bad_fraction={most}; events.jsonl lists them:"
                " fix or pack the data again, or raise the fraction"
            )


def drain(faults: list[ReadError]) -> list[ReadError]:
    """Takes out what is in a list to which other threads add."""
    found = faults[:]
    del faults[: len(found)]
    return found


def record_read_faults(events: Events, step: int, faults: list[ReadError]) -> None:
    """Writes how many reads were made again for each reason, and the first of them as an example. Collective."""
    mine = Counter(map(_kind, faults))
    first = {_kind(fault): fault for fault in reversed(faults)}
    counts: Counter[str] = Counter()
    examples: dict[str, ReadError] = {}
    for kind, count, fault in all_gather([(kind, count, first[kind]) for kind, count in mine.items()]):
        counts[kind] += count
        examples.setdefault(kind, fault)
    for kind, fault in examples.items():
        where = {"url": fault.url, "begin": fault.begin, "end": fault.end}
        events.write("read_retry", step=step, count=counts[kind], reason=fault.reason, **where)


def _kind(fault: ReadError) -> str:
    """The reason without its numbers of bytes, so that like ones count together."""
    return re.sub(r"\d{4,}", "N", fault.reason)


def record_skipped(events: Events, step: int, batches: list[Batch], loss: float, why: str) -> None:
    """Writes that a step was not applied, with its samples. Collective."""
    keys = all_gather([key for batch in batches for key in batch.keys])
    events.write("step_skipped", step=step, reason=why, loss=loss, keys=keys)
