"""URLs and paths as people write them: what of them names the file, and what is secret.

Only a web address has a query; elsewhere "?" is part of a name or a pattern. A file's kind is read from its name, in
any case of its letters and without the query, which goes with every read and into no message: it may be a signature.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_WEB = re.compile(r"https?://", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?@]+@")
_QUERY = re.compile(r"(https?://[^\s?#]*)[?#](?!\.\.\.)\S*?(?=[\"':;,.)]*(?:\s|$))", re.IGNORECASE)


def is_web(url: str) -> bool:
    """Whether this is an address of a web server."""
    return bool(_WEB.match(url))


def split_query(url: str) -> tuple[str, str]:
    """A URL without its query, and that with its "?"; "" where it has none."""
    end = re.search("[?#]", url) if is_web(url) else None
    return (url[: end.start()], url[end.start() :]) if end else (url, "")


def join(folder: str, name: str) -> str:
    """The URL or path of a file in a folder, whose query goes with it unless it has its own."""
    address, query = split_query(folder)
    return f"{address.rstrip('/')}/{name}" + ("" if "?" in name else query)


def has_suffix(url: str, *suffixes: str) -> bool:
    """Whether the file's name ends with one of these (in lower case)."""
    return split_query(url)[0].lower().endswith(suffixes)


def file_name(url: str) -> str:
    """The last part of a file's or folder's place, as it is called on its server's disk."""
    name = split_query(url)[0].rstrip("/").rpartition("/")[2]
    return unquote(name) if is_web(url) else name


def without_secrets(text: str) -> str:
    """A message whose URLs have no credentials, and instead of a query "?..."."""
    return _QUERY.sub(r"\1?...", _CREDENTIALS.sub("", text))
