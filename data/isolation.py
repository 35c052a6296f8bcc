"""Batches through DALI of which one image may fail: that image is found, taken out, and the rest decoded all the same.

DALI fails a whole batch, names no image, and its pipeline is of no use afterwards. So the images of a batch that failed
are decoded one by one, each with its own draws; those that fail alone are given back, and a new pipeline begins with
the batch without them. A sound batch costs nothing. Where no image fails alone, where even a sound one fails, or
where memory ran out, it is not an image's fault, and DALI's error stands.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from data.augment import AugmentParams
from data.decode import Decoder, DecodingFailed, Source
from data.memory import AHEAD, is_out_of_memory

Chunk = TypeVar("Chunk")
Inputs = tuple[Sequence[bytes], AugmentParams]
MakeDecoder = Callable[[Source, int], Decoder]
"""A decoder of a source, which runs so many batches ahead."""


def decode_chunks(
    chunks: Iterator[Chunk],
    inputs: Callable[[Chunk], Inputs],
    make_decoder: MakeDecoder,
    without: Callable[[Chunk, dict[int, str]], Chunk],
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Each chunk with its pixels. `without` makes the chunk that takes the place of one whose images at some places
    fail, for these reasons; what it puts there is tried in turn."""
    fed: deque[Chunk] = deque()

    def source() -> Inputs:
        chunk = next(chunks)
        fed.append(chunk)
        return inputs(chunk)

    while True:
        try:
            for pixels in make_decoder(source, AHEAD):
                yield fed.popleft(), pixels
            return
        except DecodingFailed as error:
            chunks = itertools.chain(_without_failures(list(fed), inputs, make_decoder, without, error), chunks)
            fed.clear()


def _without_failures(
    fed: list[Chunk],
    inputs: Callable[[Chunk], Inputs],
    make_decoder: MakeDecoder,
    without: Callable[[Chunk, dict[int, str]], Chunk],
    error: DecodingFailed,
) -> list[Chunk]:
    """The chunks that were in DALI when it failed, the first that has images which fail alone without these."""
    for number, chunk in enumerate(fed):
        if failures := _failures(*inputs(chunk), make_decoder, error):
            return [*fed[:number], without(chunk, failures), *fed[number + 1 :]]
    raise error


def _failures(
    images: Sequence[bytes], params: AugmentParams, make_decoder: MakeDecoder, error: DecodingFailed
) -> dict[int, str]:
    """Of which images DALI fails alone, and why; raises `error` where DALI fails of a sound one too."""
    if is_out_of_memory(error):
        raise error
    none = slice(0, 0)
    failures: dict[int, str] = {}
    following = 0
    while following < len(images):
        each = ((images[i : i + 1], params[i : i + 1]) for i in range(following, len(images)))
        source: Iterable[Inputs] = itertools.chain([(images[none], params[none])], each)  # an empty batch is sound
        decoder = make_decoder(iter(source).__next__, 1)  # not ahead: what fails is the image that was asked for
        try:
            next(decoder)
        except DecodingFailed:
            raise error from None
        try:
            for _ in decoder:
                following += 1
        except DecodingFailed as failure:
            if is_out_of_memory(failure):
                raise error from None
            failures[following] = failure.reason
            following += 1
    return failures
