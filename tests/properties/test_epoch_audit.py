"""The count of an epoch is right however it is cut up, and sees what was repeated or left out."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from data.order import Order
from pipeline.training.epoch_audit import (
    EpochUsage,
    fingerprint,
    fingerprint_of_range,
    from_json,
    is_exactly_once,
    merge,
    summary_line,
    to_json,
    usage_of,
)

sizes = st.integers(1, 300)


def taken(numbers: list[int], applied: bool = True) -> EpochUsage:
    zeros = np.zeros(len(numbers), np.int64)
    return merge([usage_of(zeros, np.array(numbers, np.int64), zeros.astype(bool), applied)]).get(0, EpochUsage())


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 50), st.integers(1, 4), st.data())
def test_the_stream_has_each_sample_once_in_each_epoch(shards, batch, ranks, data):
    """Steps may hold several epochs; parts of ranks and of starts add up through what a checkpoint keeps."""
    order = Order(1, np.array(shards, np.int64), batch, 4)
    steps = 1 + 2 * order.samples // batch
    cut = data.draw(st.integers(0, steps))
    state: dict[int, EpochUsage] = {}
    for first, end in ((0, cut), (cut, steps)):
        parts: list[dict[int, EpochUsage]] = [from_json(to_json(state))]
        for step in range(first, end):
            positions = np.arange(step * batch, (step + 1) * batch)
            for rank in range(ranks):
                own = positions[rank::ranks]
                parts.append(usage_of(own // order.samples, order.samples_at(own), own < 0, True))
        state = merge(parts)
    complete = steps * batch // order.samples
    everything = fingerprint_of_range(0, order.samples)
    assert complete and all(is_exactly_once(state[epoch], order.samples, everything) for epoch in range(complete))


@given(sizes, st.data())
def test_a_sample_that_is_repeated_or_left_out_is_seen(size, data):
    numbers = list(range(size))
    repeated, lost = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    assume(repeated != lost)
    everything = fingerprint_of_range(0, size)
    for wrong in (
        [*numbers, repeated],
        numbers[:lost] + numbers[lost + 1 :],
        [repeated if n == lost else n for n in numbers],
    ):
        assert not is_exactly_once(taken(wrong), size, everything)
    assert is_exactly_once(taken(numbers[::-1]), size, everything)


@given(sizes, st.data())
def test_samples_of_skipped_steps_and_stand_ins_are_counted_apart(size, data):
    skipped = data.draw(st.sets(st.integers(0, size - 1)))
    stand_ins = data.draw(st.sets(st.integers(0, size - 1)))
    parts = [
        usage_of(np.full(1, 3), np.array([n]), np.array([n in stand_ins]), applied=n not in skipped)
        for n in range(size)
    ]
    used = merge(parts)[3]
    assert is_exactly_once(used, size, fingerprint_of_range(0, size))
    counts = f"{size - len(skipped):,} of {size:,} samples, 0 repeated, {len(skipped):,} skipped"
    assert summary_line(3, used, size) == f"epoch 3: {counts}, {len(stand_ins):,} replaced"


@given(st.integers(0, 3 * 2**20), st.integers(0, 3 * 2**20), st.integers(0, 3 * 2**20))
def test_fingerprints_of_stripes_add_up_to_that_of_the_whole(a, b, c):
    first, middle, end = sorted((a, b, c))
    whole = fingerprint(np.arange(first, end))
    assert (fingerprint_of_range(first, middle) + fingerprint_of_range(middle, end)) % 2**64 == whole
