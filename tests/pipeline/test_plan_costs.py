"""`coatnet plan`: its terms, its calibration, its interval between checkpoints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.plan_costs import plan_costs
from pipeline.config.parsing import read_config, to_yaml
from pipeline.config.schema import Train, Zero
from pipeline.costs.calibration import FITTED, Measurement, fitted
from pipeline.costs.devices import DEVICES
from pipeline.costs.reliability import best_interval, goodput
from pipeline.costs.step_time import Rates, collective_bytes, step_seconds, step_terms
from pipeline.errors import UsageError
from pipeline.memory.activations import count_activations
from pipeline.memory.estimate import Work
from pipeline.training.model import count_model
from tests.pipeline.runs import ROOT, coatnet

TINY, LARGE = str(ROOT / "configs/tiny.yaml"), str(ROOT / "configs/jft3b/coatnet7.yaml")
PROMISED = {
    "parameters", "memory_bytes", "fits", "steps", "step_seconds", "days", "gpu_days", "checkpoint_bytes",
    "read_bytes_per_second",
}  # fmt: skip


def asked(preset: str, *overrides: str, gpu: str = "h100", gpus: int = 8, calibrate: tuple[str, ...] = ()) -> int:
    return plan_costs(preset, list(overrides), gpu, gpus, 8, list(calibrate), 2.0, None, True)


def planned(capsys: pytest.CaptureFixture[str], preset: str, *overrides: str, **more: Any) -> dict[str, Any]:
    assert asked(preset, *overrides, **more) == 0
    return json.loads(capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------- terms

works = st.builds(Work, st.integers(0, 10**15), st.integers(0, 10**12), st.integers(0, 10**5))
stages, ranks = st.sampled_from((1, 2, 3)), st.integers(1, 4096)


def test_operations_are_three_forwards_and_a_fourth_where_all_is_recomputed() -> None:
    def ratio(recomputed: str) -> float:
        more = [f"train.activation_checkpointing={recomputed}", "model.relative_attention=none"]
        config = read_config(str(ROOT / "configs/ablations/vit_rel.yaml"), ["train.micro_batch=4", *more])
        counted = count_activations(config.model, config.train, config.augment, 1000, "cuda", False).work.operations
        return counted / (2 * 4 * count_model(config.model, config.train, 1000).multiply_adds)

    # The first layer's input needs no gradient; attention's backward computes its weights again; a block's last product
    # is not recomputed, since no gradient needs it.
    assert ratio("none") == pytest.approx(3, rel=0.03) and 3.5 < ratio("all") < 4


@given(works, st.integers(1, 10**10), stages, ranks, st.sampled_from(list(DEVICES)), st.booleans())
def test_more_work_takes_longer_and_one_rank_sends_nothing(
    work: Work, parameters: int, stage: int, world_size: int, gpu: str, offload: bool
) -> None:
    train = Train(steps=1, global_batch=4096, micro_batch=1, precision="fp32")
    zero = Zero.model_validate({"stage": stage, "offload": offload})

    def terms(work: Work, world_size: int) -> dict[str, float]:
        return step_terms(work, parameters, (train, zero, world_size), DEVICES[gpu], 8, Rates())

    found = terms(work, world_size)
    assert all(seconds >= 0 for seconds in found.values())
    assert step_seconds(found) <= step_seconds(terms(2 * work, world_size))
    assert terms(work, 1)["collectives"] == 0


@given(st.integers(1, 10**10), st.integers(2, 4096), st.integers(1, 64))
def test_a_higher_stage_sends_no_less_and_at_most_three_times_the_weights_a_pass(
    parameters: int, world_size: int, passes: int
) -> None:
    sent = [collective_bytes(parameters, stage, world_size, passes) for stage in (1, 2, 3)]
    assert sent == sorted(sent) and sent[2] <= 3 * passes * 4 * parameters


# ----------------------------------------------------------------------------------------------------- calibration

seconds = st.floats(1e-3, 10)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=4), st.floats(0.1, 50))
def test_calibration_finds_a_factor_that_all_terms_share(terms: list[tuple[float, ...]], factor: float) -> None:
    points = [
        Measurement(
            {**dict.fromkeys(("optimizer", "collectives"), 0.0), **dict(zip(FITTED, each, strict=False))},
            factor * sum(each),
        )
        for each in terms
    ]
    assert fitted(points) == pytest.approx(dict.fromkeys(FITTED[:3], factor))


def test_calibration_tells_two_terms_apart_where_measurements_do() -> None:
    def point(compute: float, memory: float) -> Measurement:
        terms = {"compute": compute, "memory": memory, "calls": 0.0, "optimizer": 0.0, "collectives": 0.0}
        return Measurement(terms, 2 * compute + 6 * memory)

    assert fitted([point(10, 1), point(1, 10)]) == pytest.approx({"compute": 2, "memory": 6}, rel=0.1)


def recorded_run(run: Path, step_seconds: float, device: str = "cpu") -> Path:
    config = read_config(TINY, ["model.classes=10"])
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    starts = [
        {"event": "attempt_started", "world_size": 1, "device": device},
        {"event": "training_resumed", "step": 20},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    seconds = {step: step_seconds * (1 if step > 20 else 9) for step in range(1, 33)}  # before, it was another start's
    rows = [{"step": step, "loss": 1.0, "step_seconds": each, "data_wait": 0.0} for step, each in seconds.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run / "metrics.jsonl"


def test_the_plan_of_what_calibrated_it_takes_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = str(recorded_run(tmp_path / "run", 0.321))
    plan = planned(capsys, TINY, "model.classes=10", gpu="cpu", gpus=1, calibrate=(metrics,))
    assert plan["step_seconds"] == pytest.approx(0.321, rel=1e-3)
    assert {"compute", "memory"} <= set(plan["measured"]) and not any("peak" in line for line in plan["assumed"])


def test_a_measurement_on_another_device_is_refused(tmp_path: Path) -> None:
    bench = tmp_path / "bench.jsonl"
    bench.write_text(
        '{"command": [], "device": "cuda"}\n{"check": "speed of coatnet_0", "rows": [7, {"images/s": 0}]}\n'
    )
    with pytest.raises(UsageError, match="measured on another device than --gpu: cuda"):
        asked(TINY, gpu="cpu", gpus=1, calibrate=(str(bench),))
    with pytest.raises(UsageError, match="has no measurement"):
        asked(TINY, gpus=1, calibrate=(str(bench),))
    metrics = str(recorded_run(tmp_path / "run", 0.321, "NVIDIA A100-SXM4-80GB"))
    for gpu in ("h100", "cpu"):
        with pytest.raises(UsageError, match="than --gpu: NVIDIA A100"):
            asked(TINY, gpu=gpu, gpus=1, calibrate=(metrics,))


def test_the_results_of_bench_gpu_calibrate_speed_and_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = {"network": "ours", "batch": 4, "side": 64, "precision": "bf16", "images/s": 40.0}
    checks = [{"check": "speed of coatnet_0", "rows": [speed]}, {"check": "DALI", "rows": [{"images/s": 10.0}]}]
    results = tmp_path / "bench.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in [{"command": []}, *checks]))
    network = ["model.resolution=64", "train.micro_batch=4", "train.global_batch=4", "train.stochastic_depth=0"]
    preset = str(ROOT / "configs/imagenet1k/coatnet0.yaml")
    plan = planned(capsys, preset, *network, gpus=1, calibrate=(str(results),))
    terms = plan["step_terms"]
    assert terms["input"] == 4 / 10.0 == plan["step_seconds"]
    assert sum(terms[name] for name in ("compute", "memory", "calls")) == pytest.approx(4 / 40.0, rel=0.02)


# ----------------------------------------------------------------------------------------------------- checkpoints


@given(st.floats(1e-3, 600), st.floats(3600, 1e8), st.floats(0, 1800))
def test_no_other_interval_between_checkpoints_loses_much_less(stall: float, between: float, restart: float) -> None:
    best = best_interval(stall, between)
    share = goodput(best, stall, restart, between)
    assert 0 < share < 1
    assert all(
        goodput(best * times, stall, restart, between) <= share * 1.002 for times in (0.25, 0.5, 0.8, 1.25, 2, 4)
    )


def test_where_failures_come_faster_than_starts_nothing_is_done() -> None:
    assert goodput(60.0, 1.0, 300.0, 0.02) == 0 < goodput(60.0, 1.0, 300.0, 600.0)


# --------------------------------------------------------------------------------------------------------- command


def test_the_plan_of_the_largest_network_has_the_promised_keys_which_agree() -> None:
    words = ["--gpus", 512, "--gpu", "H200", "--price", 3, "--json", "train.micro_batch=8"]
    done = coatnet("plan", LARGE, *words, "data.train_samples=3000000000", "model.classes=30000")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(plan) >= PROMISED and plan["fits"] and plan["changes"] == []
    assert plan["days"] == pytest.approx(plan["steps"] * plan["step_seconds"] / 86400)
    assert plan["gpu_days"] == pytest.approx(512 * plan["days"])
    assert plan["cost"] == pytest.approx(plan["gpu_days"] * 24 * 3 / plan["goodput"])
    memory = dict(plan["memory_bytes"])
    assert memory.pop("total") == sum(memory.values())
    assert plan["parameters"] == 2_531_090_112  # as `coatnet models` counts it, with this many classes


def test_changes_fit_where_the_request_does_not_and_the_cheapest_is_first(capsys: pytest.CaptureFixture[str]) -> None:
    large = ["train.micro_batch=16384", "train.global_batch=131072"]
    plan = planned(capsys, TINY, *large, gpu="a10")
    assert not plan["fits"] and plan["memory_bytes"]["total"] > plan["usable_bytes"]
    assert len(plan["changes"]) == 2 and all(each["memory_bytes"] <= plan["usable_bytes"] for each in plan["changes"])
    times = [each["step_seconds"] for each in plan["changes"]]
    assert times == sorted(times)
    for change in plan["changes"]:
        again = planned(capsys, TINY, *large, change["set"], gpu="a10")
        assert again["fits"] and again["step_seconds"] == pytest.approx(change["step_seconds"])


def test_without_the_sets_size_all_but_the_length_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, TINY, "data.train=/nowhere", gpus=2)
    assert plan["steps"] is plan["days"] is plan["cost"] is None and plan["step_seconds"] > 0


WRONG: dict[str, dict[str, Any]] = {
    "--gpu h1000 is not known; choose h100, ": {"gpu": "h1000"},
    "--gpu cpu needs --calibrate": {"gpu": "cpu"},
    "does not compute in bf16; set train.precision=fp32": {"gpu": "v100", "overrides": ["train.precision=bf16"]},
    "2 micro batches a step .* are too few for 8 ranks": {"gpus": 8},
    "README.md has no measurement; give a run's metrics.jsonl": {"calibrate": (str(ROOT / "README.md"),)},
    "there is no such file": {"calibrate": (str(ROOT / "nothing.jsonl"),)},
    "config.yaml is missing": {"calibrate": (str(ROOT / "configs"),)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_request_is_refused_with_what_to_do(message: str) -> None:
    request: dict[str, Any] = {"gpus": 2, **WRONG[message]}
    overrides = request.pop("overrides", [])
    with pytest.raises(UsageError, match=message):
        asked(TINY, *overrides, **request)
