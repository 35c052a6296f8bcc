"""Checks for the runner of `coatnet bench gpu` that end in every way; light to import, since each is a process."""

import importlib
import os
import signal
import time
from collections.abc import Iterator

from benchmarks.gpu_checks import NotHere, Place, Row, attempt


def passes(place: Place, size: str) -> Iterator[Row]:
    yield {"size": size, "files in its folder": len(list(place.folder.iterdir()))}
    yield {"said": f"{size} on {place.device}"}


def crashes(place: Place) -> Iterator[Row]:
    yield {"before": 1}
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(place: Place) -> Iterator[Row]:
    yield {"before": 1}
    raise ValueError("no such thing")


def hangs(place: Place) -> Iterator[Row]:
    yield {"before": 1}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def lacks_a_package(place: Place) -> Iterator[Row]:
    yield {"before": 1}
    importlib.import_module("of_nobody.at_all")


def lacks_memory(place: Place) -> Iterator[Row]:
    raise NotHere("needs 9 GiB")
    yield {}


def misses_a_figure(place: Place) -> Iterator[Row]:
    yield attempt({"size": 1}, lambda: {"value": 1 / 0})
    yield {"size": 2, "value": 2.0}
