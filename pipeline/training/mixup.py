"""Mixup (Zhang et al. 2018): every sample of a micro batch becomes a weighted mean with another one of it.

The weight, one for the micro batch, is a draw from Beta(alpha, alpha), and the partners are a permutation of the micro
batch. Both are draws by (seed, step, micro batch): neither the number of ranks nor a restart changes them. Images are
mixed after normalisation, which is the same as before it.
"""

from __future__ import annotations

import numpy as np
import torch

from data import rng
from data.pinned import to_device
from data.rng import Stream


def mixup(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, seed: int, positions: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [n, 3, h, w] and targets [n, classes], mixed alike; `positions`: the micro batch's in the stream."""
    weight, partners = drawn_partners(alpha, seed, positions)
    of_each = to_device(partners, images.device)
    return images[of_each].lerp(images, weight), targets[of_each].lerp(targets, weight)


def drawn_partners(alpha: float, seed: int, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """The share that samples of a micro batch keep of themselves, and the place of each one's partner, int64 [n]."""
    number = int(positions[0]) // len(positions)  # of the micro batch, counted through all steps
    return mixup_lambda(seed, alpha, number), rng.permutation(seed, Stream.MIXUP_PARTNERS, number, len(positions))


def mixup_lambda(seed: int, alpha: float, number: int) -> float:
    """The share, 0 to 1, that samples of this micro batch keep of themselves: a draw from Beta(alpha, alpha).

    A bounded Student t, which two uniforms give without a loop for every alpha: Devroye 1996, "Random variate
    generation in one line of code", from Bailey 1994. The same everywhere to within the last bits of the logarithm.
    """
    first, second = rng.uniforms(seed, Stream.MIXUP, number, 2)
    exponent = np.log1p(-first) / alpha
    w, rest, cosine = np.exp(exponent), -np.expm1(exponent), np.cos(2 * np.pi * second)
    return float(0.5 + 0.5 * np.sqrt(rest) * cosine / np.sqrt(w + rest * cosine**2))
