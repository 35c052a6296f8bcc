"""Which classes a network takes for which, how sure it is of what it says, and where it is surest and wrong."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch

from data.loader import LoaderSpec, evaluation_batches
from data.shards.manifest import Manifest
from pipeline.training.losses import Kind
from pipeline.training.model import normalize

BINS = 15


@dataclass(frozen=True)
class Mistake:
    """A sample of which the network is sure and wrong; `image` uint8 [side, side, 3] as the network saw it."""

    key: str
    true: tuple[str, ...]
    predicted: str
    confidence: float
    image: np.ndarray


@dataclass
class Verdicts:
    """Of every sample of a set: its class (the first of its labels), the predicted one, and whether that is right."""

    classes: tuple[str, ...]
    pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How often a class (the first) was taken for another; what is right counts as its own class."""
    by_bin: np.ndarray = field(default_factory=lambda: np.zeros((3, BINS)))
    """float64 [3, bins of confidence]: samples, the right ones among them, and the sum of confidences."""
    mistakes: list[Mistake] = field(default_factory=list)
    """The surest first."""

    @property
    def samples(self) -> int:
        return self.pairs.total()

    @property
    def top1(self) -> float:
        return self.by_bin[1].sum() / max(self.samples, 1)

    def matrix(self) -> np.ndarray:
        """int64 [true, predicted]."""
        counts = np.zeros((len(self.classes), len(self.classes)), np.int64)
        for pair, number in self.pairs.items():
            counts[pair] = number
        return counts

    def worst_pairs(self, most: int) -> list[tuple[str, str, int, int]]:
        """The classes that are confused most: true, predicted, how often, and the samples of the true one."""
        totals = self._totals()
        wrong = sorted(((n, pair) for pair, n in self.pairs.items() if pair[0] != pair[1]), key=lambda each: -each[0])
        return [(self.classes[true], self.classes[said], n, totals[true]) for n, (true, said) in wrong[:most]]

    def by_class(self) -> list[tuple[str, int, int]]:
        """Each class that has samples, how many, and how many are right; the worst first."""
        found = [(self.classes[true], n, self.pairs[true, true]) for true, n in self._totals().items()]
        return sorted(found, key=lambda row: (row[2] / row[1], row[0]))

    def calibration(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Of the bins that have samples: mean confidence, accuracy, share; and the expected calibration error (Guo et
        al. 2017, On Calibration of Modern Neural Networks, eq. 3)."""
        samples, right, confidence = self.by_bin[:, self.by_bin[0] > 0]
        share = samples / max(self.samples, 1)
        return confidence / samples, right / samples, share, float((share * abs(right - confidence) / samples).sum())

    def _totals(self) -> Counter[int]:
        totals: Counter[int] = Counter()
        for (true, _), number in self.pairs.items():
            totals[true] += number
        return totals


@torch.no_grad()
def judge(
    forward: Callable[[torch.Tensor], torch.Tensor],
    manifest: Manifest,
    crop_fraction: float | None,
    kind: Kind,
    spec: LoaderSpec,
    most: int,
) -> Verdicts:
    """What `forward` (images [n, 3, h, w] -> logits [n, classes]) makes of the set, with `most` of its surest mistakes.

    Broken samples are left out. As in evaluation, a sample with several labels is right where one of them is predicted.
    """
    found, surest, order = Verdicts(manifest.classes), [], count()
    with evaluation_batches(manifest, crop_fraction, spec) as batches:
        for batch in batches:
            logits = forward(normalize(batch.images)).float()
            chances = logits.sigmoid() if kind == "sigmoid" else logits.softmax(1)
            sure, said = (each.cpu().numpy() for each in chances.max(1))
            labels = batch.labels.cpu().numpy()
            right = (labels == said[:, None]).any(1)
            true = np.where(right, said, labels[:, 0])
            found.pairs.update(zip(true.tolist(), said.tolist(), strict=True))
            place = np.minimum((sure * BINS).astype(int), BINS - 1)
            for row, weight in enumerate((np.ones(len(sure)), right, sure)):
                found.by_bin[row] += np.bincount(place, weight, BINS)
            for i in np.flatnonzero(~right):
                if len(surest) < most or sure[i] > surest[0][0]:
                    names = tuple(manifest.classes[label] for label in labels[i] if label >= 0)
                    key = batch.keys[i]
                    image = batch.images[i].cpu().numpy()
                    mistake = Mistake(key, names, manifest.classes[said[i]], float(sure[i]), image)
                    (heapq.heappush if len(surest) < most else heapq.heappushpop)(
                        surest, (sure[i], next(order), mistake)
                    )
    found.mistakes = [mistake for *_, mistake in sorted(surest, reverse=True)]
    return found
