"""RandAugment's fifteen operations as numbers: which family of arithmetic each belongs to, and its parameters.

Every parameter is fixed by (magnitude, resolution, operation, sign), so it is looked up on the host; the graph of
decode.py knows seven families and no magnitudes. An operation is a number of `Operation` and a row of `EFFECTS`. With
v = magnitude / 10 and sign s:

    Rotate                                   s * 30 v degrees, counter-clockwise for s = +
    ShearX, ShearY                           s * 0.3 v, about the top-left corner
    TranslateX, TranslateY                   s * 0.45 v of the image's side
    Color, Contrast, Brightness, Sharpness   factor 1 + s * 0.9 v, not below 0.1
    Posterize                                8 - 4 v bits are kept, rounded, not below 1
    Solarize                                 values from 256 - 256 v on are inverted
    SolarizeAdd                              110 v is added to values below 128
    AutoContrast, Equalize, Invert           no parameter: in full strength at any magnitude

The operations are those of RandAugment (Cubuk et al. 2019, section 3) in TensorFlow's EfficientNet code and in timm,
defined as in Pillow, but for Equalize, which is OpenCV's; what a geometric one brings in from outside is grey 128. Each
of the fifteen is drawn equally often, with a sign that is as often + as -. The scale is ours. It grows with the
magnitude throughout ("inc" in timm), so that a small magnitude is a weak augmentation and, but for the three without a
parameter, magnitude 0 is none. TensorFlow's has its identity elsewhere (enhancing factors 0.1 + 1.8 v, so v = 0.5;
Solarize at 256 v, Posterize at 4 v bits, both strongest at v = 0) and translates by 100 v pixels whatever the
image's size; shear, rotation and SolarizeAdd are the same. Like TensorFlow's, and unlike timm's, it is not clipped at
10: the paper's "2, 15" is layers 2, magnitude 15.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FILL = 128.0


class Operation(IntEnum):
    """The operations by the number that is drawn; the order is part of every run, so it never changes."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


class Family(IntEnum):
    """Operations of one family are the same arithmetic with other numbers."""

    WARP = 0
    TONE = 1
    FILTER = 2
    COLOR = 3
    CONTRAST = 4
    AUTO_CONTRAST = 5
    EQUALIZE = 6


@dataclass(frozen=True)
class Strength:
    """A magnitude and a sign (1 or -1), as the operations take them."""

    magnitude: float
    sign: int

    @property
    def share(self) -> float:
        """s * v of the table above."""
        return self.sign * self.magnitude / 10

    @property
    def factor(self) -> float:
        """Weight of the image against its grey, black or smoothed self: 1 leaves it, 0.1 is the least (as in timm)."""
        return max(0.1, 1 + self.sign * 0.09 * self.magnitude)

    @property
    def bits(self) -> int:
        """How many of the eight bits posterizing keeps."""
        return max(1, 8 - math.floor(0.4 * self.magnitude + 0.5))


def _rotation(s: Strength, side: int) -> ArrayLike:
    angle, center = math.radians(30 * s.share), side / 2
    cosine, sine = math.cos(angle), math.sin(angle)
    shift_x, shift_y = center - cosine * center + sine * center, center - sine * center - cosine * center
    return [[cosine, -sine, shift_x], [sine, cosine, shift_y], [0, 0, 1]]


def _sharpening(s: Strength, side: int) -> ArrayLike:
    """Pillow's SMOOTH kernel, mixed with the image by the factor."""
    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    return (1 - s.factor) * smooth + s.factor * np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])


def _translated(s: Strength, positive: str, negative: str) -> str:
    return f"translate {abs(45 * s.share):.3g} % {positive if s.share > 0 else negative}"


class Effect(NamedTuple):
    """An operation's family, what is written about it (preview), and what its family needs.

    `matrix(strength, side)` is the map of a WARP, from output to input coordinates, or the kernel of a FILTER;
    `curve(strength, values)` what becomes of the 256 values in a TONE. Both leave the image as it is by default.
    """

    family: Family
    describe: Callable[[Strength], str]
    matrix: Callable[[Strength, int], ArrayLike] = lambda s, side: np.eye(3)
    curve: Callable[[Strength, NDArray[np.int64]], NDArray] = lambda s, values: values


EFFECTS = {
    Operation.AUTO_CONTRAST: Effect(Family.AUTO_CONTRAST, lambda s: "auto contrast"),
    Operation.EQUALIZE: Effect(Family.EQUALIZE, lambda s: "equalize"),
    Operation.INVERT: Effect(Family.TONE, lambda s: "invert", curve=lambda s, values: 255 - values),
    Operation.ROTATE: Effect(Family.WARP, lambda s: f"rotate {30 * s.share + 0.0:+.3g} deg", _rotation),  # no -0
    Operation.POSTERIZE: Effect(
        Family.TONE, lambda s: f"posterize {s.bits} bits", curve=lambda s, values: values & -(1 << 8 - s.bits)
    ),
    Operation.SOLARIZE: Effect(
        Family.TONE,
        lambda s: f"solarize from {max(0, math.ceil(256 - 25.6 * s.magnitude))}",
        curve=lambda s, values: np.where(values < 256 - 25.6 * s.magnitude, values, 255 - values),
    ),
    Operation.SOLARIZE_ADD: Effect(
        Family.TONE,
        lambda s: f"solarize add {math.floor(11 * s.magnitude)}",
        curve=lambda s, values: np.where(values < 128, values + math.floor(11 * s.magnitude), values),
    ),
    Operation.COLOR: Effect(Family.COLOR, lambda s: f"color x {s.factor:.3g}"),
    Operation.CONTRAST: Effect(Family.CONTRAST, lambda s: f"contrast x {s.factor:.3g}"),
    Operation.BRIGHTNESS: Effect(
        Family.TONE, lambda s: f"brightness x {s.factor:.3g}", curve=lambda s, values: np.rint(values * s.factor)
    ),
    Operation.SHARPNESS: Effect(Family.FILTER, lambda s: f"sharpness x {s.factor:.3g}", _sharpening),
    Operation.SHEAR_X: Effect(
        Family.WARP,
        lambda s: f"shear x {0.3 * s.share + 0.0:+.3g}",
        lambda s, side: [[1, 0.3 * s.share, 0], [0, 1, 0], [0, 0, 1]],
    ),
    Operation.SHEAR_Y: Effect(
        Family.WARP,
        lambda s: f"shear y {0.3 * s.share + 0.0:+.3g}",
        lambda s, side: [[1, 0, 0], [0.3 * s.share, 1, 0], [0, 0, 1]],
    ),
    Operation.TRANSLATE_X: Effect(
        Family.WARP,
        lambda s: _translated(s, "left", "right"),
        lambda s, side: [[1, 0, 0.45 * s.share * side], [0, 1, 0], [0, 0, 1]],
    ),
    Operation.TRANSLATE_Y: Effect(
        Family.WARP,
        lambda s: _translated(s, "up", "down"),
        lambda s, side: [[1, 0, 0], [0, 1, 0.45 * s.share * side], [0, 0, 1]],
    ),
}


def describe(operation: Operation, magnitude: float, sign: int) -> str:
    """What an operation does to an image: "rotate +12 deg", "posterize 6 bits"."""
    return EFFECTS[operation].describe(Strength(magnitude, sign))


@dataclass(frozen=True)
class Tables:
    """The parameters of the operations, all but `tones` indexed by [operation, sign] (sign 1 is negative).

    `family` int32 [15, 2]; `matrix` float32 [15, 2, 3, 3], for WARP the map from output to input coordinates (x, y, 1)
    with the origin at the corner of the corner pixel, for FILTER the kernel; `factor` float32 [15, 2] for COLOR and
    CONTRAST; `tone` int16 [15, 2], where the curve of a TONE begins in `tones` uint8 [curves * 256].
    """

    family: NDArray[np.int32]
    matrix: NDArray[np.float32]
    factor: NDArray[np.float32]
    tone: NDArray[np.int16]
    tones: NDArray[np.uint8]


def tables(magnitude: float, resolution: int) -> Tables:
    """The parameters at this magnitude for square images of this side."""
    grid = [(EFFECTS[operation], Strength(magnitude, sign)) for operation in Operation for sign in (1, -1)]
    curves = np.stack([np.clip(effect.curve(s, np.arange(256)), 0, 255).astype(np.uint8) for effect, s in grid])
    tones, rows = np.unique(curves, axis=0, return_inverse=True)
    matrices = [np.array(effect.matrix(s, resolution), np.float32) for effect, s in grid]
    return Tables(
        family=np.array([effect.family for effect, _ in grid], np.int32).reshape(-1, 2),
        matrix=np.stack(matrices).reshape(-1, 2, 3, 3),
        factor=np.array([s.factor for _, s in grid], np.float32).reshape(-1, 2),
        tone=(rows.reshape(-1, 2) * 256).astype(np.int16),
        tones=tones.reshape(-1),
    )
