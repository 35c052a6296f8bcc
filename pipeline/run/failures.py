"""A rank that fails records its error in a file, since Slurm reports only one exit code for all ranks.

What starts the ranks sets the file and the start's name in the environment. Without it, rank 0 records its exit reason
in the run's events (../attempt.py).
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.distributed.environment import FILE, START
from pipeline.run.jsonl import append_row


def record_failure(status: int, message: str) -> None:
    """Appends this rank's exit status and message; a launcher, which has no rank, counts as rank 0."""
    path = os.environ.get(FILE)
    if path is None:
        return
    facts = {"start": os.environ.get(START, ""), "rank": int(os.environ.get("RANK", 0)), "host": os.uname().nodename}
    append_row(Path(path), {**facts, "status": status, "message": message})
