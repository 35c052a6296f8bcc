"""A rank that ends with an error says so in a file, since what Slurm reports of many ranks is one number.

Whoever starts the ranks names the file and the start in the environment. Elsewhere rank 0, which has the terminal,
leaves its last words in the run. Next: cli.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DataError, RunFailed, first_line
from pipeline.json_lines import JsonLines

FILE, START = "COATNET_FAILURES", "COATNET_START"


def note_failure(status: int, message: str) -> None:
    """Adds this rank's exit status and last words; a launcher's, which has no rank, as rank 0's."""
    path = os.environ.get(FILE)
    if path is None:
        return
    facts = {"start": os.environ.get(START, ""), "time": round(time.time(), 3), "rank": int(os.environ.get("RANK", 0))}
    JsonLines(Path(path)).write({**facts, "host": os.uname().nodename, "status": status, "message": message})


@contextmanager
def last_words(run: Path) -> Iterator[None]:
    """Inside, what rank 0 fails with goes to events.jsonl as `failed`, and to its log, unless the file above has it."""
    from pipeline.attempts import newest_of_this_process
    from pipeline.record import Events  # it imports torch

    try:
        yield
    except (RunFailed, DataError) as error:
        if FILE not in os.environ and (attempt := newest_of_this_process(run)) is not None:
            Events(run, attempt, 0).write("failed", message=first_line(error))
            with (run / "logs" / "rank-0.log").open("a") as log:
                print(f"coatnet: {error}", file=log)
        raise
