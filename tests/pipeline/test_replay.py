"""A replay names the sample and the layer that made a step bad, has the run's figures, and leaves the run as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.history import Values, attempts_of, path_to, read_history, skipped_on, span_of
from pipeline.commands.replay import replay
from pipeline.config.parsing import read_config, to_yaml
from pipeline.errors import UsageError
from pipeline.replay import LOSS_TOLERANCE, NORM_TOLERANCE, agreement
from tests import forked
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import COMMANDS, coatnet, contents, events, last_step, rows, started, wait_until

STAGES = (1, 2, 3)
EXTREME, OVERFLOWS, AFTER = 3, (5, 6, 7), 8
"""Steps: one in which a sample's loss is extreme; three in which one overflows, so that the run rolls back; and an
ordinary one after that."""
SLOT, LAYER = 6, "stages.1.1.expand"
FAULTS = {
    "rows": {str(EXTREME): (SLOT, "head.classifier", 1e4), **{str(s): (SLOT, LAYER, math.inf) for s in OVERFLOWS}}
}


def job(folder: Path, stage: int, *more: str, name: str = "run", **kind: Any) -> dict[str, Any]:
    """A training of four micro batches a step under batch norm and mixup, into FOLDER/NAME-STAGE."""
    data = [
        f"data.train={folder.parent}/train",
        "data.val=null",
        f"run.dir={folder}/{name}-{stage}",
        "log.samples=true",
    ]
    sizes = ["train.global_batch=16", "train.micro_batch=4", "optim.warmup_steps=2", "augment.mixup=0.4"]
    kept = ["train.steps=8", "checkpoint.every=2", "checkpoint.keep_last=100", "log.every=1", f"zero.stage={stage}"]
    return {"arguments": ["configs/tiny.yaml", *data, *sizes, *kept, *more], "faults": FAULTS, **kind}


def with_replays(folder: Path, stage: int, *more: str, name: str = "run") -> list[dict[str, Any]]:
    """The training, and then its three interesting steps again, into FOLDER/NAME-STAGE-STEP."""
    steps = (EXTREME, OVERFLOWS[-1], AFTER)
    again = [job(folder, stage, *more, name=name, replay=s, out=f"{folder}/{name}-{stage}-{s}") for s in steps]
    return [job(folder, stage, *more, name=name), *again]


@pytest.fixture(scope="module")
def replays(digits: Path) -> Path:
    folder = digits / "replays"
    folder.mkdir()
    on_ranks(2, [each for stage in STAGES for each in with_replays(folder, stage)], folder)
    return folder


def told(out: Path) -> dict[str, Any]:
    return json.loads((out / "told.json").read_text())


def samples(out: Path) -> list[dict[str, Any]]:
    return [
        {name: float(v) if v in ("nan", "inf") else v for name, v in row.items()} for row in rows(out / "samples.jsonl")
    ]


def recorded_keys(run: Path, step: int) -> dict[int, str]:
    """The samples that the ranks recorded of a step, by slot."""
    found = [row for file in (run / "samples").glob("rank-*.jsonl") for row in rows(file) if row["step"] == step]
    return {slot: key for row in found for slot, key in zip(row["slots"], row["keys"], strict=True)}


def check(run: Path) -> None:
    """That the three replays of a run say what went wrong in it, and equal what it recorded."""
    assert len(events(run, "rollback")) == 1
    overflow, extreme, after = (run.with_name(f"{run.name}-{step}") for step in (OVERFLOWS[-1], EXTREME, AFTER))
    culprit = recorded_keys(run, OVERFLOWS[-1])[SLOT]
    assert f"first non-finite in the forward, at {LAYER}: {culprit}\n" in told(overflow)["printed"]
    at = {row["key"]: row["place"] for row in samples(overflow)}
    assert [key for key, place in at.items() if place == LAYER] == [culprit] and len({*at.values()}) == 3
    worst, *others = sorted(samples(extreme), key=lambda row: -row["loss"])
    assert worst["key"] == recorded_keys(run, EXTREME)[SLOT] and worst["loss"] > 10 * others[0]["loss"]
    of_run = next(row["grad_norm"] for row in rows(run / "metrics.jsonl") if row["step"] == EXTREME)
    assert worst["own_gradient_norm"] == pytest.approx((1 + len(others)) * of_run, rel=0.1)  # others vanish beside it
    assert "every activation and gradient is finite" in told(extreme)["printed"]
    for out, step in ((extreme, EXTREME), (after, AFTER)):
        of_step = samples(out)
        assert {row["position"] % len(of_step): row["key"] for row in of_step} == recorded_keys(run, step)
        recorded = next(row["loss"] for row in rows(run / "metrics.jsonl") if row["step"] == step)
        assert np.mean([row["loss"] for row in of_step]) == pytest.approx(recorded, rel=1e-5)
        assert "match what the run recorded, to the bit, as they must be" in told(out)["printed"]
    assert "as attempt 1 did it on 2 ranks" in told(after)["printed"]
    assert "from checkpoints/step-00000004: 4 steps" in told(after)["printed"]
    for out in (overflow, extreme, after):
        assert told(out)["unchanged"] and told(out)["status"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_sample_and_block_are_named_values_are_equal_and_the_run_is_unchanged(replays: Path, stage: int) -> None:
    check(replays / f"run-{stage}")


def test_what_each_sample_did_is_the_same_at_every_zero_stage(replays: Path) -> None:
    first, *others = (samples(replays / f"run-{stage}-{EXTREME}") for stage in STAGES)
    for other in others:
        for one, there in zip(first, other, strict=True):
            assert one["key"] == there["key"] and one["mixed_with"] == there["mixed_with"]
            for name in ("loss", "lowest_logit", "highest_logit"):
                assert one[name] == pytest.approx(there[name], rel=1e-2)


def test_values_that_the_run_cannot_have_computed_are_a_finding(replays: Path) -> None:
    """Trained from step 1, since no checkpoint is left; the ranks' logs are not the run's either."""
    run, out = replays / "tampered", replays / "tampered-2"
    shutil.copytree(replays / "run-1", run)
    metrics = rows(run / "metrics.jsonl")
    metrics[1]["loss"] *= 1.1
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    before = contents(run)
    done = coatnet("replay", run, "--step", 2, "--from-start", "--procs", 2, "--out", out)
    assert done.returncode == 1 and "WARNING: step 2 had loss" in done.stdout, done.stderr
    assert "computes wrongly" in done.stdout and "from the first weights: 2 steps" in done.stdout
    assert contents(run) == before and len(samples(out)) == 16 and (out / "sheet.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("step", "out", "attempt", "message"),
    [
        (2, None, None, "no longer has a checkpoint before step 2; --from-start trains all 2 steps"),
        (99, None, None, "step 99 is not in the run, which has done 8 steps"),
        (8, "run-1/again", None, "is in the run's folder, which a replay must not change"),
        (8, "run-1-8", None, "already exists"),
        (6, None, 1, "step 6 was done by attempt 0"),
    ],
)
def test_what_cannot_be_replayed_is_refused_at_once(replays: Path, step, out, attempt, message) -> None:
    with pytest.raises(UsageError, match=message):
        replay(str(replays / "run-1"), step, out and str(replays / out), attempt, False, 2)
    with pytest.raises(UsageError, match="is not a run"):
        replay(str(replays), step, None, attempt, False, 2)


finite = st.floats(1e-3, 1e3)


@given(finite, finite, st.floats(0, 0.9), st.sampled_from([1, -1]))
def test_what_agrees_is_told_from_rounding_and_rounding_from_a_wrong_device(loss, norm, part, sign) -> None:
    there = Values(loss, norm)
    assert agreement(there, Values(loss, norm)) == "equal to the bit" == agreement(Values(loss, math.nan), there)
    assert agreement(there, Values(math.nextafter(loss, math.inf), norm)) == "equal within rounding"
    near = Values(loss * (1 + sign * part * LOSS_TOLERANCE), norm * (1 + sign * part * NORM_TOLERANCE))
    assert agreement(there, near) != "different"
    for wrong in (Values(loss * 1.02, norm), Values(loss, norm * 0.8), Values(math.nan, norm), Values(loss, math.inf)):
        assert agreement(there, wrong) == agreement(wrong, there) == "different"
    assert agreement(Values(math.nan, math.inf), Values(math.nan, math.inf)) == "equal to the bit"


@given(st.data())
def test_the_path_to_a_step_is_what_the_attempts_really_did(tmp_path_factory, data) -> None:
    """Of a run that crashes, resumes from what it saved, changes its learning rate and rolls back."""
    run = tmp_path_factory.mktemp("history")
    config = read_config("configs/tiny.yaml", [])
    rates = [config.optim.learning_rate]
    done_by: dict[tuple[int, int], dict[int, int]] = {}  # (attempt, step) -> who did each step up to it
    saved: dict[int, dict[int, int]] = {0: {}}
    lines, skipped = [], set[int]()
    number, step = -1, 0
    for _ in range(data.draw(st.integers(1, 5))):
        number += 1
        rates.append(data.draw(st.sampled_from([1e-3, 2e-3])))
        changed = {"optim.learning_rate": rates[-2:]} if rates[-1] != rates[-2] and number else {}
        rates[-2:] = rates[-2:] if number else [rates[-1], rates[-1]]
        noted = {"world_size": 1 + number % 3, "changed": changed, "left_step": step}
        lines.append({"event": "attempt_started", "attempt": number, **noted})
        for _ in range(data.draw(st.integers(1, 2))):
            step = max(saved)
            lineage = dict(saved[step])
            lines.append({"event": "training_resumed", "attempt": number, "step": step})
            for _ in range(data.draw(st.integers(0, 6))):
                step += 1
                if step not in skipped:
                    lineage[step] = number
                    done_by[number, step] = dict(lineage)
                if data.draw(st.booleans()):
                    saved[step] = dict(lineage)
            back = data.draw(st.sampled_from(sorted(saved)))
            if back < step and data.draw(st.booleans()):
                first = data.draw(st.integers(back + 1, step))
                skipped |= {*range(first, step + 1)}
                lines.append({"event": "step_skipped", "attempt": number, "step": step, "loss": 1.0})
                lines.append({"event": "rollback", "attempt": number, "to": back, "first": first, "last": step})
                saved = {each: who for each, who in saved.items() if each <= back}
                number += 1
            else:
                break
    lines.append({"event": "finished", "attempt": number, "step": step})
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    update = {"optim": config.optim.model_copy(update={"learning_rate": rates[-1]})}
    (run / "config.yaml").write_text(to_yaml(config.model_copy(update=update)))
    history = read_history(run)
    for step in {step for _, step in done_by}:
        having = attempts_of(history, step)
        assert having[-1].attempt == max(attempt for attempt, at in done_by if at == step)
        path = path_to(history, having[-1], step)
        for each, who in done_by[having[-1].attempt, step].items():
            assert span_of(path, each).stretch.attempt == who
        assert {*range(1, step + 1)} - skipped_on(path) == {*done_by[having[-1].attempt, step]}


@pytest.mark.torture
def test_it_holds_for_groups_across_ranks_recomputed_blocks_and_padding(replays: Path) -> None:
    settings = {
        "across": ["train.batch_norm_group=8"],
        "recomputed": ["train.activation_checkpointing=all", "train.batch_norm_group=2"],
        "bf16": ["train.precision=bf16"],
        "padded": ["train.global_batch=12"],
    }
    jobs = [
        each
        for stage in STAGES
        for name, more in settings.items()
        for each in with_replays(replays, stage, *more, name=name)
    ]
    on_ranks(2, jobs, replays)
    for stage in STAGES:
        for name in settings:
            check(replays / f"{name}-{stage}")


@pytest.mark.torture
def test_beside_a_live_run_it_disturbs_nothing(replays: Path) -> None:
    """The run that was looked into ends equal to the one that was not."""
    whole, looked_into = (job(replays, 1, "train.steps=120", name=name)["arguments"] for name in ("alone", "beside"))
    assert coatnet("pretrain", *whole).returncode == 0
    process, run = started("pretrain", *looked_into), replays / "beside-1"
    wait_until(lambda: last_step(run) >= 20, process)
    done = forked.run(COMMANDS, "replay", run, "--step", 19, timeout=240)
    assert done.returncode == 0 and "to the bit, as they must be" in done.stdout, done.stderr
    assert process.wait(240) == 0
    both = [[(r["step"], r["loss"]) for r in rows(replays / f"{n}-1" / "metrics.jsonl")] for n in ("alone", "beside")]
    assert both[0] == both[1]
