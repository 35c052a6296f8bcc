"""Preemptions, kills and dead nodes leave a training as it would have been without."""

from __future__ import annotations

import pytest

from benchmarks.fault_injection import draw_faults
from benchmarks.preemptions import KINDS, campaign, table


@pytest.mark.torture
def test_twenty_disturbances_change_no_bit(slurm_here: None, tmp_path_factory: pytest.TempPathFactory) -> None:
    result = campaign(tmp_path_factory.mktemp("night"), draw_faults(20, 0, KINDS), seed=0)
    assert not result.wrong, "\n".join(table(result))


def test_each_kind_of_disturbance_is_drawn_as_often_as_any_other() -> None:
    assert {draw_faults(10 * len(KINDS), 1, KINDS).count(kind) for kind in KINDS} == {10}
