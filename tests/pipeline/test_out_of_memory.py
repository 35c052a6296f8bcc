"""Training that runs out of memory reports what it needed and what would fit, and that does fit."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.errors import RunFailed
from pipeline.memory.oom import explain_oom, is_out_of_memory
from tests.pipeline.runs import PATIENCE_SECONDS, ROOT, command, events, pack_two
from tests.pipeline.test_memory import tiny

ADDRESS_SPACE = 2_600 << 20
"""Bytes: of these, libraries and their threads take about 2 GiB before anything is trained."""


def coatnet_within(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command under a limit of memory, on two processors at most: each thread takes a part of it."""

    def limited() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, preexec_fn=limited,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    "then",
    ["the message", pytest.param("the advice", marks=pytest.mark.torture)],  # on a busy machine threads take more
)
def test_a_training_that_does_not_fit_its_memory_suggests_what_does(tmp_path: Path, then: str) -> None:
    run = tmp_path / "run"
    asked = ["pretrain", "configs/tiny.yaml", f"data.train={pack_two(tmp_path)}", "data.val=null", f"run.dir={run}"]
    asked += ["train.global_batch=512", "train.micro_batch=512", "train.steps=1", "log.samples=false"]
    failed = coatnet_within(ADDRESS_SPACE, *asked)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    (event,) = events(run, "out_of_memory")
    error, needed, usable, fits = failed.stderr[failed.stderr.index("coatnet: ") :].splitlines()
    assert "rank 0 ran out of memory: " in error and "usable" in usable
    assert max(event["needed_bytes"], key=event["needed_bytes"].get) == "activations" and "GiB (activations " in needed
    suggested: dict[str, Any] = {key: value for changes in event["fits"] for key, value in changes.items()}
    assert f"would fit: train.micro_batch={suggested['train.micro_batch']} (" in fits and "run.dir=" in fits
    if then == "the advice":
        advised = [f"run.dir={tmp_path / 'smaller'}", f"train.micro_batch={suggested['train.micro_batch']}"]
        done = coatnet_within(ADDRESS_SPACE, *asked, *advised)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_failing_estimate_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with FakeTensorMode():
        without_memory = torch.empty(3)  # as a compiler leaves such behind
    torch._C._set_throw_on_mutable_data_ptr(without_memory)
    no_network = -1  # has so many classes
    with pytest.raises(RunFailed) as raised, explain_oom(tiny(f"run.dir={tmp_path}"), no_network):
        torch.empty(1 << 50)
    assert without_memory.shape == (3,)
    assert "rank 0 ran out of memory: " in str(raised.value) and "can't allocate memory" in str(raised.value)
    assert "could not be computed" in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_errors_of_allocators_are_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), RunFailed("the writer is out of memory")])
def test_other_errors_and_our_own_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explain_oom(tiny(), 10):
        raise error
    assert raised.value is error
