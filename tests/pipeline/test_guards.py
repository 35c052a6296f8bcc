"""Guards: what is bad is never applied, all ranks say the same of it, and a run that rolled back stays past it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.attempts import trusted_checkpoints
from pipeline.checkpoint.reader import checkpoints, step_name
from pipeline.checkpoint.rollback import roll_back
from pipeline.checkpoint.writer import CheckpointWriter
from pipeline.config.schema import Checkpoint
from pipeline.errors import RunFailed
from pipeline.run.events import Events
from pipeline.training.loss_guard import (
    BAD_IN_A_ROW,
    WARMUP_LOSSES,
    Guard,
    RollbackRecord,
    Verdict,
    plan_rollback,
)
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import curve, events, last_state, rows, state_of

STAGES = (1, 2, 3)
SPIKES = [22, 23, 24]
STEPS = 28


def after(losses: list[float]) -> list[tuple[Verdict, Guard]]:
    """The verdicts on a curve of losses whose steps were all applied if they were not refused."""
    guard, found = Guard(), []
    for step, loss in enumerate(losses, 1):
        verdict, _, guard = guard.update(step, loss, loss <= guard.limit)
        found.append((verdict, guard))
    return found


@given(st.lists(st.floats(1.0, 1.99), max_size=200))
def test_losses_within_a_factor_of_two_are_never_bad(losses: list[float]) -> None:
    assert all(verdict is Verdict.APPLY for verdict, _ in after(losses))


@given(st.lists(st.floats(0.5, 5.0), min_size=WARMUP_LOSSES, max_size=100), st.floats(0, 2))
def test_a_loss_that_falls_forever_is_good_and_one_of_a_hundred_times_is_not(noise: list[float], slope: float) -> None:
    falling = [15_000 * math.exp(-slope * step) + 0.01 for step, _ in enumerate(noise)]  # as a sigmoid loss begins
    assert all(verdict is Verdict.APPLY for verdict, _ in after(falling))
    level = sum(noise) / len(noise)
    assert after([*noise, 100 * level])[-1][0] is Verdict.SKIP


@given(st.lists(st.sampled_from(["good", "nan", "inf", "gradient", "spike"]), max_size=60))
def test_the_run_rolls_back_at_the_third_bad_step_in_a_row_and_no_sooner(kinds: list[str]) -> None:
    guard = after([2.0] * WARMUP_LOSSES)[-1][1]
    running_mean, in_a_row = guard.running_mean, 0
    for step, kind in enumerate(kinds, 1):
        loss = {"nan": math.nan, "inf": math.inf, "spike": 200.0}.get(kind, 2.0)
        verdict, why, guard = guard.update(step, loss, applied=kind == "good")
        in_a_row = 0 if kind == "good" else in_a_row + 1
        expected = Verdict.APPLY if not in_a_row else Verdict.SKIP if in_a_row < BAD_IN_A_ROW else Verdict.ROLLBACK
        assert verdict is expected and bool(why) == bool(in_a_row)
        assert guard.running_mean == running_mean  # what is bad does not become usual
        if in_a_row:
            assert (guard.bad_in_a_row, guard.first_bad) == (in_a_row, step - in_a_row + 1)
        assert Guard(**json.loads(json.dumps(asdict(guard)))) == guard


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 40))
def test_the_device_refuses_just_what_the_host_finds_bad(loss: float, seen: int) -> None:
    guard = after([1.0] * seen)[-1][1] if seen else Guard()
    permitted = guard.gate(torch.tensor(loss, dtype=torch.float64))
    assert permitted.item() == 1 or permitted.isnan()
    assert (guard.update(1, loss, applied=True)[0] is Verdict.APPLY) == (permitted.item() == 1)


@given(st.lists(st.integers(1, 100), max_size=5, unique=True), st.integers(1, 100), st.integers(0, 5))
def test_whatever_happens_the_way_back_ends(saved_at: list[int], first: int, more: int) -> None:
    history: list[RollbackRecord] = []
    checkpoints = [step for step in saved_at if step < first + more]
    while (back := plan_rollback(history, checkpoints, first, first + more)) is not None:
        assert back.to < back.first <= back.last + 1 and back.last == first + more
        assert back.to in [*checkpoints, 0] and (back.to < first or back.to == min(checkpoints))
        assert not history or back.first <= history[-1].first  # wider, never the same again
        history.append(back)
        assert len(history) < 10
    assert history or first + more < 1


# ---------------------------------------------------------------------------------------------------- real trainings


def job(folder: Path, name: str, *more: object, **faults: Any) -> dict[str, Any]:
    """A training of four micro batches a step, into folder/name."""
    data = [f"data.train={folder.parent}/train", "data.val=null", f"run.dir={folder}/{name}", "evaluate.every=null"]
    sizes = ["train.global_batch=16", "train.micro_batch=4", "optim.warmup_steps=2", "optim.learning_rate=5e-4"]
    made = {"arguments": list(map(str, ["configs/tiny.yaml", *data, *sizes, *more]))}
    return {**made, "faults": faults} if faults else made


def spikes(folder: Path, name: str, stage: int, **faults: Any) -> dict[str, Any]:
    return job(folder, name, f"train.steps={STEPS}", "checkpoint.every=2", f"zero.stage={stage}", **faults)


def test_after_the_last_rollback_nothing_is_left_of_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    """Step 20 was saved among bad steps: whoever resumes with a lower learning rate must not begin from it."""
    for step in (10, 20):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    events_of_run = Events(tmp_path, 0, 0)
    writer = CheckpointWriter(tmp_path / "checkpoints", 0, 0, 1, Checkpoint(), events_of_run)
    history = [RollbackRecord(10, 12, 14), RollbackRecord(10, 11, 17)]
    with pytest.raises(RunFailed, match="rolled back to step 10 2 times"):
        roll_back(tmp_path, writer, events_of_run, history, 19, 21, "the loss is not finite")
    assert [folder.name for folder in checkpoints(tmp_path / "checkpoints")] == [step_name(10)]
    writer.wait()


@pytest.fixture(scope="module")
def runs(digits: Path) -> Path:
    """Of each ZeRO stage on two ranks a run with a NaN and an Inf, and one with three spikes; and one of those that was
    killed after it had rolled back and before it saved anything, and then resumed where nothing goes wrong any more."""
    folder = digits / "guarded"
    folder.mkdir()
    kept = ("train.steps=7", "checkpoint.every=1", "checkpoint.keep_last=100")
    bad = [job(folder, f"bad-{stage}", *kept, f"zero.stage={stage}", nan=[3], inf=[6]) for stage in STAGES]
    spiked = [spikes(folder, f"spikes-{stage}", stage, spikes=SPIKES) for stage in STAGES]
    killed, goes_on = spikes(folder, "killed", 1, spikes=SPIKES, kill=21), spikes(folder, "killed", 1)
    on_ranks(2, [*bad[:2], *spiked[:2], killed], folder, status=1)
    on_ranks(2, [goes_on, bad[2], spiked[2]], folder)  # stage 3 comes last: it changes torch's functions for good
    return folder


def keys_of(run: Path, step: int, attempt: int = 0) -> list[str]:
    """The samples of a step, as the ranks recorded them."""
    found = [row for file in (run / "samples").glob("rank-*.jsonl") for row in rows(file)]
    return sorted(k for row in found if (row["step"], row["attempt"]) == (step, attempt) for k in row["keys"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_in_one_batch_and_an_inf_in_one_gradient_change_nothing_and_are_named(runs: Path, stage: int) -> None:
    run = runs / f"bad-{stage}"
    told = {row["step"]: row for row in events(run, "step_skipped")}
    reasons = {3: "the loss is not finite", 6: "the gradient is not finite"}
    assert {step: row["reason"] for step, row in told.items()} == reasons
    states = {step: state_of(run / "checkpoints" / step_name(step)) for step in range(1, 8)}
    for step in range(2, 8):
        assert (states[step] == states[step - 1]) == (step in told)
    for step, row in told.items():
        assert sorted(row["keys"]) == keys_of(run, step) and len(row["keys"]) == 16
        for rank in (0, 1):
            assert f"step {step}/7  not applied: {row['reason']}" in (run / "logs" / f"rank-{rank}.log").read_text()
    assert all(math.isfinite(row["loss"]) for row in rows(run / "metrics.jsonl") if row["step"] != 3)
    assert len(events(run, "finished")) == 1 and not events(run, "rollback")


@pytest.mark.parametrize("stage", STAGES)
def test_after_three_spikes_the_run_rolls_back_and_past_them(runs: Path, stage: int) -> None:
    run = runs / f"spikes-{stage}"
    back = events(run, "rollback")
    assert [(row["to"], row["first"], row["last"]) for row in back] == [(20, SPIKES[0], SPIKES[-1])]
    assert [row["step"] for row in events(run, "step_skipped")] == SPIKES
    assert [sorted(row["keys"]) for row in events(run, "step_skipped")] == [keys_of(run, step) for step in SPIKES]
    done = [row["step"] for row in rows(run / "metrics.jsonl")]
    assert done == [step for step in range(1, STEPS + 1) if step not in SPIKES]
    assert keys_of(run, 21) == keys_of(run, 21, attempt=1) and not keys_of(run, SPIKES[0], attempt=1)
    assert (run / "checkpoints" / "abandoned" / step_name(SPIKES[0])).exists()
    assert step_name(SPIKES[0]) not in [folder.name for folder in trusted_checkpoints(run)]
    for rank in (0, 1):
        log = (run / "logs" / f"rank-{rank}.log").read_text()
        assert log.count("not applied: the loss") == 3
        assert "3 bad steps in a row: rolling back\nresumes from step" in log


def test_a_run_that_rolled_back_and_was_killed_is_the_run_that_was_not(runs: Path) -> None:
    run, whole = runs / "killed", runs / "spikes-1"
    assert len(events(run, "rollback")) == 1 and [row["step"] for row in events(run, "training_resumed")] == [20, 20]
    assert curve(run) == curve(whole) and last_state(run) == last_state(whole)


@pytest.mark.torture
@pytest.mark.parametrize("stage", STAGES)
def test_and_when_it_was_killed_later_on_too(runs: Path, stage: int) -> None:
    run, whole = runs / f"killed-later-{stage}", runs / f"spikes-{stage}"
    on_ranks(2, [spikes(runs, run.name, stage, spikes=SPIKES, kill=STEPS)], runs, status=1)
    on_ranks(2, [spikes(runs, run.name, stage)], runs)
    assert len(events(run, "rollback")) == 1 and len(events(run, "training_resumed")) == 2
    assert curve(run) == curve(whole) and last_state(run) == last_state(whole)
