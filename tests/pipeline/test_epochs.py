"""A run ends its epochs with a count, and stops where promise 1 is broken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import RunFailed
from pipeline.run.events import Events
from pipeline.run.jsonl import read_lines
from pipeline.training import epoch_audit
from pipeline.training.epoch_audit import EpochAudit

SAMPLES, GLOBAL_BATCH = 10, 4


def batch(step: int, numbers: list[int]) -> Any:
    positions = np.arange((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH)
    return SimpleNamespace(positions=positions, numbers=np.array(numbers), replaced=np.array(numbers) == 7)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(epoch_audit, "all_gather", lambda values: values)


def counted(events: Events, *steps: list[int]) -> list[str]:
    """The lines of a run that takes these samples, begun anew from its checkpoint before each step."""
    lines, state = [], None
    for step, numbers in enumerate(steps, 1):
        count = EpochAudit(SAMPLES, GLOBAL_BATCH, state)
        count.add([batch(step, numbers)], applied=step != 2)
        lines += count.completed(step, events)
        state = count.state()
    return lines


def test_an_epoch_ends_with_a_line_in_the_step_that_completes_it(one_rank: None, tmp_path: Path) -> None:
    steps = [3, 1, 4, 0], [5, 9, 2, 6], [8, 7, 1, 2], [0, 3, 4, 5], [6, 7, 8, 9]
    assert counted(Events(tmp_path, 0, 0), *steps) == [
        "epoch 0: 6 of 10 samples, 0 repeated, 4 skipped, 1 replaced",
        "epoch 1: 10 of 10 samples, 0 repeated, 0 skipped, 1 replaced",
    ]
    kept = list(read_lines(tmp_path / "events.jsonl"))
    assert [(row["epoch"], row["each_once"], row["samples"], row["skipped"]) for row in kept] == [
        (0, True, 6, 4), (1, True, 10, 0),
    ]  # fmt: skip


def test_a_sample_that_came_twice_ends_the_run(one_rank: None, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="epoch 0: 10 samples were taken, but not each of 10 exactly once"):
        counted(Events(tmp_path, 0, 0), [3, 1, 4, 0], [5, 9, 2, 6], [8, 3, 1, 2])
    assert [row["each_once"] for row in read_lines(tmp_path / "events.jsonl")] == [False]
