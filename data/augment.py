"""What happens to a sample, as numbers: crop, flip and RandAugment drawn from (seed, epoch, sample) and nothing else.

Pure arithmetic on arrays; the same on every rank, in every order, and whatever a sample is batched with. A random
resized crop is that of Inception (Szegedy et al. 2015, section 6): a share of the area and an aspect ratio of 3/4 to
4/3, ten tries, then the largest centred crop within these ratios.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.randaugment import Operation, describe
from data.rng import Stream, uniforms

RATIOS = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training does to its samples; the fields are keys of the configuration's `augment`, which checks them.

    `crop` is "random_resized" (a share of the area within `crop_area`), "center" (the largest centred square) or "none"
    (the whole image, whatever its shape); `layers` and `magnitude` are RandAugment's, on the scale of randaugment.py.
    """

    crop: Literal["random_resized", "center", "none"]
    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: bool
    layers: int
    magnitude: float


NONE = Augmentation(crop="none", flip=False, layers=0, magnitude=0.0)
"""What evaluation does beside its crop, and what the originals of a preview show."""


@dataclass(frozen=True)
class AugmentParams:
    """What is done to each of n samples, in this order: crop, flip, one operation per layer.

    `crop_start` and `crop_shape` int32 [n, 2] are (y, x) and (height, width) in the upright image, `flip` int32 [n] is
    1 for mirrored; `operations` int32 [n, layers] are numbers of Operation, `signs` int32 [n, layers] 1 for negative.
    """

    crop_start: NDArray[np.int32]
    crop_shape: NDArray[np.int32]
    flip: NDArray[np.int32]
    operations: NDArray[np.int32]
    signs: NDArray[np.int32]

    def __getitem__(self, part: slice) -> AugmentParams:
        return AugmentParams(*(getattr(self, field.name)[part] for field in fields(self)))


def sample_params(
    augmentation: Augmentation, seed: int, epochs: ArrayLike, samples: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> AugmentParams:
    """Draws for n samples (their global numbers, in the epoch of each) whose upright images have these sizes."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    if augmentation.crop == "random_resized":
        numbers = uniforms(seed, Stream.CROP, samples, 2 + 2 * TRIES, epochs)
        start, shape = _random_resized(augmentation.crop_area, numbers, heights, widths)
    else:
        start, shape = _center(1.0 if augmentation.crop == "center" else None, heights, widths)
    heads = uniforms(seed, Stream.FLIP, samples, 1, epochs)[:, 0] < 0.5
    layers = uniforms(seed, Stream.RANDAUGMENT, samples, 2 * augmentation.layers, epochs)
    return AugmentParams(
        crop_start=start.astype(np.int32),
        crop_shape=shape.astype(np.int32),
        flip=(heads & augmentation.flip).astype(np.int32),
        operations=(layers[:, 0::2] * len(Operation)).astype(np.int32),
        signs=(layers[:, 1::2] < 0.5).astype(np.int32),
    )


def eval_params(center_fraction: float | None, heights: ArrayLike, widths: ArrayLike) -> AugmentParams:
    """Evaluation's crop: the centred square of this fraction of the short side, or all of the image (None)."""
    start, shape = _center(center_fraction, np.asarray(heights, np.int64), np.asarray(widths, np.int64))
    none = np.zeros((len(start), 0), np.int32)
    return AugmentParams(start.astype(np.int32), shape.astype(np.int32), np.zeros(len(start), np.int32), none, none)


def describe_params(params: AugmentParams, i: int, image_shape: NDArray[np.int64], magnitude: float) -> list[str]:
    """What is done to sample i, an image of this height and width, a line for each step."""
    share = params.crop_shape[i].prod() / image_shape.prod()
    drawn = zip(params.operations[i], params.signs[i], strict=True)
    return [
        f"crop {100 * share:.0f} % of the area" + ", mirrored" * int(params.flip[i]),
        *(describe(Operation(operation), magnitude, -1 if negative else 1) for operation, negative in drawn),
    ]


def _center(
    fraction: float | None, heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if fraction is None:
        shape = np.stack([heights, widths], axis=1)
        return np.zeros_like(shape), shape
    side = np.maximum(1, np.rint(fraction * np.minimum(heights, widths)).astype(np.int64))
    shape = np.stack([side, side], axis=1)
    return (np.stack([heights, widths], axis=1) - shape) // 2, shape


def _random_resized(
    area: tuple[float, float], numbers: NDArray[np.float64], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and shapes [n, 2] from `numbers` [n, 2 + 2 * TRIES]: the place, then area and ratio of each try."""
    size = np.stack([heights, widths], axis=1)
    areas = (area[0] + (area[1] - area[0]) * numbers[:, 2::2]) * (heights * widths)[:, None]
    ratios = RATIOS[0] * (RATIOS[1] / RATIOS[0]) ** numbers[:, 3::2]
    tries = np.stack([_pixels(np.sqrt(areas / ratios)), _pixels(np.sqrt(areas * ratios))], axis=2)
    fits = np.all(tries <= size[:, None], axis=2)
    found = np.any(fits, axis=1, keepdims=True)
    shape = np.where(found, tries[np.arange(len(size)), fits.argmax(axis=1)], _largest_within_ratios(heights, widths))
    start = np.where(found, numbers[:, :2] * (size - shape + 1), (size - shape) // 2)
    return start.astype(np.int64), shape


def _largest_within_ratios(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
    height, width = _pixels(widths / RATIOS[0]), _pixels(heights * RATIOS[1])
    return np.stack([np.minimum(heights, height), np.minimum(widths, width)], axis=1)


def _pixels(lengths: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.maximum(1, np.rint(lengths).astype(np.int64))
