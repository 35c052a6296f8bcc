"""What a figure was measured on, how a piece of work is timed, and how figures are recorded."""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> str:
    """The machine and the versions, in one line; torch's, and the GPU, where the benchmark has imported torch."""
    processors = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = processors[0] if processors else platform.processor()
    facts = [f"{len(processors)} x {name}", platform.system(), f"Python {platform.python_version()}"]
    facts.append(f"numpy {version('numpy')}")
    if "torch" in sys.modules:
        import torch

        facts.append(f"torch {torch.__version__}")
        if torch.cuda.is_available():
            facts.append(torch.cuda.get_device_name())
    return ", ".join(facts)


def timer(work: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that times the work: seconds a piece, over as many pieces as fill a tenth of a second, at least one.

    The work runs twice before, uncounted. A device is waited for at the end only, as in training.
    """
    work()

    def seconds(pieces: int) -> float:
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(pieces):
            work()
        _wait_for(device)
        return (time.perf_counter() - start) / pieces

    pieces = max(1, round(0.1 / seconds(1)))
    return lambda: seconds(pieces)


def document(rows: list[dict[str, Any]], **facts: object) -> str:
    """The rows, the machine and these facts as one JSON document, a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{json.dumps({"machine": machine(), **facts})[:-1]}, "rows": [\n{lines}\n]}}'


def _wait_for(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
