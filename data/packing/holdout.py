"""Which images are held out for evaluation: a share of each class, by draws that depend on seed and path alone.

So neither the order of the listing nor the order of the classes matters, and an image that is added moves few others.
Images of equal contents count as one. One of several classes counts in each.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import chain

import numpy as np

from data.rng import Stream, uint64s


def held_out(
    paths: Sequence[str],
    labels: Sequence[Sequence[int]],
    contents: Sequence[Hashable],
    fraction: float,
    seed: int,
) -> list[bool]:
    """For each image whether it is held out; `contents` are equal where images are.

    Of a class of n images `fraction` n are, rounded, but never all. An image of several classes is taken where one of
    them lacks some, so that others may exceed their share; but never the last that any of them has left.
    """
    names = [unicodedata.normalize("NFC", path) for path in paths]
    images: dict[Hashable, list[int]] = {}
    for number in sorted(range(len(paths)), key=lambda number: (names[number], paths[number])):
        images.setdefault(contents[number], []).append(number)
    copies = list(images.values())
    classes = [{label for number in each for label in labels[number]} for each in copies]
    counts = Counter(chain.from_iterable(classes))
    wanted = {label: int(count * fraction + 0.5) for label, count in counts.items()}
    held, taken = [False] * len(paths), Counter[int]()
    for drawn in _drawn_order([names[each[0]] for each in copies], seed):
        own = classes[drawn]
        lacking = any(taken[label] < wanted[label] for label in own)
        if lacking and all(taken[label] + 1 < counts[label] for label in own):
            taken.update(own)
            for number in copies[drawn]:
                held[number] = True
    return held


def _drawn_order(names: Sequence[str], seed: int) -> list[int]:
    digests = (hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in names)
    indices = np.frombuffer(b"".join(digests), "<u8")
    return np.argsort(uint64s(seed, Stream.HOLDOUT, indices, 1)[:, 0], kind="stable").tolist()
