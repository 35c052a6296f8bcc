"""Whole runs as a person starts them: real processes, real kills, the digits of the demo.

The laws: every epoch has every sample once, on any number of ranks; what does not fit together is refused in one line
and nothing is lost. That a run that was killed is the run that never was, is in test_faults.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from data.storage.remote import open_fs, write_file
from pipeline.checkpoint.reader import CheckpointReader, checkpoints
from tests.data.servers import s3_server, shares
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    as_format_1,
    coatnet,
    consumed,
    contents,
    curve,
    events,
    last_state,
    last_step,
    packed_keys,
    ranks_of,
    rows,
    started,
    wait_until,
)

STEPS = 26
"""An epoch has 22.5."""


@pytest.fixture(scope="session")
def request_of(digits: Path) -> Callable[..., list[object]]:
    """A short pretraining of the tiny configuration into a run's folder."""

    def arguments(run: Path, *more: object, procs: int = 2) -> list[object]:
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={run}", "run.seed=7"]
        length = [f"train.steps={STEPS}", "evaluate.every=13", "checkpoint.every=6", "checkpoint.keep_last=100"]
        logs = ["log.every=1", "log.samples=pixels"]
        return ["pretrain", "configs/tiny.yaml", "--procs", procs, *data, *length, *logs, *more]

    return arguments


@pytest.fixture(scope="session")
def undisturbed(request_of: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = coatnet(*request_of(run))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def test_epochs_have_every_sample_once_and_steps_are_alike_on_one_rank_and_two(
    undisturbed: Path, request_of: Callable[..., list[object]], digits: Path, tmp_path: Path
) -> None:
    alone = coatnet(*request_of(tmp_path / "alone", procs=1))
    assert alone.returncode == 0, alone.stderr
    assert consumed(tmp_path / "alone") == consumed(undisturbed)
    epochs: dict[int, Counter[str]] = {}
    for parts in consumed(undisturbed).values():
        assert [slot for slot, *_ in parts] == list(range(64))
        for _, epoch, key, _ in parts:
            epochs.setdefault(epoch, Counter())[key] += 1
    assert epochs[0] == Counter(packed_keys(digits / "train"))
    assert len(epochs[0]) == 1437
    assert set(epochs[1]) <= set(epochs[0]) and set(epochs[1].values()) == {1}
    told = "epoch 0: 1,437 of 1,437 samples, 0 repeated, 0 skipped, 0 replaced"
    for run in (undisturbed, tmp_path / "alone"):
        assert told in (run / "logs" / "rank-0.log").read_text().splitlines()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    copy: Path, undisturbed: Path, request_of: Callable[..., list[object]]
) -> None:
    for folder in checkpoints(copy / "checkpoints")[3:]:
        shutil.rmtree(folder)
    newest, before = checkpoints(copy / "checkpoints")[::-1][:2]
    part = newest / "rank-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert coatnet(*request_of(copy)).returncode == 0
    assert [row["checkpoint"] for row in events(copy, "damaged_checkpoint")] == [newest.name]
    assert events(copy, "training_resumed")[-1]["step"] == int(before.name[5:])
    assert curve(copy) == curve(undisturbed) and last_state(copy) == last_state(undisturbed)


def test_a_run_without_any_good_checkpoint_stops_rather_than_begin_again(
    copy: Path, request_of: Callable[..., list[object]]
) -> None:
    for folder in checkpoints(copy / "checkpoints"):
        (folder / "manifest.json").write_text("{}")
    for folder in checkpoints(copy / "checkpoints")[2:]:
        shutil.rmtree(folder)
    refused = coatnet(*request_of(copy))
    assert refused.returncode == 1 and "none of step-00000006, step-00000012 is good" in refused.stderr
    (failed,) = events(copy, "failed")
    assert f"coatnet: {failed['message']}" in refused.stderr
    assert f"coatnet: {failed['message']}" in (copy / "logs" / "rank-0.log").read_text()


def test_a_finished_run_says_so_and_changes_nothing(copy: Path, request_of: Callable[..., list[object]]) -> None:
    before = contents(copy)
    again = coatnet(*request_of(copy))
    assert again.returncode == 0 and f"already done, {STEPS} of {STEPS} steps" in again.stdout
    assert contents(copy) == before


def test_a_longer_run_with_another_learning_rate_resumes_and_reports_the_change(
    copy: Path, undisturbed: Path, request_of: Callable[..., list[object]]
) -> None:
    longer = coatnet(*request_of(copy, f"train.steps={STEPS + 4}", "optim.learning_rate=1e-3", procs=1))
    assert longer.returncode == 0, longer.stderr
    changed = {
        "train.steps": [STEPS, STEPS + 4],
        "optim.learning_rate": [2e-3, 1e-3],
        "run.dir": [str(undisturbed), str(copy)],
    }
    assert events(copy, "attempt_started")[-1]["changed"] == changed
    assert events(copy, "training_resumed")[-1]["step"] == STEPS and last_step(copy) == STEPS + 4


@pytest.mark.parametrize(
    ("override", "key"),
    [("model.head_size=32", "model.head_size"), ("run.seed=8", "run.seed"), ("train.micro_batch=16", "micro_batch")],
)
def test_what_defines_a_run_may_not_change(
    copy: Path, request_of: Callable[..., list[object]], override: str, key: str
) -> None:
    before = contents(copy)
    refused = coatnet(*request_of(copy, override))
    assert refused.returncode == 2 and key in refused.stderr and "run.dir=" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert contents(copy) == before


def test_another_training_set_under_the_same_name_is_refused(
    undisturbed: Path, request_of: Callable[..., list[object]], digits: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(digits / "train", tmp_path / "train"))
    run = [f"data.train={data}", "data.val=null", "checkpoint.every=1"]
    assert coatnet(*request_of(tmp_path / "run", *run, "train.steps=1", procs=1)).returncode == 0
    shutil.rmtree(data)
    shutil.copytree(digits / "val", data)
    refused = coatnet(*request_of(tmp_path / "run", *run, "train.steps=4", procs=1))
    assert refused.returncode == 2 and "a different training set" in refused.stderr


def test_a_run_resumes_to_the_bit_where_its_data_lie_now(
    copy: Path, undisturbed: Path, request_of: Callable[..., list[object]], digits: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(digits / "train", tmp_path / "elsewhere"))
    as_format_1(data)
    for folder in checkpoints(copy / "checkpoints")[3:]:
        shutil.rmtree(folder)
    done = coatnet(*request_of(copy, f"data.train={data}/"))
    assert done.returncode == 0, done.stderr
    assert events(copy, "attempt_started")[-1]["changed"]["data.train"] == [f"{digits}/train", f"{data}/"]
    assert curve(copy) == curve(undisturbed) and last_state(copy) == last_state(undisturbed)
    assert json.loads((data / "manifest.json").read_text())["format"] == 2


def test_a_run_whose_checkpoints_are_gone_begins_again_only_by_restart(
    copy: Path, request_of: Callable[..., list[object]]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    refused = coatnet(*request_of(copy))
    assert refused.returncode == 2 and contents(copy) == before
    assert f"had saved step {STEPS} and logged step {STEPS}" in refused.stderr and "--restart" in refused.stderr
    anew = coatnet(*request_of(copy, "train.steps=2", "model.head_size=32", "--restart", procs=1))
    assert anew.returncode == 0, anew.stderr
    assert contents(copy / "restarted-1") == before
    assert [row["step"] for row in events(copy, "training_started")] == [0] and last_step(copy) == 2
    again = coatnet(*request_of(copy, "train.steps=2", "model.head_size=32", procs=1))
    assert "already done" in again.stdout and not (copy / "restarted-2").exists()


def test_a_run_that_never_saved_begins_again_and_tells_how_many_steps_are_lost(
    undisturbed: Path, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(undisturbed / name, run)
    (run / "events.jsonl").write_text('{"time": 1, "attempt": 0, "event": "attempt_started"}\n')
    again = coatnet(*request_of(run, "train.steps=1", procs=1))
    assert (
        again.returncode == 0 and f"starts over: it had no checkpoint yet, and {STEPS} steps are lost" in again.stderr
    )
    assert events(run, "training_started")[0]["steps_lost"] == STEPS and last_step(run) == 1


def test_a_run_that_is_alive_is_refused_and_one_that_was_asked_to_stop_resumes(
    undisturbed: Path, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = started(*request_of(run))
    wait_until(lambda: last_step(run) >= 2, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE_SECONDS) == 3
    assert first.stderr is not None and "run the same command to resume" in first.stderr.read()
    assert events(run, "interrupted")[-1]["step"] < STEPS

    second = started(*request_of(run))
    stopped_at = events(run, "interrupted")[-1]["step"]
    wait_until(lambda: last_step(run) > stopped_at, second)
    for pid in [second.pid, *ranks_of(second)]:  # frozen, it can't be done before the third has asked
        os.kill(pid, signal.SIGSTOP)
    third = coatnet(*request_of(run))
    assert third.returncode == 2 and third.stderr.startswith(f"{run}: held by process "), third.stderr
    assert "already running" in third.stderr
    for pid in [*ranks_of(second), second.pid]:
        os.kill(pid, signal.SIGCONT)
    assert second.wait(PATIENCE_SECONDS) == 0
    assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


def test_evaluation_gives_the_same_figures_on_any_number_of_ranks(undisturbed: Path, digits: Path) -> None:
    answers = [
        coatnet("evaluate", undisturbed, "--data", f"{digits}/val", "--procs", procs, "--json") for procs in (1, 2, 3)
    ]
    figures = [json.loads(answer.stdout) for answer in answers]
    assert figures[0] == figures[1] == figures[2]
    assert figures[0]["samples"] == 360 and figures[0]["broken"] == 0 and figures[0]["weights"] == "ema"
    logged = [row for row in rows(undisturbed / "metrics.jsonl") if "top1" in row][-1]
    assert figures[0]["top1"] == logged["top1"]
    assert figures[0]["loss"] == pytest.approx(logged["eval_loss"], rel=1e-5)  # under DeepSpeed and without


@pytest.fixture
def finetune_of(digits: Path, undisturbed: Path) -> Callable[..., list[object]]:
    def arguments(run: Path, *more: object) -> list[object]:
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={run}"]
        length = ["train.steps=8", "checkpoint.every=4", "log.every=1"]
        return ["finetune", "configs/tiny_finetune.yaml", "--from", undisturbed, "--procs", 2, *data, *length, *more]

    return arguments


def test_finetuning_begins_from_the_average_at_another_resolution_and_resumes(
    undisturbed: Path, finetune_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = coatnet(*finetune_of(run))
    assert done.returncode == 0, done.stderr
    reader, source = (CheckpointReader(checkpoints(folder / "checkpoints")[-1]) for folder in (run, undisturbed))
    assert reader.shapes["stages.2.0.attention.bias_table"] > source.shapes["stages.2.0.attention.bias_table"]
    losses = [row[3] for row in curve(run) if row[3] is not None]
    assert losses[0] < curve(undisturbed)[0][3]  # type: ignore[operator]  # begins from what was learnt
    lineage = reader.state()["ancestry"]
    assert [entry["run"] for entry in lineage] == [str(undisturbed), str(run)]
    shutil.rmtree(checkpoints(run / "checkpoints")[-1])
    before = curve(run)
    assert coatnet(*finetune_of(run)).returncode == 0
    assert curve(run) == before


@pytest.mark.torture
def test_finetuning_for_other_classes_takes_a_new_classifier_and_keeps_the_rest(
    undisturbed: Path, finetune_of: Callable[..., list[object]], digits: Path, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        for digit in "0123":
            shutil.copytree(digits / "digits" / part / digit, tmp_path / part / f"digit {digit}")
        assert coatnet("data", "pack", tmp_path / part, tmp_path / "packed" / part).returncode == 0
    data = [f"data.train={tmp_path}/packed/train", f"data.val={tmp_path}/packed/val"]
    run = tmp_path / "run"
    done = coatnet(*finetune_of(run, *data, "train.steps=2"))
    assert done.returncode == 0, done.stderr
    assert CheckpointReader(checkpoints(run / "checkpoints")[-1]).shapes["head.classifier.weight"] == (4, 96)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data", "pack", "no/such/folder", "out"], "no/such/folder"),
        (["pretrain", "no/such.yaml"], "no/such.yaml"),
        (["pretrain", "configs/tiny.yaml", "optim.learning_rte=1"], "did you mean optim.learning_rate?"),
        (
            ["pretrain", "configs/tiny.yaml", "train.micro_batch=fast"],
            'train.micro_batch is "fast"; it must be a whole number',
        ),
        (["pretrain", "configs/tiny.yaml", "train.micro_batch=24"], "train.micro_batch=16 or train.global_batch=72"),
        (["pretrain", "configs/tiny.yaml", "--procs", "4"], "for 4 ranks; ranks=2 or train.micro_batch=16"),
        (["pretrain", "configs/tiny.yaml", "data.train=no/such/data"], "no/such/data"),
        (["pretrain", "configs/tiny.yaml", "--check", "model.head_size=7"], "must divide the transformer width"),
        (["evaluate", "no/such/run", "--data", "no/such/data"], "no/such/run"),
        (["finetune", "configs/tiny_finetune.yaml", "--from", "no/such/run"], "no/such/run"),
    ],
)
def test_a_wrong_request_is_answered_with_status_2_and_one_line(
    arguments: list[str], said: str, tmp_path: Path, digits: Path
) -> None:
    if arguments[0] in ("pretrain", "finetune"):
        given = {text.split("=")[0] for text in arguments}
        data = [f"data.{part}={digits}/{part}" for part in ("train", "val") if f"data.{part}" not in given]
        arguments = [*arguments, *data, f"run.dir={tmp_path}/run"]
    refused = coatnet(*arguments)
    assert refused.returncode == 2, refused.stderr
    assert said in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_check_needs_no_data_and_says_what_would_be_trained() -> None:
    good = coatnet("pretrain", "configs/tiny.yaml", "--check", "--procs", 2)
    assert good.returncode == 0 and "2 micro batches of 32, 1 pass on 2 ranks" in good.stdout


def test_a_run_from_an_s3_that_fails_is_the_run_from_a_disk_and_records_retries(
    undisturbed: Path, digits: Path, request_of: Callable[..., list[object]], tmp_path: Path
) -> None:
    """5 % of the requests are refused, 1 % dropped half-way. Of all ranks one reads a manifest."""
    run, places = tmp_path / "run", ["data.train=s3://data/train", "data.val=s3://data/val"]
    with s3_server() as server:
        for part in ("train", "val"):
            for file in (digits / part).iterdir():
                write_file(*open_fs(f"s3://data/{part}/{file.name}"), file.read_bytes())
        server.plan = shares({"503": 0.05, "drop": 0.01})
        done = coatnet(*request_of(run, *places))
        assert done.returncode == 0, done.stderr
        failed = sum(request.fault is not None for request in server.requests)
        read = Counter(request.path for request in server.requests if request.method == "GET" and not request.fault)
        launcher, rank, page = 1, 1, 1  # the report's page compares with the plan
        assert read["/data/train/manifest.json"] == launcher + rank + page
        assert read["/data/val/manifest.json"] == launcher + rank
    assert curve(run) == curve(undisturbed)
    assert last_state(run) == last_state(undisturbed)
    assert consumed(run) == consumed(undisturbed)
    told = events(run, "read_retry")
    assert 0 < sum(row["count"] for row in told) <= failed
    assert all(row["url"].startswith("s3://data/") and row["reason"] for row in told)
