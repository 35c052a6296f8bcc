"""RUN/tensorboard/: the rows of metrics.jsonl as TensorBoard's curves, one file for each start of the run.

A row is one record, written at once and whole, or later, so that a killed run has lost none; a start's first record
tells TensorBoard to forget what earlier files have past the checkpoint's step. Files are named by the attempt, since
TensorBoard reads them in the order of their names and clocks of nodes differ.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.run.appended import AppendedFile, Warn, print_warning

# tensorboardX loads the clients of object stores where they are installed; only its messages are needed here.
_HIDDEN = [name for name in ("boto3", "google.cloud.storage") if name not in sys.modules]
for _name in _HIDDEN:
    sys.modules[_name] = None  # type: ignore[assignment]  # to import it fails, as if it were not there
try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c
finally:
    for _name in _HIDDEN:
        del sys.modules[_name]


class TensorBoard:
    """The event file of one start."""

    def __init__(self, folder: Path, attempt: int, first_step: int, warn: Warn = print_warning) -> None:
        """Has TensorBoard forget the rows of earlier files past `first_step`."""
        self._file = AppendedFile(folder / f"events.out.tfevents.{attempt:010d}.{os.uname().nodename}", warn)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row's numbers, each as a curve of its name."""
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._add(Event(step=row["step"], summary=Summary(value=values)))

    def close(self, done: bool) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        self._file.append(length + _checksum(length) + content + _checksum(content))


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
