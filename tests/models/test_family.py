"""The family is the paper's: sizes agree with the published ones, and layouts that cannot be built are refused."""

import pytest

from models import coatnet
from models.variants import Layout, Stage, Stem


def test_a_name_outside_the_family_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"coatnet_8.*coatnet_0.*coatnet_7"):
        coatnet("coatnet_8")


def test_a_head_size_that_does_not_divide_a_transformer_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_size is 32.*48"):
        Layout(Stem(1, 8), (Stage("transformer", 1, 48),), head_size=32)


def test_a_stage_of_unknown_kind_or_stride_or_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'conv'"):
        Stage("conv", 1, 8)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="stride 3"):
        Stage("mbconv", 1, 8, stride=3)
    with pytest.raises(ValueError, match="0 blocks"):
        Stem(0, 8)
    with pytest.raises(ValueError, match="kernel 3 and stride 4"):
        Stem(1, 8, stride=4)
    with pytest.raises(ValueError, match="no stages"):
        Layout(Stem(1, 8), ())
