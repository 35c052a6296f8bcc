"""What people see of a run: figures in words, MFU, the run's arithmetic, TensorBoard, Weights & Biases, a trace."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.parsing import read_config
from pipeline.costs.devices import DEVICES
from pipeline.errors import UsageError
from pipeline.formatting import format_duration, format_number, format_si
from pipeline.memory.estimate import states_of
from pipeline.monitoring.metrics import MetricsFile
from pipeline.monitoring.mfu import peak_images_per_second
from pipeline.monitoring.progress import eta_seconds, format_row
from pipeline.monitoring.summary import training_summary
from pipeline.monitoring.tensorboard import TensorBoard
from pipeline.monitoring.wandb import check_wandb
from pipeline.training.model import build_model, count_model, init_weights
from tests.pipeline.runs import ROOT, coatnet, curve, rows

TINY = str(ROOT / "configs" / "tiny.yaml")

# ---------------------------------------------------------------------------------------------------------------- words


def test_the_line_of_a_step() -> None:
    row = {"step": 1200, "loss": 5.1234, "lr": 1.2e-4, "images_per_second": 3410.2, "data_wait": 0.003, "mfu": 0.4099}
    line = "step 1,200/93,800  loss 5.12  lr 1.2e-4  3,410 img/s  data 0.3 %  MFU 41 %  2 d 3 h left"
    assert format_row(row, 93_800, 86400 * 2 + 3600 * 3.4) == line
    del row["mfu"]
    assert format_row(row | {"loss": float("nan")}, 93_800, 59.7) == (
        "step 1,200/93,800  loss nan  lr 1.2e-4  3,410 img/s  data 0.3 %  1 min 0 s left"
    )


def test_time_left_is_at_the_middle_one_of_the_last_speeds() -> None:
    assert eta_seconds(90, 100, [50.0, *[1.0] * 8, 3.0, 2.0]) == 10.0
    assert eta_seconds(101, 100, [1.0]) == 0


@given(st.floats(0, 1e9))
def test_a_duration_is_right_to_its_last_unit(seconds: float) -> None:
    words = format_duration(seconds).replace(",", "").split()
    lengths = [{"d": 86400, "h": 3600, "min": 60, "s": 1}[unit] for unit in words[1::2]]
    said = sum(int(count) * length for count, length in zip(words[::2], lengths, strict=True))
    assert 0 <= seconds - said + 0.5 <= lengths[-1] + 0.5


@given(st.floats(1e-3, 1e15))
def test_a_figure_has_three_digits_or_is_whole(value: float) -> None:
    assert float(format_number(value).replace(",", "")) == pytest.approx(value, rel=0.0051)
    number, _, unit = format_si(value, "B").partition(" ")
    if value >= 1000:
        assert float(number.replace(",", "")) * 1000 ** (1 + "kMGTP".index(unit[0])) == pytest.approx(value, rel=0.0051)


# ------------------------------------------------------------------------------------------------------------------ MFU


def test_multiply_adds_are_those_of_the_network_that_is_trained() -> None:
    more = ["model.resolution=48", "model.norm=layer", "model.relative_attention=none", "model.attention=reference"]
    config = read_config(TINY, more)
    network = build_model(config.model, config.train, 7, torch.device("cpu"), init_weights(0))
    images = torch.linspace(-1, 1, 2 * 3 * 48 * 48).view(2, 3, 48, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    counts = count_model(config.model, config.train, 7)
    assert counts.multiply_adds * 2 * len(images) == counter.get_total_flops()
    assert counts.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_a_peak_is_known_by_the_exact_name_alone() -> None:
    assert peak_images_per_second("NVIDIA A100-SXM4-80GB", "bf16", 4 * 10**9, 8) == 312e12 * 8 / (6 * 4e9)
    assert peak_images_per_second("Tesla V100-SXM2-32GB", "fp32", 10**9, 1) == pytest.approx(15.7e12 / 6e9)
    for name in ("cpu", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100", ""):
        assert peak_images_per_second(name, "bf16", 10**9, 1) is None
    assert peak_images_per_second("Tesla V100-SXM2-32GB", "bf16", 10**9, 1) is None
    assert all(gpu.fp32 * 0.9 < (gpu.bf16 or 2 * gpu.fp32) / 2 < gpu.fp32 * 1.1 for gpu in DEVICES.values())


# ------------------------------------------------------------------------------------------------- the run's arithmetic


def test_the_arithmetic_of_a_run() -> None:
    config = read_config(TINY, ["train.global_batch=1024", "train.epochs=1.5", "zero.stage=2", "train.micro_batch=64"])
    counts = count_model(config.model, config.train, 1)
    assert list(training_summary(config.model, config.train, config.zero, 1, counts, 3, 1437)) == [
        "custom CoAtNet, 32 x 32, 1 class: 278 k parameters, 15.6 M multiply-adds an image",
        "1,024 samples a step: 16 micro batches of 64, 6 passes on 3 ranks",
        "3 steps: 3,072 samples, 2.138 epochs of 1,437",
        "each rank holds at ZeRO stage 2, beside activations: weights 1.11 MB, gradients 371 kB, optimizer states"
        " 1.11 MB, average 371 kB",
        "a checkpoint takes 4.45 MB",
    ]
    assert "1.5 epochs" in list(training_summary(config.model, config.train, config.zero, 1, counts, 3, None))


@given(st.integers(1, 10**10), st.integers(1, 5000), st.booleans())
def test_a_higher_stage_never_holds_more_and_one_rank_holds_all_at_any(parameters: int, ranks: int, ema: bool) -> None:
    held = [sum(astuple(states_of(parameters, ranks, stage, ema))[:4]) for stage in (1, 2, 3)]
    assert held == sorted(held, reverse=True)
    assert sum(astuple(states_of(parameters, 1, 3, ema))[:4]) == 4 * parameters * (5 + ema)


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def read_events(file: Path) -> Iterator[Event]:
    """The records of an event file, as TensorBoard reads them: length, checksum, content, checksum."""
    content, place = file.read_bytes(), 0
    while place < len(content):
        length = content[place : place + 8]
        end = place + 12 + struct.unpack("<Q", length)[0]
        parts = (length, content[place + 8 : place + 12]), (content[place + 12 : end], content[end : end + 4])
        assert all(struct.pack("<I", masked_crc32c(part)) == checksum for part, checksum in parts)
        yield Event.FromString(content[place + 12 : end])
        place = end + 4


def shown_by_tensorboard(folder: Path) -> list[tuple[int, str, float]]:
    """(step, curve, value) of the points that TensorBoard shows: files by name; a start hides all from its step on."""
    shown: list[tuple[int, str, float]] = []
    for file in sorted(folder.iterdir()):
        versions = [event.file_version for event in read_events(file)]
        assert versions[0] == "brain.Event:2" and not any(versions[1:])
        for event in read_events(file):
            if event.session_log.status == SessionLog.START:
                shown = [point for point in shown if point[0] < event.step]
            shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


def in_tensorboard(row: dict[str, Any]) -> list[tuple[int, str, float]]:
    numbers = {name: value for name, value in row.items() if name not in ("step", "weights", "time")}
    return [(row["step"], name, struct.unpack("f", struct.pack("f", float(n)))[0]) for name, n in numbers.items()]


@given(st.lists(st.tuples(st.sampled_from(["row", "row", "row", "start or back"]), st.integers(0, 9)), max_size=25))
def test_tensorboard_shows_what_metrics_jsonl_has_after_any_starts_and_rollbacks(
    tmp_path_factory: pytest.TempPathFactory, happens: list[tuple[str, int]]
) -> None:
    run, attempt, step = tmp_path_factory.mktemp("run"), 0, 0
    sinks = (MetricsFile(run, 0), TensorBoard(run / "tensorboard", attempt, 0))
    for what, number in happens:
        if what == "row":
            step += 1
            for sink in sinks:
                sink.write({"step": step, "loss": number / 7, "lr": 1e-3})
        else:
            step, attempt = min(step, number), attempt + 1
            sinks = (MetricsFile(run, step), TensorBoard(run / "tensorboard", attempt, step))
    expected = [point for row in rows(run / "metrics.jsonl") for point in in_tensorboard(row)]
    assert shown_by_tensorboard(run / "tensorboard") == expected


# ----------------------------------------------------------------------------------------------------------- whole runs


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of W&B's own file: blocks of 32 KiB, in which a record may lie in parts."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if (left := 32768 - place % 32768) < 7 or kind == 0:
            place += left
            continue
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield wandb_internal_pb2.Record.FromString(whole)  # pyrefly: ignore
            whole = b""


def in_wandb(file: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """The run's id, the host that is told, and the rows without W&B's own values."""
    records = list(wandb_records(file))
    ((identity, host),) = {(record.run.run_id, record.run.host) for record in records if record.HasField("run")}
    history = [record.history.item for record in records if record.HasField("history")]
    named = [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items} for items in history]
    return identity, host, [{name: value for name, value in row.items() if name[0] != "_"} for row in named]


@pytest.fixture(scope="module")
def watched(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[list[dict[str, Any]]]]:
    """A run of two starts that is watched in every way, one of the same configuration, and each start's metrics."""
    folder = tmp_path_factory.mktemp("watched")
    environment = pytest.MonkeyPatch()
    environment.setenv("WANDB_MODE", "offline")
    environment.setenv("SECRET", "do not tell")

    def train(run: str, *more: str) -> list[dict[str, Any]]:
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={folder / run}"]
        how = ["train.steps=6", "train.global_batch=32", "log.every=1", "checkpoint.every=4", "evaluate.every=3"]
        done = coatnet("pretrain", "configs/tiny.yaml", *data, *how, *more)
        assert done.returncode == 0, done.stderr
        found = rows(folder / run / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "time"} for row in found]  # sinks have theirs

    try:
        wanted = ["log.wandb=digits", "log.profile=2-3"]
        first = train("run", *wanted)
        shutil.rmtree(folder / "run" / "checkpoints" / "step-00000006")
        starts = [first, train("run", *wanted)]
        train("again")
    finally:
        environment.undo()
    return folder / "run", folder / "again", starts


def test_a_second_training_with_the_same_configuration_has_the_same_metrics(watched: Any) -> None:
    run, again, _ = watched
    assert curve(run) == curve(again)
    assert len([row for row in rows(run / "metrics.jsonl") if "top1" in row]) == 2


def test_two_starts_are_one_curve_in_tensorboard(watched: Any) -> None:
    run, _, _ = watched
    expected = [point for row in rows(run / "metrics.jsonl") for point in in_tensorboard(row)]
    assert shown_by_tensorboard(run / "tensorboard") == expected
    assert len(list((run / "tensorboard").iterdir())) == 2


def test_two_attempts_are_one_wandb_run_with_all_steps_and_no_machine_data(watched: Any) -> None:
    run, _, starts = watched
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((run / "run.json").read_text())["id"]
    later = [row for row in starts[1] if row["step"] > 4]
    assert [in_wandb(file) for file in files] == [(identity, "", starts[0]), (identity, "", later)]
    for content in (file.read_bytes() for file in (run / "wandb").rglob("*") if file.suffix in (".wandb", ".json")):
        assert b"warmup_steps" in content
        assert b"do not tell" not in content and b"pipeline.cli" not in content


def test_a_trace_has_the_steps_that_were_asked_for_and_a_later_start_makes_none(watched: Any) -> None:
    run, _, _ = watched
    (file,) = (run / "profile").iterdir()
    assert file.name == "steps-2-3.json.gz"
    names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
    # one fused kernel of the optimizer for each of two groups of parameters in each step
    assert names.count("aten::_fused_adamw_") == 4
    told = [line for line in (run / "logs" / "rank-0.log").read_text().splitlines() if "trace" in line]
    made = f"rank 0's trace, from step 2 to the end of step 3: {file}"
    assert told == [made, "log.profile=2-3 begins before the next step, 5: no trace is written"]


def test_a_run_begins_with_its_arithmetic_and_says_where_it_stands(watched: Any) -> None:
    run, _, _ = watched
    said = (run / "logs" / "rank-0.log").read_text().splitlines()
    assert said[0].startswith("warning: optim.warmup_steps=40 is not less than the training's 6 steps")
    assert said[2:4] == [
        "32 samples a step: 1 micro batch of 32, 1 pass on 1 rank", "6 steps: 192 samples, 0.1336 epochs of 1,437"
    ]  # fmt: skip
    size = sum(file.stat().st_size for file in (run / "checkpoints" / "step-00000006").iterdir())
    assert float(said[5].split()[-2]) * 1e6 == pytest.approx(size, rel=0.05)
    assert any(line.startswith("step 6/6  loss ") and line.endswith("0 s left") for line in said)
    assert not any("MFU" in line for line in said) and "mfu" not in rows(run / "metrics.jsonl")[0]


# ------------------------------------------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize("profile", ["100", "100..105", "0-3", "105-100", "'5-'", "[1, 2]", "true", "''"])
def test_what_names_no_steps_to_profile_is_refused_with_what_would_do(profile: str) -> None:
    with pytest.raises(UsageError, match=r"log\.profile is .*; it must be a first and a last step.*as 100-105"):
        read_config(TINY, [f"log.profile={profile}"])


def test_a_folder_called_wandb_is_no_package_and_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_wandb(None)
    with pytest.raises(UsageError, match=r"log.wandb is digits, but the package wandb is not installed: pip install"):
        check_wandb("digits")
