"""Counting what was used of each epoch, so that promise 1 is checked by every run and not only by tests.

Every rank adds up the samples that it used: their number, and a fingerprint of which they were, the sum of a hash of
each. An epoch in which each sample was used once has the sum over all samples; one that was repeated or left out
changes it. Sums of ranks and of attempts add up, so they need neither an order nor memory for the samples.

Next: evaluate.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**20
_WORDS = 2**64


@dataclass(frozen=True)
class Used:
    """Samples of an epoch that training took: `used` by steps that were applied, `skipped` with those that were not.

    `fingerprint` is that of both, modulo 2^64; `replaced` counts those whose place another sample took.
    """

    used: int = 0
    skipped: int = 0
    replaced: int = 0
    fingerprint: int = 0

    def __add__(self, other: Used) -> Used:
        return Used(
            self.used + other.used,
            self.skipped + other.skipped,
            self.replaced + other.replaced,
            (self.fingerprint + other.fingerprint) % _WORDS,
        )


Epochs = Mapping[int, Used]


def of_samples(
    epochs: NDArray[np.int64], numbers: NDArray[np.int64], replaced: NDArray[np.bool_], applied: bool
) -> dict[int, Used]:
    """What a step took, by epoch: of each sample its epoch, its number, whether another stood in for it."""
    found = {}
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        count = int(here.sum())
        used, skipped = (count, 0) if applied else (0, count)
        found[epoch] = Used(used, skipped, int(replaced[here].sum()), fingerprint(numbers[here]))
    return found


def together(parts: Iterable[Epochs]) -> dict[int, Used]:
    """What several ranks, steps or attempts took, by epoch."""
    found: dict[int, Used] = {}
    for part in parts:
        for epoch, used in part.items():
            found[epoch] = found.get(epoch, Used()) + used
    return found


def each_once(used: Used, samples: int, all_samples: int) -> bool:
    """Whether all of an epoch's samples, whose fingerprint is `all_samples`, were taken, and each once."""
    return used.used + used.skipped == samples and used.fingerprint == all_samples


def line(epoch: int, used: Used, samples: int) -> str:
    """The line that a complete epoch ends with."""
    return (
        f"epoch {epoch}: {used.used:,} of {samples:,} samples, 0 repeated, {used.skipped:,} skipped,"
        f" {used.replaced:,} replaced"
    )


def fingerprint(numbers: NDArray[np.int64]) -> int:
    """The sum of a hash of each sample number, modulo 2^64 (the hash: SplitMix64, Steele et al. 2014, figure 17)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return int((mixed ^ mixed >> np.uint64(31)).sum(dtype=np.uint64))


@cache
def fingerprint_of_range(first: int, end: int) -> int:
    """The fingerprint of the samples first .. end - 1."""
    parts = range(first, end, _AT_ONCE)
    return sum(fingerprint(np.arange(part, min(part + _AT_ONCE, end))) for part in parts) % _WORDS


def to_json(epochs: Epochs) -> dict[str, dict[str, int]]:
    """As it stands in a checkpoint's state.json."""
    return {str(epoch): asdict(used) for epoch, used in epochs.items()}


def from_json(state: Mapping[str, Mapping[str, int]]) -> dict[int, Used]:
    return {int(epoch): Used(**used) for epoch, used in state.items()}
