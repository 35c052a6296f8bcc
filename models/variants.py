"""The eight CoAtNets as data, the layouts of the paper's ablations, and what the paper prints about them.

Tables 3, 11 and 12 of the paper (arXiv 2106.04803v2) give the layouts, Tables 4, 5 and 9 the sizes. A network of one's
own is one more `Layout`. Nothing here knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

StridePlace = Literal["expand", "depthwise"]


@dataclass(frozen=True)
class Stem:
    """The convolution stem S0: 3x3 convolutions, of which the first has the stride.

    `kernel` is that of the first; equal to its stride it cuts the image into patches, as a ViT does.
    """

    blocks: int
    width: int
    stride: int = 2
    kernel: int = 3

    def __post_init__(self) -> None:
        _check_counts("stem", self.blocks, self.width)
        if self.kernel != self.stride and (self.kernel != 3 or self.stride not in (1, 2)):
            raise ValueError(
                f"the stem has kernel {self.kernel} and stride {self.stride};"
                " use kernel 3 with stride 1 or 2, or the same number for both, which makes patches"
            )


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
        _check_counts(f"{self.kind} stage", self.blocks, self.width)
        if self.stride not in (1, 2):
            raise ValueError(f"a {self.kind} stage has stride {self.stride}; it must be 1 or 2")


@dataclass(frozen=True)
class Layout:
    """A whole network: stem, stages in order, the channels of one attention head, and which convolution of an MBConv
    has the stride: the first 1x1 one (`expand`, Eq. 5) or the depthwise one (the paper's dagger, Table 9)."""

    stem: Stem
    stages: tuple[Stage, ...]
    head_size: int = 32
    stride: StridePlace = "expand"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("the layout has no stages; give it at least one")
        for stage in self.stages:
            if stage.kind == "transformer" and (self.head_size < 1 or stage.width % self.head_size):
                raise ValueError(f"head_size is {self.head_size}; it must divide the transformer width {stage.width}")


@dataclass(frozen=True)
class Size:
    """A member of the family, the parameters that the paper prints for it, and where."""

    layout: Layout
    published_parameters: float
    source: str


@dataclass(frozen=True)
class Cost:
    """A row of the paper's tables: multiply-adds of one image (the paper's FLOPs). `stride` as the table marks it."""

    table: str
    model: str
    resolution: int
    stride: StridePlace
    published_flops: float


def _check_counts(what: str, blocks: int, width: int) -> None:
    if blocks < 1 or width < 1:
        raise ValueError(f"a {what} has {blocks} blocks of width {width}; both must be 1 or more")


def _layout(stem: tuple[int, int], *stages: Stage, head_size: int = 32, stride: StridePlace = "expand") -> Layout:
    return Layout(Stem(*stem), stages, head_size, stride)


C = partial(Stage, "mbconv")
T = partial(Stage, "transformer")

# A row reads as in the paper: (blocks, width) of the stem S0 and of S1 to S4, whose strides are 2 unless they say 1.
# S3 of CoAtNet-6 and -7 is mixed (appendix A.2), hence two stages here, of which the second keeps the resolution. Their
# stride place is not printed: the depthwise one is nearer to the published FLOPs, of both.
_0 = _layout((2, 64), C(2, 96), C(3, 192), T(5, 384), T(2, 768))
_1 = _layout((2, 64), C(2, 96), C(6, 192), T(14, 384), T(2, 768))
_2 = _layout((2, 128), C(2, 128), C(6, 256), T(14, 512), T(2, 1024))
_3 = _layout((2, 192), C(2, 192), C(6, 384), T(14, 768), T(2, 1536))
_4 = _layout((2, 192), C(2, 192), C(12, 384), T(28, 768), T(2, 1536))
_5 = _layout((2, 192), C(2, 256), C(12, 512), T(28, 1280), T(2, 2048), head_size=64)
_6 = _layout(
    (2, 192), C(2, 192), C(4, 384), C(8, 768), T(42, 1536, stride=1), T(2, 3072), head_size=128, stride="depthwise"
)
_7 = _layout(
    (2, 192), C(2, 256), C(4, 512), C(8, 1024), T(42, 2048, stride=1), T(2, 3072), head_size=128, stride="depthwise"
)

FAMILY: dict[str, Size] = {
    "coatnet_0": Size(_0, 25e6, "Table 4"),
    "coatnet_1": Size(_1, 42e6, "Table 4"),
    "coatnet_2": Size(_2, 75e6, "Table 4"),
    "coatnet_3": Size(_3, 168e6, "Table 4"),
    "coatnet_4": Size(_4, 275e6, "Table 4"),
    "coatnet_5": Size(_5, 688e6, "Table 5"),
    "coatnet_6": Size(_6, 1.47e9, "Table 5"),
    "coatnet_7": Size(_7, 2.44e9, "Table 5"),
}
"""CoAtNet-6's S4 is 3072 wide. Table 12 prints 2048, with which no reading comes near the published 1.47 billion
parameters (it has 1.35); 3072 is twice S3's width, as everywhere up to CoAtNet-4, and fits. `coatnet_6_printed` has the
printed one."""

VARIANTS: dict[str, Layout] = {
    "coatnet_6_printed": replace(_6, stages=(*_6.stages[:-1], T(2, 2048))),
    # Table 7: where the blocks of S2 and S3 stand. V0 is the family's own layout.
    "coatnet_2_v1": replace(_2, stages=(C(2, 128), C(2, 256), T(18, 512), T(2, 1024))),
    "coatnet_2_v2": replace(_2, stages=(C(2, 128), C(8, 256), T(12, 512), T(2, 1024))),
    "coatnet_3_v1": replace(_3, stages=(C(2, 192), C(2, 384), T(18, 768), T(2, 1536))),
    # Figure 1: which stages are convolution, which attention. The paper calls the five comparable and prints no layout:
    # these have CoAtNet-0's widths, and depths that bring parameters and multiply-adds at 224 within 8 % of C-C-T-T's
    # (12 % for the ViT, where both cannot be met). `coatnet models` prints them.
    "c_c_c_c": _layout((2, 64), C(2, 96), C(4, 192), C(8, 384), C(2, 768)),
    "c_c_c_t": _layout((2, 64), C(2, 96), C(4, 192), C(6, 384), T(2, 768)),
    "c_c_t_t": _0,
    "c_t_t_t": _layout((2, 64), C(2, 96), T(2, 192), T(4, 384), T(2, 768)),
    "vit_rel": Layout(Stem(1, 384, stride=16, kernel=16), (T(12, 384, stride=1),)),
}

COSTS = (
    Cost("Table 4", "coatnet_0", 224, "expand", 4.2e9),
    Cost("Table 4", "coatnet_1", 224, "expand", 8.4e9),
    Cost("Table 4", "coatnet_2", 224, "expand", 15.7e9),
    Cost("Table 4", "coatnet_3", 224, "expand", 34.7e9),
    Cost("Table 4", "coatnet_0", 384, "expand", 13.4e9),
    Cost("Table 4", "coatnet_1", 384, "expand", 27.4e9),
    Cost("Table 4", "coatnet_2", 384, "expand", 49.8e9),
    Cost("Table 4", "coatnet_3", 384, "expand", 107.4e9),
    Cost("Table 4", "coatnet_4", 384, "expand", 189.5e9),
    Cost("Table 4", "coatnet_2", 512, "expand", 96.7e9),
    Cost("Table 4", "coatnet_3", 512, "expand", 203.1e9),
    Cost("Table 4", "coatnet_4", 512, "expand", 360.9e9),
    Cost("Table 5", "coatnet_3", 384, "depthwise", 114e9),
    Cost("Table 5", "coatnet_3", 512, "depthwise", 214e9),
    Cost("Table 5", "coatnet_5", 512, "expand", 812e9),
    Cost("Table 5", "coatnet_6", 512, "depthwise", 1521e9),
    Cost("Table 5", "coatnet_7", 512, "depthwise", 2586e9),
    Cost("Table 9", "coatnet_0", 224, "depthwise", 4.6e9),
    Cost("Table 9", "coatnet_1", 224, "depthwise", 8.8e9),
    Cost("Table 9", "coatnet_2", 224, "depthwise", 16.6e9),
)


def layout_of(name: str) -> Layout:
    """The layout of a member of the family or of a variant; ValueError where there is no such name."""
    if name in FAMILY:
        return FAMILY[name].layout
    if name in VARIANTS:
        return VARIANTS[name]
    raise ValueError(
        f"model {name!r} does not exist; the family is {', '.join(FAMILY)}, its variants {', '.join(VARIANTS)}"
    )
