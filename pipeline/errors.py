"""How a command ends before its work is done, as exit status and one line for the person who must act."""

from data.errors import DataError, UsageError

__all__ = ["DataError", "Interrupted", "RunFailed", "UsageError", "first_line"]


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class RunFailed(RuntimeError):
    """The work failed; the message says where and what to do. Exit status 1."""


class Interrupted(RuntimeError):
    """The run stopped before its end and can be resumed. Exit status 3."""
