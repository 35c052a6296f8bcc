"""A campaign of faults: what survives is, to the bit or to rounding, the run that nothing happened to."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_injection import FAULTS, campaign, draw_faults, table

SHORT = ["killed while saving", "a rank frozen"]
"""The first meets a run that stays on two ranks, the second one that changes from two to one."""


@pytest.mark.torture
@pytest.mark.parametrize("faults", [SHORT, draw_faults(100, 0)], ids=["short", "long"])
def test_every_fault_is_survived(faults: list[str], tmp_path: Path) -> None:
    outcomes = campaign(tmp_path, faults, seed=0)
    told = "\n".join(table(outcomes))
    assert not any(outcome.wrong for outcome in outcomes), told
    assert told.startswith(f"{len(faults)} of {len(faults)} faults survived")
    assert sum(len(outcome.changes) for outcome in outcomes) >= len(faults) // 2


def test_each_kind_of_fault_is_drawn_as_often_as_any_other() -> None:
    counts = {kind: draw_faults(10 * len(FAULTS), 1).count(kind) for kind in FAULTS}
    assert set(counts.values()) == {10}
