"""Keys that are good by themselves and contradict each other are named before anything is trained."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards.manifest import Shard, write_manifest
from pipeline.checkpoint.mirror import check_mirror
from pipeline.commands.pretrain import check_config
from pipeline.config.batch_size import known_steps
from pipeline.config.contradictions import check_job, warnings
from pipeline.config.parsing import validate
from pipeline.config.schema import Config, Slurm
from pipeline.errors import UsageError
from pipeline.training.optimizer import learning_rate
from tests.pipeline.test_presets import PRESETS, preset_of

FAST = {"avx2", "avx512_bf16"}


def config(**sections: Any) -> Config:
    required = {"data": {"train": "x"}, "model": {"name": "coatnet_0"}, "train": {"steps": 1000}}
    sections.setdefault("optim", {"warmup_steps": 0})
    return validate(required | {name: required.get(name, {}) | keys for name, keys in sections.items()}, "test")


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_contradicts_itself(preset: str) -> None:
    trained = preset_of(preset)
    steps = known_steps(trained.train, trained.data.train_samples)
    assert warnings(trained, steps, trained.model.classes, FAST) == []
    check_job(trained.slurm)


@given(
    st.integers(0, 40), st.integers(2, 40), st.floats(1e-6, 1), st.floats(0, 1), st.sampled_from(["cosine", "linear"])
)
def test_a_learning_rate_that_does_not_fall_after_its_warm_up_is_warned_about(warmup, steps, peak, final, decay):
    keys = {"warmup_steps": warmup, "learning_rate": peak, "final_learning_rate": final, "decay": decay}
    trained = config(optim=keys)
    rates = [learning_rate(trained.optim, step, steps) for step in range(steps)]
    found = warnings(trained, steps, None, None)
    if final > peak:
        assert "optim.final_learning_rate" in found[-1]
    if warmup >= steps:
        assert "optim.warmup_steps" in found[0] and rates == sorted(rates)
    elif final <= peak:
        assert not found and rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert warnings(config(optim=keys | {"decay": "none", "warmup_steps": 0}), steps, None, None) == []


@given(st.integers(1, 12), st.integers(1, 12))
def test_checkpoints_to_keep_that_are_not_made_are_warned_about(every, keep_every):
    made, wanted = set(range(0, 200, every)), set(range(0, 200, keep_every))
    found = warnings(config(checkpoint={"every": every, "keep_every": keep_every}), None, None, None)
    assert bool(found) == (not wanted <= made and not made <= wanted)
    assert not found or f"multiples of {min(made & wanted - {0})} steps" in found[0]


@given(st.integers(1, 10**6), st.integers(1, 10**6) | st.just(0), st.sampled_from(["clock", "days", "minutes"]))
def test_a_job_that_would_be_told_to_stop_as_it_starts_is_refused(seconds, signal, written):
    minutes, hours = seconds // 60, seconds // 3600
    clock = f"{minutes % 60}:{seconds % 60:02}"
    time, limit = {
        "clock": (f"{hours}:{clock}", seconds),
        "days": (f"{hours // 24}-{hours % 24}:{clock}", seconds),
        "minutes": (str(minutes), 60 * minutes),
    }[written]
    slurm = Slurm(time=time, signal_seconds=signal or max(1, limit))
    if limit and slurm.signal_seconds >= limit:
        with pytest.raises(
            UsageError, match=rf"slurm.signal_seconds={slurm.signal_seconds} .* slurm.time={time} \({limit} s\)"
        ):
            check_job(slurm)
    else:
        check_job(slurm)
        found = [line for line in warnings(config(slurm=dict(slurm)), None, None, None) if "signal" in line]
        left = limit - slurm.signal_seconds
        assert bool(found) == (0 < left <= 60) and (not found or f"leaves {left} s of slurm.time={time}" in found[0])
    check_job(Slurm(time="UNLIMITED", signal_seconds=slurm.signal_seconds))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks_per_node": 8, "gpus_per_node": 4}, "slurm.tasks_per_node=8 is more than slurm.gpus_per_node=4"),
        ({"sbatch": ("--time=1:00:00",)}, "set slurm.time instead"),
        ({"sbatch": ("--reservation=ours", "--mem=4G")}, "set slurm.memory instead"),
        ({"sbatch": ("--no-requeue",)}, "set slurm.requeue instead"),
        ({"sbatch": ("--mem 4G",)}, "--mem 4G: set slurm.memory instead"),
        ({"sbatch": ("--gres=fpga:1,gpu:a100:4",), "gpus_per_node": 2}, "set slurm.gpus_per_node=4"),
        ({"sbatch": ("--gres=gpu",)}, "set slurm.gpus_per_node=1"),
        ({"sbatch": ("--parsable",)}, "coatnet submit reads sbatch's output"),
    ],
)
def test_a_job_that_asks_for_two_things_at_once_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_job(Slurm(**keys))


@pytest.mark.parametrize(
    "option",
    [
        "--reservation=ours",
        "--gres=craynetwork:0",
        "--mem-bind=local",
        "--wait-all-nodes=1",
        "--hold",
        "--mail-type END",
    ],
)
def test_other_options_of_sbatch_are_passed_on(option: str) -> None:
    check_job(Slurm(sbatch=(option,)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"log": {"profile": "1001-1002"}}, "log.profile=1001-1002 begins after the last step, 1000"),
        ({"data": {"cache": {"max_bytes": 1}}}, "data.cache.max_bytes"),
        ({"model": {"norm": "layer"}, "train": {"batch_norm_group": 64}}, "train.batch_norm_group=64"),
        ({"slurm": {"gpus_per_node": 4, "tasks_per_node": 2}}, "slurm.tasks_per_node=2"),
        ({"train": {"loss": "softmax"}}, "train.loss=softmax"),
    ],
)
def test_keys_without_an_effect_are_warned_about(sections: dict[str, Any], message: str) -> None:
    loss = {"loss": "sigmoid", "label_smoothing": 0.0001}
    sections["train"] = loss | sections.get("train", {})
    (found,) = warnings(config(**sections), 1000, 1, None)
    assert message in found


def test_bf16_is_warned_about_on_a_cpu_without_it_and_nowhere_else() -> None:
    bf16, fp32 = config(), config(train={"precision": "fp32"})
    slow, *others = ({"avx2", "avx512f"}, FAST, {"amx_bf16"}, {"fp", "bf16"}, None, set())
    assert [len(warnings(bf16, None, None, flags)) for flags in (slow, *others)] == [1, 0, 0, 0, 0, 0]
    assert warnings(fp32, None, None, slow) == []


@given(st.floats(0.01, 100), st.integers(1, 10**7), st.integers(1, 4096))
def test_a_length_in_epochs_is_known_once_the_samples_are(epochs, samples, batch):
    train = {"steps": None, "epochs": epochs, "global_batch": batch, "micro_batch": batch}
    assert known_steps(config(train=train).train, None) is None
    known = known_steps(config(train=train).train, samples)
    assert known is not None and math.isclose(known, epochs * samples / batch, rel_tol=1e-9, abs_tol=1)


def test_a_check_warns_and_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As before a submission, where a requested GPU makes this machine's CPU not count."""
    monkeypatch.setattr("pipeline.commands.pretrain.cpu_flags", lambda: {"avx2"})
    keys: dict[str, Any] = {"train": {"steps": 10, "global_batch": 64}, "optim": {"warmup_steps": 10}}
    check_config(config(**keys), 1)
    said = capsys.readouterr().err.splitlines()
    assert [line.split("=")[0] for line in said] == ["warning: train.precision", "warning: optim.warmup_steps"]
    check_config(config(**keys, slurm={"gpus_per_node": 1}), 1)
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("CC", "no-such-compiler")
    for compiled in ({"train": {**keys["train"], "compile": True}}, {"model": {"attention": "flex"}}):
        check_config(config(**{**keys, **compiled}, slurm={"gpus_per_node": 1}), 1)
        assert "no compiler no-such-compiler" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"slurm.signal_seconds=300 is not less than slurm.time=5"):
        check_config(config(**keys, slurm={"time": "5"}), 1)


def test_a_check_knows_the_length_by_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.commands.pretrain.cpu_flags", lambda: FAST)
    train = {"steps": None, "epochs": 1, "global_batch": 64}
    write_manifest(str(tmp_path), ["a", "b"], [Shard("a.tar", 6400, 1)])
    check_config(config(train=train, data={"train": str(tmp_path)}, optim={"warmup_steps": 100}), 1)
    said = capsys.readouterr()
    assert "2 classes" in said.out and "optim.warmup_steps=100 is not less than the training's 100 steps" in said.err
    check_config(config(train=train, data={"train": str(tmp_path / "none")}, optim={"warmup_steps": 100}), 1)
    assert capsys.readouterr().err == ""
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match=r"manifest.json is not a manifest of shards"):
        check_config(config(train=train, data={"train": str(tmp_path)}), 1)


@pytest.mark.parametrize("mirror", ["RUN", "RUN/mirror", "RUN/..", "file://RUN/../run/", "LINK/copies"])
def test_a_mirror_and_its_run_that_lie_in_each_other_are_refused_by_a_check(tmp_path: Path, mirror: str) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    place = mirror.replace("RUN", str(run)).replace("LINK", str(link))
    with pytest.raises(UsageError, match=r"checkpoint\.mirror=.* or one contains the other"):
        check_config(config(run={"dir": str(run)}, checkpoint={"mirror": place}), 1)
    check_mirror(run, f"{run}-mirror")
