"""Sizes and costs are the published ones, for every row of the paper's Tables 4, 5 and 9, and counted rightly."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import coatnet
from models.count import count
from models.variants import COSTS, FAMILY, VARIANTS, Cost

WITHIN_1_PERCENT = ("coatnet_6", "coatnet_7")


@pytest.mark.parametrize("row", COSTS, ids=lambda row: f"{row.model}-{row.resolution}-{row.stride}")
def test_parameters_and_flops_of_every_published_row(row: Cost) -> None:
    assert count(row.model, 224, row.stride).parameters == pytest.approx(
        FAMILY[row.model].published_parameters, rel=0.007
    )
    unit = 1e9 if row.table == "Table 5" else 0.1e9  # of the last printed digit
    within = 0.01 if row.model in WITHIN_1_PERCENT else max(0.005, unit / row.published_flops)
    counted = count(row.model, row.resolution, row.stride).multiply_adds_with_overhead
    assert counted == pytest.approx(row.published_flops, rel=within)


@pytest.mark.parametrize(
    ("name", "resolution", "stride"),
    [("coatnet_1", 224, "expand"), ("coatnet_1", 96, "depthwise"), ("coatnet_6", 224, "expand"), ("vit_rel", 64, None)],
)
def test_exact_multiply_adds_are_those_of_torch_s_own_counter(name, resolution, stride) -> None:
    with torch.device("meta"):
        model = coatnet(name, 1000, resolution, stride=stride).eval()
        images = torch.empty(1, 3, resolution, resolution)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert count(name, resolution, stride).multiply_adds == counter.get_total_flops() // 2


def test_coatnet_6_has_its_published_size_at_width_3072_and_not_as_printed() -> None:
    published = FAMILY["coatnet_6"].published_parameters
    assert count("coatnet_6_printed").parameters == pytest.approx(1348.4e6, rel=1e-4)
    assert count("coatnet_6").parameters == pytest.approx(published, rel=0.001)


@pytest.mark.parametrize("name", ["c_c_c_c", "c_c_c_t", "c_t_t_t", "vit_rel"])
def test_the_layouts_of_figure_1_are_of_about_equal_size_and_cost(name: str) -> None:
    tolerance = 0.12 if name == "vit_rel" else 0.08
    ours, base = count(name), count("c_c_t_t")
    assert ours.parameters == pytest.approx(base.parameters, rel=tolerance)
    assert ours.multiply_adds == pytest.approx(base.multiply_adds, rel=tolerance)


def test_table_7_moves_blocks_between_s2_and_s3_and_keeps_their_sum() -> None:
    for name, of in (("coatnet_2_v1", "coatnet_2"), ("coatnet_2_v2", "coatnet_2"), ("coatnet_3_v1", "coatnet_3")):
        blocks = [stage.blocks for stage in VARIANTS[name].stages]
        own = [stage.blocks for stage in FAMILY[of].layout.stages]
        assert blocks != own and sum(blocks) == sum(own)
