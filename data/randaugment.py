"""RandAugment's fifteen operations as numbers: which family of arithmetic each belongs to, and its parameters.

Every parameter is fixed by (magnitude, resolution, operation, sign), so it is looked up on the host; the graph of
decode.py knows seven families and no magnitudes. With v = magnitude / 10 and sign s:

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
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MOST_MAGNITUDE = 20.0
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


_FAMILIES = {
    Operation.AUTO_CONTRAST: Family.AUTO_CONTRAST,
    Operation.EQUALIZE: Family.EQUALIZE,
    Operation.INVERT: Family.TONE,
    Operation.ROTATE: Family.WARP,
    Operation.POSTERIZE: Family.TONE,
    Operation.SOLARIZE: Family.TONE,
    Operation.SOLARIZE_ADD: Family.TONE,
    Operation.COLOR: Family.COLOR,
    Operation.CONTRAST: Family.CONTRAST,
    Operation.BRIGHTNESS: Family.TONE,
    Operation.SHARPNESS: Family.FILTER,
    Operation.SHEAR_X: Family.WARP,
    Operation.SHEAR_Y: Family.WARP,
    Operation.TRANSLATE_X: Family.WARP,
    Operation.TRANSLATE_Y: Family.WARP,
}


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
    """The parameters at this magnitude (0 to MOST_MAGNITUDE) for square images of this side."""
    grid = [(operation, sign) for operation in Operation for sign in (1, -1)]
    curves = np.stack([tone_curve(operation, magnitude, sign) for operation, sign in grid])
    tones, rows = np.unique(curves, axis=0, return_inverse=True)
    return Tables(
        family=np.array([_FAMILIES[operation] for operation, _ in grid], np.int32).reshape(15, 2),
        matrix=np.stack([_matrix(o, magnitude, sign, resolution) for o, sign in grid]).reshape(15, 2, 3, 3),
        factor=np.array([factor(magnitude, sign) for _, sign in grid], np.float32).reshape(15, 2),
        tone=(rows.reshape(15, 2) * 256).astype(np.int16),
        tones=tones.reshape(-1),
    )


def factor(magnitude: float, sign: int) -> float:
    """Weight of the image against its greyed, flat, black or smoothed self; 1 leaves it, 0.1 is the least (as timm)."""
    return max(0.1, 1 + sign * 0.09 * magnitude)


def posterize_bits(magnitude: float) -> int:
    """How many of the eight bits are kept."""
    return max(1, 8 - math.floor(0.4 * magnitude + 0.5))


def tone_curve(operation: Operation, magnitude: float, sign: int) -> NDArray[np.uint8]:
    """What each of the 256 values becomes, [256]; the identity for operations that are no curve."""
    values = np.arange(256)
    match operation:
        case Operation.INVERT:
            curve = 255 - values
        case Operation.POSTERIZE:
            curve = values & -(1 << 8 - posterize_bits(magnitude))
        case Operation.SOLARIZE:
            curve = np.where(values < 256 - 25.6 * magnitude, values, 255 - values)
        case Operation.SOLARIZE_ADD:
            curve = np.where(values < 128, values + math.floor(11 * magnitude), values)
        case Operation.BRIGHTNESS:
            curve = np.rint(values * factor(magnitude, sign))
        case _:
            curve = values
    return np.clip(curve, 0, 255).astype(np.uint8)


def in_words(operation: Operation, magnitude: float, sign: int) -> str:
    """What an operation does to an image, as a person says it: "rotate +12 deg", "posterize 6 bits"."""
    name, strength = operation.name.lower().replace("_", " "), sign * magnitude / 10 + 0.0  # no -0
    match operation:
        case Operation.ROTATE:
            return f"rotate {30 * strength:+.3g} deg"
        case Operation.SHEAR_X | Operation.SHEAR_Y:
            return f"{name} {0.3 * strength:+.3g}"
        case Operation.TRANSLATE_X:
            return f"translate {abs(45 * strength):.3g} % {'left' if strength > 0 else 'right'}"
        case Operation.TRANSLATE_Y:
            return f"translate {abs(45 * strength):.3g} % {'up' if strength > 0 else 'down'}"
        case Operation.COLOR | Operation.CONTRAST | Operation.BRIGHTNESS | Operation.SHARPNESS:
            return f"{name} x {factor(magnitude, sign):.3g}"
        case Operation.POSTERIZE:
            return f"posterize {posterize_bits(magnitude)} bits"
        case Operation.SOLARIZE:
            return f"solarize from {max(0, math.ceil(256 - 25.6 * magnitude))}"
        case Operation.SOLARIZE_ADD:
            return f"solarize add {math.floor(11 * magnitude)}"
    return name


def _matrix(operation: Operation, magnitude: float, sign: int, resolution: int) -> NDArray[np.float32]:
    strength = sign * magnitude / 10
    match operation:
        case Operation.ROTATE:
            return _rotation(math.radians(30 * strength), resolution / 2)
        case Operation.SHEAR_X:
            rows = [[1, 0.3 * strength, 0], [0, 1, 0], [0, 0, 1]]
        case Operation.SHEAR_Y:
            rows = [[1, 0, 0], [0.3 * strength, 1, 0], [0, 0, 1]]
        case Operation.TRANSLATE_X:
            rows = [[1, 0, 0.45 * strength * resolution], [0, 1, 0], [0, 0, 1]]
        case Operation.TRANSLATE_Y:
            rows = [[1, 0, 0], [0, 1, 0.45 * strength * resolution], [0, 0, 1]]
        case Operation.SHARPNESS:
            # Pillow's SMOOTH kernel, mixed with the image by the factor.
            smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
            weight = factor(magnitude, sign)
            rows = (1 - weight) * smooth + weight * np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
        case _:
            rows = np.eye(3)
    return np.array(rows, np.float32)


def _rotation(angle: float, center: float) -> NDArray[np.float32]:
    cosine, sine = math.cos(angle), math.sin(angle)
    shift_x, shift_y = center - cosine * center + sine * center, center - sine * center - cosine * center
    return np.array([[cosine, -sine, shift_x], [sine, cosine, shift_y], [0, 0, 1]], np.float32)
