"""Checks a built site: `links.py FOLDER`.

Each link leads to a file and an anchor that are there, and no page asks elsewhere for what it shows.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHOWN = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "srcset"), ("iframe", "src")}
"""What a browser fetches by itself; `a` it follows when asked to."""


class Page(HTMLParser):
    """The anchors of a page and what it refers to, as (tag, attribute, URL)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name == "id" or (tag, name) == ("a", "name")):
                self.anchors.add(value)
            if value and ((tag, name) in SHOWN or (tag, name) == ("a", "href")):
                self.links.append((tag, name, value))


def problems(site: Path) -> list[str]:
    """What is wrong with the pages of a folder, a line each."""
    pages = {file.resolve(): Page(file.read_text()) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        for tag, name, url in page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if (tag, name) in SHOWN and parts.scheme != "data":
                    found.append(f"{file}: <{tag}> fetches {url}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file():
                found.append(f"{file}: {url} is no file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{file}: {url} has no such anchor")
    fetched = [file for file in site.rglob("*.css") if "url(http" in file.read_text() or "@import" in file.read_text()]
    return found + [f"{file} fetches from elsewhere" for file in fetched]


if __name__ == "__main__":
    if wrong := problems(Path(sys.argv[1])):
        sys.exit("\n".join(wrong))
