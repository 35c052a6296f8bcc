"""Random numbers as a function of the seed and of what they are for; nothing here has a state.

Counter-based (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so any number can be
had alone, in any order, on any rank. Key and counter are spelled out below and independent of `numpy.random`, whose
streams may change between versions: integers and uniforms are the same everywhere, normals to within the last bit of
the machine's logarithm and cosine.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

SEEDS = 2**48
_NORMALS_AT_ONCE = 2**20
_LOW, _HALF = np.array(0xFFFFFFFF, np.uint64), np.array(32, np.uint64)
_FACTORS = np.array([[0xCD9E8D57], [0xD2511F53]], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


class Stream(IntEnum):
    """What numbers are for. A number given out is never given to another purpose: existing runs depend on it."""

    SHARD_ORDER = 1
    ROTATION = 2
    LANES = 3
    WINDOW = 4
    CROP = 5
    FLIP = 6
    RANDAUGMENT = 7
    MIXUP = 8
    STOCHASTIC_DEPTH = 9
    WEIGHTS = 10
    PACK = 11
    MIXUP_PARTNERS = 12
    HOLDOUT = 13
    VERIFY = 14


def philox(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Four random words for each counter, [n, 4] from [n, 4]: Philox4x32-10, section 3.3 of the paper."""
    wide = counters.T.astype(np.uint64, order="C")
    even, odd = wide[0::2], wide[1::2]
    # Both products by one call: for a few counters, the number of numpy calls is what costs.
    for round_key in _ROUNDS + np.array(key, np.uint64)[:, None] & _LOW:
        product = even[::-1] * _FACTORS
        even = product >> _HALF
        even ^= odd
        even ^= round_key
        product &= _LOW
        odd = product
    result = np.empty(counters.shape, np.uint32)
    result[:, 0::2], result[:, 1::2] = even.T, odd.T
    return result


def uint32s(
    seed: int, purpose: Stream, index: ArrayLike, count: int, epoch: ArrayLike = 0, first_block: int = 0
) -> NDArray[np.uint32]:
    """The first `count` words of each index's stream: [count] for one index, [n, count] for [n].

    `index` is below 2^64 and `epoch` below 2^32, each a number or [n]. A longer request begins with the shorter one;
    `first_block` skips that many groups of four words. A seed outside 0 .. 2^48 - 1 is a ValueError.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}; it must be from 0 to {SEEDS - 1} (2^48 - 1)")
    blocks = -(-count // 4)
    if count < 0 or first_block + blocks > 2**32:
        raise ValueError(f"{count} words were asked for; a stream has from 0 to 2^34")
    indices, epochs = np.asarray(index, np.uint64), np.asarray(epoch, np.uint32)
    counters = np.empty((*np.broadcast(indices, epochs).shape, blocks, 4), np.uint32)
    counters[..., 0] = np.arange(first_block, first_block + blocks, dtype=np.uint64)
    counters[..., 1] = epochs[..., None]
    counters[..., 2] = (indices & _LOW)[..., None]
    counters[..., 3] = (indices >> _HALF)[..., None]
    key = (seed % 2**32, int(purpose) << 16 | seed >> 32)
    return philox(counters.reshape(-1, 4), key).reshape(*counters.shape[:-2], 4 * blocks)[..., :count]


def uint64s(
    seed: int, purpose: Stream, index: ArrayLike, count: int, epoch: ArrayLike = 0, first_block: int = 0
) -> NDArray[np.uint64]:
    """64 random bits each: [count] or [n, count], two words a number, the low half first."""
    pairs = uint32s(seed, purpose, index, 2 * count, epoch, first_block).astype(np.uint64)
    return pairs[..., 0::2] | pairs[..., 1::2] << _HALF


def uniforms(seed: int, purpose: Stream, index: ArrayLike, count: int, epoch: ArrayLike = 0) -> NDArray[np.float64]:
    """Numbers in [0, 1): [count] or [n, count], 53 random bits each (two words)."""
    return (uint64s(seed, purpose, index, count, epoch) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: Stream, index: int, n: int, epoch: int = 0) -> NDArray[np.int64]:
    """A permutation of 0 .. n - 1: the stable order of the index's first n 64-bit numbers."""
    return np.argsort(uint64s(seed, purpose, index, n, epoch), kind="stable")


def normals(seed: int, name: str, count: int) -> NDArray[np.float32]:
    """Standard normal numbers [count] for the parameter of this name: Box-Muller, four from each four words."""
    index = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = np.empty(count, np.float32)
    for first in range(0, count, _NORMALS_AT_ONCE):
        part = values[first : first + _NORMALS_AT_ONCE]
        bits = uint32s(seed, Stream.WEIGHTS, index, -(-len(part) // 4) * 4, first_block=first // 4)
        # Half a step up keeps zero, whose logarithm is infinite, out.
        radius = np.sqrt(-2 * np.log((bits[0::2] + 0.5) * 2.0**-32))
        angle = (bits[1::2] + 0.5) * (2.0**-32 * 2 * np.pi)
        part[:] = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[: len(part)]
    return values
