"""Standard output and standard error where nobody reads them any more, or where they were closed from the start.

A pipe whose reader has ended (`| head`, a tee that was killed), a terminal that is gone, a full disk behind `> log`:
what a training prints is lost then, and the training continues; its lines are in RUN/logs too. A command whose output
is its result ends, quietly where the reader has.
"""

from __future__ import annotations

import errno
import io
import os
import sys

from pipeline.errors import RunFailed

_DESCRIPTORS = {"stdout": 1, "stderr": 2}


class OutputFile(io.FileIO):
    """A file of text for people; `lost` is why its first failed write failed.

    Failed writes are dropped, or, if it is `needed`, RunFailed, or BrokenPipeError where nobody reads it.
    """

    needed = False
    lost: str | None = None

    def write(self, data, /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            written, self.lost = None, self.lost or error.strerror
            if self.needed:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is in buffers
                if error.errno == errno.EPIPE:
                    raise
                raise RunFailed(f"standard output cannot be written: {error.strerror}") from None
        return memoryview(data).nbytes if written is None else written  # None: it would block


def prepare_output(needed: bool) -> None:
    """Makes sys.stderr a stream that never fails, and sys.stdout one too, unless it is `needed`."""
    for descriptor in (0, *_DESCRIPTORS.values()):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file of the run would be taken for it
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in _DESCRIPTORS.items():
        stream, file = getattr(sys, name), OutputFile(descriptor, "wb", closefd=False)
        file.needed = needed and name == "stdout"
        encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "backslashreplace")
        lines = not file.needed or (stream is not None and stream.line_buffering)
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(file), encoding, errors, line_buffering=lines))


def lost_output() -> str | None:
    """Which of them is lost and why, if one is."""
    for name in _DESCRIPTORS:
        file = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
        if isinstance(file, OutputFile) and file.lost:
            return f"{name}: {file.lost}"
    return None
