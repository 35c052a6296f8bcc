"""Paths as people type them, in a configuration or on the command line: `~` and `$VARIABLES` stand for folders."""

import os
import re

from data.errors import UsageError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def expand(path: str, name: str) -> str:
    """The path with the variables and the home folder that it names; `name` is the key or option it was given as.

    Neither a URL changes, whose `$` is its server's, nor the name of a file that exists as it is written. UsageError
    where there is no such variable or user.
    """
    if "://" in path:
        return path

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable not in os.environ:
            raise UsageError(f"{name} is {path}, but the environment variable {variable} is not set")
        return os.environ[variable]

    replaced = path if os.path.lexists(os.path.expanduser(path)) else _VARIABLE.sub(value, path)
    expanded = os.path.expanduser(replaced)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        user = expanded.partition("/")[0]
        raise UsageError(f"{name} is {path}, but there is no user {user[1:]}; ./{user} is a name in this folder")
    return expanded
