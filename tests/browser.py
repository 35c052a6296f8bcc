"""A page as Chromium shows it: what went wrong on it, what it asked of any network, and which pictures it drew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MISSING = "needs Chromium: apt-get install --no-install-recommends chromium"
_DRAWN = """(() => {
  const images = [...document.images], drawings = [...document.querySelectorAll("svg")];
  const empty = images.filter(i => !(i.complete && i.naturalWidth && i.getBoundingClientRect().width));
  const blank = drawings.filter(s => !(s.getBoundingClientRect().height > 20 && s.querySelector("path, rect")));
  return {images: images.length, drawings: drawings.length, broken: empty.length + blank.length,
          overflow: document.documentElement.scrollWidth - window.innerWidth, text: document.body.innerText,
          scripts: document.scripts.length};
})()"""


@dataclass
class Shown:
    """A page at a width: counts of what it drew, and what was wrong or asked for elsewhere."""

    facts: dict[str, Any]
    problems: list[Any]
    requests: list[str]


class Browser:
    """Chromium's devtools protocol over its pipe: messages of JSON, each ended by a null byte."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of = os.fdopen(to, "wb", buffering=0), os.fdopen(of, "rb")
        self._number, self.seen = 0, list[dict[str, Any]]()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def show(self, page: Path, width: int) -> Shown:
        self.seen.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Page.navigate", url=page.as_uri())
        while not any(message.get("method") == "Page.loadEventFired" for message in self.seen):
            self.seen.append(self._next())
        facts = self.ask("Runtime.evaluate", expression=_DRAWN, returnByValue=True)["result"]["value"]
        of = {name: [each["params"] for each in self.seen if each.get("method") == name] for name in _HEARD}
        urls = [each["request"]["url"] for each in of["Network.requestWillBeSent"]]
        requests = [url for url in urls if not url.startswith("data:") and url != page.as_uri()]
        return Shown(
            facts, of["Log.entryAdded"] + of["Runtime.consoleAPICalled"] + of["Runtime.exceptionThrown"], requests
        )

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **getattr(self, "_session", {})}
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.seen.append(answer)
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._of.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            message += byte
        return json.loads(message)


_HEARD = ("Network.requestWillBeSent", "Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A headless Chromium; where there is none the test fails in CI, and else is skipped."""
    program = shutil.which("chromium")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    (its_input, to), (of, its_output) = os.pipe(), os.pipe()
    options = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"
    start = f'exec "$0" {options} --user-data-dir="$1" 3<&{its_input} 4>&{its_output}'
    process = subprocess.Popen(
        ["bash", "-c", start, program, str(profile)], pass_fds=(its_input, its_output), stderr=subprocess.DEVNULL
    )
    os.close(its_input)
    os.close(its_output)
    browser = Browser(to, of)
    try:
        yield browser
    finally:
        browser.ask("Browser.close")
        process.wait(timeout=30)
