"""The loop waits for the device where DeepSpeed does, once a step: a host that waits elsewhere launches nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.loader import LoaderSpec
from data.shards.manifest import read_manifest
from pipeline.training.evaluation import evaluate
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.waits import AFTER

NOTHING_TO_COPY = {"to in partition_parameters.py:_allgather_params_coalesced"}
"""Where DeepSpeed moves what is on the device already, unless it is offloaded."""
DEEPSPEED_WAITS = {"_local_scalar_dense in utils.py:is_invalid_grad_norm": 1}
"""After the last backward, for the norm of all gradients."""
READ = "tolist in pinned.py:tolist"
"""Reads what was copied to pinned memory: the step's sums, which arrived before DeepSpeed's wait was over."""
IN_A_ROW = {"_local_scalar_dense in metrics.py:log_step": 1}
OF_AN_EVALUATION = {"tolist in evaluation.py:evaluate": 1}
BATCHES = 23
"""Of an evaluation: 360 images, 8 of them on two ranks."""


@pytest.fixture(scope="module")
def waits(digits: Path) -> Callable[[int, int], tuple[Counter[str], Counter[str]]]:
    """What a rank waited for at a stage in a step of two passes: the loop, and other threads. The two ranks have three
    micro batches, so one pass is padding. At stage 2 the step is logged and followed by an evaluation."""

    def job(stage: int, precision: str, *more: str) -> dict[str, object]:
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={digits}/waits-{stage}"]
        sizes = ["model.resolution=16", "train.global_batch=24", "train.micro_batch=8", "train.steps=5"]
        draws = ["augment.mixup=0.2", "train.stochastic_depth=0.1"]
        rare = ["log.every=100", "evaluate.every=null", "checkpoint.every=100"]
        ways = [f"zero.stage={stage}", f"train.precision={precision}", *more]
        return {"arguments": ["configs/tiny.yaml", *data, *sizes, *draws, *rare, *ways], "waits": 4}

    on_ranks(2, [job(1, "bf16"), job(2, "fp32", "log.every=1", "evaluate.every=4"), job(3, "fp32")], digits)

    def found(stage: int, rank: int) -> tuple[Counter[str], Counter[str]]:
        counts = json.loads((digits / f"waits-{stage}/waits-{rank}.json").read_text())
        loop = {call: count for call, count in counts["loop"].items() if call not in {*NOTHING_TO_COPY, AFTER}}
        return Counter(loop), Counter(counts["threads"])

    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_waits_for_the_device_where_deepspeed_does_and_its_loader_never(stage, rank, waits):
    assert waits(stage, rank) == ({**DEEPSPEED_WAITS, READ: 1}, {})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_follows_the_backwards_takes_fewer_than_two_operations_a_parameter(stage, waits, digits):
    waits(stage, 0)
    counts = json.loads((digits / f"waits-{stage}/waits-0.json").read_text())
    assert 0 < counts["loop"][AFTER] < 2 * counts["parameters"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_row_waits_once_and_an_evaluation_for_the_batch_before_the_last(rank, waits):
    loop, threads = waits(2, rank)
    gathers = {call: count for call, count in loop.items() if call.endswith("collectives.py:all_gather")}
    assert loop == {**DEEPSPEED_WAITS, **IN_A_ROW, **OF_AN_EVALUATION, READ: 1 + BATCHES - 1, **gathers}
    assert not threads


@pytest.mark.parametrize("asked_after", [0, 1, 5])
def test_an_evaluation_ends_at_most_one_batch_after_a_stop_is_asked_for(asked_after, digits, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)  # of one rank
    batches = 0

    def forward(images: torch.Tensor) -> torch.Tensor:
        nonlocal batches
        batches += 1
        return torch.zeros(len(images), 10)

    spec = LoaderSpec(0, 1, 32, 16, torch.device("cpu"), 1)
    manifest = read_manifest(str(digits / "val"))
    assert evaluate(forward, manifest, 1.0, "softmax", spec, lambda: batches >= asked_after) is None
    assert batches == asked_after + 1
