"""A check in a process of its own, so that a library that crashes is one more check and not the end of the doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess

from pipeline.distributed.launcher import module_command
from pipeline.doctor.checks import Check
from pipeline.doctor.install import driver_cuda

PROBE_SECONDS = 120
REINSTALL = "make clean install"


def run_isolated(
    what: str,
    function: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    seconds: float = PROBE_SECONDS,
    advice: str = REINSTALL,
) -> list[Check]:
    """The checks that a function below pipeline.doctor returns; if its process dies or hangs, one that says how.

    `function` is `module.function`; `what` and `advice` are of the check that stands for a process without an answer.
    """
    # Without DS_ACCELERATOR DeepSpeed looks for devices itself, and prints what it found.
    variables = os.environ | {"DS_ACCELERATOR": "cuda" if has_gpu() else "cpu"} | (environment or {})
    words = [*module_command("pipeline.doctor"), function, *arguments]
    try:
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [Check(what, "broken", f"no answer within {seconds:.0f} s", advice)]
    if done.returncode < 0:
        return [Check(what, "broken", f"it crashed: {signal.Signals(-done.returncode).name}", advice)]
    if done.returncode > 0:
        return [Check(what, "broken", one_line(done.stderr.strip().rpartition("\n")[2]), advice)]
    return [Check(**check) for check in json.loads(done.stdout.strip().rpartition("\n")[2])]


def has_gpu() -> bool:
    """Whether this machine has a GPU, even one whose driver does not say what it supports."""
    try:
        return driver_cuda() is not None
    except RuntimeError:
        return True


def one_line(text: str) -> str:
    return " ".join(text.split())
