"""Laws of the draws: known answers, no stream meets another, and the numbers have the distribution they claim."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.rng import SEEDS, Stream, normals, permutation, philox, uint32s, uint64s, uniforms

seeds = st.integers(0, SEEDS - 1)
purposes = st.sampled_from(Stream)
indices = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**32 - 1)
ONES = 2**32 - 1


def chi_square(values: np.ndarray, bins: int) -> float:
    """Distance of the counts of 0 .. bins - 1 from even ones, in standard deviations of the statistic."""
    expected = values.size / bins
    counts = np.bincount(values.ravel(), minlength=bins)
    return float((((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1)))


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    assert " ".join(f"{word:08x}" for word in philox(np.array([counter], np.uint32), key)[0]) == answer


@given(seed=seeds, purpose=purposes, index=indices, epoch=epochs, count=st.integers(0, 40))
def test_words_are_philox_of_the_documented_key_and_counter(seed, purpose, index, epoch, count):
    key = (seed & ONES, purpose << 16 | seed >> 32)
    blocks = (philox_by_hand((block, epoch, index & ONES, index >> 32), key) for block in range(10))
    assert uint32s(seed, purpose, index, count, epoch).tolist() == list(chain(*blocks))[:count]


@given(
    seed=seeds,
    purpose=purposes,
    rows=st.lists(st.tuples(indices, epochs), max_size=8),
    count=st.integers(0, 20),
    more=st.integers(0, 9),
)
def test_a_row_is_the_same_alone_or_among_others_and_begins_every_longer_one(seed, purpose, rows, count, more):
    index, epoch = (np.array([row[i] for row in rows], np.uint64) for i in (0, 1))
    together = uint32s(seed, purpose, index, count + more, epoch)
    assert together.shape == (len(rows), count + more) and together.dtype == np.uint32
    for row, (i, e) in zip(together, rows, strict=True):
        assert np.array_equal(row[:count], uint32s(seed, purpose, i, count, e))
    skipped = uint32s(seed, purpose, index, max(0, count + more - 8), epoch, first_block=2)
    assert np.array_equal(skipped, together[:, 8:])


@given(st.lists(st.tuples(seeds, purposes, indices, epochs), unique=True, min_size=2, max_size=12))
def test_no_two_seeds_purposes_indices_or_epochs_share_a_stream(streams):
    rows = {tuple(uint32s(seed, purpose, index, 16, epoch)) for seed, purpose, index, epoch in streams}
    assert len(rows) == len(streams)


@given(seed=seeds, purpose=purposes, index=indices, epoch=epochs)
def test_uniforms_are_53_bits_in_the_half_open_unit_interval(seed, purpose, index, epoch):
    values = uniforms(seed, purpose, index, 50, epoch)
    assert values.dtype == np.float64 and values.min() >= 0 and values.max() < 1
    assert np.array_equal(values * 2**53, uint64s(seed, purpose, index, 50, epoch) // 2**11)


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: uniforms(0, Stream.CROP, np.arange(n), 1),
        lambda n: uniforms(0, Stream.CROP, 0, n),
        lambda n: uniforms(0, Stream.CROP, 7, 1, epoch=np.arange(n)),
        lambda n: uniforms(0, Stream.CROP, np.arange(n, dtype=np.uint64) << np.uint64(32), 1),
        lambda n: np.concatenate([uniforms(seed, Stream.FLIP, np.arange(n // 50), 1) for seed in range(50)]),
        lambda n: np.concatenate([uniforms(3, purpose, np.arange(n // 11), 1) for purpose in Stream]),
    ],
    ids=["index", "place", "epoch", "high index", "seed", "purpose"],
)
def test_uniforms_are_even_and_neighbours_know_nothing_of_each_other(draw):
    values = draw(110_000).ravel()
    assert abs(chi_square((values * 64).astype(int), 64)) < 5
    pairs = (values[:-1] * 16).astype(int) * 16 + (values[1:] * 16).astype(int)
    assert abs(chi_square(pairs, 256)) < 5


@given(seed=seeds, purpose=purposes, index=indices, epoch=epochs, n=st.integers(0, 200))
def test_a_permutation_has_every_number_once_in_the_order_of_the_keys(seed, purpose, index, epoch, n):
    order = permutation(seed, purpose, index, n, epoch)
    assert order.dtype == np.int64 and sorted(order) == list(range(n))
    assert np.all(np.diff(uint64s(seed, purpose, index, n, epoch)[order].astype(object)) >= 0)


def test_every_permutation_is_equally_likely():
    orders = np.array([permutation(0, Stream.WINDOW, index, 4) for index in range(6000)])
    assert abs(chi_square(np.unique(orders @ [64, 16, 4, 1], return_inverse=True)[1], 24)) < 5


def test_normals_have_mean_0_variance_1_and_normal_tails():
    values = normals(0, "stages.0.0.weight", 1_000_001).astype(np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.005 and abs(values.var() - 1) < 0.007
    for bound, below in ((-3, 0.0013499), (-2, 0.0227501), (-1, 0.1586553), (0, 0.5), (1, 0.8413447), (2, 0.9772499)):
        assert abs((values < bound).mean() - below) < 5 * np.sqrt(below * (1 - below) / len(values))
    for lag in (1, 2, 3):
        assert abs(np.mean(values[lag:] * values[:-lag])) < 0.005


def test_normals_depend_on_seed_and_name_only():
    long = normals(5, "head.weight", 2**20 + 7)
    for count in (0, 1, 2, 3, 5, 1000, 2**20, 2**20 + 1):
        assert np.array_equal(normals(5, "head.weight", count), long[:count])
    assert long.dtype == np.float32 and not np.array_equal(long[2**20 :], long[:7])
    for seed, name in ((6, "head.weight"), (5, "head.bias"), (5 + 2**32, "head.weight")):
        assert abs(np.mean(normals(seed, name, 100_000) * long[:100_000])) < 0.016


@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_a_seed_out_of_range_is_refused_with_the_range(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}; it must be from 0 to 281474976710655"):
        uint32s(seed, Stream.CROP, 0, 1)


def test_golden_numbers_that_existing_runs_depend_on():
    """Changing any of these changes the data order, augmentation or weights of every run that exists: don't."""
    assert [(purpose.name, purpose.value) for purpose in Stream] == [
        ("SHARD_ORDER", 1),
        ("ROTATION", 2),
        ("LANES", 3),
        ("WINDOW", 4),
        ("CROP", 5),
        ("FLIP", 6),
        ("RANDAUGMENT", 7),
        ("MIXUP", 8),
        ("STOCHASTIC_DEPTH", 9),
        ("WEIGHTS", 10),
        ("PACK", 11),
        ("MIXUP_PARTNERS", 12),
        ("HOLDOUT", 13),
        ("VERIFY", 14),
    ]
    assert uint32s(0, Stream.CROP, 0, 5).tolist() == [1453774076, 1864408564, 2861361103, 3731970511, 3207881972]
    assert uint32s(SEEDS - 1, Stream.PACK, 2**64 - 1, 2, 2**32 - 1).tolist() == [1829221087, 1153936536]
    assert uniforms(1, Stream.FLIP, 2, 2, 3).tolist() == [0.39981964472815423, 0.3893203833784298]
    assert permutation(0, Stream.LANES, 0, 10, 1).tolist() == [9, 6, 5, 3, 8, 7, 0, 2, 1, 4]
    # The machine's logarithm and cosine may differ in the last bit.
    assert normals(0, "head.weight", 5) == pytest.approx(
        [1.6840628, -0.5511282, 0.016862981, 0.574352324, -0.704351962], rel=1e-6
    )
