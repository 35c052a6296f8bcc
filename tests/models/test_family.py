"""The family is the paper's: sizes agree with the published ones, and layouts that cannot be built are refused."""

import pytest
import torch

from models import coatnet
from models.family import FAMILY, Layout, Stage, Stem

COUNTED_MILLIONS = [25.04, 42.23, 74.69, 166.97, 275.43, 687.05, 1471.1, 2441.97]


def millions_of_parameters(name: str) -> float:
    with torch.device("meta"):
        model = coatnet(name)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.parametrize(("name", "counted"), list(zip(FAMILY, COUNTED_MILLIONS, strict=True)))
def test_parameters_are_those_of_the_reading_that_fits_the_paper(name: str, counted: float) -> None:
    tolerance = 0.05 if counted == 1471.1 else 0.01
    assert millions_of_parameters(name) == pytest.approx(counted, abs=tolerance)


@pytest.mark.parametrize("name", FAMILY)
def test_parameters_agree_with_the_published_figure_to_0_7_percent(name: str) -> None:
    assert millions_of_parameters(name) * 1e6 == pytest.approx(FAMILY[name].published_parameters, rel=0.007)


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
    with pytest.raises(ValueError, match="no stages"):
        Layout(Stem(1, 8), ())
