"""Errors that end a command: each has its exit status, and a message that says what to do."""

from data.errors import DataError, UsageError

__all__ = ["DataError", "Interrupted", "RunFailed", "UsageError", "first_line"]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class RunFailed(RuntimeError):
    """The work failed; the message says where and what to do. Exit status 1."""


class Interrupted(RuntimeError):
    """The run stopped before its end and can be resumed. Exit status 3."""
