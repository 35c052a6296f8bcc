"""A rank that fails alone ends the run at once and by its own error, whatever it shares with the other ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from pipeline.checkpoint.reader import checkpoints, step_of
from pipeline.distributed.collectives import lost_rank
from tests import forked
from tests.pipeline.hang_injection import ERRORS, MODULE
from tests.pipeline.runs import PATIENCE_SECONDS, coatnet, events

ALL = [pytest.param(*case, marks=pytest.mark.torture) for case in itertools.product(ERRORS, (1, 2, 3), (0, 1))]
STEPS_BEFORE = 2


@pytest.mark.parametrize(("kind", "stage", "rank"), [("memory", 1, 1), *ALL])
def test_a_rank_that_fails_alone_ends_the_run_by_its_error(
    kind: str, stage: int, rank: int, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = ["train.global_batch=16", "train.micro_batch=8", "train.steps=9", "checkpoint.every=1", f"zero.stage={stage}"]
    words = ["pretrain", "configs/tiny.yaml", f"data.train={digits}/train", "data.val=null", f"run.dir={run}", *few]
    done = forked.run(MODULE, 2, kind, rank, 1 + STEPS_BEFORE, *words, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1, done.stderr
    said = [done.stderr, (run / "logs" / "rank-1.log").read_text()]
    assert ERRORS[kind] in said[rank] and f"rank {1 - rank} has lost another rank" in said[1 - rank]
    assert ("the cleanup failed too: ValueError" in said[rank]) is (kind != "stuck")
    status = json.loads(coatnet("status", run, "--json").stdout)
    assert [row["rank"] for row in events(run, "failed")] == [rank]
    assert "failed" in str(status) and ERRORS[kind] in str(status)
    assert step_of(checkpoints(run / "checkpoints")[-1]) == STEPS_BEFORE  # it was being written


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4711", "lost"),
        (
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, remote process exited or there was a"
            " network error, NCCL version 2.28.9\nncclRemoteError: A call failed possibly due to a network error",
            "lost",
        ),
        ("NCCL communicator was aborted on rank 0.  Original reason for failure was: another one's", "lost"),
        (
            "NCCL communicator was aborted on rank 0. Original reason for failure was: [Rank 0] Watchdog caught"
            " collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 3600000 milliseconds",
            "timed out",
        ),
        ("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", "lost"),
        ("wait timeout after 1800000ms, keys: /default_pg/0", "timed out"),
        ("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.28.9", None),
    ],
)
def test_errors_of_collectives_tell_whether_another_rank_is_gone(error: str, meaning: str | None) -> None:
    assert (meaning or "None") in str(lost_rank(RuntimeError(error)))
    assert lost_rank(ConnectionResetError(error)) is None
