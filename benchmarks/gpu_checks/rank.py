"""A training as the only rank of its process; with faults, a job of tests/pipeline/batch_runs.py.

python -P coatnet_main.py benchmarks.gpu_checks.rank '{"arguments": [...]}' SHARE_OF_THE_GPUS_MEMORY
"""

from __future__ import annotations

import json
import os
import sys

import torch

from benchmarks.gpu_checks.images import decoder


def be_the_only_rank() -> str:
    """Sets a launcher's variables for one rank, and returns what decodes here."""
    from pipeline.distributed.launcher import free_port

    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}}
    return decoder()


def main() -> None:
    be_the_only_rank()
    job, share = json.loads(sys.argv[1]), float(sys.argv[2])
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    if "faults" in job:
        from tests.pipeline.batch_runs import do

        return do(job)
    from pipeline.cli import main

    sys.argv = ["coatnet", "pretrain", *job["arguments"]]
    main()


if __name__ == "__main__":
    main()
