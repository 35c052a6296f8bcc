"""The tiny configuration on one GPU, in bf16 on NCCL, with DALI's mixed decoder: `make gpu`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.pinned import ToHost, to_device
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import (
    PATIENCE_SECONDS,
    ROOT,
    coatnet,
    curve,
    events,
    last_step,
    ranks_of,
    rows,
    started,
    wait_until,
)

pytestmark = pytest.mark.gpu


def losses(run: Path) -> np.ndarray:
    return np.array([row[3] for row in curve(run) if row[3] is not None], np.float64)


def request(digits: Path, run: Path, *more: str) -> list[str]:
    data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={run}"]
    how = ["train.precision=bf16", "log.every=1", "checkpoint.every=10"]
    return ["pretrain", "configs/tiny.yaml", *data, *how, *more]


def test_copies_through_pinned_memory_make_no_host_wait_and_keep_their_order() -> None:
    numbers = np.arange(1000.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = to_device(numbers, torch.device("cuda", 0))
        there = ToHost(values)
        values += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.tolist() == numbers.tolist()


def test_the_tiny_configuration_learns_the_digits_on_a_gpu(digits: Path, tmp_path: Path) -> None:
    done = coatnet(*request(digits, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert [row["top1"] for row in rows(tmp_path / "run" / "metrics.jsonl") if "top1" in row][-1] >= 0.985


@pytest.mark.parametrize("how", [(), ("train.deterministic=true",), ("train.deterministic=true", "zero.stage=3")])
def test_a_run_killed_on_a_gpu_resumes_with_the_losses_of_the_undisturbed_run(
    digits: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    whole, killed = (request(digits, tmp_path / name, "train.steps=60", *how) for name in ("whole", "killed"))
    assert coatnet(*whole).returncode == 0
    process = started(*killed)
    wait_until(lambda: last_step(tmp_path / "killed") >= 25, process)
    ranks = ranks_of(process)
    os.kill(ranks[0], signal.SIGKILL)
    process.wait(60)
    time.sleep(1)
    done = coatnet(*killed)
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "killed", "training_resumed")[-1]["step"] >= 10
    # Else cuDNN's backward adds up in no fixed order.
    np.testing.assert_allclose(losses(tmp_path / "killed"), losses(tmp_path / "whole"), rtol=0 if how else 0.05)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bad_steps_are_not_applied_on_a_gpu_and_three_are_rolled_back(digits: Path, tmp_path: Path, stage: int) -> None:
    wanted = request(digits, tmp_path / "run", "train.steps=28", "data.val=null", f"zero.stage={stage}")[1:]
    on_ranks(1, [{"arguments": wanted, "faults": {"inf": [3], "spikes": [22, 23, 24]}}], tmp_path)
    assert [row["step"] for row in events(tmp_path / "run", "step_skipped")] == [3, 22, 23, 24]
    (back,) = events(tmp_path / "run", "rollback")
    assert (back["to"], back["first"], back["last"]) == (20, 22, 24)
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")][-5:] == [21, 25, 26, 27, 28]


@pytest.mark.parametrize(
    "how",
    [
        (), ("zero.stage=2",), ("zero.stage=3",), ("zero.stage=3", "zero.offload=true"), ("train.compile=true",),
        ("zero.stage=3", "train.compile=true", "train.activation_checkpointing=all"),
    ],
)  # fmt: skip
def test_the_first_losses_on_a_gpu_are_those_of_the_cpu_to_rounding(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    precise = ["train.precision=fp32", "train.steps=4", "augment.randaugment.layers=0", "optim.eps=1e-3"]
    done = coatnet(*request(digits, tmp_path / "gpu", *precise, *how))
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert coatnet(*request(digits, tmp_path / "cpu", *precise)).returncode == 0
    # the digits are PNG, which both backends decode exactly; resizing differs by a level
    np.testing.assert_allclose(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), rtol=0.01)


LIMITED = """
import sys
import torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
sys.argv = ["coatnet", *sys.argv[2:]]
from pipeline.cli import main
main()
"""


def coatnet_on_a_part(gpu_bytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a single rank, whose allocator may take so many bytes of the GPU."""
    import torch

    fraction = gpu_bytes / torch.cuda.get_device_properties(0).total_memory
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(fraction), *arguments], cwd=ROOT, env={**os.environ, **rank},
        capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_that_fills_the_gpu_is_told_what_fits_and_that_runs(digits: Path, tmp_path: Path, precision: str) -> None:
    part, run = 2 << 30, tmp_path / "full"
    asked = ["train.global_batch=2048", "train.steps=2", "data.val=null", f"train.precision={precision}"]
    failed = coatnet_on_a_part(part, *request(digits, run, *asked, "train.micro_batch=2048"))
    assert failed.returncode == 1, failed.stderr
    assert "ran out of memory" in failed.stderr and "GPU 0" in failed.stderr and "Traceback" not in failed.stderr
    (event,) = events(run, "out_of_memory")
    assert max(event["needed_bytes"], key=event["needed_bytes"].get) == "activations"
    assert event["usable_bytes"] <= part
    found = {key: value for way in event["fits"] for key, value in way.items()}
    advised = f"train.micro_batch={found['train.micro_batch']}"
    assert advised in failed.stderr
    done = coatnet_on_a_part(part, *request(digits, tmp_path / "fits", *asked, advised))
    assert done.returncode == 0, done.stderr
