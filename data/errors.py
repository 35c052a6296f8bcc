"""The two ways in which work on data ends early: the request was wrong, or the work failed."""

from data.urls import without_secrets


class _Message(Exception):
    """The message of an error, which may end in logs and so has no credentials of its URLs."""

    def __init__(self, message: str) -> None:
        super().__init__(without_secrets(message))


class UsageError(_Message, ValueError):
    """What was asked for cannot be done as it stands; the message says what to change. Exit status 2."""


class DataError(_Message, RuntimeError):
    """The data could not be read, checked or written; the message names the place. Exit status 1."""
