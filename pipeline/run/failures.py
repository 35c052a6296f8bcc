"""A rank that ends with an error says so in a file, since what Slurm reports of many ranks is one number.

Whoever starts the ranks names the file and the start in the environment. Elsewhere rank 0, which has the terminal,
leaves its last words in the run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.distributed.environment import FILE, START
from pipeline.run.jsonl import JsonLines


def record_failure(status: int, message: str) -> None:
    """Adds this rank's exit status and last words; a launcher's, which has no rank, as rank 0's."""
    path = os.environ.get(FILE)
    if path is None:
        return
    facts = {"start": os.environ.get(START, ""), "time": round(time.time(), 3), "rank": int(os.environ.get("RANK", 0))}
    JsonLines(Path(path)).write({**facts, "host": os.uname().nodename, "status": status, "message": message})
