"""A rank that ends with an error says so in a file, since what Slurm reports of many ranks is one number.

Whoever starts the ranks names the file and the start in the environment; elsewhere nothing is written. Next: cli.py.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.json_lines import JsonLines

FILE, START = "COATNET_FAILURES", "COATNET_START"


def note_failure(status: int, message: str) -> None:
    """Adds this rank's exit status and last words; a launcher's, which has no rank, as rank 0's."""
    path = os.environ.get(FILE)
    if path is None:
        return
    facts = {"start": os.environ.get(START, ""), "time": round(time.time(), 3), "rank": int(os.environ.get("RANK", 0))}
    JsonLines(Path(path)).write({**facts, "host": os.uname().nodename, "status": status, "message": message})
