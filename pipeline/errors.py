"""Errors that end a command: each has its exit status, and a message that says what to do."""

import os

from data.errors import DataError, UsageError
from data.urls import without_secrets

__all__ = ["DataError", "Interrupted", "RunFailed", "UsageError", "explain", "first_line", "without_secrets"]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class RunFailed(RuntimeError):
    """The work failed; the message says where and what to do. Exit status 1."""


class Interrupted(RuntimeError):
    """The run stopped before its end and can be resumed. Exit status 3."""


def explain(error: BaseException) -> str | None:
    """What is wrong and what to do, of an error that a person can act on; None of one that needs its traceback."""
    if isinstance(error, UsageError | DataError | RunFailed | Interrupted):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:  # the machine's, or a stranger's in a run's folder
        where = f"{os.fsdecode(error.filename)}: {error.strerror}"
        return f"{where}; fix that, then run the same command again"
    return None
