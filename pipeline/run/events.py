"""RUN/events.jsonl: the events of a run, one object a line, append-only."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.run.jsonl import JsonLines, read_lines, read_metrics
from pipeline.run.small_files import NUMBER, has

UNNOTICED_SECONDS = 0.01
BEGIN_EVENTS = ("training_started", "training_resumed")
"""One of them opens the steps of each attempt, and of what follows a rollback."""
HANG_EVENTS = ("heartbeat_lost", "hang")
_FIELDS = {
    **{event: {"step": int} for event in (*BEGIN_EVENTS, "first_step", "interrupted")},
    **{event: {"seconds": NUMBER} for event in ("evaluation", "checkpoint_stall")},
    **{event: {"ranks": list} for event in HANG_EVENTS},
    "step_skipped": {"step": int},
    "rollback": {"to": int, "first": int, "last": int},
    "sample_replaced": {"step": int, "key": str, "reason": str},
    "failed": {"message": str},
    "checkpoint_failed": {"in_a_row": int, "reason": str},
    "out_of_memory": {"rank": int, "error": str},
}
"""Without which an event is not the program's."""
_OF_A_CHECKPOINT = ("checkpoint", "training_resumed", "interrupted", "finished")


class Events:
    """Appends events with `time` (seconds since 1970), `attempt` and `event`; only one rank writes."""

    def __init__(self, run: Path, attempt: int, rank: int) -> None:
        self._path, self.attempt, self.rank = run / "events.jsonl", attempt, rank
        self._lines = JsonLines(self._path) if rank == 0 else None

    def write(self, event: str, by: int = 0, **facts: Any) -> None:
        """`by` is the rank that writes: 0, or another where rank 0 can't."""
        if self.rank != by:
            return
        if self._lines is None:
            self._lines = JsonLines(self._path)
        self._lines.write({"time": round(time.time(), 3), "attempt": self.attempt, "event": event, **facts})

    @contextmanager
    def timed(self, event: str, **facts: Any) -> Iterator[None]:
        """Records the `seconds` that training waits for what is inside, unless they are too few to notice."""
        began = time.monotonic()
        try:
            yield
        finally:
            if (seconds := time.monotonic() - began) > UNNOTICED_SECONDS:
                self.write(event, **facts, seconds=round(seconds, 3))

    def warn(self, event: str, message: str, **facts: Any) -> None:
        """Records that something beside the training failed, and prints it; training continues."""
        print(f"warning: {message}", file=sys.stderr)
        self.write(event, **facts)

    def warn_unwritten(self, path: Path, problem: str) -> None:
        """Records what a file lacks (appended.py)."""
        self.warn("write_failed", f"{path} {problem}", file=str(path), reason=problem)

    def close(self) -> None:
        """Writes what waits; a later event is still recorded."""
        if self._lines is not None:
            self._lines.close()


def read_events(run: Path) -> list[dict[str, Any]]:
    """The events of a run that have their fields; what else is in the file is skipped."""
    rows = read_lines(run / "events.jsonl", event=str, time=NUMBER)
    return [row for row in rows if has(row, _FIELDS.get(row["event"], {}))]


def steps_not_applied(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events of the steps with a bad loss or gradient that no later start has done again."""
    bad: list[Mapping[str, Any]] = []
    for row in events:
        if row["event"] in BEGIN_EVENTS:
            bad = [each for each in bad if each["step"] <= row["step"]]
        elif row["event"] == "step_skipped":
            bad.append(row)
    return bad


def last_saved_step(events: Iterable[Mapping[str, Any]]) -> int | None:
    """The step of the last checkpoint that a run has written and not abandoned by a rollback; None where none is.

    A run that finished, stopped or resumed after a step has one of it.
    """
    saved: list[int] = []
    for row in events:
        if row["event"] in _OF_A_CHECKPOINT and has(row, {"step": int}) and row["step"] > 0:
            saved.append(row["step"])
        elif row["event"] == "rollback" and has(row, {"to": int}):
            saved = [step for step in saved if step <= row["to"]]
    return max(saved, default=None)


def last_logged_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 where there is none."""
    return max((row["step"] for row in read_lines(run / "metrics.jsonl", step=int)), default=0)


def last_record(run: Path) -> dict[str, float]:
    """The step and the time of the last row of metrics, for the event of an attempt that may cut it back; or {}."""
    rows = read_metrics(run, step=int, time=NUMBER)
    return {"left_step": rows[-1]["step"], "left_time": rows[-1]["time"]} if rows else {}
