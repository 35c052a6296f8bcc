"""The two ways in which work on data ends early: the request was wrong, or the work failed."""


class UsageError(ValueError):
    """What was asked for cannot be done as it stands; the message says what to change. Exit status 2."""


class DataError(RuntimeError):
    """The data could not be read, checked or written; the message names the place. Exit status 1."""
