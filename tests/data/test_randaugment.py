"""RandAugment: each operation is Pillow's at the same parameter, none at magnitude 0, more at more."""

import math
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from data.augment import eval_params
from data.decode import Decoder
from data.randaugment import FILL, Operation, describe, tables

SIDE = 90
WARPS = {Operation.ROTATE, Operation.SHEAR_X, Operation.SHEAR_Y, Operation.TRANSLATE_X, Operation.TRANSLATE_Y}
CURVES = {Operation.INVERT, Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD}
WITHOUT_PARAMETER = {Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.INVERT}
Device = Literal["cpu", "gpu"]
WHOLE_PIXELS = 40 / 9
"""The magnitude that translates by 18 of 90 pixels."""

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def pictures() -> list[Image.Image]:
    """Smooth shades with an edge, each with its own range of values."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(4):
        coarse = Image.fromarray(rng.integers(20 * i, 256 - 15 * i, (8, 8, 3)).astype(np.uint8))
        pixels = np.array(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        pixels[SIDE // 3 : SIDE // 2, SIDE // 4 : SIDE // 2] = (200, 60, 90)
        made.append(Image.fromarray(pixels))
    return made


def augmented(
    images: list[Image.Image], operations: list[list[int]], signs: list[int], magnitude: float, device: Device
) -> np.ndarray:
    """[n, height, width, 3]: each image after its operations, one after the other, by the decoder."""
    encoded = []
    for image in images:
        image.save(file := BytesIO(), "PNG")
        encoded.append(file.getvalue())
    sides, rows = [image.height for image in images], np.array(operations, np.int32)
    negative = np.broadcast_to(np.array(signs, np.int32)[:, None] < 0, rows.shape).astype(np.int32)
    params = replace(eval_params(1.0, sides, sides), operations=rows, signs=negative)
    decoder = Decoder(
        resolution=sides[0],
        batch_size=len(images),
        layers=rows.shape[1],
        magnitude=magnitude,
        device=device,
        device_id=0 if device == "gpu" else None,
        threads=1,
        source=lambda: (encoded, params),
    )
    return next(decoder).cpu().numpy().astype(int)


@cache
def every_operation(magnitude: float, device: Device) -> dict[tuple[Operation, int], np.ndarray]:
    """All operations with both signs in one batch, so that each is also seen not to touch the others' images."""
    images, pairs = pictures(), [(operation, sign) for operation in Operation for sign in (1, -1)]
    pixels = augmented(
        images * len(pairs),
        [[operation] for operation, _ in pairs for _ in images],
        [sign for _, sign in pairs for _ in images],
        magnitude,
        device,
    )
    return dict(zip(pairs, pixels.reshape(len(pairs), len(images), SIDE, SIDE, 3), strict=True))


def pillow(image: Image.Image, operation: Operation, sign: int, magnitude: float) -> np.ndarray:
    """The operation as written in the table of randaugment.py, by Pillow."""
    v, size = magnitude / 10, image.size

    def affine(*coefficients: float) -> Image.Image:
        return image.transform(
            size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
        )

    enhance = max(0.1, 1 + sign * 0.9 * v)
    match operation:
        case Operation.AUTO_CONTRAST:
            image = ImageOps.autocontrast(image)
        case Operation.EQUALIZE:
            image = ImageOps.equalize(image)
        case Operation.INVERT:
            image = ImageOps.invert(image)
        case Operation.ROTATE:
            image = image.rotate(sign * 30 * v, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
        case Operation.POSTERIZE:
            image = ImageOps.posterize(image, max(1, round(8 - 4 * v)))
        case Operation.SOLARIZE:
            image = ImageOps.solarize(image, max(0, math.ceil(256 - 256 * v)))
        case Operation.SOLARIZE_ADD:
            image = image.point([min(255, i + int(110 * v)) if i < 128 else i for i in range(256)] * 3)
        case Operation.COLOR:
            image = ImageEnhance.Color(image).enhance(enhance)
        case Operation.CONTRAST:
            image = ImageEnhance.Contrast(image).enhance(enhance)
        case Operation.BRIGHTNESS:
            image = ImageEnhance.Brightness(image).enhance(enhance)
        case Operation.SHARPNESS:
            image = ImageEnhance.Sharpness(image).enhance(enhance)
        case Operation.SHEAR_X:
            image = affine(1, sign * 0.3 * v, 0, 0, 1, 0)
        case Operation.SHEAR_Y:
            image = affine(1, 0, 0, sign * 0.3 * v, 1, 0)
        case Operation.TRANSLATE_X:
            image = affine(1, 0, sign * 0.45 * v * size[0], 0, 1, 0)
        case Operation.TRANSLATE_Y:
            image = affine(1, 0, 0, 0, 1, sign * 0.45 * v * size[1])
    return np.array(image).astype(int)


def inside(operation: Operation, sign: int, magnitude: float) -> np.ndarray:
    """Where the result of a warp comes from inside the image, one pixel off its border."""
    white = pillow(Image.new("RGB", (SIDE, SIDE), (255, 255, 255)), operation, sign, magnitude)[..., 0] == 255
    padded = np.pad(white, 1)
    return padded[1:-1, 1:-1] & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]


@on_each_device
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.5, WHOLE_PIXELS, 15, 20])
@pytest.mark.parametrize("operation", Operation, ids=lambda operation: operation.name.lower())
def test_an_operation_is_pillows(operation: Operation, magnitude: float, sign: int, device: Device) -> None:
    ours = every_operation(magnitude, device)[operation, sign]
    theirs = np.stack([pillow(image, operation, sign, magnitude) for image in pictures()])
    off = abs(ours - theirs)
    if operation in CURVES:
        assert off.max() == 0
    elif operation is Operation.EQUALIZE:
        assert off.max() <= 15 and off.mean() < 3  # OpenCV's formula
    elif operation is Operation.SHARPNESS:
        assert off[:, 1:-1, 1:-1].max() <= 2 and off.max() <= 8  # Pillow leaves the border as it is
    elif operation in WARPS:
        # Where the image meets the grey, one mixes the two and the other does not.
        assert off[:, inside(operation, sign, magnitude)].max() <= 1 and off.mean() < 1
    else:
        assert off.max() <= 2  # rounded here, cut off there


@pytest.mark.parametrize("operation", [Operation.TRANSLATE_X, Operation.TRANSLATE_Y], ids=["x", "y"])
def test_a_translation_by_whole_pixels_moves_them_unchanged_and_fills_with_grey(operation: Operation) -> None:
    for sign in (1, -1):
        ours = every_operation(WHOLE_PIXELS, "cpu")[operation, sign]
        np.testing.assert_array_equal(ours, [pillow(i, operation, sign, WHOLE_PIXELS) for i in pictures()])
        assert (ours == FILL).all(axis=(0, 3)).sum() == 18 * SIDE


@on_each_device
def test_an_operation_with_a_parameter_does_nothing_at_magnitude_0(device: Device) -> None:
    images = np.stack([np.array(image) for image in pictures()])
    for (operation, _), pixels in every_operation(0, device).items():
        assert (pixels == images).all() == (operation not in WITHOUT_PARAMETER), operation.name


def test_an_operation_with_a_parameter_does_more_at_more() -> None:
    images = np.stack([np.array(image) for image in pictures()]).astype(int)
    for operation in set(Operation) - WITHOUT_PARAMETER:
        for sign in (1, -1):
            # Further on a far shift may come to look more like the image again.
            changes = [abs(every_operation(m, "cpu")[operation, sign] - images).mean() for m in (0.5, 2, WHOLE_PIXELS)]
            assert changes == sorted(changes) and changes[-1] > 0, operation.name


def test_layers_are_applied_in_their_order() -> None:
    chains = [
        [Operation.INVERT, Operation.POSTERIZE],
        [Operation.POSTERIZE, Operation.INVERT],
        [Operation.TRANSLATE_X, Operation.INVERT],
        [Operation.SOLARIZE, Operation.TRANSLATE_Y],
    ]
    ours = augmented(pictures(), [[*chain] for chain in chains], [1, 1, -1, -1], WHOLE_PIXELS, "cpu")
    for pixels, image, (first, second), sign in zip(ours, pictures(), chains, (1, 1, -1, -1), strict=True):
        between = Image.fromarray(pillow(image, first, sign, WHOLE_PIXELS).astype(np.uint8))
        np.testing.assert_array_equal(pixels, pillow(between, second, sign, WHOLE_PIXELS))


def test_a_flat_image_survives_every_operation() -> None:
    """No range to stretch, no histogram to level: what has no answer leaves the image, and never fails."""
    for shade in (0, 77, 255):
        flat = Image.new("RGB", (SIDE, SIDE), (shade, shade, shade))
        operations = [Operation.AUTO_CONTRAST, Operation.EQUALIZE, Operation.CONTRAST, Operation.COLOR]
        pixels = augmented([flat] * 4, [[each] for each in operations], [1] * 4, 5, "cpu")
        assert (pixels == shade).all()


@pytest.mark.parametrize("magnitude", [0, 0.5, 5, WHOLE_PIXELS, 15, 20])
def test_descriptions_are_equal_if_and_only_if_the_operations_are(magnitude: float) -> None:
    table, pairs = tables(magnitude, SIDE), [(operation, sign) for operation in Operation for sign in (0, 1)]
    with_factor = {Operation.COLOR, Operation.CONTRAST}
    facts = {
        (o, s): (o, table.matrix[o, s].tobytes(), table.tone[o, s], table.factor[o, s] if o in with_factor else None)
        for o, s in pairs
    }
    for one in pairs:
        for other in pairs:
            same = describe(one[0], magnitude, 1 - 2 * one[1]) == describe(other[0], magnitude, 1 - 2 * other[1])
            assert same == (facts[one] == facts[other]), (one, other)


def test_an_operation_is_described_in_degrees_percent_and_bits() -> None:
    described = {operation: [describe(operation, 5, sign) for sign in (1, -1)] for operation in Operation}
    assert described[Operation.ROTATE] == ["rotate +15 deg", "rotate -15 deg"]
    assert described[Operation.POSTERIZE] == ["posterize 6 bits"] * 2
    assert described[Operation.TRANSLATE_X] == ["translate 22.5 % left", "translate 22.5 % right"]
    assert described[Operation.TRANSLATE_Y] == ["translate 22.5 % up", "translate 22.5 % down"]
    assert described[Operation.BRIGHTNESS] == ["brightness x 1.45", "brightness x 0.55"]
    assert described[Operation.SOLARIZE] == ["solarize from 128"] * 2
    assert described[Operation.AUTO_CONTRAST] == ["auto contrast"] * 2
    for sign, side in ((1, np.s_[:, :, -18:]), (-1, np.s_[:, :, :18])):  # moved left, grey comes in on the right
        assert (every_operation(WHOLE_PIXELS, "cpu")[Operation.TRANSLATE_X, sign][side] == FILL).all()
    for sign, side in ((1, np.s_[:, -18:]), (-1, np.s_[:, :18])):
        assert (every_operation(WHOLE_PIXELS, "cpu")[Operation.TRANSLATE_Y, sign][side] == FILL).all()
