"""Recipes: functions of (seed, epoch, sample) alone, crops inside the image, draws of the right distribution."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.augment import RATIOS, Augmentation, AugmentParams, eval_params, sample_params
from data.randaugment import Operation

RANDOM = Augmentation(crop="random_resized", flip=True, layers=2, magnitude=5)
SAMPLES = 100_000

sizes = st.integers(1, 20_000)
numbers = st.integers(0, 2**40)


def rows(params: AugmentParams, chosen: np.ndarray | slice) -> list[np.ndarray]:
    return [getattr(params, field.name)[chosen] for field in fields(params)]


@given(
    seed=st.integers(0, 2**48 - 1),
    asked=st.lists(st.tuples(st.integers(0, 2**20), numbers, sizes, sizes), min_size=1, max_size=8),
    data=st.data(),
)
def test_params_do_not_depend_on_what_they_are_drawn_with(seed: int, asked: list[tuple[int, ...]], data) -> None:
    together = sample_params(RANDOM, seed, *np.array(asked, np.int64).T)
    order = np.array(data.draw(st.permutations(range(len(asked)))))
    shuffled = sample_params(RANDOM, seed, *np.array(asked, np.int64)[order].T)
    alone = sample_params(RANDOM, seed, *np.array(asked, np.int64)[order[:1]].T)
    for all_rows, again, one in zip(
        rows(together, order), rows(shuffled, slice(None)), rows(alone, slice(1)), strict=True
    ):
        np.testing.assert_array_equal(all_rows, again)
        np.testing.assert_array_equal(all_rows[:1], one)


@pytest.mark.parametrize("changed", ["seed", "epoch", "sample"])
def test_another_seed_epoch_or_sample_is_another_draw(changed: str) -> None:
    place = {"seed": 3, "epoch": 5, "sample": 7}

    def drawn(seed: int, epoch: int, sample: int) -> list[np.ndarray]:
        n = np.arange(64)
        return rows(
            sample_params(RANDOM, seed, np.full(64, epoch), sample + 1000 * n, n * 0 + 375, n * 0 + 500), slice(None)
        )

    for one, other in zip(drawn(**place), drawn(**place | {changed: place[changed] + 1}), strict=True):
        assert (one != other).any()


def test_draws_stay_what_they_were_in_earlier_versions() -> None:
    params = sample_params(
        RANDOM, seed=1, epochs=[0, 7], samples=[2, 3_000_000_000], heights=[375, 32], widths=[500, 32]
    )
    found = [part.tolist() for part in rows(params, slice(None))]
    assert found == [
        [[111, 92], [5, 2]],
        [[189, 221], [25, 26]],
        [0, 0],
        [[12, 14], [10, 11]],
        [[1, 0], [0, 0]],
    ]


@given(height=sizes, width=sizes, sample=numbers, low=st.floats(0.001, 1), high=st.floats(0.001, 1))
def test_a_crop_lies_in_the_image_and_has_a_pixel(
    height: int, width: int, sample: int, low: float, high: float
) -> None:
    augmentation = replace(RANDOM, crop_area=(min(low, high), max(low, high)))
    params = sample_params(augmentation, 0, 0, np.arange(sample, sample + 50), np.full(50, height), np.full(50, width))
    assert (params.crop_start >= 0).all() and (params.crop_shape >= 1).all()
    assert (params.crop_start + params.crop_shape <= [height, width]).all()


@given(height=sizes, ratio=st.floats(0.5, 2), sample=numbers, low=st.floats(0.001, 0.5), span=st.floats(0, 1))
def test_a_crop_has_the_area_and_the_ratio_that_were_asked_for(
    height: int, ratio: float, sample: int, low: float, span: float
) -> None:
    """To within the rounding of its sides, of which none is below a pixel.

    What fits nowhere is the largest centred crop of a right ratio.
    """
    width = max(1, round(height * ratio))
    high = low + span * (1 - low)
    augmentation = replace(RANDOM, crop_area=(low, high))
    params = sample_params(augmentation, 0, 0, np.arange(sample, sample + 50), np.full(50, height), np.full(50, width))
    h, w = params.crop_shape.T.astype(float)
    largest = (h == height) | (w == width)
    assert ((w - 0.5) / (h + 0.5) <= RATIOS[1]).all() and ((w + 0.5) / (h - 0.5) >= RATIOS[0]).all()
    assert ((h + 0.5) * (w + 0.5) >= low * height * width).all()
    assert (((h - 0.5) * (w - 0.5) <= high * height * width) | largest | (h * w == 1)).all()


def test_a_ribbon_is_cropped_in_its_middle() -> None:
    params = sample_params(RANDOM, 0, 0, [1, 2], [10, 1000], [1000, 10])
    assert params.crop_shape.tolist() == [[10, 13], [13, 10]]
    assert params.crop_start.tolist() == [[0, 493], [493, 0]]


def test_crops_flips_and_operations_have_their_distributions() -> None:
    """Areas up to half a square always fit, so nothing is rejected and the draws show as they are."""
    augmentation = replace(RANDOM, crop_area=(0.1, 0.5))
    n, side = SAMPLES, 10_000
    params = sample_params(augmentation, 0, 3, np.arange(n), np.full(n, side), np.full(n, side))
    height, width = params.crop_shape.T.astype(float)
    area = (height * width / side**2 - 0.1) / 0.4
    ratio = (np.log(width / height) - np.log(RATIOS[0])) / np.log(RATIOS[1] / RATIOS[0])
    place = params.crop_start / (side - params.crop_shape)
    for uniform in (area, ratio, *place.T):
        # The largest distance from the uniform distribution: above 2 / sqrt(n) once in 1,500 tries.
        assert np.abs(np.sort(uniform) - (np.arange(n) + 0.5) / n).max() < 2 / np.sqrt(n)
    assert abs(params.flip.mean() - 0.5) < 4 * 0.5 / np.sqrt(n)
    assert (abs(params.signs.mean(axis=0) - 0.5) < 4 * 0.5 / np.sqrt(n)).all()
    pairs = np.bincount(params.operations[:, 0] * 15 + params.operations[:, 1], minlength=225) / n
    assert (abs(pairs - 1 / 225) < 5 * np.sqrt(1 / 225 / n)).all()
    together = np.corrcoef([area, ratio, *place.T, params.flip, *params.signs.T, *params.operations.T])
    assert abs(together - np.eye(len(together))).max() < 5 / np.sqrt(n)


def test_a_layer_is_the_same_whatever_comes_after_it() -> None:
    one, three = (
        sample_params(replace(RANDOM, layers=k), 0, 0, np.arange(99), np.full(99, 9), np.full(99, 9)) for k in (1, 3)
    )
    np.testing.assert_array_equal(one.operations, three.operations[:, :1])
    np.testing.assert_array_equal(one.signs, three.signs[:, :1])
    assert set(sample_params(RANDOM, 0, 0, np.arange(999), [9] * 999, [9] * 999).operations.ravel()) == set(Operation)


def test_what_is_off_is_not_done() -> None:
    plain = Augmentation(crop="center", flip=False, layers=0, magnitude=0)
    drawn = sample_params(plain, 0, 0, np.arange(50), np.full(50, 300), np.full(50, 401))
    evaluated = eval_params(1.0, np.full(50, 300), np.full(50, 401))
    for one, other in zip(rows(drawn, slice(None)), rows(evaluated, slice(None)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype == np.int32
    assert not drawn.flip.any() and drawn.operations.shape == drawn.signs.shape == (50, 0)


@given(height=sizes, width=sizes, fraction=st.floats(0.001, 1))
def test_evaluation_takes_the_centred_square_of_its_fraction(height: int, width: int, fraction: float) -> None:
    params = eval_params(fraction, [height], [width])
    (side, other), start = params.crop_shape[0], params.crop_start[0]
    assert side == other and side >= 1 and abs(side - fraction * min(height, width)) <= max(0.5, 1 - fraction)
    assert (abs(2 * start + side - np.array([height, width])) <= 1).all() and (start >= 0).all()


def test_without_a_crop_the_whole_image_is_taken_in_training_and_in_evaluation():
    heights, widths = np.array([30, 500, 1]), np.array([40, 375, 9])
    plain = Augmentation(crop="none", flip=False, layers=0, magnitude=0)
    for params in (sample_params(plain, 0, [0, 1, 2], [5, 6, 7], heights, widths), eval_params(None, heights, widths)):
        assert params.crop_start.tolist() == [[0, 0]] * 3
        assert params.crop_shape.tolist() == [[30, 40], [500, 375], [1, 9]]


def test_the_whole_centred_square_at_fraction_one() -> None:
    params = eval_params(1.0, [375, 500], [500, 333])
    assert params.crop_start.tolist() == [[0, 62], [83, 0]] and params.crop_shape.tolist() == [[375, 375], [333, 333]]


def test_no_samples_have_empty_params() -> None:
    none = np.array([], np.int64)
    for params in (eval_params(1.0, none, none), sample_params(RANDOM, 0, none, none, none, none)):
        assert params.crop_start.shape == params.crop_shape.shape == (0, 2) and params.flip.shape == (0,)
