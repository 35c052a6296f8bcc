"""The eight CoAtNets as data: Tables 3, 11 and 12 of the paper (arXiv 2106.04803v2), published sizes beside them.

A network of one's own is one more `Layout`. Nothing here knows torch. Next: coatnet.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class Stem:
    """The convolution stem S0: 3x3 convolutions, of which the first has the stride."""

    blocks: int
    width: int
    stride: int = 2

    def __post_init__(self) -> None:
        _check_counts("stem", self.blocks, self.width, self.stride)


@dataclass(frozen=True)
class Stage:
    """Blocks of one kind at one width; the first of them has the stride and takes in the width before."""

    kind: Literal["mbconv", "transformer"]
    blocks: int
    width: int
    stride: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("mbconv", "transformer"):
            raise ValueError(f"a stage's kind is {self.kind!r}; it must be 'mbconv' or 'transformer'")
        _check_counts(f"{self.kind} stage", self.blocks, self.width, self.stride)


@dataclass(frozen=True)
class Layout:
    """A whole network: stem, stages in order, and the channels of one attention head."""

    stem: Stem
    stages: tuple[Stage, ...]
    head_size: int = 32

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("the layout has no stages; give it at least one")
        for stage in self.stages:
            if stage.kind == "transformer" and (self.head_size < 1 or stage.width % self.head_size):
                raise ValueError(f"head_size is {self.head_size}; it must divide the transformer width {stage.width}")


@dataclass(frozen=True)
class Size:
    """A member of the family and what the paper prints about it."""

    layout: Layout
    published_parameters: float


def _check_counts(what: str, blocks: int, width: int, stride: int) -> None:
    if blocks < 1 or width < 1:
        raise ValueError(f"a {what} has {blocks} blocks of width {width}; both must be 1 or more")
    if stride not in (1, 2):
        raise ValueError(f"a {what} has stride {stride}; it must be 1 or 2")


def _size(published_parameters: float, head_size: int, stem: tuple[int, int], *stages: Stage) -> Size:
    return Size(Layout(Stem(*stem), stages, head_size), published_parameters)


C = partial(Stage, "mbconv")
T = partial(Stage, "transformer")

# A row reads as in the paper: published parameters, head size, then (blocks, width) of the stem S0 and of S1 to S4.
# S3 of CoAtNet-6 and -7 is mixed (appendix A.2), hence two stages here, of which the second keeps the resolution.
# CoAtNet-6's S4 is 3072 wide: with the printed 2048 it has 1.35 billion parameters instead of the published 1.47.
FAMILY: dict[str, Size] = {
    "coatnet_0": _size(25e6, 32, (2, 64), C(2, 96), C(3, 192), T(5, 384), T(2, 768)),
    "coatnet_1": _size(42e6, 32, (2, 64), C(2, 96), C(6, 192), T(14, 384), T(2, 768)),
    "coatnet_2": _size(75e6, 32, (2, 128), C(2, 128), C(6, 256), T(14, 512), T(2, 1024)),
    "coatnet_3": _size(168e6, 32, (2, 192), C(2, 192), C(6, 384), T(14, 768), T(2, 1536)),
    "coatnet_4": _size(275e6, 32, (2, 192), C(2, 192), C(12, 384), T(28, 768), T(2, 1536)),
    "coatnet_5": _size(688e6, 64, (2, 192), C(2, 256), C(12, 512), T(28, 1280), T(2, 2048)),
    "coatnet_6": _size(1.47e9, 128, (2, 192), C(2, 192), C(4, 384), C(8, 768), T(42, 1536, stride=1), T(2, 3072)),
    "coatnet_7": _size(2.44e9, 128, (2, 192), C(2, 256), C(4, 512), C(8, 1024), T(42, 2048, stride=1), T(2, 3072)),
}
